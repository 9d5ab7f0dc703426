"""`train.measure_kernels`: what is measured, what is chosen, and that a run keeps it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train import fastest, kernels
from megatron_lcl.train.engine import init_processes
from megatron_lcl.train.fastest import Candidate, choose_fastest

PLAIN, COMPILED = Candidate("per_sequence", False), Candidate("per_sequence", True)


@pytest.mark.parametrize(("seconds", "chosen"), [(0.90, COMPILED), (0.96, COMPILED), (0.98, PLAIN), (1.2, PLAIN)])
def test_another_candidate_must_save_more_than_noise(seconds: float, chosen: Candidate) -> None:
    assert fastest.fastest([PLAIN, COMPILED], {str(PLAIN): 1.0, str(COMPILED): seconds}) == chosen


class Time(float):
    def of_step(self, _recompute: bool) -> float:
        return float(self)


class Planted:
    """In place of layers: what they cost, compiled ones half."""

    def __init__(self, specs: Sequence[Any], *_: Any) -> None:
        self.cost = 0.5 if all(make.func.__name__ == "_compiled" for make in specs) else 1.0

    def measure(self) -> float:
        return self.cost

    def times(self, measured: Sequence[float]) -> list[Time]:
        assert len(measured) == fastest.REPEATS
        return [Time(cost) for cost in measured]


def choose(rank: int, cache: str, compilers: Sequence[bool]) -> tuple[str, list[str]]:
    """What a process of two chooses, and what it has measured. compilers: whether each has one."""
    asked = []
    kernels.has_compiler = lambda: compilers[rank]

    class Asked(Planted):
        def __init__(self, specs: Sequence[Any], *more: Any) -> None:
            super().__init__(specs, *more)
            asked.append("compiled" if self.cost < 1 else "plain")

    fastest.LayerSamples = Asked  # type: ignore[misc,assignment]
    config = configs.replace(Case(data=2).config(), data__cache=cache, train__measure_kernels=True)
    mesh = init_processes(config)
    try:
        found = choose_fastest(config, make_batches(config, 0)[0], mesh, torch.device("cpu"))
        return str(found), asked
    finally:
        dist.destroy_process_group()


def test_what_was_measured_is_kept(tmp_path: Path) -> None:
    both = (str(tmp_path), (True, True))
    first = run_processes(choose, 2, *both)
    assert [asked for _, asked in first] == [["plain", "compiled"]] * 2
    assert first[0][0] == first[1][0]
    assert first[0][0].startswith("per_sequence, compiled blocks (a micro-batch")
    again = run_processes(choose, 2, *both)
    assert again == [(first[0][0], [])] * 2
    (file,) = tmp_path.glob("kernels-*.json")
    about = json.loads(file.read_text())
    assert about["torch"] == torch.__version__
    assert len(about["seconds"]) == 2
    file.write_text("cut off")
    assert [asked for _, asked in run_processes(choose, 2, *both)] == [["plain", "compiled"]] * 2


def test_what_one_process_lacks_no_process_uses(tmp_path: Path) -> None:
    found = run_processes(choose, 2, str(tmp_path), (True, False))
    assert found == [("per_sequence (nothing else can be used)", [])] * 2
    assert list(tmp_path.iterdir()) == []


CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 96, images_per_pack: 4, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 2, global_batch: 2, log_every: 1, progress: false, measure_kernels: true}}
checkpoint: {{every: 1}}
"""


def plant(_rank: int, compiled: float) -> None:
    """Compiled blocks take so many times as long."""
    kernels.has_compiler = lambda: True
    agree = fastest.agree_on_costs

    def said(times: Sequence[Any], *more: Any) -> list[float]:
        costs = agree(times, *more)
        said.calls += 1  # type: ignore[attr-defined]
        return [1.0 if said.calls % 2 else compiled for _ in costs]  # type: ignore[attr-defined]

    said.calls = 0  # type: ignore[attr-defined]
    fastest.agree_on_costs = said


@pytest.mark.slow
@pytest.mark.skipif(not kernels.has_compiler(), reason="torch.compile needs a C++ compiler here")
def test_a_run_measures_its_own_layers_and_keeps_its_kernels(tmp_path: Path) -> None:
    corpus, file, run = make_corpus(tmp_path, seed=0), tmp_path / "config.yaml", tmp_path / "run"
    vocab_size = open_corpus(corpus).tokenizer.vocab_size
    file.write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=tmp_path / "cache"))
    said = fleet.train(run, "--config", str(file), "--train.steps", "1", size=1, plant=plant, planted=(2.0,))
    assert "kernels measured: per_sequence (a micro-batch through all layers: per_sequence " in said
    train = configs.load(run / "config.yaml").train
    assert (train.attention, train.compile, train.measure_kernels) == ("per_sequence", False, True)
    (kept,) = (tmp_path / "cache").glob("kernels-*.json")
    kept.unlink()
    said = fleet.train(run, "--config", str(file), size=1, plant=plant, planted=(0.5,))
    assert "going on from" in said
    assert "kernels measured" not in said
    assert "setting changed: train.compile" not in said
    assert not list((tmp_path / "cache").glob("kernels-*.json"))
    train = configs.load(run / "config.yaml").train
    assert (train.attention, train.compile) == ("per_sequence", False)
