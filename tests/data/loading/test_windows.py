"""Windows of many documents, of which only the sizes are known: how large they are, and that their packs are alike."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading import ledger as ledgers
from megatron_lcl.data.loading import pack_index
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.data.loading.source import VERSION

P = 4


class Sizes:
    """A corpus of which only the sizes of documents are known."""

    def __init__(self, number: int, documents: int) -> None:
        self.key = number
        self.tokens = np.random.default_rng(number).integers(100, 900, documents).astype(np.int32)
        self.mean_tokens = float(self.tokens.mean())

    def sizes(self, documents: np.ndarray, epoch: int, ranges: np.ndarray) -> np.ndarray:
        numbers, zeros = np.arange(len(documents)), np.zeros(len(documents), np.int32)
        return np.stack([numbers, zeros, self.tokens[documents], zeros], 1).astype(np.int32)


def test_chunks_of_many_corpora_are_not_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64, one gives half of the tokens: a window, in which each has as many documents at most, is 32,000."""
    names = [f"{n:032x}" for n in range(64)]
    weights = [63.0, *[1.0] * 63]
    blend = [{"path": n, "fingerprint": n, "weight": w} for n, w in zip(names, weights, strict=True)]
    data = Data(tuple(Corpus(name) for name in names), tokens_per_pack=8192, images_per_pack=1, cache=str(tmp_path))
    settings = ledgers._settings_of(data, P, 8192, INTERLEAVED) | {"version": 2}
    ledger = Ledger(settings, ({"from_pack": 0, "blend": blend},))
    sources = {name: Sizes(n, 50_000 if n else 1_000_000) for n, name in enumerate(names)}
    monkeypatch.setattr(PackIndex, "source", lambda _, wanted: sources[wanted])
    monkeypatch.setattr(pack_index, "FIRST_CHUNK", 1 << 40)  # the first is as the ones behind a million documents
    index = PackIndex(data, ledger)
    index.prepare(0)
    (chunk,) = index.chunks
    documents = json.loads((chunk.folder / "chunk.json").read_text())["documents"]
    assert 500_000 < documents < 600_000
    assert len(json.dumps(chunk.end)) < 110 * 64, "bytes of a state"


class Books(Sizes):
    """Each document is cut into 100 sequences."""

    def sizes(self, documents: np.ndarray, epoch: int, ranges: np.ndarray) -> np.ndarray:
        found = np.zeros((100 * len(documents), 4), np.int32)
        found[:, 0] = np.repeat(np.arange(len(documents), dtype=np.int32), 100)
        found[:, 1] = np.tile(np.arange(100, dtype=np.int32), len(documents))
        found[:, 2] = 1000 + found[:, 1]
        return found


def test_a_window_of_long_documents_takes_a_hundred_bytes_a_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has up to 10^6 documents, whatever their length."""
    data = Data((Corpus("0" * 32),), tokens_per_pack=2048, images_per_pack=1, cache=str(tmp_path))
    settings = ledgers._settings_of(data, P, 2048, INTERLEAVED) | {"version": VERSION}
    ledger = Ledger(settings, ({"from_pack": 0, "blend": [{"path": "", "fingerprint": "0" * 32, "weight": 1.0}]},))
    source = Books(0, 1000)
    monkeypatch.setattr(PackIndex, "source", lambda *_: source)
    PackIndex(replace(data, cache=str(tmp_path / "compiles")), ledger).prepare(0)
    tracemalloc.start()
    try:
        PackIndex(data, ledger).prepare(0)
        assert tracemalloc.get_traced_memory()[1] < 100 * 100_000
    finally:
        tracemalloc.stop()


class HeavyTailed(Sizes):
    """Texts of log-normal lengths with this median, and one to six images whatever their length."""

    def __init__(self, number: int, documents: int, median: int) -> None:
        super().__init__(number, documents)
        rng = np.random.default_rng(number)
        self.images = np.clip(rng.poisson(2.4, documents) + 1, 1, 6).astype(np.int32)
        text = rng.lognormal(np.log(median), 0.9, documents)
        self.tokens = np.clip(text + 51 * self.images + 2, 60, 8192).astype(np.int32)
        self.mean_tokens = float(self.tokens.mean())

    def sizes(self, documents: np.ndarray, epoch: int, ranges: np.ndarray) -> np.ndarray:
        found = super().sizes(documents, epoch, ranges)
        found[:, 3] = self.images[documents]
        return found


def test_what_packs_hold_does_not_depend_on_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two corpora, one with longer documents: the means of each tenth of a window within 4.5 standard errors."""
    names = ["0" * 32, "1" * 32]
    blend = [{"path": n, "fingerprint": n, "weight": 1.0} for n in names]
    data = Data(tuple(Corpus(n) for n in names), tokens_per_pack=8192, images_per_pack=32, cache=str(tmp_path))
    settings = ledgers._settings_of(data, 49, 8192, INTERLEAVED) | {"version": VERSION}
    sources = {names[0]: HeavyTailed(0, 12_000, 300), names[1]: HeavyTailed(1, 12_000, 600)}
    monkeypatch.setattr(PackIndex, "source", lambda _, wanted: sources[wanted])

    def drift(version: int) -> float:
        ledger = Ledger({**settings, "version": version}, ({"from_pack": 0, "blend": blend},))
        index = PackIndex(data, ledger)
        index.prepare(0)
        folder = index.chunks[0].folder
        entries, offsets = np.load(folder / "entries.npy"), np.load(folder / "offsets.npy")
        of = [entries["corpus"] == c for c in (0, 1)]
        each = np.zeros((4, len(entries)))  # sequences, tokens, images, and tokens of one corpus
        each[0] = 1
        for mine, source in zip(of, sources.values(), strict=True):
            each[1, mine] = source.tokens[entries["document"][mine]]
            each[2, mine] = source.images[entries["document"][mine]]
        each[3] = each[1] * of[0]
        packs = np.add.reduceat(each, offsets[:-1], axis=1)
        packs = packs[:, : len(packs[0]) // 10 * 10]
        means = packs.reshape(4, 10, -1).mean(2)
        errors = packs.std(1) * np.sqrt(0.9 / (packs.shape[1] / 10))
        return float((np.abs(means - packs.mean(1)[:, None]) / errors[:, None]).max())

    assert drift(VERSION) < 4.5
    assert drift(2) > 9
