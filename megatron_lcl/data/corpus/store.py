"""The corpus on disk: shards of tokens and images, and the manifest that says what belongs to it.

corpus.json                 the manifest, written last
tokenizer.model | .json     a copy of the tokenizer, so that the folder stands alone
tokens-00000.bin .idx       pieces of documents (`indexed.py`): mode 0 token ids of a text, mode 1 an image's index
images-00000.bin .idx       encoded images, uint8, each once per shard
images-00000.arrow          what is known of images and of their places (`image_columns.py`)
names-00000.bin             where each document came from (`names.py`); not in corpora of earlier releases
"""

from __future__ import annotations

import bisect
import itertools
import operator
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import xxhash

from megatron_lcl.data.corpus import kinds
from megatron_lcl.data.corpus.corpus_manifest import (
    ARROW,
    IMAGES,
    MANIFEST,
    NAMES,
    TOKENS,
    check_names,
    check_shape,
    damaged,
    has_names,
    read_manifest,
    shard_files,
)
from megatron_lcl.data.corpus.document import Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import LOG, Drops
from megatron_lcl.data.corpus.image_columns import FORMATS, write_columns
from megatron_lcl.data.corpus.indexed import IMAGE, TEXT, FileInfo, IndexedWriter, damaged_file
from megatron_lcl.data.corpus.names import NamesWriter
from megatron_lcl.data.corpus.remote import open_remote
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.structure import structure_faults
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file

if TYPE_CHECKING:
    from megatron_lcl.data.corpus.tokenizer import Tokenizer

_STATS = 16
"""files whose sizes are read at once: each may be a round trip to a file server"""


# --- writing -----------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes one shard's six files into `folder`; nothing stands under its name before `finish`."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self._tokens = IndexedWriter(folder / TOKENS.format(number), np.int32)
        self._images = IndexedWriter(folder / IMAGES.format(number), np.uint8)
        self._columns_path = folder / (IMAGES.format(number) + ARROW)
        self._names = NamesWriter(folder / NAMES.format(number))
        self._index_of: dict[bytes, int] = {}
        self._widths = array("i")
        self._heights = array("i")
        self._formats = array("b")
        self._similarity = array("f")
        self._matched = array("i")

    @property
    def num_documents(self) -> int:
        return self._tokens.num_documents

    @property
    def num_pieces(self) -> int:
        return self._tokens.num_sequences

    @property
    def num_images(self) -> int:
        return self._images.num_sequences

    @property
    def has_similarities(self) -> bool:
        return any(similarity == similarity for similarity in self._similarity)  # not NaN

    @property
    def num_bytes(self) -> int:
        """Bytes of tokens and images so far."""
        return self._tokens.num_bytes + self._images.num_bytes

    def add_texts(self, pieces: list[bytes]) -> None:
        """Text pieces, each given as the bytes of its int32 token ids, without special tokens."""
        self._tokens.add_run(b"".join(pieces), [len(piece) // 4 for piece in pieces], TEXT)

    def add_text_documents(self, ids: bytes, lengths: list[int], counts: list[int], names: Iterable[str]) -> None:
        """Documents of texts only, complete: all their int32 ids, the tokens of each piece; of each document the pieces
        and the name."""
        first = self.num_pieces
        self._tokens.add_run(ids, lengths, TEXT)
        self._tokens.end_documents([first + end for end in itertools.accumulate(counts)])
        self._names.extend(names)

    def add_image(
        self,
        data: bytes,
        width: int,
        height: int,
        format: str,
        similarity: float | None = None,
        matched_text: int | None = None,
    ) -> bytes:
        """An image piece: encoded bytes, stored once in the shard; width and height in pixels, as shown.

        Returns their XXH3-128.
        """
        digest = xxhash.xxh3_128_digest(data)
        index = self._index_of.setdefault(digest, len(self._index_of))
        if index == self._images.num_sequences:
            self._images.add(data, IMAGE)
            self._images.end_document()
            self._widths.append(width)
            self._heights.append(height)
            self._formats.append(FORMATS.index(format) if format in FORMATS else 0)
        self._tokens.add(index.to_bytes(4, "little"), IMAGE)
        self._similarity.append(float("nan") if similarity is None else similarity)
        self._matched.append(-1 if matched_text is None else matched_text)
        return digest

    def end_document(self, name: str = "") -> None:
        """name: where the document came from, such as file and line, relative to the input."""
        self._tokens.end_document()
        self._names.extend((name,))

    def finish(self) -> tuple[dict[str, FileInfo], dict[str, int]]:
        """Put the files under their names; returns {file name: size and hash} and the shard's counts."""
        counts = {
            "documents": self.num_documents,
            "pieces": self.num_pieces,
            "tokens": self._tokens.num_bytes // 4 - len(self._matched),  # an image piece is one number
            "placements": len(self._matched),
            "images": self._images.num_sequences,
            "image_bytes": self._images.num_bytes,
        }
        files = {**self._tokens.finish(), **self._images.finish()}
        sizes = (self._widths, self._heights, self._formats)
        files[self._columns_path.name] = write_columns(
            self._columns_path, sizes, self._index_of, self._similarity, self._matched
        )
        files[self._names.path.name] = self._names.finish()
        return files, counts

    def abort(self) -> None:
        """Remove what is unfinished; finished files stay."""
        self._tokens.abort()
        self._images.abort()
        self._names.abort()


# --- reading -----------------------------------------------------------------------------------------------------


MAX_OPEN = 6000
"""shards of all corpora that a process has open: each is six mappings, and Linux allows a process 65,530"""
_opened: deque[tuple[weakref.ref[Corpus], int]] = deque()
"""in the order in which they were opened. The first is closed: of documents in random order all are as likely to be
next, so nothing is gained by recording which was used last."""


class Corpus(Sequence[Document]):
    """A finished corpus; `corpus[i]` is its i-th Document. Cheap to open, pickled by its path.

    path: a folder, or a URL of one in object storage, of which a part is kept in `cache` (data.cache; `remote`).
    """

    def __init__(self, path: str | Path, cache: str | Path | None = None) -> None:
        url = url_of(path)
        self.remote = None if url is None else open_remote(url, cache, MANIFEST)
        self.path = self.remote.folder if self.remote else Path(path)
        """the folder with the files that are on the disk"""
        self.where = str(url or path)
        """as the user named it"""
        self._cache = cache
        self.manifest = read_manifest(self.path, self.where)
        try:
            check_shape(self.manifest)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.where, error) from None
        check_names([*self.manifest["files"], self.manifest["tokenizer"]["file"]], f"{self.where}/{MANIFEST}")
        if self.remote:
            self.remote.prepare(self.manifest)
        self._shards: dict[int, Shard] = {}
        counts = [shard["documents"] for shard in self.manifest["shards"]]
        self.document_starts = np.array([0, *itertools.accumulate(counts)], np.int64)
        """int64 [num_shards+1]: number of each shard's first document, and the total"""

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.where, self._cache)

    def __repr__(self) -> str:
        return f"Corpus({self.where!r}, {len(self)} documents)"

    @cached_property
    def fingerprint(self) -> str:
        """As `read_manifest` says it.

        Where an earlier release's `merge` lost the kinds, of these as well: its batches are not what they were then.
        """
        own = self.manifest["fingerprint"]
        if kinds.were_lost(self.manifest):
            return xxhash.xxh3_128_hexdigest(" ".join([own, *self.kinds]).encode())
        return own

    @property
    def drops(self) -> Drops:
        """What was dropped on the way into it, with all the names that are known. UserError where a file is damaged."""
        if LOG not in self.manifest["files"]:  # of an earlier release
            return Drops.from_dict(self.manifest["drops"])
        if self.remote:
            self.remote.copy([LOG])
        try:
            return Drops.from_log((self.path / LOG).read_bytes())
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{self.where}/{LOG} is damaged; `megatron-lcl verify` says what else is") from None

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The kind of each shard's documents."""
        return kinds.of_shards(self.manifest, self.open_shard)

    @property
    def num_shards(self) -> int:
        return len(self.document_starts) - 1

    def shard(self, k: int) -> Shard:
        """Shard `k`, opened on first use, and again if MAX_OPEN others were opened since; its sizes are checked."""
        shard = self._shards.get(k)
        if shard is None:
            shard = self._shards[k] = self._open(k)
            _opened.append((weakref.ref(self), k))
            while len(_opened) > MAX_OPEN:
                of, first = _opened.popleft()
                if (corpus := of()) is not None:
                    corpus._shards.pop(first, None)  # its files stay mapped for whoever uses them
        return shard

    def open_shard(self, k: int) -> Shard:
        """Shard `k`, opened for this caller alone: its files are mapped as long as the caller keeps it.

        For who reads all of it: UserError where its arrays do not go together, for which its indices are read.
        """
        shard = self._open(k)
        self._check_structure(shard)
        return shard

    def _open(self, k: int) -> Shard:
        self._check_sizes(shard_files(k, has_names(self.manifest, k)))
        return Shard(self.path, k, self.remote)

    def _check_structure(self, shard: Shard) -> None:
        faults = list(structure_faults(shard))
        if (num := self.manifest["shards"][shard.number]["documents"]) != shard.num_documents:
            faults.append(f"{shard.num_documents:,} documents, the manifest says {num:,}")
        if faults:
            raise damaged_file(f"{self.where}, shard {shard.number}: {faults[0]}", self.where)

    def check_sizes(self) -> None:
        """UserError where a file is missing, or does not have the size that it was written with. Reads none."""
        self._check_sizes(self.manifest["files"])

    def _check_sizes(self, names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_STATS) if len(names := list(names)) > _STATS else nullcontext() as pool:
            for fault in (pool.map if pool else map)(self._size_fault, names):
                if fault:
                    raise damaged_file(fault, self.where)

    def _size_fault(self, name: str) -> str:
        path = f"{self.where}/{name}"
        try:
            size, expected = (
                self.remote.size(name) if self.remote else (self.path / name).stat().st_size,
                self.manifest["files"][name]["size"],
            )
        except FileNotFoundError:
            return f"{path} is missing"
        except KeyError:
            return f"{path} is not in the manifest"
        return "" if size == expected else f"{path} has {size:,} bytes, but was written with {expected:,}"

    @property
    def shards(self) -> Iterator[Shard]:
        """All shards, one after another. UserError where the arrays of one do not go together."""
        for shard in map(self.shard, range(self.num_shards)):
            self._check_structure(shard)
            yield shard

    @cached_property
    def tokenizer(self) -> Tokenizer:
        from megatron_lcl.data.corpus.tokenizer import load

        return load(self.path / self.manifest["tokenizer"]["file"])

    def __len__(self) -> int:
        return int(self.document_starts[-1])

    def locate(self, i: SupportsIndex) -> tuple[int, int]:
        """(shard, document in that shard) of document `i`; IndexError past the end, TypeError for no integer."""
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of a corpus of {len(self)}")
        i %= len(self)
        k = bisect.bisect_right(self.document_starts, i) - 1
        return k, i - int(self.document_starts[k])

    @overload
    def __getitem__(self, i: SupportsIndex) -> Document: ...

    @overload
    def __getitem__(self, i: slice) -> list[Document]: ...

    def __getitem__(self, i: SupportsIndex | slice) -> Document | list[Document]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        k, local = self.locate(i)
        shard = self.shard(k)
        start, stop = shard.bounds(local)
        name = shard.names[local] if shard.names else ""
        return Document(tuple(self._items(shard, start, stop)), name=name or f"shard {k}, document {local}")

    def name(self, i: int) -> str:
        """Where document `i` came from; "" where that is not known."""
        k, local = self.locate(i)
        names = self.shard(k).names
        return names[local] if names else ""

    def find(self, text: str) -> Iterator[int]:
        """Numbers of the documents whose name has `text` in it, in order."""
        for k in range(self.num_shards):
            if (names := self.shard(k).names) is not None:
                yield from (int(self.document_starts[k]) + local for local in names.find(text))

    def _items(self, shard: Shard, start: int, stop: int) -> Iterator[Text | Image]:
        for k in range(start, stop):
            piece = shard.piece(k)
            if isinstance(piece, int):
                placement = int(shard.placement_of[k])
                matched = int(shard.matched_text[placement])
                similarity = float(shard.similarity[placement])
                yield Image(
                    bytes(shard.image(piece)),
                    name=f"shard {shard.number}, image {piece}",
                    similarity=None if np.isnan(similarity) else similarity,
                    matched_text=None if matched < 0 else matched,
                )
            else:
                yield Text(self.tokenizer.decode(piece))


def open_corpus(path: str | Path, cache: str | Path | None = None) -> Corpus:
    """Open the corpus in folder `path` by its manifest; shards are mapped on first use. UserError if there is none.

    path: also `s3://bucket/folder` or `http(s)://host/folder`; cache: where what is read of such a corpus is kept,
    `data.cache` (None: megatron_lcl in the user's cache folder).
    """
    return Corpus(path, cache)


def is_corpus(path: str | Path) -> bool:
    """Whether a folder holds a finished corpus. A URL is taken for one's: `open_corpus` says what is wrong there."""
    return url_of(path) is not None or is_file(Path(path) / MANIFEST)
