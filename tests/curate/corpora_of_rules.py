"""A corpus of known documents for the tests of curate, and what it holds, read independently of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data import writers
from data.helpers import TOKENIZER
from PIL import Image as Pillow

from megatron_lcl.data.corpus import store
from megatron_lcl.data.corpus.corpus_manifest import read_manifest
from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.prepare.preprocess import preprocess


def picture(seed: int, width: int = 40, height: int = 30, format: str = "PNG") -> bytes:
    """An image of its own bytes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).resize((width, height), Pillow.Resampling.NEAREST).save(out, format)
    return out.getvalue()


def write(folder: Path, documents: Sequence[Document], **options: Any) -> Path:
    """A corpus of the documents; in shards of a few where `task_bytes` and `shard_documents` say so."""
    writers.write_jsonl(documents, folder / "in")
    preprocess("jsonl", folder / "in", folder / "corpus", tokenizer=TOKENIZER, **options)
    return folder / "corpus"


def manifests_read(patch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the corpora whose manifests are read from now on, a folder each time."""
    read = []

    def noted(folder: Path, *arguments: Any) -> dict[str, Any]:
        read.append(folder)
        return read_manifest(folder, *arguments)

    patch.setattr(store, "read_manifest", noted)
    return read


@contextmanager
def computing_in_one_thread() -> Iterator[None]:
    """Fails where a module of torch computes in more threads meanwhile, none does, or torch has other ones afterwards:
    they change the last bits of what rules find."""
    before, used = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        with torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, given: used.add(torch.get_num_threads())
        ):
            yield
        assert (used, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)


def contents(corpus: Corpus) -> list[tuple[Any, ...]]:
    """Of each document name, kind, and items: ids of a text, or bytes, sides and format, similarity and match."""
    found: list[tuple[Any, ...]] = []
    for shard, kind in zip(corpus.shards, corpus.kinds, strict=True):
        placement = 0
        for local in range(shard.num_documents):
            items: list[tuple[Any, ...]] = []
            for k in range(*shard.document_offsets[local : local + 2].tolist()):
                piece = shard.piece(k)
                if isinstance(piece, int):
                    similarity = float(shard.similarity[placement])
                    arrays = (shard.image_width, shard.image_height, shard.image_format)
                    sides = tuple(int(array[piece]) for array in arrays)
                    match = (None if similarity != similarity else similarity, int(shard.matched_text[placement]))
                    items.append((bytes(shard.image(piece)), sides, match))
                    placement += 1
                else:
                    items.append(tuple(piece.tolist()))
            found.append((corpus.name(int(corpus.document_starts[shard.number]) + local), kind, items))
    return found


def removed(folder: Path) -> list[tuple[int, int, str]]:
    """(document, item, rule) of every removal."""
    table = read_table(folder / "removed.parquet")
    return list(zip(*(table[name].to_pylist() for name in ("document", "item", "rule")), strict=True))


def left(source: Path, folder: Path) -> list[tuple[Any, ...]]:
    """What the record of removals leaves of the source, with matches by the texts' new numbers."""
    gone = {(document, item) for document, item, _ in removed(folder)}
    found = []
    for number, (name, kind, items) in enumerate(contents(open_corpus(source))):
        if (number, -1) in gone:
            continue
        texts = [k for k, item in enumerate(items) if not isinstance(item[0], bytes)]
        kept_texts = [k for k in texts if (number, k) not in gone]
        kept: list[tuple[Any, ...]] = []
        for k, item in enumerate(items):
            if (number, k) in gone:
                continue
            if isinstance(item[0], bytes) and item[2][1] >= 0:
                similarity, matched = item[2]
                item = (*item[:2], (similarity, kept_texts.index(texts[matched])))
            kept.append(item)
        found.append((name, kind, kept))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read(folder: Path) -> list[tuple[Any, ...]]:
    return contents(open_corpus(folder))
