"""Checkpoints as models, and models in the formats of other libraries.

Reading: `load` (any LCL checkpoint: a run's, an imported one, a file in the reference's format, whose names and sizes
`model.reference_format` knows). Writing: `export`, which runs one of the writers `hf`, `timm` and `open_clip`, compares
the result with our model (`certificate`) and puts the folder in place whole (`folder`). `weights` is the one writer of
safetensors files; `card` writes the model card, `pool` the attention pool's files; `block_names` has the libraries'
names of a block's modules, by which `warm_start` reads their encoders too.

A format is a module with LIBRARY (what it needs), `write` (all files but the certificate) and `features` (what the
library computes from them), listed in `export._FORMATS`.

Imports config, data and model; other libraries only inside functions, after `libraries.require`. Begin with
`load.load_model` and `export.export`.
"""
