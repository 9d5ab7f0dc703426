"""The model: one list of layers, each from `Activations` to `Activations`, and its public face in one process.

`layers` has the list, `block` what both encoders are made of, `initialize` the initial parameters, `lcl` the class
`LCL` of the library, `reference_format` the names and sizes of the published checkpoints, `special` the special tokens'
ids.

Imports attention, config, data.loading, losses and parallel. Begin with `layers.layer_specs`.
"""
