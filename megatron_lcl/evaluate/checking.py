"""Which images of a data set do not decode: all of them are looked at before the first one is encoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from tqdm import tqdm

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.probe import BadImage, probe
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.sources import Blob, ImageSet
from megatron_lcl.machine import num_cores

T = TypeVar("T")
NAMED = 20
"""bad images that an error names"""
_VERSION = 1
"""of `probe`: what was found with another one is not read"""


@dataclass(frozen=True)
class BadBlob:
    """An image that does not decode."""

    index: int
    name: str
    reason: str


def find_bad(images: Sequence[Blob], cache: Path, progress: bool = False, name: str = "") -> list[BadBlob]:
    """The images that do not decode, cannot be read, or have too many pixels, by the check of `preprocess`.

    A decode of each image, in as many threads as there are cores. That all are good is kept in the folder `cache`
    under a hash of their bytes, so that an evaluation whose features are cached too need not decode anything.
    """
    key = xxhash.xxh3_128(f"{_VERSION} {len(images)}".encode())
    for digest in _in_threads(_digest, images, f"reading {name}", progress):
        key.update(digest)
    file = cache / f"{key.hexdigest()}-good.txt"
    if file.is_file():
        return []
    reasons = _in_threads(_fault, images, f"checking {name}", progress)
    bad = [BadBlob(i, images[i].name, reason) for i, reason in enumerate(reasons) if reason is not None]
    if not bad:  # a fault may have been the machine's, of which nothing is to be kept
        cache.mkdir(parents=True, exist_ok=True)
        replace_text(file, f"{len(images)} images of {name} decode\n")
    return bad


def without_bad(data: ImageSet, bad: Sequence[BadBlob], skip: bool) -> ImageSet:
    """The data set without them, if `skip`; else UserError naming the first NAMED."""
    if not bad:
        return data
    if not skip:
        named = "; ".join(f"{b.name} ({b.reason})" for b in bad[:NAMED])
        more = f"; and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
        raise UserError(
            f"{len(bad):,} of the {len(data):,} images of {data.name} cannot be used: {named}{more}. Repair or remove "
            "them, or have them skipped and counted: --skip-bad-images"
        )
    kept = np.delete(np.arange(len(data)), [b.index for b in bad])
    if not len(kept):
        raise UserError(f"no image of {data.name} can be used; the first: {bad[0].name} ({bad[0].reason})")
    return replace(
        data,
        images=tuple(data.images[i] for i in kept),
        labels=None if data.labels is None else data.labels[kept],
        captions=None if data.captions is None else tuple(data.captions[i] for i in kept),
        domains=None if data.domains is None else tuple(data.domains[i] for i in kept),
    )


def _in_threads(work: Callable[[Blob], T], images: Sequence[Blob], what: str, progress: bool) -> list[T]:
    # `probe` sets the warnings' filters, which are the process's: of threads, the last puts back what another had set
    with warnings.catch_warnings(), ThreadPoolExecutor(num_cores()) as pool:
        results = pool.map(work, images)
        return list(tqdm(results, total=len(images), unit="images", desc=what, disable=not progress))


def _digest(blob: Blob) -> bytes:
    try:
        return xxhash.xxh3_128_digest(blob.read())
    except OSError as error:
        return (error.strerror or "").encode()


def _fault(blob: Blob) -> str | None:
    try:
        probe(blob.read())
    except BadImage as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return None
