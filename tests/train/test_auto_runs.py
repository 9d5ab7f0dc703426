"""Runs with `contrast.strategy: auto`, to a checkpoint and on from it, with as much memory as the test says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from launch.conftest import TINY
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.train import checks, dryrun, fits, resume_point, strategy
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.memory import Memory, Slots

LITTLE, ENOUGH = 5e6, 12e6
"""bytes: of the model below, `recompute` fits into the first, `retain` into the second, on two processes"""


def with_memory(rank: int, size: float) -> None:
    """In a process of a run: its machine has so much, the first rank's more. A simulated step takes half as much again
    as its bound."""
    for module in (checks, resume_point):
        module.available = lambda local: Memory(size * (1000 if rank == 0 else 1), "this machine has little")  # type: ignore[attr-defined]
    predicted = lambda config, processes, slots, on_gpu: 1.5 * fits._bound(config, processes, slots, on_gpu)  # noqa: E731
    strategy.predicted = fits.predicted = predicted  # type: ignore[assignment]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    corpus = make_corpus(tmp_path / "documents", seed=0)
    vocab_size = open_corpus(corpus).tokenizer.vocab_size
    places = ["--data.corpora", str(corpus), "--data.cache", str(tmp_path / "cache")]
    small = [
        "--model.language.vocab_size",
        str(vocab_size),
        "--train.global_batch",
        "32",
        "--data.images_per_pack",
        "4",
    ]
    return [*TINY, *places, *small, "--contrast.strategy", "auto", "--train.progress", "false"]


@pytest.mark.slow
def test_chosen_kept_and_chosen_anew(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"

    def train(steps: int, size: float, *more: str) -> tuple[str, str]:
        said = fleet.train(run, *arguments, "--train.steps", str(steps), *more, plant=with_memory, planted=(size,))
        (choice,) = re.findall("^contrast: .*$", said, re.M)
        (line,) = (line for line in fleet.lines(run) if "strategy" in line and line["step"] == steps - 1)
        saved = checkpoint.list_checkpoints(run)[-1]
        for folder in (run, saved):
            assert configs.load(folder / "config.yaml").contrast.strategy == line["strategy"]
        assert checkpoint.read_progress(saved).contrast["strategy"] == line["strategy"]
        return choice, said

    # the memory of the process that has least counts, not that of the first
    choice, _ = train(1, LITTLE)
    assert re.fullmatch(r"contrast: recompute \(auto\): retain would need at least 0\.\d+ GB a process", choice)
    choice, said = train(2, ENOUGH)  # it goes on with what it had
    assert choice.startswith("contrast: recompute (auto)")
    assert "contrast.strategy" not in said
    choice, said = train(3, ENOUGH, "--parallel.tensor", "2")  # at another layout it is chosen anew
    assert re.fullmatch(r"contrast: retain \(auto\): about 0\.\d+ GB a process", choice)
    assert "setting changed: contrast.strategy recompute → retain" in said
    choice, _ = train(4, LITTLE, "--parallel.tensor", "2")  # on smaller machines as well
    assert choice.startswith("contrast: recompute (auto)")


def test_a_dry_run_says_what_and_why(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has = Memory(ENOUGH, "this machine has little")
    for module in (checks, dryrun):
        monkeypatch.setattr(module, "available", lambda local: has)
    needed: list[float] = []

    def predicted(config: Config, processes: int, slots: Slots, on_gpu: bool) -> float:
        needed.append(1.5 * fits._bound(config, processes, slots, on_gpu))
        return needed[-1]

    for module in (fits, strategy):
        monkeypatch.setattr(module, "predicted", predicted)

    def dry_run(*more: str) -> list[str]:
        code = main(
            ["train", *arguments, "--dry-run", "--processes", "2", "--train.output", str(tmp_path / "r"), *more]
        )
        out, err = capsys.readouterr()
        return [line for line in out.splitlines() if line.startswith(("contrast", "memory"))] if code == 0 else [err]

    monkeypatch.setattr(dryrun, "is_elsewhere", lambda nodes: False)
    contrast, memory = dry_run()
    assert re.fullmatch(r"contrast    retain \(auto\): about 0\.\d+ GB a process", contrast)
    assert "graphs of 16 micro-batches" in memory
    has = Memory(LITTLE, "this machine has little")
    contrast, memory = dry_run()
    assert re.fullmatch(r"contrast    recompute \(auto\): retain would need at least 0\.\d+ GB a process", contrast)
    assert "graphs of a micro-batch" in memory
    (refused,) = dry_run("--contrast.strategy", "retain")
    assert re.search(r"little; add --contrast\.strategy recompute \(then about 0\.\d+ GB\)$", refused.strip()), refused
    has = Memory(0.8 * needed[-1], "this machine has little")  # of `recompute` the bound passes
    (refused,) = dry_run("--contrast.strategy", "recompute")
    assert re.search(r"a step needs about 0\.\d+ GB a process, as simulated, and this machine", refused), refused
    has = Memory(1.0, "this machine has little")
    (refused,) = dry_run()
    assert "nothing that was tried fits" in refused
    monkeypatch.setattr(dryrun, "is_elsewhere", lambda nodes: True)
    contrast, memory = dry_run()
    assert re.fullmatch(
        r"contrast    retain \(auto\): at least 0\.\d+ GB a process, where the run's devices have the room; else "
        "recompute",
        contrast,
    )
    assert "graphs of a micro-batch" in memory
