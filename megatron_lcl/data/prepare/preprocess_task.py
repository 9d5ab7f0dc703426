"""One task of `preprocess`: a run of input units → finished parts in the work folder.

A part is a folder, put there complete under its name: a shard (six files) for each kind of documents in it, a file of
the documents' hashes, and a small JSON record that says what it holds. Parts end after whole batches of documents, by
size alone, so a task that is started again skips the documents of its finished parts and writes the rest as if nothing
had happened; and the bytes do not depend on who writes them.
"""

from __future__ import annotations

import io
import itertools
import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.data.corpus.corpus_manifest import total
from megatron_lcl.data.corpus.document import KINDS, Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.probe import BadImage, Probe, downscale, probe
from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder, waiting_for_others
from megatron_lcl.data.corpus.store import ShardWriter
from megatron_lcl.data.corpus.tokenizer import JoinedEncoder, Tokenizer
from megatron_lcl.data.prepare.faulty_documents import naming_faulty_documents
from megatron_lcl.data.prepare.holdout import group_name, groups_hash
from megatron_lcl.data.prepare.importers import Importer, Unit, separated
from megatron_lcl.data.prepare.importers.files import MAX_FILE, TooLarge
from megatron_lcl.errors import UserError

BATCH = 384
"""texts and images of one kind of documents tokenized together, each document counted as one more; parts end between
batches"""
BATCH_BYTES = 64 << 20
"""fewer, where their images are larger than this together"""
DIGESTS = "digests"
"""a part's file of hashes, uint64, of its documents"""
RECORD = "part.json"
"""a part's file with its `Part`"""
PART_PIECES, PART_IMAGES = 8 << 20, 1 << 20
"""a part's index is kept in memory until it ends, so it ends after a batch in which it comes to so many of either"""


@dataclass(frozen=True)
class TaskSettings:
    """What every task of a run has in common. Picklable."""

    importer: Importer
    tokenizer: Tokenizer
    folder: Path
    """the work folder"""
    folders: tuple[Path, ...]
    """those of all corpora that the run writes"""
    max_image_side: int | None
    shard_bytes: int
    shard_documents: int
    groups: frozenset[str] = frozenset()
    """names of held-out groups"""
    training: Path | None = None
    """where the documents of `groups` are written, the corpus of all others; None: write these others"""

    @property
    def is_held_out(self) -> bool:
        return self.training is not None

    @cached_property
    def written_by(self) -> list[str]:
        """Fingerprints of what is chosen from all documents: of the tokenizer, and of the groups."""
        return [self.tokenizer.fingerprint, groups_hash(self.groups)]

    def separated(self, document: Document) -> Document:
        """With white space between texts (`importers.separated`); as it is where the tokenizer puts a space there."""
        if self.tokenizer.separates_texts:
            return document
        return separated(document, self.importer.separator, self.importer.kind)

    def wants(self, document: Document) -> bool:
        return (group_name(document) in self.groups) == self.is_held_out


@dataclass(frozen=True)
class Part:
    """A finished part's record."""

    task: int
    number: int
    last: bool
    """nothing of the task follows"""
    documents_read: int
    """documents wanted of the task up to this part's end, whether or not they were written"""
    shards: list[dict[str, Any]] = field(default_factory=list)
    """of each kind of documents: `kind` (None: not said), `number` in this part, `has_similarities`, `files`, `counts`;
    none where no document was left to write"""
    drops: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    """what the documents hold that were read on the way and are of the other half of the corpus: `documents`, `pieces`,
    `placements`"""
    written_by: list[str] = field(default_factory=list)
    """`TaskSettings.written_by`"""

    @property
    def name(self) -> str:
        return f"part-{self.task:06d}-{self.number:04d}"

    @property
    def counts(self) -> dict[str, int]:
        return total(shard["counts"] for shard in self.shards)

    @property
    def seen(self) -> dict[str, int]:
        """The same, and of the `others`: of held-out documents and all others together, as if none were held out."""
        return total([self.counts, self.others])


def parts_of(folder: Path, task: int) -> list[Part]:
    """The finished parts of a task, in order."""
    parts: list[Part] = []
    for number in itertools.count():
        try:
            record = json.loads((folder / f"part-{task:06d}-{number:04d}" / RECORD).read_text("utf-8"))
        except FileNotFoundError:
            return parts
        parts.append(Part(**record))
    raise AssertionError


def is_finished(parts: list[Part]) -> bool:
    return bool(parts) and parts[-1].last


def check_parts(settings: TaskSettings, parts: list[Part]) -> None:
    """UserError where a part was written with another tokenizer, or with other documents held out."""
    for part in parts:
        if part.written_by != settings.written_by:
            raise UserError(
                f"{settings.folder / part.name} was written with another tokenizer, or other held-out documents, than "
                f"are chosen now; remove {' and '.join(map(str, settings.folders))}, and run the same command again"
            )


def run_task(settings: TaskSettings, numbered: tuple[int, list[Unit]]) -> Drops:
    """Write what is missing of a task's parts; returns the drops of all its parts. numbered: its number and units.

    While another process does the same task it is waited for, where there are locks. Where there are none, both write
    the same parts, each in a folder of its own, and those renamed second are discarded.
    """
    task, units = numbered
    with waiting_for_others(settings.folder / f"lock-{task:06d}"), scratch_folder(settings.folder) as scratch:
        parts = parts_of(settings.folder, task)
        check_parts(settings, parts)
        if not is_finished(parts):
            with naming_faulty_documents(settings.importer, units):
                _write_parts(settings, task, units, parts, scratch)
    drops = Drops()
    for part in parts:
        drops.add(Drops.from_dict(part.drops))
    return drops


def _write_parts(settings: TaskSettings, task: int, units: list[Unit], parts: list[Part], scratch: Path) -> None:
    """Write the parts that follow on `parts`, and append them."""
    drops, others = Drops(), Counter[str]()
    # what the importer drops is counted once, with the training side
    reading = Drops() if settings.is_held_out else drops
    every = (settings.separated(document) for unit in units for document in settings.importer.documents(unit, reading))
    documents = _wanted(settings, every, others) if settings.groups else every
    num_read = sum(1 for _ in itertools.islice(documents, parts[-1].documents_read)) if parts else 0
    encode = settings.tokenizer.joined_encoder()
    while not is_finished(parts):
        drops.clear()  # those up to here are in the records of the finished parts
        others.clear()
        parts.append(_write_part(settings, encode, task, len(parts), documents, num_read, drops, others, scratch))
        num_read = parts[-1].documents_read


def _wanted(settings: TaskSettings, documents: Iterator[Document], others: Counter[str]) -> Iterator[Document]:
    """The wanted documents; the others are counted."""
    for document in documents:
        if settings.wants(document):
            yield document
        else:
            others.update(documents=1, pieces=len(document.items), placements=len(document.images))


def _write_part(
    settings: TaskSettings,
    encode: JoinedEncoder,
    task: int,
    number: int,
    documents: Iterator[Document],
    num_read: int,
    drops: Drops,
    others: Counter[str],
    scratch: Path,
) -> Part:
    name = Part(task, number, False, 0).name
    folder, default = scratch / name, settings.importer.kind
    folder.mkdir()
    shards: dict[Kind | None, _OpenShard] = {}
    last = True
    try:
        document = next(documents, None)
        while document is not None:
            kind = document.kind or default
            shard = shards.get(kind)
            if shard is None:
                if kind is not None and kind not in KINDS:  # of an importer's class, too
                    raise UserError(
                        f"{settings.importer} gives the document {document.name!r} the kind {kind!r}; the kinds are "
                        f"{', '.join(KINDS)}, or None"
                    )
                shard = shards[kind] = _OpenShard(ShardWriter(folder, len(shards)), settings.shard_documents)
            taken, document = shard.take(document, documents)
            num_read += taken
            if shard.has_batch:
                shard.write_batch(settings, encode, drops)
                if shard.is_full(settings.shard_bytes):
                    last = False
                    break
                document = next(documents, None)
        records = []
        for kind, shard in shards.items():
            shard.write_batch(settings, encode, drops)
            if shard.writer.num_documents:
                similarities = shard.writer.has_similarities
                files, counts = shard.writer.finish()
                record = {"kind": kind, "number": shard.writer.number, "has_similarities": similarities}
                records.append({**record, "files": files, "counts": counts})
            else:
                shard.writer.abort()
    except BaseException:
        for shard in shards.values():
            shard.writer.abort()
        raise
    digests = [digest for shard in shards.values() for digest in shard.digests]
    write_file(folder / DIGESTS, np.array(digests, np.uint64).tobytes())
    part = Part(task, number, last, num_read, records, drops.to_dict(), dict(others), settings.written_by)
    write_file(folder / RECORD, json.dumps(vars(part)).encode())
    put_in_place(folder, settings.folder / name)
    return part


class _OpenShard:
    """A shard that is being written, and the documents that wait until there are enough of them for a batch."""

    def __init__(self, writer: ShardWriter, max_documents: int) -> None:
        self.writer = writer
        self._max_documents = max_documents
        self.digests: list[int] = []
        """a hash of each document written"""
        self._begin()

    def _begin(self) -> None:
        self._documents: list[Document] = []
        self._texts: list[str] = []
        self._size = 0
        self._num_items = 0
        self._only_texts = True
        self.has_batch = False
        """there are documents of about BATCH items, or as many as the shard has room for"""

    def take(self, first: Document, documents: Iterator[Document]) -> tuple[int, Document | None]:
        """Add a document, and those of its kind that follow, until there is a batch.

        Returns how many were added, and the next document where that is of another kind, or None.
        """
        kind, room = first.kind, self._max_documents - self.writer.num_documents
        batch, texts, num_items, size = (
            self._documents,
            self._texts,
            self._num_items,
            self._size,
        )  # locals are faster
        before, following = len(batch), None
        for document in itertools.chain((first,), documents):
            if document.kind != kind:
                following = document
                break
            batch.append(document)
            items = document.items
            num_items += 1 + len(items)
            try:  # faster than a type check of each item
                texts += [item.text for item in items]  # type: ignore[union-attr]
            except AttributeError:
                self._only_texts = False
                size += sum(len(image.data) for image in document.images)
            if num_items >= BATCH or size >= BATCH_BYTES or len(batch) >= room:
                self.has_batch = True
                break
        self._num_items, self._size = num_items, size
        return len(batch) - before, following

    def write_batch(self, settings: TaskSettings, encode: JoinedEncoder, drops: Drops) -> None:
        """Write the documents that wait."""
        if self._documents:
            texts = self._texts if self._only_texts else None
            self.digests += _write_batch(settings, encode, self.writer, self._documents, texts, drops)
        self._begin()

    def is_full(self, shard_bytes: int) -> bool:
        writer = self.writer
        return (
            writer.num_bytes >= shard_bytes
            or writer.num_documents >= self._max_documents
            or writer.num_pieces >= PART_PIECES
            or writer.num_images >= PART_IMAGES
        )


# --- one batch ---------------------------------------------------------------------------------------------------


def _write_batch(
    settings: TaskSettings,
    encode: JoinedEncoder,
    writer: ShardWriter,
    documents: list[Document],
    texts: list[str] | None,
    drops: Drops,
) -> list[int]:
    """Write a batch of documents; returns a hash of each one written. texts: all in order, if there are no images."""
    try:
        ids, lengths = encode(_blanked(_texts(documents) if texts is None else texts))
    except UnicodeEncodeError:
        documents = [_with_valid_texts(document, drops) for document in documents]
        ids, lengths = encode(_blanked(_texts(documents)))
    counts = [len(document.items) for document in documents]
    if texts is not None and all(lengths) and all(counts):  # nothing to skip
        for document in documents:
            if _num_lost(document):
                drops.note("document", _WITHOUT_IMAGES, document.name)
        writer.add_text_documents(ids, lengths, counts, [document.source for document in documents])
        return _digests(ids, lengths, counts)
    rest = io.BytesIO(ids)
    pieces = (rest.read(4 * length) for length in lengths)
    digests = [_write_document(settings, writer, document, pieces, drops) for document in documents]
    return [digest for digest in digests if digest is not None]


def _texts(documents: list[Document]) -> list[str]:
    return [text.text for document in documents for text in document.texts]


def _num_lost(document: Document) -> int:
    """Images that its importer could not read."""
    return document.metadata.get("lost_images", 0)


def _blanked(texts: list[str]) -> list[str]:
    """The same, with "" for blank ones."""
    return ["" if text.isspace() else text for text in texts] if any(map(str.isspace, texts)) else texts


def _with_valid_texts(document: Document, drops: Drops) -> Document:
    """Lone surrogates replaced, and counted."""
    items = [Text(_valid(item.text)) if isinstance(item, Text) else item for item in document.items]
    if count := sum(item != original for item, original in zip(items, document.items, strict=True)):
        drops.note("text", "invalid Unicode replaced", document.name, count)
    return Document(tuple(items), document.name, document.metadata)


def _valid(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _digests(ids: bytes, lengths: list[int], counts: list[int]) -> list[int]:
    """`_digest` of documents of `counts` texts each."""
    digests = []
    data, sizes = memoryview(ids), memoryview(array("I", lengths).tobytes())
    first = start = 0
    for count in counts:
        stop = first + count
        end = start + 4 * sum(lengths[first:stop])
        digests.append(_digest(data[start:end], sizes[4 * first : 4 * stop]))
        first, start = stop, end
    return digests


_IMAGE = -1
"""in place of a length"""
_WITHOUT_IMAGES = "kept without its images, which are missing or bad"


def _digest(content: bytes | memoryview, lengths: bytes | memoryview) -> int:
    """Equal for documents that are equal: their pieces, ids of texts and hashes of images, and how long each is."""
    return xxhash.xxh3_64_intdigest(content, xxhash.xxh3_64_intdigest(lengths))


@dataclass(frozen=True, slots=True)
class _ReadyImage:
    image: Image
    data: bytes
    size: Probe


def _write_document(
    settings: TaskSettings, writer: ShardWriter, document: Document, encoded: Iterator[bytes], drops: Drops
) -> int | None:
    """Write one document, taking its texts' ids from `encoded`; returns its hash, or None where nothing was left."""
    num_bad = drops.num_bad("image")
    runs: list[list[bytes] | _ReadyImage] = []  # texts between images together
    texts: list[bytes] = []
    new_number: list[int] = []  # of each text, once those without tokens are gone; -1 for these
    num_texts = 0
    for item in document.items:
        if isinstance(item, Text):
            if ids := next(encoded):
                new_number.append(num_texts)
                num_texts += 1
                texts.append(ids)
            else:
                new_number.append(-1)
                if item.text:  # an importer counts an empty one itself
                    reason = "blank" if item.text.isspace() else "without tokens"
                    drops.left_out("text", reason, document.name)
        elif (ready := _ready_image(settings, item, document, drops)) is not None:
            runs += [texts, ready]
            texts = []
    runs.append(texts)
    content: list[bytes] = []
    lengths = array("i")
    for run in runs:
        if isinstance(run, list):
            if run:
                writer.add_texts(run)
                content += run
                lengths.extend(len(ids) // 4 for ids in run)
        elif reason := _bad_match(run.image, new_number):
            drops.bad("image", reason, f"{document.name}: {run.image.name}")
        else:
            image, size = run.image, run.size
            matched = None if image.matched_text is None else new_number[image.matched_text]
            content.append(writer.add_image(run.data, size.width, size.height, size.format, image.similarity, matched))
            lengths.append(_IMAGE)
    lost_images = _num_lost(document) + drops.num_bad("image") - num_bad
    if not content:
        reason = "nothing left, its images are missing or bad" if lost_images else "nothing left"
        drops.bad("document", reason, document.name)
        return None
    if lost_images and _IMAGE not in lengths:
        drops.note("document", _WITHOUT_IMAGES, document.name)
    writer.end_document(document.source)
    return _digest(b"".join(content), lengths.tobytes())


def _ready_image(settings: TaskSettings, image: Image, document: Document, drops: Drops) -> _ReadyImage | None:
    """The image with the bytes to store and their size; None, and counted, if it cannot be used."""
    try:
        if len(image.data) > MAX_FILE:  # of a column, or of another package's importer
            raise BadImage(str(TooLarge()))
        size, data = probe(image.data), image.data
        if settings.max_image_side and max(size.width, size.height) > settings.max_image_side:
            data = downscale(data, settings.max_image_side)
            size = probe(data)
    except BadImage as error:
        drops.bad("image", str(error), f"{document.name}: {image.name}")
        return None
    if size.width == size.height == 1:
        drops.left_out("image", "1x1 pixel", f"{document.name}: {image.name}")
        return None
    return _ReadyImage(image, data, size)


_MAX_SIMILARITY = float(np.finfo(np.float32).max)


def _bad_match(image: Image, new_number: list[int]) -> str:
    """Why an image's match makes it unusable; "" if it does not."""
    if image.similarity is not None and not abs(image.similarity) <= _MAX_SIMILARITY:
        return "similarity is not a number"
    if image.matched_text is None:
        return ""
    if not 0 <= image.matched_text < len(new_number):
        return "matched text out of range"
    return "matched text is blank" if new_number[image.matched_text] < 0 else ""
