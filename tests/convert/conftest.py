"""Models with every parameter random (no zero bias, no unit norm), so that a misplaced tensor shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision

TINY = Model(Vision(64, 16, 64, 2, 4, 128), Language(64, 211, 48, 2, 4, 96), 4)


def random_model(config: Model = TINY, seed: int = 0) -> LCL:
    model = LCL(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LCL]:
    return random_model


@pytest.fixture(scope="session")
def model() -> LCL:
    return random_model()


@pytest.fixture(scope="session")
def photograph() -> Callable[[Path], Path]:
    """Writes a smooth color picture, 150 x 100."""

    def write(path: Path) -> Path:
        x, y = np.meshgrid(np.linspace(0, 6, 150), np.linspace(0, 5, 100))
        pixels = np.stack([np.sin(x) * 100 + 128, np.cos(y) * 100 + 128, np.sin(x + y) * 100 + 128], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        return path

    return write
