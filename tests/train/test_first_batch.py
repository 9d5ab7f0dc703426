"""The micro-batch that a run measures with before its first step."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_corpus import make_corpus

from megatron_lcl import config as configs
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.loading import pack_index
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.parallel.mesh import ALONE, Axis, Mesh
from megatron_lcl.train import first_batch
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.first_batch import build_loader, sample_batch


def test_nothing_is_built_beside_once_the_batch_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the end of a chunk of packs a thread builds the next one, with locks that forked loader processes would find
    held for ever."""
    monkeypatch.setattr(pack_index, "FIRST_CHUNK", 8)
    overrides = {
        "data.corpora": str(make_corpus(tmp_path, 0)),
        "data.cache": str(tmp_path / "cache"),
        "data.tokens_per_pack": "256",
        "model.vision.image_size": "16",
        "model.vision.patch_size": "8",
        "model.language.context_length": "128",
        "train.micro_batch": "1",
    }
    config = configs.load(overrides=overrides)
    ledger = open_run_ledger(config, INTERLEAVED)
    index = PackIndex(config.data, ledger)
    index.prepare(0)
    last = index.chunks[0].stop - 1
    begun: list[threading.Thread] = []
    built, read_on = PackIndex._built, threading.Event()

    def slowly(self: PackIndex, *arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.append(threading.current_thread())
            read_on.wait(0.5)
        return built(self, *arguments)

    monkeypatch.setattr(PackIndex, "_built", slowly)
    point = SimpleNamespace(progress=Progress(last, last, ledger.to_json()), config=config)
    batch = sample_batch(config, Mesh(ALONE, ALONE), point)  # type: ignore[arg-type]
    assert batch.packs == (last,)
    (builder,) = begun
    assert not builder.is_alive()


def test_each_replica_reads_packs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, each of two tensor ranks: processes 0 and 2 read, for both ranks of their replica."""
    monkeypatch.setattr(first_batch, "loader_of", lambda *_, **given: given)
    ledger: Any = SimpleNamespace(reading_at=lambda *_: (SimpleNamespace(global_batch=4), 0))
    config = configs.load(overrides={"parallel.tensor": "2"})
    for process, replica in ((0, 0), (2, 1)):
        world, data, two = Axis(rank=process, size=4), Axis(rank=replica, size=2), Axis(size=2)
        mesh = Mesh(world, data, tensor=two, model_parallel=two)
        given: Any = build_loader(config, mesh, phase_at(config, 0), Progress(0, 0, {}), ledger)
        assert (given["rank"], given["world_size"]) == (replica, 2)
