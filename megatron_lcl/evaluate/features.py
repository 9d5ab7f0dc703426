"""Features of many images, computed once: cached under a name that is their content.

A cache file is called by the hash of all that decides the features (`Encoder.fingerprint`: weights, the model's
configuration, preprocessing) and of every image's bytes in order; so a changed image, weight or setting is another
file, and nothing stale is ever read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.sources import Blob
from megatron_lcl.evaluate.workers import load, map_batches

Kind = Literal["pooled", "patches"]
_TYPES = {"pooled": np.float32, "patches": np.float16}


def default_cache() -> Path:
    """`megatron_lcl/features` under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lcl" / "features"


def image_features(
    encoder: Encoder,
    images: Sequence[Blob],
    kind: Kind = "pooled",
    cache: str | Path | None = None,
    batch_size: int = 64,
    processes: int = 1,
    progress: bool = True,
) -> np.ndarray:
    """Features of all images, in order, memory-mapped: pooled [N, D] float32, or patches [N, P, V] float16.

    `processes` > 1: each makes its own encoder (on a GPU of its own, say; see `EncoderSource`) and computes an equal
    share. UserError naming an image that does not decode, or where the encoder has no patch tokens.
    """
    key = xxhash.xxh3_128(f"{encoder.fingerprint} {kind} {len(images)}".encode())
    with ThreadPoolExecutor(8) as pool:
        for digest in pool.map(_digest, images):
            key.update(digest)
    folder = Path(cache) if cache is not None else default_cache()
    file = folder / f"{key.hexdigest()}-{kind}.npy"
    if not file.is_file():
        shape = getattr(encoder.encode(load(encoder, images[0])[None]), kind).shape[1:]
        if kind == "patches" and shape[0] == 0:
            raise UserError(f"{encoder.name} gives no patch tokens, which an attentive probe pools")
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".npy", dir=folder)
        os.close(handle)
        try:
            np.lib.format.open_memmap(name, "w+", _TYPES[kind], (len(images), *shape)).flush()
            write = partial(_write, Path(name), kind)
            map_batches(encoder, images, write, batch_size, processes, f"{kind} features", progress)
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
    return np.load(file, mmap_mode="r")


def _digest(blob: Blob) -> bytes:
    return xxhash.xxh3_128_digest(blob.read())


def _write(file: Path, kind: Kind, encoder: Encoder, first: int, images: torch.Tensor) -> None:
    out = np.load(file, mmap_mode="r+")
    out[first : first + len(images)] = getattr(encoder.encode(images), kind).numpy()
    out.flush()
