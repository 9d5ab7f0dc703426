"""Patch tokens of a data set for attentive probes: read from the cache, or computed again whenever they are asked for.

Of ImageNet's training images they are hundreds of gigabytes. Streamed ones are rounded as cached ones are, so that a
probe learns from the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch

from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import Blob
from megatron_lcl.evaluate.workers import run_batches
from megatron_lcl.machine import num_cores


class Patches(Protocol):
    """Patch tokens of N images."""

    @property
    def width(self) -> int:
        """Numbers of a token."""

    def batches(self, chosen: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """[n, P, V] float32 of the images with each array's indices."""


class CachedPatches:
    """Of an array [N, P, V], which may be memory-mapped."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.width = array.shape[-1]

    def batches(self, chosen: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        return (torch.from_numpy(self.array[indices]).float() for indices in chosen)


class StreamedPatches:
    """Computed by the encoder, with nothing on disk; images are decoded ahead by threads."""

    def __init__(self, encoder: Encoder, images: Sequence[Blob], width: int, batch_size: int = 64) -> None:
        """batch_size: images of a forward pass of the encoder at most."""
        self.encoder, self.images, self.width, self.batch_size = encoder, images, width, batch_size

    def batches(self, chosen: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        size = max(map(len, chosen))
        assert all(len(indices) == size for indices in chosen[:-1]), "only the last batch may be smaller"
        images = [self.images[i] for indices in chosen for i in indices]
        for _, patches in run_batches(self.encoder, images, self._encode, size, 0, num_cores()):
            yield patches

    def _encode(self, encoder: Encoder, _first: int, images: torch.Tensor) -> torch.Tensor:
        parts = [encoder.encode(part).patches for part in images.split(self.batch_size)]
        return torch.cat(parts).half().float()
