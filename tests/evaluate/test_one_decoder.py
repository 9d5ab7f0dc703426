"""Ours and other libraries' encoders are given the same pixels, whatever the file says about them."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lcl import LCL
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import export_model, save_checkpoint
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.model.layers import normalize

SIZE = 32
"""of the pictures and of the model, so that what `prepare` gives are the picture's own pixels"""

_PACKAGES = {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}


def picture() -> np.ndarray:
    """Another color in each corner, uint8 [SIZE, SIZE, 3]."""
    y, x = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j]
    return np.stack([255 * x, 255 * y, 200 * x * y], -1).round().astype(np.uint8)


def rotated() -> tuple[bytes, np.ndarray]:
    """A file whose EXIF data say 6: to be shown, what is stored has to be turned a quarter clockwise."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(out, "PNG", exif=exif)
    return out.getvalue(), np.rot90(picture(), -1)


def transparent() -> tuple[bytes, np.ndarray]:
    """The right half is not there; what is stored under it is red."""
    alpha, out = np.full((SIZE, SIZE, 1), 255, np.uint8), io.BytesIO()
    pixels = picture()
    shown = pixels.copy()
    pixels[:, SIZE // 2 :] = (255, 0, 0)
    shown[:, SIZE // 2 :] = 255
    alpha[:, SIZE // 2 :] = 0
    Image.fromarray(np.concatenate([pixels, alpha], -1)).save(out, "PNG")
    return out.getvalue(), shown


def sixteen_bits() -> tuple[bytes, np.ndarray]:
    """Gray levels of 16 bits; Pillow's own conversion cuts them off at 255."""
    gray, out = picture()[..., 0], io.BytesIO()
    Image.fromarray(gray.astype(np.uint16) * 257).save(out, "PNG")
    return out.getvalue(), np.stack([gray] * 3, -1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in `ours`, and what its exports are called."""
    folder = tmp_path_factory.mktemp("decoder")
    model = LCL(Model(Vision(SIZE, 8, 32, 1, 2, 64), Language(64, 517, 32, 1, 2, 64), 2))
    (folder / "ours").mkdir()
    save_checkpoint(model, Config(model=model.config), folder / "ours")
    for format in ("hf", "timm", "open_clip"):
        if find_spec(_PACKAGES[format]):
            export_model(model, format, folder / format)
    return folder


@pytest.mark.parametrize("library", ["ours", "hf", "timm", "open_clip"])
@pytest.mark.parametrize("file", [rotated, transparent, sixteen_bits])
def test_every_encoder_is_given_the_same_pixels(folder: Path, tmp_path: Path, library: str, file) -> None:  # type: ignore[no-untyped-def]
    """Of bytes, paths and Pillow's images."""
    if library != "ours":
        pytest.importorskip(_PACKAGES[library])
    prefix = {"ours": "", "hf": "hf:"}.get(library, f"{library}:local-dir:")
    data, shown = file()
    expected = torch.from_numpy(np.ascontiguousarray(shown.transpose(2, 0, 1)))
    encoder, path = load_encoder(f"{prefix}{folder / library}"), tmp_path / "picture.png"
    path.write_bytes(data)
    given = encoder.prepare(data)
    for image in (bytearray(data), memoryview(data), path, str(path), Image.open(path)):
        assert torch.equal(encoder.prepare(image), given), type(image)
    for wrong in (np.asarray(Image.open(path)), given, [data], None):
        with pytest.raises(
            TypeError, match=rf"type {type(wrong).__name__}; give encoded bytes, the path of a file, or"
        ):
            encoder.prepare(wrong)  # type: ignore[arg-type]
    if given.dtype == torch.uint8:
        assert torch.equal(given, expected)
    else:  # other libraries normalize, with the same mean and deviation
        assert torch.allclose(given, normalize(expected[None])[0], atol=1e-5)


class Largest(TorchDispatchMode):
    """Of all tensors that are made and all pictures that Pillow resizes, the longest side."""

    side = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dim() >= 3:
            self.side = max(self.side, *out.shape)
        return out


@pytest.mark.parametrize("library", ["ours", "hf", "timm", "open_clip"])
@pytest.mark.parametrize("size", [(1, 5000), (5001, 1), (2, 128)])
def test_of_a_very_thin_picture_the_center_is_resized(
    folder: Path, library: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, one of 1 x 60,000 pixels would become one of 224 x 13,440,000."""
    if library != "ours":
        pytest.importorskip(_PACKAGES[library])
    prefix = {"ours": "", "hf": "hf:"}.get(library, f"{library}:local-dir:")
    encoder, largest, resize = load_encoder(f"{prefix}{folder / library}"), Largest(), Image.Image.resize

    def recorded(image: Image.Image, to: tuple[int, int], *rest: Any, **named: Any) -> Image.Image:
        largest.side = max(largest.side, *to)
        return resize(image, to, *rest, **named)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    out, levels = io.BytesIO(), (np.arange(max(size)) % 251).astype(np.uint8)
    Image.fromarray(np.broadcast_to(levels if size[0] > size[1] else levels[:, None], size[::-1])).save(out, "PNG")
    with largest:
        given = encoder.prepare(out.getvalue())
    assert SIZE <= largest.side <= 64 * SIZE
    assert given.shape == (3, SIZE, SIZE)
    if library == "ours":
        return
    ours = load_encoder(str(folder / "ours")).prepare(out.getvalue())
    assert torch.allclose(given, normalize(ours[None])[0], atol=0.05)  # the library's bicubic filter
