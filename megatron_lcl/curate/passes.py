"""The two passes over a corpus, a range of documents at a time: `judge` decides on single items, `decide` on documents.

A task leaves a folder in the work folder, put there complete under its name, so one that was killed is done again and
any number of processes may do the same tasks. What is written depends on the range alone.
"""

from __future__ import annotations

import functools
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_lcl.curate.documents import Range, Source, documents, read_ahead
from megatron_lcl.curate.first_rule import Removal, first_rules
from megatron_lcl.curate.joins import REMOVED as JOINED
from megatron_lcl.curate.joins import Join, Matching, Places
from megatron_lcl.curate.languages import context_of
from megatron_lcl.curate.measures import Measured
from megatron_lcl.curate.names import Form
from megatron_lcl.curate.settings import Rule, Settings, files_of, rules_of
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder, waiting_for_others
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.data.prepare.preprocess_task import RECORD, Part, parts_of
from megatron_lcl.filesystem import exists

WHOLE = -1
"""in place of an item: the whole document"""
EMPTY, UNMATCHED = "document.empty", "image.matched_text"
"""rules that are always on: of a document nothing is left; the text that an image is matched to was removed"""
REMOVED = pa.schema(
    [
        ("document", pa.int64()),
        ("item", pa.int32()),
        ("rule", pa.dictionary(pa.int32(), pa.string())),
        ("value", pa.float64()),
        ("name", pa.string()),
        ("matched", pa.string()),
    ]
)
"""of the corpus's file `removed.parquet`"""
REMOVED_FILE, COUNTED_FILE = "removed.parquet", "counted.json"
"""of what `decide` leaves of a range: what it lost; counts by rule and samples"""
_JUDGED = pa.schema([("document", pa.int64()), ("item", pa.int32()), ("rule", pa.string()), ("value", pa.float64())])
_JUDGED_FILE = "items.parquet"
SAMPLES = 6
"""of each rule, unless another number is given; those whose hash is smallest, so that they are the same whoever removes
what"""
_SAMPLE_CHARACTERS, _SAMPLE_PARTS, _THUMBNAIL = 1200, 8, 240


class Row(NamedTuple):
    """A row of `removed.parquet`."""

    document: int
    item: int
    rule: str
    value: float
    name: str
    matched: str


@dataclass(frozen=True)
class Work:
    """What all tasks of a run have in common. Picklable."""

    corpus: Corpus
    settings: Settings
    joins: tuple[Join, ...]
    folder: Path
    """the work folder"""
    samples: int = SAMPLES
    """of each rule; 0: nothing that is written says more of what was removed than its number"""

    def facts(self, task: int, join: int) -> Path:
        """The file of what a join wants to know of a task's documents."""
        wanted = [each.facts_of for each in self.joins]
        return self._judged(task) / f"facts-{wanted.index(wanted[join])}"

    def prepared(self, join: int) -> Path:
        """The folder of what a join needs beside the corpus."""
        return self.folder / f"prepared-{join}"

    def joined(self, join: int) -> Path:
        """The file of what a join removes."""
        return self.folder / f"joined-{join}.parquet"

    def judged_items(self, task: int) -> Path:
        return self._judged(task) / _JUDGED_FILE

    def _judged(self, task: int) -> Path:
        return self.folder / f"judged-{task:06d}"


@contextmanager
def once(work: Work, target: Path) -> Iterator[Path | None]:
    """A new folder that is put in place at the end; None where that is done already."""
    with waiting_for_others(work.folder / f"lock-{target.name}"), scratch_folder(work.folder) as scratch:
        if exists(target):
            yield None
            return
        folder = scratch / target.name
        folder.mkdir()
        yield folder
        put_in_place(folder, target)


# --- pass 1: single items ----------------------------------------------------------------------------------------


def judge(work: Work, task: Range) -> int:
    """Decide on every text and image of a range alone, and collect what the joins want of those that stay.

    Returns how many items are removed.
    """
    folder = work.judged_items(task.number).parent
    with once(work, folder) as scratch:
        if scratch is not None:
            images = any(not isinstance(join, Places) for join in work.joins)
            with read_ahead(work.corpus, task, images):
                _judge(work, task, scratch)
    return pq.read_metadata(folder / _JUDGED_FILE).num_rows


def _judge(work: Work, task: Range, folder: Path) -> None:
    rows: list[tuple[int, int, str, float]] = []
    gone: dict[int, set[int]] = {}

    def remove(document: int, item: int, removal: Removal | None) -> None:
        if removal:
            gone.setdefault(document, set()).add(item)
            rows.append((document, item, removal.rule, removal.value))

    context, images = context_of(work.settings), rules_of(work.settings, "image")

    def texts() -> Iterator[tuple[tuple[int, int], Measured]]:
        for document in documents(work.corpus, task):
            for item, is_text in enumerate(document.is_text):
                if is_text:
                    yield (document.number, item), Measured(functools.partial(document.text, item), context)
                else:
                    remove(document.number, item, _first_of_image(images, document, item))

    for (number, item), removal in first_rules(rules_of(work.settings, "text"), texts()):
        remove(number, item, removal)
    rows.sort()
    for number, join in enumerate(work.joins):
        file = folder / work.facts(task.number, number).name
        if not exists(file):
            join.facts(work.corpus, task, gone, file, work.prepared(number))
    columns = list(map(list, zip(*rows, strict=True))) or [[] for _ in _JUDGED]
    pq.write_table(pa.table(columns, schema=_JUDGED), folder / _JUDGED_FILE, compression="zstd")


def _first_of_image(rules: Sequence[Rule], document: Source, item: int) -> Removal | None:
    shard, j = document.shard, document.image(item)
    sides = sorted((int(shard.image_width[j]), int(shard.image_height[j])))
    for rule in rules:
        match rule.field:
            case "formats":
                number = int(shard.image_format[j])
                if FORMATS[number] not in rule.threshold:
                    return Removal(rule.name, float(number))
                continue
            case "min_side":
                value: float | np.float32 = sides[0]
            case "max_side":
                value = sides[1]
            case "max_aspect":
                value = sides[1] / sides[0]
            case "min_similarity":
                value = shard.similarity[document.placement(item)]  # NumPy compares it as the float32 that it is
            case _:
                continue  # of the whole corpus, or of what all others leave of a document
        if rule.breaks(value):
            return Removal(rule.name, float(value))
    return None


# --- pass 2: documents -------------------------------------------------------------------------------------------


@dataclass
class Counted:
    """What was removed, by rule."""

    removed: dict[str, list[int]] = field(default_factory=dict)
    """texts, images, documents; of documents that are removed whole, the texts and images that were left in them"""
    samples: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    """a few of each rule, with the hashes by which they are chosen, the smallest first"""

    def add(self, rule: str, texts: int = 0, images: int = 0, documents: int = 0) -> None:
        counts = self.removed.setdefault(rule, [0, 0, 0])
        for k, count in enumerate((texts, images, documents)):
            counts[k] += count

    def merge(self, other: Counted, num_samples: int) -> None:
        for rule, counts in other.removed.items():
            self.add(rule, *counts)
        for rule, samples in other.samples.items():
            both = [*self.samples.get(rule, ()), *samples]
            self.samples[rule] = heapq.nsmallest(num_samples, both, key=lambda sample: sample[0])


def decide(work: Work, task: Range) -> Counted:
    """Decide on every document of a range by what is left of it; returns what was removed, by this and before."""
    folder = work.folder / Part(task.number, 0, True, 0).name
    with once(work, folder) as scratch:
        if scratch is not None:
            with read_ahead(work.corpus, task, images=False):
                _decide_range(work, task, scratch)
    return Counted(**json.loads((folder / COUNTED_FILE).read_bytes()))


def names_found(work: Work, task: Range) -> set[Form]:
    """What of the list of excluded names matches documents of a range, also those that other rules remove."""
    listed, names = context_of(work.settings).excluded_names, work.corpus.shard(task.shard).names
    assert names is not None  # `curate` checks it
    return {form for name in names.between(task.first, task.last) for form in listed.matching(name)}


def recorded(folder: Path, number: int) -> Part:
    """The record of a range, or a group of them. FileNotFoundError where there is none, as where another job has
    finished the corpus and deletes it."""
    for part in parts_of(folder, number):
        return part
    raise FileNotFoundError(folder)


def _decide_range(work: Work, task: Range, folder: Path) -> None:
    rules, thresholds = rules_of(work.settings, "document"), thresholds_of(work.settings, work.joins)
    counted, drops = Counted(), Drops()
    rows: list[Row] = []

    def add_row(document: Source, item: int, removal: Removal) -> None:
        name, matched = (document.name, removal.matched) if work.samples else ("", "")
        rows.append(Row(document.number, item, removal.rule, removal.value, name, matched))

    for (document, gone, whole), of_document in first_rules(rules, _left(work, task)):
        whole = whole or of_document
        for item, removal in sorted(gone.items()):
            is_text = document.is_text[item]
            counted.add(removal.rule, texts=is_text, images=not is_text)
            sample, reason = document.text(item) if is_text else "", _reason(removal.rule, thresholds)
            drops.left_out("text" if is_text else "image", reason, document.name, sample=sample)
            add_row(document, item, removal)
        if whole is not None:
            counted.add(whole.rule, len(document.kept_texts), len(document.kept_images), 1)
            drops.left_out("document", _reason(whole.rule, thresholds), document.name)
            add_row(document, WHOLE, whole)
    columns = list(map(list, zip(*rows, strict=True))) or [[] for _ in REMOVED]
    pq.write_table(pa.table(columns, names=REMOVED.names).cast(REMOVED), folder / REMOVED_FILE, compression="zstd")
    counted.samples = _samples(work, task, rows)
    write_file(folder / COUNTED_FILE, json.dumps(vars(counted)).encode())
    part = Part(task.number, 0, True, task.last - task.first, drops=drops.to_dict())
    write_file(folder / RECORD, json.dumps(vars(part)).encode())


def _left(
    work: Work, task: Range
) -> Iterator[tuple[tuple[Source, dict[int, Removal], Removal | None], Measured | None]]:
    """The documents of a range without what was removed so far, with the removals of items and of the whole, and what
    the rules of documents are to measure."""
    removals, matches, context = _removals(work, task), matches_of(work, task), context_of(work.settings)
    again = [rule for rule in rules_of(work.settings, "image") if rule.field == "max_in_document"]
    for document in documents(work.corpus, task):
        gone = removals.pop(document.number, {})
        whole = gone.pop(WHOLE, None)
        document.without(list(gone))
        if matches is not None:
            document.matches = matches.get(document.number, {})
        gone |= _unmatched(document)
        document.without(list(gone))
        for rule in again:
            gone |= _repeated(document, rule)
            document.without(list(gone))
        if whole is None and not document.kept:
            whole = Removal(EMPTY, 0.0)
        texts = document.kept_texts
        read = functools.partial(_text_of, document, texts)
        images = len(document.kept) - len(texts)
        measured = Measured(read, context, images, len(texts), document.name, is_document=True)
        yield (document, gone, whole), None if whole else measured


def _text_of(document: Source, texts: Sequence[int]) -> str:
    return "\n\n".join(map(document.text, texts))


def _removals(work: Work, task: Range) -> dict[int, dict[int, Removal]]:
    """What pass 1 and the joins remove of a range, by document and item; of several that remove one item the first."""
    found: dict[int, dict[int, Removal]] = {}
    table = read_table(work.judged_items(task.number))
    for document, item, rule, value in zip(*(table[name].to_pylist() for name in _JUDGED.names), strict=True):
        found.setdefault(document, {})[item] = Removal(rule, value)
    first = task.start(work.corpus)
    inside = [("document", ">=", first), ("document", "<", first + task.last - task.first)]
    for number, join in enumerate(work.joins):
        table = read_table(work.joined(number), filters=inside)
        columns = (table[name].to_pylist() for name in JOINED.names)
        for document, item, value, matched in zip(*columns, strict=True):
            found.setdefault(document, {}).setdefault(item, Removal(join.rule, value, matched))
    return found


def matches_of(work: Work, task: Range) -> dict[int, dict[int, tuple[float, int]]] | None:
    """New matches of images to texts, by document and item; None where they stay."""
    for number, join in enumerate(work.joins):
        if isinstance(join, Matching):
            return join.matches(work.facts(task.number, number))
    return None


def _unmatched(document: Source) -> dict[int, Removal]:
    """Images whose text is gone; the value is the number of the text."""
    texts = [item for item, is_text in enumerate(document.is_text) if is_text]
    kept, found = set(document.kept), {}
    if len(kept) < len(document.is_text):
        for item in document.kept_images:
            _, matched = document.match(item)
            if matched >= 0 and texts[matched] not in kept:
                found[item] = Removal(UNMATCHED, float(matched))
    return found


def _repeated(document: Source, rule: Rule) -> dict[int, Removal]:
    """Images whose bytes stand in the document too often before; the value is which of these places it is, from 1.

    After all other rules of images, as OBELICS does it (build_obelics/13_final_processing.py, by their URLs).
    """
    places: Counter[bytes] = Counter()
    found = {}
    for item in document.kept_images:
        digest = document.shard.image_xxh3[document.image(item)].tobytes()
        places[digest] += 1
        if rule.breaks(places[digest]):
            found[item] = Removal(rule.name, float(places[digest]))
    return found


def thresholds_of(settings: Settings, joins: Sequence[Join]) -> dict[str, Any]:
    """Of all rules that are on, in the order in which they are tried, by name; None: it has none, or is a file, of
    which the recipe has the hash, and whose path may say something of what is in it."""
    found: dict[str, Any] = {}
    for section in ("image", "text"):
        found |= {rule.name: rule.threshold for rule in rules_of(settings, section)}
    found |= {join.rule: join.threshold for join in joins}
    found |= {UNMATCHED: None, EMPTY: None}
    found |= {rule.name: rule.threshold for rule in rules_of(settings, "document")}
    return found | {name: None for name, _ in files_of(settings) if name in found}


def threshold_text(threshold: Any) -> str:
    """A threshold as it is read."""
    if isinstance(threshold, tuple | list):
        return ", ".join(map(str, threshold))
    return "" if threshold is None else f"{threshold:g}" if isinstance(threshold, float) else str(threshold)


def _reason(rule: str, thresholds: dict[str, Any]) -> str:
    return f"{rule} {threshold_text(thresholds[rule])}".rstrip()


def _samples(work: Work, task: Range, rows: Sequence[Row]) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Of each rule those removals whose hash is smallest, with what was removed."""
    by_rule: dict[str, list[Row]] = {}
    gone: dict[int, set[int]] = {}
    for row in rows:
        by_rule.setdefault(row.rule, []).append(row)
        gone.setdefault(row.document, set()).add(row.item)
    chosen: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for rule, found in sorted(by_rule.items()):
        hashed = ((xxhash.xxh3_64_intdigest(b"%d %d" % (row.document, row.item)) >> 1, row) for row in found)
        chosen[rule] = [
            (number, {**row._asdict(), "parts": _parts(work.corpus, task, row.document, row.item, gone[row.document])})
            for number, row in heapq.nsmallest(work.samples, hashed)
        ]
    return chosen


def _parts(corpus: Corpus, task: Range, document: int, item: int, gone: set[int]) -> list[dict[str, str]]:
    """What was removed, as a page shows it: the item, or of a whole document what was left of it."""
    shard = corpus.shard(task.shard)
    source = Source(corpus, shard, document - int(corpus.document_starts[task.shard]), "")
    items = [item] if item != WHOLE else [other for other in source.kept if other not in gone]
    parts = []
    for number in items[:_SAMPLE_PARTS]:
        if source.is_text[number]:
            text = source.text(number)
            parts.append({"text": text[:_SAMPLE_CHARACTERS] + "…" * (len(text) > _SAMPLE_CHARACTERS)})
        else:
            j = source.image(number)
            size = f"{shard.image_width[j]} × {shard.image_height[j]}, {FORMATS[shard.image_format[j]]}"
            parts.append({"image": thumbnail(shard.image(j), _THUMBNAIL), "caption": size})
    if len(items) > _SAMPLE_PARTS:
        parts.append({"text": f"… and {len(items) - _SAMPLE_PARTS} more"})
    return parts
