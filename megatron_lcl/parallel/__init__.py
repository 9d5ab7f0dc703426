"""Processes and what is split over them.

`mesh` says which process this is along each axis (world, data, pipeline, tensor) and has every axis's collectives;
`mappings` has the collectives of tensor parallelism with gradients, under Megatron-Core's names; `layers` the layers
whose parameters are split over the tensor axis.

Imports no other package. Begin with `mesh.Axis`, then the head docstring of `mappings`.
"""
