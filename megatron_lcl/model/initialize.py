"""Initial parameters: the same full tensors for the same seed, whatever the layout.

Every parameter draws from its own generator, seeded by the run's seed and the parameter's name, so a process that holds
one shard or one pipeline stage needs to draw nothing else. Blocks of both encoders have the scales of CLIP's text tower
(Radford et al. 2021, and its public code), class token and positions of patches those of its vision tower; all of them
are in docs/model.md. The reference has torch's module defaults in the matrices of the vision encoder, of the pool and
of the generation head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from megatron_lcl.config import Model
from megatron_lcl.model.layers import Head, LanguageBlock, Patches, PoolInterleave, VisionBlock
from megatron_lcl.parallel.layers import full_shape, shard
from megatron_lcl.parallel.mesh import ALONE, Axis


def initialize(layers: Mapping[int, nn.Module], model: Model, seed: int, axis: Axis = ALONE) -> None:
    """Fill the parameters of the given layers, by their index in the list of all, in place.

    axis: the tensor ranks that share them.
    """
    for index, layer in layers.items():
        for name, parameter in layer.named_parameters():
            generator = _generator(seed, f"{index}.{name}")
            with torch.device("cpu"):  # where the generator is, whatever torch's default is
                full = _initial(layer, name, full_shape(parameter), model, generator)
            parameter.data.copy_(shard(full, parameter, axis))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _initial(layer: nn.Module, name: str, shape: torch.Size, model: Model, generator: torch.Generator) -> torch.Tensor:
    if isinstance(layer, Head) and name in layer.initial_values:
        return torch.full(shape, layer.initial_values[name], dtype=torch.float32)
    if isinstance(layer, VisionBlock | LanguageBlock) and name in ("scale1", "scale2"):
        encoder = model.vision if isinstance(layer, VisionBlock) else model.language
        assert encoder.layer_scale is not None
        return torch.full(shape, encoder.layer_scale, dtype=torch.float32)
    std = _std(layer, name, model)
    if std is not None:
        return torch.randn(shape, generator=generator, dtype=torch.float32) * std
    assert len(shape) == 1, f"{name} of {type(layer).__name__} has no initial scale"
    return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)  # norms, biases


def _std(layer: nn.Module, name: str, model: Model) -> float | None:
    """Standard deviation of a weight; None for norms and biases."""
    vision, language = model.vision.width**-0.5, model.language.width**-0.5
    match layer:
        case Patches():
            table = {
                "projection.weight": layer.projection.in_features**-0.5,
                "class_embedding": vision,
                "registers": vision,
                "positions": vision,
            }
        case PoolInterleave():
            table = {"query": 0.02, "embedding.weight": 0.02, "positions": 0.01, "out.weight": language}
            table |= {f"{x}.weight": vision for x in "qkv"}
        case VisionBlock() | LanguageBlock():
            is_vision = isinstance(layer, VisionBlock)
            width = vision if is_vision else language
            residual = width * (2 * (model.vision if is_vision else model.language).layers) ** -0.5
            table = {f"attention.{x}.weight": width for x in "qkv"}
            table |= {"attention.out.weight": residual, "mlp.up.weight": width * 2**-0.5, "mlp.down.weight": residual}
        case Head():
            table = {"projection.weight": language, "vocabulary": 0.02}
        case _:
            raise AssertionError(f"unknown layer {type(layer).__name__}")
    return table.get(name)
