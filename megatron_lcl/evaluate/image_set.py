"""A set of evaluation images. They stay where they are: an image is a `Blob` that says where its bytes stand."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from tqdm import tqdm

from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.errors import UserError

NAMES = ("classnames.txt", "classes.txt")
"""files with the classes' names, one a line"""
DEFAULT_TEMPLATE = "a photo of a {c}."
_SYNSET = re.compile(r"n\d{8}")
logger = logging.getLogger(__name__)


class Blob(Protocol):
    """Encoded bytes of an image, somewhere."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A file, or a part of one: `size` bytes from `offset`, -1: to its end. member: the part's name in messages."""

    path: Path | str
    offset: int = 0
    size: int = -1
    member: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}{':' if self.member else ''}{self.member}"

    def read(self) -> bytes:
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True, slots=True)
class CorpusBlob:
    """An image of a corpus."""

    corpus: Corpus
    document: int
    position: int
    """among the document's images"""

    @property
    def name(self) -> str:
        return f"{self.corpus.where}: document {self.document}, image {self.position}"

    def read(self) -> bytes:
        return self.corpus[self.document].images[self.position].data


DIGEST = 16
"""bytes of a digest"""


def content_digests(images: Sequence[Blob], name: str = "", progress: bool = False) -> bytes:
    """XXH3 (128 bits) of each image's encoded bytes, one after the other. OSError where one cannot be read."""
    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda blob: xxhash.xxh3_128_digest(blob.read()), images)
        return b"".join(tqdm(digests, total=len(images), unit="images", desc=f"reading {name}", disable=not progress))


@dataclass(frozen=True)
class ImageSet:
    """Images with labels, or with captions."""

    name: str
    images: tuple[Blob, ...]
    labels: np.ndarray | None = None
    """[N] int64 index into `classes`"""
    classes: tuple[str, ...] = ()
    captions: tuple[tuple[str, ...], ...] | None = None
    """one or more of each image"""
    templates: tuple[str, ...] = (DEFAULT_TEMPLATE,)
    """texts with `{c}` in the class name's place"""
    domains: tuple[str, ...] | None = None
    """[N] a part of the data set that each image is in, whose captions are also measured alone (NoCaps)"""
    numbered: bool = False
    """whether nothing gives the classes names: `classes` are then their numbers"""
    names_from: str = ""
    """what gives them, a file or `class_names`; empty: the classes' folders are called so"""

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def digests(self) -> bytes:
        """`content_digests` of the images, read once."""
        return content_digests(self.images)

    def read_digests(self, progress: bool) -> bytes:
        """`digests`; with a bar where they are yet to be read."""
        if "digests" not in vars(self):
            vars(self)["digests"] = content_digests(self.images, self.name, progress)
        return self.digests

    def of(self, indices: np.ndarray) -> ImageSet:
        """The set of these images alone, with their digests where they are known."""
        found = replace(
            self,
            images=tuple(self.images[i] for i in indices),
            labels=None if self.labels is None else self.labels[indices],
            captions=None if self.captions is None else tuple(self.captions[i] for i in indices),
            domains=None if self.domains is None else tuple(self.domains[i] for i in indices),
        )
        if "digests" in vars(self):
            vars(found)["digests"] = np.frombuffer(self.digests, f"V{DIGEST}")[indices].tobytes()
        return found

    @cached_property
    def numbers(self) -> np.ndarray:
        """[N] a number of each image, which images with the same bytes share: 0, 1, … by where the first one stands."""
        number: dict[bytes, int] = {}
        starts = range(0, len(self.digests), DIGEST)
        return np.array([number.setdefault(self.digests[i : i + DIGEST], len(number)) for i in starts])

    def need_labels(self) -> np.ndarray:
        """The labels; UserError where there are none."""
        if self.labels is None:
            raise UserError(
                f"{self.name} has no labels; this evaluation needs an image folder of classes or .cls files"
            )
        return self.labels

    def need_names(self) -> tuple[str, ...]:
        """The classes' names; UserError where there are none, or one is not a text."""
        self.need_labels()
        if self.numbered:
            raise UserError(
                f"{self.name} has no names of its {len(self.classes):,} classes, only numbers, and zero-shot needs "
                f"names: write one a line to {NAMES[0]} in the folder that is evaluated (evaluate: or give "
                "--class-names FILE)"
            )
        for name in self.classes:
            if any("\ud800" <= character <= "\udfff" for character in name):  # no tokenizer takes it
                raise UserError(
                    f"{self.name}: the class name {name!r} is not valid UTF-8, and zero-shot needs texts: rename it, "
                    "or give --class-names FILE"
                )
        return self.classes

    def warn_of_ids(self) -> None:
        """A warning where most classes' names are ids of WordNet, as ImageNet's folders have in place of names."""
        names = self.classes
        ids = list(filter(_SYNSET.fullmatch, names))
        if 2 * len(ids) > len(names):
            logger.warning(
                "%s: %s of %s class names are WordNet ids, and zero-shot asks for %r; give the classes names: %s",
                self.name,
                f"{len(ids):,}",
                f"{len(names):,}",
                self.templates[0].replace("{c}", ids[0]),
                f"in {self.names_from}"
                if self.names_from
                else "rename the folders (evaluate: or give --class-names FILE, a name a line for each folder, in the "
                "order of `LC_ALL=C ls`)",
            )

    def need_captions(self) -> tuple[tuple[str, ...], ...]:
        """The captions; UserError where there are none."""
        if self.captions is None:
            raise UserError(
                f"{self.name} has no captions; this evaluation needs JSON of COCO or NoCaps, .txt files, a corpus"
            )
        return self.captions
