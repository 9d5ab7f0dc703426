"""Which images of a data set do not decode: all of them are looked at before the first one is encoded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash
from tqdm import tqdm

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.probe import BadImage, probe
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.image_set import Blob, ImageSet
from megatron_lcl.filesystem import is_file, raise_if_passing
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


def find_bad(data: ImageSet, cache: Path, progress: bool = False) -> list[BadBlob]:
    """The images that do not decode, cannot be read, or have too many pixels, by the check of `preprocess`. OSError for
    a fault of the storage that may pass, as `attempt`.

    A decode of each image, in as many threads as there are cores. That all are good is kept in the folder `cache`
    under a hash of their bytes, so that an evaluation whose features are cached too need not decode anything.
    """
    file = None
    with suppress(OSError):  # of an image that cannot be read, which is found below
        key = xxhash.xxh3_128(f"{_VERSION} {len(data)}".encode())
        key.update(data.read_digests(progress))
        file = cache / f"{key.hexdigest()}-good.txt"
    if file is not None and is_file(file):
        return []
    # `probe` sets the warnings' filters, which are the process's: of threads, the last puts back what another had set
    with warnings.catch_warnings(), ThreadPoolExecutor(num_cores()) as pool:
        found = pool.map(partial(attempt, probe), data.images)
        bar = tqdm(found, total=len(data), unit="images", desc=f"checking {data.name}", disable=not progress)
        bad = [BadBlob(i, data.images[i].name, reason) for i, reason in enumerate(bar) if isinstance(reason, str)]
    if file is not None and not bad:  # a fault may have been the machine's, of which nothing is to be kept
        cache.mkdir(parents=True, exist_ok=True)
        replace_text(file, f"{len(data)} images of {data.name} decode\n")
    return bad


def attempt(work: Callable[[bytes], T], blob: Blob) -> T | str:
    """`work` on an image's bytes; in its place the reason where it does not decode, or is not there or not to be read.
    OSError for a fault of the storage that may pass: it says nothing of the image."""
    try:
        return work(blob.read())
    except BadImage as error:
        return str(error)
    except OSError as error:
        raise_if_passing(error, blob.name)
        return error.strerror or str(error)


def without_bad(data: ImageSet, bad: Sequence[BadBlob], skip: bool) -> ImageSet:
    """The data set without them if `skip`, else UserError naming the first NAMED."""
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
    return data.of(kept)
