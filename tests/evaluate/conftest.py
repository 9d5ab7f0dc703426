"""scikit-learn's digits as images on disk, and an encoder that is simple enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from megatron_lcl.evaluate.encoders.encoder import Encoder, Features

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class PixelEncoder(Encoder):
    """Pooled: the 64 pixels; patches: the 16 blocks of 2 x 2; a text: the pixels of the digit it ends on."""

    def __init__(self, prototypes: torch.Tensor) -> None:
        super().__init__("pixels", nn.ParameterList([nn.Parameter(prototypes)]))
        self.calls = 0

    def _prepare(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("L"), np.float32) / 255)[None]

    def _encode(self, images: torch.Tensor) -> Features:
        self.calls += 1
        blocks = F.unfold(images, 2, stride=2).transpose(1, 2)
        return Features(images.flatten(1), blocks)

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        return F.normalize(torch.stack([self.module[0][WORDS.index(t.rstrip(".").split()[-1])] for t in texts]), dim=-1)  # type: ignore[index]


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 real handwritten digits, [N, 8, 8] in 0 … 1, and their classes."""
    data: Any = pytest.importorskip("sklearn.datasets").load_digits()
    return data.images / 16, data.target


@pytest.fixture(scope="session")
def encoder(digits: tuple[np.ndarray, np.ndarray]) -> PixelEncoder:
    images, labels = digits
    means = np.stack([images[:1200][labels[:1200] == c].reshape(-1, 64).mean(0) for c in range(10)])
    return PixelEncoder(torch.from_numpy(means.astype(np.float32)))


@pytest.fixture(scope="session")
def folder(digits: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS/*.png (300 images) and test/CLASS/*.png (200), class folders that sort like the digits."""
    root = tmp_path_factory.mktemp("digits")
    images, labels = digits
    for i, (image, label) in enumerate(zip(images[:500], labels[:500], strict=True)):
        sub = root / ("train" if i < 300 else "test") / f"{label} {WORDS[label]}"
        sub.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255).round().astype(np.uint8)).save(sub / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small CLIP of OpenCLIP's whose image encoder has no patch tokens."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("resnet")
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(0)
    weights = open_clip.CLIP(**json.loads(json.dumps(config))).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return f"open_clip:local-dir:{folder}"
