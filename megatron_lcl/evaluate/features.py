"""Features of many images, computed once: cached under a name that is their content.

A cache file is called by the hash of all that decides the features (`Encoder.fingerprint`: weights, the model's
configuration, preprocessing; `DECODING`) and of every image's bytes in order; so a changed image, weight or setting is
another file, and nothing stale is ever read. It is written in a scratch folder beside the others. How large the files
will be is known, and compared with the disk, before the first image is encoded (`FeatureStore.check_room`).
"""

from __future__ import annotations

import io
import math
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from PIL import Image
from tqdm import tqdm

from megatron_lcl.data.corpus.cache_folders import user_cache
from megatron_lcl.data.corpus.files import new_array
from megatron_lcl.data.corpus.scratch import clear_dead, scratch_folder
from megatron_lcl.data.loading.images import DECODING
from megatron_lcl.errors import UserError, nearest_folder
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import DIGEST, ImageSet
from megatron_lcl.evaluate.patches import CachedPatches, Patches, StreamedPatches
from megatron_lcl.evaluate.workers import load, map_batches
from megatron_lcl.filesystem import is_file
from megatron_lcl.interrupts import ending_on_sigterm
from megatron_lcl.units import in_gb

Kind = Literal["pooled", "patches"]
_TYPES: dict[Kind, type] = {"pooled": np.float32, "patches": np.float16}
_TOLD = 10**9
"""bytes of cache from which on they are told"""


def default_cache() -> Path:
    """`megatron_lcl/features` under the user's cache folder. UserError as `user_cache`."""
    return user_cache() / "features"


@dataclass(frozen=True)
class Shapes:
    """What is known of an encoder's features before any are computed."""

    name: str
    fingerprint: str
    of_image: dict[Kind, tuple[int, ...]]

    @classmethod
    def of(cls, encoder: Encoder) -> Shapes:
        """From one gray image."""
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), (127, 127, 127)).save(picture, "PNG")
        features = encoder.encode(encoder.prepare(picture.getvalue())[None])
        return cls(
            encoder.name, encoder.fingerprint, {kind: tuple(getattr(features, kind).shape[1:]) for kind in _TYPES}
        )

    def num_bytes(self, kind: Kind, num_images: int) -> int:
        """Of a cache file."""
        return num_images * math.prod(self.of_image[kind]) * np.dtype(_TYPES[kind]).itemsize


def need_patches(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (P, V) of an encoder's patch tokens; UserError where it has none."""
    if shape[0] == 0:
        raise UserError(f"{name} gives no patch tokens, which an attentive probe pools; leave out it or that task")
    return shape


class FeatureStore:
    """The features of an evaluation's data sets, in one folder."""

    def __init__(self, folder: Path, batch_size: int = 64, processes: int = 1, progress: bool = True) -> None:
        self.folder, self.batch_size, self.processes, self.progress = folder, batch_size, processes, progress

    def features(self, encoder: Encoder, data: ImageSet, kind: Kind = "pooled") -> np.ndarray:
        """Features of all images, in order, memory-mapped: pooled [N, D] float32, or patches [N, P, V] float16.

        Where there are several processes each makes its own encoder (on a GPU of its own, say; see `EncoderSource`) and
        computes an equal share. UserError naming an image that does not decode, or where the encoder has no patch
        tokens.
        """
        file = _file(self.folder, encoder.fingerprint, kind, data.read_digests(self.progress))
        if not is_file(file):
            shape = getattr(encoder.encode(load(encoder, data.images[0])[None]), kind).shape[1:]
            if kind == "patches":
                need_patches(encoder.name, shape)
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_dead(self.folder)
            with ending_on_sigterm(), scratch_folder(self.folder) as scratch:
                temporary = scratch / file.name  # who may read it, the umask says
                new_array(temporary, _TYPES[kind], (len(data), *shape)).flush()
                write, label = partial(_write, temporary, kind), f"{kind} features"
                map_batches(encoder, data.images, write, self.batch_size, self.processes, label, self.progress)
                temporary.replace(file)
        try:
            return np.load(file, mmap_mode="r")
        except PermissionError:
            raise UserError(
                f"{file} was written by another user, and may not be read; name another folder (--cache DIR), or have "
                f"that user share it (chmod a+r {file})"
            ) from None

    def patches(self, encoder: Encoder, data: ImageSet, streamed: bool) -> Patches:
        """Patch tokens for a probe, from the cache or computed whenever they are asked for."""
        if not streamed:
            return CachedPatches(self.features(encoder, data, "patches"))
        width = need_patches(encoder.name, Shapes.of(encoder).of_image["patches"])[-1]
        return StreamedPatches(encoder, data.images, width, self.batch_size)

    def check_room(self, encoders: Sequence[Shapes], wanted: Sequence[tuple[ImageSet, Kind]]) -> None:
        """UserError where the features that are yet to be computed would not fit the disk; large ones are told."""
        clear_dead(self.folder)
        sizes: dict[Path, tuple[int, str]] = {}
        for shapes in encoders:
            of_whom = f" of {shapes.name}" if len(encoders) > 1 else ""
            for data, kind in wanted:
                file = _file(self.folder, shapes.fingerprint, kind, data.read_digests(self.progress))
                if not is_file(file):
                    each = f"{' x '.join(map(str, shapes.of_image[kind]))} {np.dtype(_TYPES[kind]).name}"
                    size = shapes.num_bytes(kind, len(data))
                    sizes[file] = size, f"{kind} features{of_whom}, {len(data):,} images of {each}: {in_gb(size)} GB"
        total = sum(size for size, _ in sizes.values())
        free = shutil.disk_usage(nearest_folder(self.folder)).free
        if total > free:
            streamed = any(kind == "patches" for _, kind in wanted)
            raise UserError(
                f"{self.folder} would have to hold {in_gb(total)} GB, and {in_gb(free)} GB are free "
                f"({'; '.join(text for _, text in sizes.values())}); name another folder (--cache DIR)"
                + ", or have patch features computed in every epoch (--attentive-probe.features streamed)"
                * streamed
            )
        if total >= _TOLD and self.progress:
            tqdm.write(f"{in_gb(total)} GB of features go to {self.folder} ({in_gb(free)} GB free)", file=sys.stderr)


def _file(folder: Path, fingerprint: str, kind: Kind, digests: bytes) -> Path:
    key = xxhash.xxh3_128(f"{fingerprint} {DECODING} {kind} {len(digests) // DIGEST}".encode())
    key.update(digests)
    return folder / f"{key.hexdigest()}-{kind}.npy"


def _write(file: Path, kind: Kind, encoder: Encoder, first: int, images: torch.Tensor) -> None:
    out = np.load(file, mmap_mode="r+")
    out[first : first + len(images)] = getattr(encoder.encode(images), kind).numpy()
    out.flush()
