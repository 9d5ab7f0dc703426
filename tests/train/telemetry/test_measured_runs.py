"""A run on real processes, one of which is slow: what its lines hold, who is named, and what a profile leaves."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.model import flops
from megatron_lcl.train.heldout import HeldOutMeter
from megatron_lcl.train.telemetry.clock import PHASES

STEPS, EVERY, LAG = 12, 4, 0.6
PEAK = 1e9
CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 16, layers: 1, heads: 2, mlp_width: 32}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 16, layers: 1, heads: 2, mlp_width: 32}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 64, images_per_pack: 3, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1, parts: {{vision: {{lr: 0.5}}}}}}
train: {{steps: 12, global_batch: 4, log_every: 4, progress: false, dtype: float32, peak_flops: 1.0e+9}}
checkpoint: {{every: 6}}
"""


def be_slow(rank: int) -> None:
    """Process 1 takes longer in every forward."""
    import time

    from megatron_lcl.train.step import Stepper

    if rank == 1:
        forwards = Stepper._first_forwards

        def slow(self: Any, batches: Any) -> Any:
            time.sleep(LAG)
            return forwards(self, batches)

        Stepper._first_forwards = slow  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def run(once: Callable[..., Any]) -> tuple[Path, str]:
    """The run's folder, and what it said."""

    def make(folder: Path) -> tuple[Path, str]:
        corpus, file = make_corpus(folder / "documents", seed=0), folder / "config.yaml"
        vocab_size = open_corpus(corpus).tokenizer.vocab_size
        file.write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=folder / "cache"))
        profile = ("--profile", "5:6", "--profile-ranks", "0,1")
        said = fleet.train(folder / "run", "--config", str(file), *profile, plant=be_slow, timeout=400.0)
        return folder / "run", said

    return once("measured", make)


@pytest.mark.slow
def test_the_lines_hold_what_the_documentation_names(run: tuple[Path, str]) -> None:
    lines = [line for line in fleet.lines(run[0]) if "loss" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        for kind in ("grad_norm", "update_norm"):
            parts = [line[f"{kind}/{part}"] for part in ("vision", "pool", "language", "head")]
            assert all(part > 0 for part in parts), (kind, parts)
            if kind == "grad_norm":
                assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(line["grad_norm"], rel=1e-5)
        assert line["token_slots_padded"] == 4 * 64 - line["num_tokens"]
        assert line["image_slots_padded"] == 4 * 3 - line["num_images"]
        assert line["negatives_per_anchor"] == line["num_pairs"] - 1
        assert line["lr/vision"] == line["lr/head"] / 2 == line["lr"] / 2
        assert line["mfu"] == pytest.approx(line["flops_per_second"] / (2 * PEAK))
        assert 1 <= line["latent_effective_rank"] <= line["num_pairs"]
        assert line["skipped_steps"] == 0
        assert line["memory_peak_bytes"] > 50e6
        assert 0 < line["data_wait"] <= line["data_wait_max"] < 1
    waits = [line["checkpoint_wait_seconds"] for line in lines]
    assert waits[0] < waits[1], "the checkpoint of step 6 was waited for before the line of step 8"
    (last,) = [line for line in fleet.lines(run[0]) if "checkpoint_wait_seconds" in line and "loss" not in line]
    assert last["step"] == 12
    assert last["checkpoint_wait_seconds"] > 0, "the last save is behind the last line"


@pytest.mark.slow
def test_the_counted_operations_are_those_of_the_batches_sizes(run: tuple[Path, str]) -> None:
    """Of the slots, which are known here; targets, pairs and the lengths of sequences can add half of that at most."""
    config = configs.load(next(run[0].glob("checkpoints/*/config.yaml")))
    patches = config.model.vision.num_patches
    least = flops.Sizes(12, 4 * 64, 4 * 64, 0, 0, 12 * patches, 12 * patches**2)
    most = flops.Sizes(12, 4 * 64, 4 * 64 * 64, 4 * 64, 12, 12 * patches, 12 * patches**2)
    for line in fleet.lines(run[0]):
        if "loss" in line:
            counted = line["flops_per_second"] * line["step_seconds"]
            low, high = (flops.of_step(config.model, sizes).total for sizes in (least, most))
            assert low < counted < high


@pytest.mark.slow
def test_the_slow_process_is_named_with_its_phase(run: tuple[Path, str]) -> None:
    folder, said = run
    lines = [line for line in fleet.lines(folder) if "loss" in line]
    for line in lines:
        assert (line["slowest_rank"], line["slowest_phase"]) == (1, "forward"), line
        assert line["slowest_lag_seconds"] > LAG * 0.5
        steps, work = line["rank_step_seconds"], line["rank_work_seconds"]
        assert work[1] - work[0] == pytest.approx(line["slowest_lag_seconds"], rel=0.02)
        assert all(own < step for own, step in zip(work, steps, strict=True)), line
        assert steps == pytest.approx([line["step_seconds"]] * 2, rel=0.2), "they end together"
    (report,) = [line["stragglers"] for line in fleet.lines(folder) if "stragglers" in line]
    assert [(row["rank"], row["last"], row["of"], row["phase"]) for row in report] == [(1, 3, 3, "forward")]
    assert re.search(
        r"process 1 \(node \S+\) is behind the others by \d\.\d+ s a step, in forward: last in 3 of 3", said
    )


@pytest.mark.slow
def test_a_profile_is_written_and_parses(run: tuple[Path, str]) -> None:
    folder, said = run
    names = {path.name for path in (folder / "profile").iterdir()}
    assert names == {f"steps-5-6.rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")}
    for rank in (0, 1):
        trace = json.loads(gzip.decompress((folder / "profile" / f"steps-5-6.rank-{rank}.json.gz").read_bytes()))
        events = {event.get("name") for event in trace["traceEvents"]}
        assert {"vision forward", "pool forward", "language forward", "head forward"} <= events
        assert any("addmm" in str(name) for name in events)
        text = (folder / "profile" / f"steps-5-6.rank-{rank}.txt").read_text()
        table = {m[1]: float(m[2]) for m in re.finditer(r"^  (\w[\w ]*?) +(\d+\.\d+) +\d+\.\d%$", text, re.M)}
        parts = [f"{part} {way}" for part in ("vision", "pool", "language", "head") for way in ("forward", "backward")]
        assert set(parts) <= set(table) <= {*parts, *PHASES}
        assert "Self CPU" in text
    assert "process 1, 2 steps of " in said
    assert "vision backward" in said


def test_what_one_process_alone_meets_in_an_evaluation_is_its_own_error() -> None:
    """As a full /dev/shm: as an error of all, the others would be left waiting, and it would not be printed."""
    meter = HeldOutMeter.__new__(HeldOutMeter)
    meter.labeled, meter.evaluation = None, Mock(run=Mock(side_effect=UserError("full")))
    with pytest.raises(UserError, match="full") as raised:
        meter.measure(1)
    assert not isinstance(raised.value, RunError)


def test_what_all_processes_find_in_the_data_of_an_evaluation_does_not_end_the_run() -> None:
    """And the other evaluation of the step is made."""
    meter = HeldOutMeter.__new__(HeldOutMeter)
    meter.telemetry, meter.audit, meter.mesh = Mock(), Mock(), Mock(is_first=False)
    meter.evaluation, meter.labeled = Mock(run=Mock(side_effect=RunError("nothing to evaluate"))), Mock()
    assert meter.measure(7)
    meter.telemetry.say.assert_called_once_with("not evaluated after step 7: nothing to evaluate")
    meter.audit.write.assert_called_once_with("not evaluated", 7, reason="nothing to evaluate")
    meter.labeled.run.assert_called_once_with(7)
