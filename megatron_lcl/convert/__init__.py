"""Checkpoints as models, and models in the formats of other libraries.

Reading: `load` (any LCL checkpoint: a run's, an imported one, a file in the reference's format, whose names and sizes
`model.reference_format` knows). Writing: `export`, which runs one of the writers `hf`, `timm` and `open_clip`, compares
the result with our model (`certificate`) and puts the folder in place whole (`folder`). `weights` is the one writer of
safetensors files; `card` writes the model card, `pool` the attention pool's files. `manifest` lists the files of a
folder with their hashes, and serves the checkpoints of runs as well. `block_names` has the libraries' names of a
block's modules, by which `warm_start` reads their encoders too.

A format is a module as `export.Writer` describes it (LIBRARY, `check`, `write`, `features`), listed in
`export._FORMATS` and, as a kind of folder, in `folder.EXPORTS`. `load` reads exports with the module's `read`.

Imports config, data and model; other libraries only inside functions, after `libraries.require`. Begin with
`load.load_model` and `export.export`.
"""
