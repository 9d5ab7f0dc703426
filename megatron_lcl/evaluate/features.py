"""Features of many images, computed once: cached under a name that is their content.

A cache file is called by the hash of the encoder's weights and settings, and of every image's bytes in order; so a
changed image or weight is another file, and nothing stale is ever read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from megatron_lcl.evaluate.encoders import Encoder, EncoderSource
from megatron_lcl.evaluate.sources import Blob

Kind = Literal["pooled", "patches"]
_TYPES = {"pooled": np.float32, "patches": np.float16}


def default_cache() -> Path:
    """`megatron_lcl/features` under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lcl" / "features"


def image_features(
    encoder: Encoder | EncoderSource,
    images: Sequence[Blob],
    kind: Kind = "pooled",
    cache: str | Path | None = None,
    batch_size: int = 64,
    processes: int = 1,
    progress: bool = True,
) -> np.ndarray:
    """Features of all images, in order, memory-mapped: pooled [N, D] float32, or patches [N, P, V] float16.

    `processes` > 1 needs an EncoderSource, of which each process makes its own encoder (on a GPU of its own, say) and
    computes an equal share. ValueError naming an image that does not decode.
    """
    first = encoder if isinstance(encoder, Encoder) else encoder(0)
    key = xxhash.xxh3_128(f"{first.fingerprint} {kind} {len(images)}".encode())
    with ThreadPoolExecutor(8) as pool:
        for digest in pool.map(_digest, images):
            key.update(digest)
    folder = Path(cache) if cache is not None else default_cache()
    file = folder / f"{key.hexdigest()}-{kind}.npy"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".npy", dir=folder)
        os.close(handle)
        try:
            _compute(first, encoder, images, kind, Path(name), batch_size, processes, progress)
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
    return np.load(file, mmap_mode="r")


def _digest(blob: Blob) -> bytes:
    return xxhash.xxh3_128_digest(blob.read())


def _compute(
    first: Encoder,
    source: Encoder | EncoderSource,
    images: Sequence[Blob],
    kind: Kind,
    file: Path,
    batch_size: int,
    processes: int,
    progress: bool,
) -> None:
    shape = getattr(first.encode(_load(first, images[0])[None]), kind).shape[1:]
    out = np.lib.format.open_memmap(file, "w+", _TYPES[kind], (len(images), *shape))
    del out
    bar = tqdm(total=len(images), unit="images", desc=f"{kind} features", disable=not progress)
    if processes == 1:
        for done in _share(first, images, kind, file, 0, len(images), batch_size):
            bar.update(done)
    else:
        assert isinstance(source, EncoderSource), "an encoder of this process cannot be shared"
        bounds = np.linspace(0, len(images), processes + 1).astype(int)
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context) as pool:
            jobs = [
                pool.submit(
                    _process, source, i, images[bounds[i] : bounds[i + 1]], kind, file, int(bounds[i]), batch_size
                )
                for i in range(processes)
            ]
            for job in jobs:
                bar.update(job.result())
    bar.close()


def _process(
    source: EncoderSource,
    number: int,
    images: Sequence[Blob],
    kind: Kind,
    file: Path,
    start: int,
    batch_size: int,
) -> int:
    return sum(_share(source(number), images, kind, file, start, start + len(images), batch_size))


def _share(
    encoder: Encoder, images: Sequence[Blob], kind: Kind, file: Path, start: int, stop: int, batch_size: int
) -> Iterator[int]:
    """Fill rows start … stop-1; yields how many are done at a time. Decoding runs ahead in threads."""
    out = np.load(file, mmap_mode="r+")
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        waiting = iter(images)
        queue = [pool.submit(_load, encoder, blob) for blob in islice(waiting, 2 * batch_size)]
        for low in range(start, stop, batch_size):
            batch = [job.result() for job in queue[:batch_size]]
            queue = queue[batch_size:] + [pool.submit(_load, encoder, b) for b in islice(waiting, batch_size)]
            features = getattr(encoder.encode(torch.stack(batch)), kind)
            out[low : low + len(batch)] = features.numpy()
            yield len(batch)
    out.flush()


def _load(encoder: Encoder, blob: Blob) -> torch.Tensor:
    try:
        return encoder.prepare(blob.read())
    except ValueError as error:
        raise ValueError(f"{blob.name}: {error}") from None
