"""The copy: what the two passes have left of a corpus, into shards, several ranges of documents in each.

A range is small, so that many processes have something to do; a shard for each would be too many files to open.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_lcl.curate.documents import Range, Source, documents, read_ahead
from megatron_lcl.curate.joins import Matching
from megatron_lcl.curate.passes import REMOVED_FILE, WHOLE, Work, matches_of, once, recorded
from megatron_lcl.data.corpus.document import Kind
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.store import ShardWriter
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.prepare.preprocess import SHARD_BYTES, SHARD_DOCUMENTS
from megatron_lcl.data.prepare.preprocess_task import PART_IMAGES, PART_PIECES, RECORD, Part


@dataclass(frozen=True)
class Group:
    """Ranges of documents of one kind, one after another: a task of the copy."""

    number: int
    kind: Kind
    ranges: tuple[Range, ...]


def groups(work: Work, tasks: Sequence[Range]) -> list[Group]:
    """All ranges, in runs of up to SHARD_BYTES of tokens and images before anything was removed."""
    found: list[Group] = []
    size = 0
    for task in tasks:
        kind = "matched" if any(isinstance(join, Matching) for join in work.joins) else work.corpus.kinds[task.shard]
        if found and found[-1].kind == kind and size + task.size <= SHARD_BYTES:
            found[-1] = Group(found[-1].number, kind, (*found[-1].ranges, task))
            size += task.size
        else:
            found.append(Group(len(found), kind, (task,)))
            size = task.size
    return found


def shards_folder(work: Work) -> Path:
    """The folder of the parts that `write` makes."""
    return work.folder / "shards"


def write(work: Work, group: Group) -> Part:
    """Copy what is left of a group of ranges; returns the record of its shards. Done before, that is only read."""
    folder = shards_folder(work)
    folder.mkdir(exist_ok=True)
    with once(work, folder / Part(group.number, 0, True, 0).name) as scratch:
        if scratch is not None:
            _write_group(work, group, scratch)
    return recorded(folder, group.number)


def _write_group(work: Work, group: Group, folder: Path) -> None:
    shards = []
    writer = ShardWriter(folder, 0)
    try:
        for task in group.ranges:
            with read_ahead(work.corpus, task, images=True):
                for document in _left(work, task):
                    _copy_document(writer, document)
            if writer.num_documents and (_is_full(writer) or task is group.ranges[-1]):
                similarities = writer.has_similarities
                files, counts = writer.finish()
                record = {"kind": group.kind, "number": writer.number, "has_similarities": similarities}
                shards.append({**record, "files": files, "counts": counts})
                writer = ShardWriter(folder, len(shards))
    finally:
        writer.abort()
    count = sum(task.last - task.first for task in group.ranges)
    write_file(folder / RECORD, json.dumps(vars(Part(group.number, 0, True, count, shards))).encode())


def _is_full(writer: ShardWriter) -> bool:
    return (
        writer.num_documents >= SHARD_DOCUMENTS or writer.num_pieces >= PART_PIECES or writer.num_images >= PART_IMAGES
    )


def _left(work: Work, task: Range) -> Iterator[Source]:
    """The documents of a range that stay, without what was removed from them."""
    table = read_table(
        work.folder / recorded(work.folder, task.number).name / REMOVED_FILE, columns=["document", "item"]
    )
    gone: dict[int, list[int]] = {}
    for number, item in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        gone.setdefault(number, []).append(item)
    matches = matches_of(work, task)
    for document in documents(work.corpus, task):
        items = gone.get(document.number, ())
        if WHOLE in items:
            continue
        document.without(items)
        if matches is not None:
            document.matches = matches.get(document.number, {})
        yield document


def _copy_document(writer: ShardWriter, document: Source) -> None:
    """Token ids and encoded images as they are; matches by the numbers that the texts have now."""
    shard = document.shard
    texts = document.kept_texts
    if len(texts) == len(document.kept):
        ids = [document.ids(item).tobytes() for item in texts]
        writer.add_text_documents(b"".join(ids), [len(piece) // 4 for piece in ids], [len(ids)], [document.name])
        return
    numbers = {document.number_of_text[item]: number for number, item in enumerate(texts)}
    for item in document.kept:
        if document.is_text[item]:
            writer.add_texts([document.ids(item).tobytes()])
            continue
        j, (similarity, matched) = document.image(item), document.match(item)
        writer.add_image(
            bytes(shard.image(j)),
            int(shard.image_width[j]),
            int(shard.image_height[j]),
            FORMATS[shard.image_format[j]],
            similarity,
            None if matched < 0 else numbers[matched],
        )
    writer.end_document(document.name)
