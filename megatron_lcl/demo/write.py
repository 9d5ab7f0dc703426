"""A data set's files: pictures, documents, licenses, corpora, and labeled pictures for `evaluate`.

OUTPUT/documents/   labels.jsonl, contexts.jsonl, pairs.jsonl, heldout.jsonl and their pictures
OUTPUT/corpora/     labels, contexts, pairs, heldout: corpora of the same tokenizer
OUTPUT/evaluate/    artist, artist-distinct, names, names-distinct, kinds: for `evaluate --data`
OUTPUT/LICENSES     who made what under which license
OUTPUT/sources.json the packages and counts, written last
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl.data.corpus.files import replace_text, sync, sync_all
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.prepare.export_corpus import add_file
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.demo import documents
from megatron_lcl.demo.documents import Record
from megatron_lcl.demo.licenses import LICENSES, License, license_text
from megatron_lcl.demo.packages import Fetched
from megatron_lcl.demo.pictures import Picture
from megatron_lcl.demo.split import Split, split
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists

DOCUMENTS, CORPORA, EVALUATE, SOURCES = "documents", "corpora", "evaluate", "sources.json"
TRAINING, HELD_OUT = ("labels", "contexts", "pairs"), "heldout"
"""documents, and the corpora of them"""
RULES = 1
"""counted up when the same packages give other documents than before"""


@dataclass(frozen=True)
class DataSet:
    """Pictures and how they become documents."""

    name: str
    pictures: Sequence[Picture]
    licenses: Sequence[License]
    held_out_artist: str
    held_out_names: float
    """share of the names that no artist's picture of is trained on"""
    vocab_size: int
    max_words: int
    """of the descriptions in one document"""
    more: Callable[[Sequence[Picture]], Iterable[Record]] = lambda pictures: ()
    """further documents of the kind contexts from some of the pictures"""


def is_written(output: Path, packages: Sequence[Fetched]) -> bool:
    """Whether the folder holds this data set of these packages, whole. UserError where it holds another one's."""
    try:
        sources = json.loads((output / SOURCES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    if sources.get("rules") == RULES and sources.get("packages") == [fetched.source for fetched in packages]:
        return True
    raise UserError(f"{output} was made of other packages or by another version's rules; give a new folder")


def write(
    data: DataSet,
    packages: Sequence[Fetched],
    output: Path,
    workers: int = 1,
    learn: Callable[[Sequence[str]], Tokenizer] | None = None,
) -> None:
    """Write everything; what is there already and the same stays. The bytes depend on the packages alone.

    learn: makes the corpora's tokenizer of the texts to train on, in place of `data.vocab_size` ids of SentencePiece.
    """
    parts = split(data.pictures, data.held_out_artist, data.held_out_names)
    folder = output / DOCUMENTS
    for picture in data.pictures:
        _write(folder / picture.file, picture.data)
    records = {
        "labels": list(_labels(data, parts.training)),
        "contexts": list(_contexts(data, parts.training)),
        "pairs": [documents.pair(p) for p in sorted(parts.training, key=lambda p: p.key)],
        HELD_OUT: [*_labels(data, parts.distinct), *_contexts(data, parts.distinct)],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        _write(folder / f"{name}.jsonl", text.encode())
        os.utime(folder / f"{name}.jsonl", (0, 0))  # the corpora's manifests tell their input by it
    replace_text(output / LICENSES, license_text(data.name, data.licenses))
    _write_evaluation(data, parts, output / EVALUATE)
    texts = training_texts(output)
    tokenizer = learn(texts) if learn else train_sentencepiece(texts, data.vocab_size)
    license = " AND ".join(sorted({entry.spdx for entry in data.licenses}))
    for name in records:
        summary = preprocess(
            "jsonl",
            folder / f"{name}.jsonl",
            output / CORPORA / name,
            images=folder,
            tokenizer=tokenizer,
            source={"demo": data.name, "license": license, "packages": _names(packages)},
            workers=workers,
        )
        print(summary, flush=True)
    counts = _counts(data, parts, records)
    sources = {"demo": data.name, "rules": RULES, "packages": [f.source for f in packages], "counts": counts}
    write_sources(output, sources)


def write_sources(output: Path, sources: Mapping[str, Any]) -> None:
    """`sources.json`, by which a data set is taken for whole, once all else of it is on the disk."""
    for name in (DOCUMENTS, CORPORA, EVALUATE):  # in `output` may lie what is not ours
        if exists(output / name):
            sync_all(output / name)
    sync(output)
    replace_text(output / SOURCES, json.dumps(sources, indent=1))


def summary(output: Path) -> str:
    """What `sources.json` says, for a terminal."""
    counts = json.loads((output / SOURCES).read_text(encoding="utf-8"))["counts"]
    lines = [
        f"{counts['pictures']:,} pictures of {counts['names']:,} names by {len(counts['artists'])} artists: "
        f"{counts['training']:,} of {counts['trained names']:,} names to train on, {counts['held out']:,} held out "
        f"(all of {counts['held-out artist']}); {counts['near-duplicates']:,} of them have a near-duplicate in training"
    ]
    for name, entry in counts["evaluate"].items():
        lines.append(
            f"  {output / EVALUATE / name}: {entry['pictures']:,} pictures of {entry['classes']:,} classes, "
            f"chance {1 / entry['classes']:.2%}"
        )
    return "\n".join(lines)


def _labels(data: DataSet, pictures: Sequence[Picture]) -> Iterator[Record]:
    for run in documents.runs(pictures, "labels", data.max_words):
        yield documents.labels(run)


def _contexts(data: DataSet, pictures: Sequence[Picture]) -> Iterator[Record]:
    for run in documents.runs(pictures, "contexts", data.max_words):
        yield documents.contexts(run)
    yield from data.more(pictures)


def training_texts(output: Path) -> list[str]:
    """All texts of the documents in `output` that are trained on."""
    lines = (
        json.loads(line)
        for name in TRAINING
        for line in (output / DOCUMENTS / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    )
    return [item["text"] for line in lines for item in line["items"] if "text" in item]


# --- labeled pictures --------------------------------------------------------------------------------------------


def _write_evaluation(data: DataSet, parts: Split, folder: Path) -> None:
    """WebDatasets as `evaluate.sources` reads them: names as classes, and kinds as classes."""
    for name, pictures in parts.sets().items():
        classes = sorted({p.name for p in pictures})
        splits = {"test": pictures}
        if name == "artist-distinct":  # for k-NN and probes
            known = set(classes)
            splits["train"] = [p for p in parts.training if p.name in known]
        _write_labeled(folder / name, splits, classes, lambda p: p.name)
    kinds = sorted({p.kind for p in parts.training})
    test = [p for p in parts.distinct if p.artist == parts.artist and p.kind in kinds]
    _write_labeled(folder / "kinds", {"train": parts.training, "test": test}, kinds, lambda p: p.kind)


def _write_labeled(
    folder: Path,
    splits: Mapping[str, Sequence[Picture]],
    classes: Sequence[str],
    label: Callable[[Picture], str],
) -> None:
    number = {name: k for k, name in enumerate(classes)}
    labeled = {
        part: [
            Labeled(f"{p.artist}/{p.key}", p.data, number[label(p)], p.name)
            for p in sorted(pictures, key=lambda p: p.key)
        ]
        for part, pictures in splits.items()
    }
    write_labeled(folder, labeled, classes)


@dataclass(frozen=True)
class Labeled:
    """A picture of a labeled set."""

    stem: str
    """its name in the .tar, without the suffix"""
    data: bytes
    """PNG"""
    label: int
    caption: str


def write_labeled(folder: Path, splits: Mapping[str, Sequence[Labeled]], classes: Sequence[str]) -> None:
    """A data set in CLIP_benchmark's layout, a .tar for each split; the same pictures give the same bytes.

    Its template is a name alone, as it stands right before its picture in documents.
    """
    _write(folder / "classnames.txt", "".join(f"{name}\n" for name in classes).encode())
    _write(folder / "zeroshot_classification_templates.txt", b"{c}\n")
    for part, pictures in splits.items():
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for picture in pictures:
                for suffix, data in (
                    ("png", picture.data),
                    ("cls", str(picture.label).encode()),
                    ("txt", picture.caption.encode()),
                ):
                    add_file(tar, f"{picture.stem}.{suffix}", data)
        _write(folder / part / "pictures.tar", content.getvalue())


# --- the rest ----------------------------------------------------------------------------------------------------


def _counts(data: DataSet, parts: Split, records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    sets = parts.sets()
    return {
        "pictures": len(data.pictures),
        "names": len({p.name for p in data.pictures}),
        "artists": {a: sum(p.artist == a for p in data.pictures) for a in sorted({p.artist for p in data.pictures})},
        "training": len(parts.training),
        "trained names": len({p.name for p in parts.training}),
        "held-out artist": parts.artist,
        "held out": len(parts.held_out),
        "near-duplicates": len(parts.near),
        "documents": {name: len(lines) for name, lines in records.items()},
        "evaluate": {
            name: {"pictures": len(pictures), "classes": len({p.name for p in pictures})}
            for name, pictures in sets.items()
        },
    }


def _names(packages: Sequence[Fetched]) -> str:
    return ", ".join(f"{fetched.package.name} {fetched.version}" for fetched in packages)


def _write(file: Path, content: bytes) -> None:
    """Leaves a file alone that has this content; one that a killed run left cut is written again by the next."""
    try:
        if file.stat().st_size == len(content) and file.read_bytes() == content:
            return
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
