"""One task of `preprocess`: a run of input units → finished parts in the work folder.

A part is one shard (five files) and a small JSON record that says what it holds. Parts end after whole batches of
documents, by size alone, so a task that is started again skips the documents of its finished parts and writes the rest
as if nothing had happened; and the bytes do not depend on who writes them.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.data.document import Document, Image, Text
from megatron_lcl.data.drops import Drops
from megatron_lcl.data.files import sync
from megatron_lcl.data.holdout import group_name
from megatron_lcl.data.importers import Importer, Unit
from megatron_lcl.data.indexed import write_file
from megatron_lcl.data.probe import BadImage, Probe, downscale, probe
from megatron_lcl.data.store import ShardWriter, shard_files
from megatron_lcl.data.tokenizer import Tokenizer

BATCH = 512
"""texts and images tokenised together, whole documents, each counted as one more; parts end between batches"""
BATCH_BYTES = 64 << 20
"""fewer, where their images are larger than this together"""
PART_PIECES, PART_IMAGES = 8 << 20, 1 << 20
"""a part's index is kept in memory until it ends, so it ends after a batch in which it comes to so many of either"""


@dataclass(frozen=True)
class Job:
    """What every task of a run has in common. Picklable."""

    importer: Importer
    tokenizer: Tokenizer
    folder: Path
    """the work folder"""
    max_image_side: int | None
    shard_bytes: int
    shard_documents: int
    groups: frozenset[str] = frozenset()
    """names of held-out groups"""
    keep_groups: bool = False
    """write the documents of `groups`, or (False) all others"""


@dataclass(frozen=True)
class Part:
    """A finished part's record."""

    task: int
    number: int
    last: bool
    """nothing of the task follows"""
    documents_read: int
    """documents of the task up to this part's end, whether or not they were written"""
    files: dict[str, Any] = field(default_factory=dict)
    """empty where no document was left to write"""
    counts: dict[str, int] = field(default_factory=dict)
    drops: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"part-{self.task:06d}-{self.number:04d}"


def parts_of(folder: Path, task: int) -> list[Part]:
    """The finished parts of a task, in order."""
    parts: list[Part] = []
    for number in itertools.count():
        try:
            record = json.loads((folder / f"part-{task:06d}-{number:04d}.json").read_text("utf-8"))
        except FileNotFoundError:
            return parts
        parts.append(Part(**record))
    raise AssertionError


def is_finished(parts: list[Part]) -> bool:
    return bool(parts) and parts[-1].last


@contextmanager
def _young_collections() -> Iterator[None]:
    """Python's garbage collector looks only at what is made from here on, not again and again at all modules."""
    mine = not gc.get_freeze_count()
    if mine:
        gc.freeze()
    try:
        yield
    finally:
        if mine:
            gc.unfreeze()


@_young_collections()
def run_task(job: Job, task: int, units: list[Unit]) -> Drops:
    """Write what is missing of a task's parts; returns the drops of all its parts."""
    parts = parts_of(job.folder, task)
    number = len(parts)
    if not is_finished(parts):
        drops = Drops()
        # what the importer drops is counted once, with the training side
        reading = Drops() if job.keep_groups else drops
        documents = (document for unit in units for document in job.importer.documents(unit, reading))
        num_read = sum(1 for _ in itertools.islice(documents, parts[-1].documents_read)) if parts else 0
        drops.clear()  # what came up to here is on the records of the finished parts
        while not is_finished(parts):
            parts.append(_write_part(job, task, number, documents, num_read, drops))
            num_read, number = parts[-1].documents_read, number + 1
            drops.clear()
    total = Drops()
    for part in parts:
        total.add(Drops.from_dict(part.drops))
    return total


def _write_part(job: Job, task: int, number: int, documents: Iterator[Document], num_read: int, drops: Drops) -> Part:
    scratch = job.folder / f"task-{task:06d}"
    scratch.mkdir(exist_ok=True)
    for leftover in scratch.iterdir():  # of a run that was killed
        leftover.unlink()
    writer = ShardWriter(scratch, number)
    digests: list[int] = []
    last = True
    try:
        while batch := _next_batch(documents, job.shard_documents - writer.num_documents):
            num_read += len(batch)
            chosen = [d for d in batch if (group_name(d) in job.groups) == job.keep_groups] if job.groups else batch
            digests += _write_batch(job, writer, chosen, drops)
            if (
                writer.num_bytes >= job.shard_bytes
                or writer.num_documents >= job.shard_documents
                or writer.num_pieces >= PART_PIECES
                or writer.num_images >= PART_IMAGES
            ):
                last = False
                break
        name = Part(task, number, last, num_read).name
        if writer.num_documents:
            files, counts = writer.finish()
            # the record names the files as they are in the work folder
            renamed = {source: f"{name}{suffix}" for source, suffix in zip(shard_files(number), _SUFFIXES, strict=True)}
            for source, target in renamed.items():
                os.replace(scratch / source, job.folder / target)
            files = {renamed[source]: info for source, info in files.items()}
            write_file(job.folder / f"{name}.digests", np.array(digests, np.uint64).tobytes())
        else:
            writer.abort()
            files, counts = {}, {}
        sync(job.folder)
        part = Part(task, number, last, num_read, files, counts, drops.to_dict())
        write_file(job.folder / f"{name}.json", json.dumps(vars(part)).encode())
    except BaseException:
        writer.abort()
        raise
    finally:
        for leftover in scratch.iterdir():
            leftover.unlink()
        scratch.rmdir()
    return part


_ONLY_TEXT = {Text}


def _next_batch(documents: Iterator[Document], room: int) -> list[Document]:
    """Documents of about BATCH items, no more than the part has room for."""
    batch: list[Document] = []
    size = num_items = 0
    for document in itertools.islice(documents, room):
        batch.append(document)
        num_items += 1 + len(document.items)
        if not _ONLY_TEXT.issuperset(map(type, document.items)):
            size += sum(len(image.data) for image in document.images)
        if num_items >= BATCH or size >= BATCH_BYTES:
            break
    return batch


_SUFFIXES = (".tokens.bin", ".tokens.idx", ".images.bin", ".images.idx", ".arrow")


def final_name(part_file: str, shard: int) -> str:
    """The name in the corpus of one of a part's files."""
    suffix = "." + part_file.split(".", 1)[1]
    return shard_files(shard)[_SUFFIXES.index(suffix)]


# --- one batch ---------------------------------------------------------------------------------------------------


def _write_batch(job: Job, writer: ShardWriter, batch: list[Document], drops: Drops) -> Iterator[int]:
    """Write a batch of documents; yields a hash of each one written."""
    texts = [_texts(document, drops) for document in batch]
    ids, lengths = job.tokenizer.encode_joined(list(itertools.chain.from_iterable(own for own, _ in texts)))
    rest = io.BytesIO(ids)

    def take(lengths: list[int]) -> tuple[bytes, list[int]]:
        return rest.read(4 * sum(lengths)), lengths

    first = first_waiting = 0
    # numbers of texts of the documents, from text `first_waiting` on, that are texts and nothing else
    waiting: list[int] = []
    for document, (own, joined) in zip(batch, texts, strict=True):
        stop = first + len(own)
        if own and len(own) == len(document.items) and all(lengths[first:stop]):  # no need to look at each
            waiting.append(len(own))
            yield xxhash.xxh3_64_intdigest(joined)
        else:
            writer.add_text_documents(*take(lengths[first_waiting:first]), waiting)
            first_waiting, waiting = stop, []
            encoded = [(rest.read(4 * length), text) for length, text in zip(lengths[first:stop], own, strict=True)]
            digest = _write_document(job, writer, document, iter(encoded), drops)
            if digest is not None:
                yield digest
        first = stop
    writer.add_text_documents(*take(lengths[first_waiting:]), waiting)


def _texts(document: Document, drops: Drops) -> tuple[list[str], bytes]:
    """A document's texts in order, lone surrogates replaced, "" for blank ones; and these joined."""
    try:  # sooner done than asking each item what it is
        texts = [item.text for item in document.items]  # type: ignore[union-attr]
    except AttributeError:  # an image among them
        texts = [item.text for item in document.items if isinstance(item, Text)]
    if any(map(str.isspace, texts)):
        texts = ["" if text.isspace() else text for text in texts]
    try:
        return texts, _join(texts)
    except UnicodeEncodeError:
        valid = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]
        count = sum(text != original for text, original in zip(valid, texts, strict=True))
        drops.note("text", "invalid Unicode replaced", document.name, count)
        return valid, _join(valid)


def _join(content: list[str]) -> bytes:
    """What the hash of a document is taken of: its texts, and the hashes of its images, in order of writing."""
    return "\0".join(content).encode()


@dataclass(frozen=True, slots=True)
class _ReadyImage:
    image: Image
    data: bytes
    size: Probe


def _write_document(
    job: Job, writer: ShardWriter, document: Document, encoded: Iterator[tuple[bytes, str]], drops: Drops
) -> int | None:
    """Write one document, taking its texts from `encoded`; returns its hash, or None where nothing of it was left."""
    runs: list[list[bytes] | _ReadyImage] = []  # texts between images together
    texts: list[bytes] = []
    new_number: list[int] = []  # of each text, once those without tokens are gone; -1 for these
    content: list[str] = []
    for item in document.items:
        if isinstance(item, Text):
            ids, text = next(encoded)
            if ids:
                new_number.append(len(content))
                content.append(text)
                texts.append(ids)
            else:
                new_number.append(-1)
                if item.text:  # an importer counts an empty one itself
                    drops.left_out("text", "without tokens" if text else "blank", document.name)
        elif (ready := _ready_image(job, item, document, drops)) is not None:
            runs += [texts, ready]
            texts = []
    runs.append(texts)
    for run in runs:
        if isinstance(run, list):
            if run:
                writer.add_texts(run)
        elif reason := _bad_match(run.image, new_number):
            drops.bad("image", reason, f"{document.name}: {run.image.name}")
        else:
            image, size = run.image, run.size
            matched = None if image.matched_text is None else new_number[image.matched_text]
            writer.add_image(run.data, size.width, size.height, size.format, image.similarity, matched)
            content.append(xxhash.xxh3_128_hexdigest(run.data))
    if not content:
        drops.bad("document", "nothing left", document.name)
        return None
    writer.end_document()
    return xxhash.xxh3_64_intdigest(_join(content))


def _ready_image(job: Job, image: Image, document: Document, drops: Drops) -> _ReadyImage | None:
    """The image with the bytes to store and their size; None, and counted, if it cannot be used."""
    try:
        size, data = probe(image.data), image.data
        if job.max_image_side and max(size.width, size.height) > job.max_image_side:
            data = downscale(data, job.max_image_side)
            size = probe(data)
    except BadImage as error:
        drops.bad("image", str(error), f"{document.name}: {image.name}")
        return None
    if size.width == size.height == 1:
        drops.left_out("image", "1x1 pixel", f"{document.name}: {image.name}")
        return None
    return _ReadyImage(image, data, size)


def _bad_match(image: Image, new_number: list[int]) -> str:
    """Why an image's match makes it unusable; "" if it does not."""
    if image.similarity is not None and not np.isfinite(image.similarity):
        return "similarity is not a number"
    if image.matched_text is None:
        return ""
    if not 0 <= image.matched_text < len(new_number):
        return "matched text out of range"
    return "matched text is blank" if new_number[image.matched_text] < 0 else ""
