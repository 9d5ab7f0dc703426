"""What an export is checked by: both models run on the same images, and the differences are written down."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import Patches, PoolInterleave, VisionBlock, normalize
from megatron_lcl.model.lcl import LCL

BOUND = 1e-5
"""largest relative difference of an export"""


class Features(NamedTuple):
    """What LCL trains, of N images."""

    patches: torch.Tensor
    """[N, P, V] patch tokens after the final norm"""
    latents: torch.Tensor
    """[N, D] image latents z, not scaled to unit norm"""


def check_images(size: int) -> torch.Tensor:
    """Normalized images [4, 3, size, size], the same on every machine: noise of four scales, from pixels to blobs."""
    generator = torch.Generator().manual_seed(0)
    scales = [size, max(size // 4, 2), max(size // 16, 2), 2]
    noise = [torch.randint(256, (1, 3, scale, scale), generator=generator).float() for scale in scales]
    images = torch.cat([F.interpolate(x, (size, size), mode="bilinear", align_corners=True) for x in noise])
    return normalize(images.to(torch.uint8))


@torch.no_grad()
def our_features(model: LCL, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> Features:
    """The model's features, computed in float32 with parameters rounded to `dtype`, one layer at a time."""
    hidden = images
    for layer in model.layers:
        with _rounded(layer, dtype):
            if isinstance(layer, PoolInterleave):
                return Features(layer.patch_features(hidden), layer.pool(hidden)[0])
            assert isinstance(layer, Patches | VisionBlock)
            hidden = layer.encode(hidden)
    raise AssertionError("the list of layers has no pool")


def compare(theirs: Features, ours: Features, rounded: Features) -> dict[str, Any]:
    """Relative differences (Frobenius norms over all images) of an export from our model.

    The bound is on the difference from our model with the same rounded weights: that is the conversion's own error.
    Raises UserError over the bound. What rounding the weights changed stands beside it.
    """
    facts: dict[str, Any] = {"bound": BOUND}
    for name in Features._fields:
        a, b, exact = (getattr(features, name) for features in (theirs, rounded, ours))
        if a.shape != b.shape:
            raise UserError(f"the exported model's {name} have the shape {tuple(a.shape)}, ours {tuple(b.shape)}")
        facts[name] = {
            "relative_difference": _relative(a, b),
            "largest_absolute_difference": float((a - b).abs().max()),
            "relative_change_by_rounding": _relative(b, exact),
        }
        if not facts[name]["relative_difference"] <= BOUND:  # NaN too
            raise UserError(
                f"the exported model's {name} differ from ours by {facts[name]['relative_difference']:.3g} "
                f"(relative; the bound is {BOUND:g}); nothing was written"
            )
    return facts


def summary(facts: Mapping[str, Any]) -> str:
    """A certificate for the terminal."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['format']}, {facts['dtype']}, {facts['image_size']} px; loaded back and run on {facts['num_images']} "
        f"images by {versions}"
    ]
    for name in Features._fields:
        own, rounding = facts[name]["relative_difference"], facts[name]["relative_change_by_rounding"]
        changed = f"; rounding the weights changed them by {rounding:.1e}" if rounding else ""
        lines.append(f"  {name}: relative difference {own:.1e} (bound {facts['bound']:.0e}){changed}")
    return "\n".join(lines)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@contextlib.contextmanager
def _rounded(layer: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    kept = [(p, p.data) for p in layer.parameters()] if dtype != torch.float32 else []
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype).float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
