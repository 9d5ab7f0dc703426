"""The emoji of `demo` as corpora; labeled pictures of its sets, divided into validation and test.

OUTPUT/corpora/emoji-{labels,contexts,pairs}   what is trained on
OUTPUT/corpora/emoji-heldout                   documents of held-out pictures, none of them of the validation split
OUTPUT/evaluate/SET-kinds                      train, validation, test: kinds as classes
OUTPUT/evaluate/SET-names                      test: pictures of the held-out artist, names as classes
OUTPUT/evaluate/digits                         train, test: handwritten digits, of scikit-learn
OUTPUT/sources.json                            of the sets, written last

A fifth of the held-out pictures, by a hash of their bytes, is the validation split. The others are the test split.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from PIL import Image as Pillow

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.demo.write import (
    DOCUMENTS,
    EVALUATE,
    SOURCES,
    TRAINING,
    Labeled,
    training_texts,
    write_labeled,
    write_sources,
)
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.filesystem import is_file
from megatron_lcl.machine import num_cores

TRAINED = "emoji"
SETS = (TRAINED, "things")
CORPORA = "corpora"
KINDS = tuple(f"{name}-kinds" for name in SETS)
NAMES = tuple(f"{name}-names" for name in SETS)
HELD_OUT = f"{TRAINED}-heldout"
DIGITS = "digits"
VALIDATION = 0.2
"""share of the held-out pictures"""
PROBE_IMAGES = 2000
"""of a split at most, chosen by a hash: probes are trained and tested for each of many encoders"""
_VOCAB_SIZE = 2048
_DIGITS_TRAIN = 1200
"""of 1,797; those that follow are by other writers for the most part"""
_RULES = 3
"""counted up when the same sets give other data than before"""


def prepare(sets: Path, output: Path) -> None:
    """Make all of it from the folders `sets`/emoji and `sets`/things; what is there already stays.

    UserError where `output` was made of other sets.
    """
    made_of: dict[str, Any] = {"rules": _RULES}
    made_of |= {name: json.loads((sets / name / SOURCES).read_text(encoding="utf-8")) for name in SETS}
    if is_file(output / SOURCES):
        if json.loads((output / SOURCES).read_text(encoding="utf-8")) == made_of:
            return
        raise UserError(f"{output} was made of other sets than those in {sets}; give a new --output")
    _write_digits(output / EVALUATE / DIGITS)
    for name in SETS:
        _write_kinds(sets / name, output / EVALUATE / f"{name}-kinds")
        _write_names(sets / name, output / EVALUATE / f"{name}-names")
    source = sets / TRAINED
    files = {kind: source / DOCUMENTS / f"{kind}.jsonl" for kind in TRAINING}
    tokenizer = train_sentencepiece(training_texts(source), _VOCAB_SIZE)
    files["heldout"] = _write_held_out(source, output / DOCUMENTS / f"{HELD_OUT}.jsonl")
    for kind, file in files.items():
        summary = preprocess(
            "jsonl",
            file,
            output / CORPORA / f"{TRAINED}-{kind}",
            images=source / DOCUMENTS,
            tokenizer=tokenizer,
            source={"demo": TRAINED, "packages": made_of[TRAINED]["packages"]},
            workers=min(2, num_cores()),
        )
        print(summary, flush=True)
    write_sources(output, made_of)


def in_validation(data: bytes) -> bool:
    """Whether a held-out picture with these bytes is of the validation split."""
    return xxhash.xxh3_64_intdigest(data) < VALIDATION * 2.0**64


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write_held_out(source: Path, file: Path) -> Path:
    """The held-out documents that have no picture of the validation split."""
    folder = source / DOCUMENTS
    kept = [
        record
        for record in _records(folder / "heldout.jsonl")
        if not any(in_validation((folder / item["image"]).read_bytes()) for item in record["items"] if "image" in item)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
    os.utime(file, (0, 0))  # the corpus's manifest tells its input by it
    return file


def _labeled(images: ImageSet) -> list[Labeled]:
    """All pictures of a set, in the order of a hash."""
    labels, captions = images.need_labels(), images.need_captions()
    found = []
    for blob, label, texts in zip(images.images, labels, captions, strict=True):
        data = blob.read()
        digest = xxhash.xxh3_64_hexdigest(f"{blob.name.rpartition(':')[2]} ".encode() + data)
        found.append(Labeled(digest, data, int(label), texts[0]))
    return sorted(found, key=lambda picture: picture.stem)


def _divided(pictures: Sequence[Labeled]) -> tuple[list[Labeled], list[Labeled]]:
    """Validation, test."""
    return [p for p in pictures if in_validation(p.data)], [p for p in pictures if not in_validation(p.data)]


def _write_kinds(source: Path, folder: Path) -> None:
    train, held_out = (open_images(source / EVALUATE / "kinds", split) for split in ("train", "test"))
    validation, test = _divided(_labeled(held_out))
    splits = {"train": _labeled(train), "validation": validation, "test": test}
    write_labeled(folder, {name: pictures[:PROBE_IMAGES] for name, pictures in splits.items()}, train.classes)


def _write_names(source: Path, folder: Path) -> None:
    images = open_images(source / EVALUATE / "artist-distinct", "test")
    _, test = _divided(_labeled(images))
    left = sorted({p.label for p in test})
    test = [Labeled(p.stem, p.data, left.index(p.label), p.caption) for p in test]
    write_labeled(folder, {"test": test}, [images.classes[label] for label in left])


def _write_digits(folder: Path) -> None:
    """8 x 8 pixels of 17 levels, each pixel as 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = []
    for number, (levels, label) in enumerate(zip(found.images, found.target, strict=True)):
        pixels = np.kron((levels * 255 / 16).round().astype(np.uint8), np.ones((8, 8), np.uint8))
        png = io.BytesIO()
        Pillow.fromarray(pixels).save(png, "PNG")
        pictures.append(Labeled(f"{number:04d}", png.getvalue(), int(label), str(label)))
    splits = {"train": pictures[:_DIGITS_TRAIN], "test": pictures[_DIGITS_TRAIN:]}
    write_labeled(folder, splits, [str(digit) for digit in range(10)])
