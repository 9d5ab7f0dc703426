"""What a line holds beside the step's result: collapse that is noticed, operations, rates, waits."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from small_model_of_telemetry import RESULT, batch, config_of

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.model import flops
from megatron_lcl.model.layers import PARTS
from megatron_lcl.objectives.base import GlobalCounts
from megatron_lcl.parallel.mesh import ALONE, Axis, Mesh
from megatron_lcl.train import loop
from megatron_lcl.train.changes import Changes
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.loop import Training
from megatron_lcl.train.parts import frozen_parameters
from megatron_lcl.train.result import Measured
from megatron_lcl.train.telemetry import Telemetry, read_metrics
from megatron_lcl.train.telemetry import clock as clocks
from megatron_lcl.train.telemetry import meter as meters
from megatron_lcl.train.telemetry.clock import PHASES, Clock
from megatron_lcl.train.telemetry.meter import StepMeter, memory_peak
from megatron_lcl.train.telemetry.stragglers import Place

MESH, CPU = Mesh(ALONE, ALONE), torch.device("cpu")
FROZEN = ("vision.*",)
NORMS = dict.fromkeys(PARTS, 0.5)
LOGITS = {"vision": 5.0, "pool": 0.5, "language": 999.0, "head": math.nan}


def measured(latents: torch.Tensor, contexts: torch.Tensor) -> Measured:
    return Measured(NORMS, NORMS, LOGITS, latents, contexts)


def one_line(
    meter: StepMeter,
    step: int,
    features: Measured | None = None,
    phase: Config | None = None,
    num_pairs: int | None = None,
    **replaced: Any,
) -> dict[str, Any]:
    """A step of half a second on one batch, which is logged. phase: its config; num_pairs: of all replicas."""
    config = phase or config_of()
    own = batch(config)
    counts = GlobalCounts.of([own], MESH, CPU)
    if num_pairs is not None:
        counts = GlobalCounts(counts.counts | {"num_pairs": num_pairs}, [own.num_pairs, num_pairs - own.num_pairs])
    meter.read([own], config, objectives.create(config))
    meter.step([own], counts, 0.5)
    result = dataclasses.replace(RESULT, measured=features, num_pairs=counts.counts["num_pairs"], **replaced)
    return meter.line(step, result, 1e-3)


def test_a_planted_collapse_is_noticed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    healthy = torch.randn(40, 24, generator=draw)
    collapsed = healthy[:1] + 1e-4 * healthy
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        assert one_line(meter, 3, measured(collapsed, healthy))["latent_spread"] < 0.01
        assert "nearly the same" not in capsys.readouterr().out, "the warmup is not over"
        assert one_line(meter, 4, measured(healthy, healthy))["latent_spread"] > 0.9
        assert "latent" not in capsys.readouterr().out
        one_line(meter, 5, measured(collapsed, healthy))
        said = capsys.readouterr().out
        assert "step 5: the image latents are nearly the same for all inputs: latent_spread" in said
        assert "context" not in said
    (line, *others) = [line for line in read_metrics(tmp_path) if "health" in line]
    assert (line["step"], {line["health"]["metric"], *(other["health"]["metric"] for other in others)}) == (
        5,
        {"latent_effective_rank", "latent_spread", "latent_dead_features", "uniformity"},
    )


def test_large_attention_logits_are_noticed_whatever_there_is_to_contrast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = torch.zeros(0, 24)
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        line = one_line(meter, 5, measured(nothing, nothing))
        found = {name: value for name, value in line.items() if name.startswith("max_attention_logit/")}
        assert found == {f"max_attention_logit/{part}": LOGITS[part] for part in ("vision", "pool", "language")}
        assert "attention" not in capsys.readouterr().out
        for step, logit in ((6, 1001.0), (7, math.inf), (8, 3.0)):
            logits = {**LOGITS, "language": logit}
            one_line(meter, step, dataclasses.replace(measured(nothing, nothing), attention_logits=logits))
        said = capsys.readouterr().out
    name = "max_attention_logit/language"
    assert f"step 6: attention logits of the language model are very large: {name} 1001 is above 1000" in said
    assert "step 7" not in said, "said once"
    assert f"step 8: {name} 3 is within its bound again" in said
    lines = [line for line in read_metrics(tmp_path) if "health" in line]
    assert [(line["step"], line["health"]["metric"]) for line in lines] == [(6, name), (8, name)]


def test_operations_are_those_of_the_batches_and_mfu_their_part_of_the_peak(tmp_path: Path) -> None:
    config = config_of(peak_flops=1e9)
    own = batch(config)
    expected = flops.of_step(config.model, flops.Sizes.of([own])).total
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        meter = StepMeter(config, MESH, Clock(CPU), telemetry)
        line = one_line(meter, 1)
        assert line["flops_per_second"] == pytest.approx(expected / 0.5)
        assert line["mfu"] == pytest.approx(expected / 0.5 / 1e9)
        assert line["token_slots_padded"] == len(own.tokens) - RESULT.num_tokens
        frozen, sizes = config_of(freeze=FROZEN), flops.Sizes.of([own])
        less = flops.of_step(config.model, sizes, frozen=frozen_parameters(frozen))
        assert less.total < 0.9 * expected
        assert one_line(meter, 2, phase=frozen)["flops_per_second"] == pytest.approx(less.total / 0.5)
        wider = configs.replace(config, model__language__mlp_width=96)
        more = flops.of_step(wider.model, sizes).total
        assert one_line(meter, 3, phase=wider)["flops_per_second"] == pytest.approx(more / 0.5) != expected / 0.5
        against_all = flops.of_step(config.model, sizes, 10).total
        assert against_all > expected
        found = one_line(meter, 4, num_pairs=10)["flops_per_second"]
        assert found == pytest.approx(against_all / 0.5), "similarities to the pairs of all replicas"
        assert "mfu" not in one_line(StepMeter(config_of(), MESH, Clock(CPU), telemetry), 1), "of a CPU"
        of_four = one_line(StepMeter(config, Mesh(Four(None, 0, 4), ALONE), Clock(CPU), telemetry), 1)
        assert of_four["flops_per_second"] == pytest.approx(4 * expected / 0.5)
        assert of_four["mfu"] == pytest.approx(line["mfu"]), "of the peak of all processes"


def test_the_memory_of_a_cpu_is_told_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which Linux counts 1024 a unit."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(meters.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**20))
    assert memory_peak() == 3 * 2**30


def test_a_line_has_the_rates_of_the_steps_since_the_last_one_or_since_the_run_went_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ledger_from", mock.Mock())
    monkeypatch.setattr(loop, "begins_other_blend", lambda *_: False)
    monkeypatch.setattr(loop, "changes_since", lambda *_: Changes())
    monkeypatch.setattr(loop.checkpoint, "go_back", lambda *_: (tmp_path, {}))
    progress = Progress(1, 4, Ledger({}).to_json())
    monkeypatch.setattr(loop.checkpoint, "read_progress", lambda _: progress)
    rates = ("images_per_second", "tokens_per_second", "step_seconds", "flops_per_second", "data_wait")
    config, clock = config_of(), Clock(CPU)
    with Telemetry(tmp_path, config, True, 0) as telemetry:
        training: Any = mock.MagicMock(config=config, mesh=MESH, progress=Progress(2, 8, {}))
        training.bad.began, training.bad.state.return_value = (1, 4), {}
        meter = training.meter = StepMeter(config, MESH, clock, telemetry)
        first = one_line(meter, 1)
        own = batch(config)
        assert [first[name] for name in rates[:3]] == [2 * own.num_images, 2 * own.num_tokens, 0.5]
        assert tuple(first)[:3] == rates[:3], "in metrics.jsonl they follow the learning rate"
        meter.read([own], config, objectives.create(config))
        meter.step([own], GlobalCounts.of([own], MESH, CPU), 1.5)
        of_two = one_line(meter, 2)
        assert [of_two[name] for name in rates[:3]] == [own.num_images, own.num_tokens, 1.0]
        with meter.waiting():
            pass
        clock.enter("data")
        time.sleep(0.05)
        meter.read([own] * 3, config, objectives.create(config))
        meter.step([own] * 3, GlobalCounts.of([own] * 3, MESH, CPU), 9.0)
        Training._rewind(training)
        line = one_line(meter, 2)
    assert [line[name] for name in rates[:-1]] == pytest.approx([first[name] for name in rates[:-1]])
    assert line["data_wait"] < 0.1
    assert line["checkpoint_wait_seconds"] > 0, "for saves of the steps that stay"


def test_what_waits_for_a_checkpoint_is_counted_until_it_is_written(tmp_path: Path) -> None:
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        began = time.perf_counter()
        for _ in range(2):
            with meter.waiting():
                time.sleep(0.02)
        ended = time.perf_counter()
        assert 0.04 <= one_line(meter, 1)["checkpoint_wait_seconds"] <= ended - began + 0.001
        assert one_line(meter, 2)["checkpoint_wait_seconds"] == 0


def test_the_last_save_is_waited_for_behind_the_last_line(tmp_path: Path) -> None:
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        one_line(meter, 1)
        telemetry.last_step, began = 1, time.perf_counter()
        with meter.waiting():
            time.sleep(0.02)
        ended = time.perf_counter()
        meter.finish()
    (line,) = read_metrics(tmp_path)
    assert (line["step"], 0.02 <= line["checkpoint_wait_seconds"] <= ended - began + 0.001) == (1, True)
    with Telemetry(tmp_path, config_of(), True, 1) as telemetry:
        meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        with meter.waiting():
            pass
        meter.finish()
    assert read_metrics(tmp_path) == [line], "of a run that was done nothing is waited for"


def test_comparing_replicas_before_a_save_is_waited_for(tmp_path: Path) -> None:
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        training: Any = object.__new__(Training)
        training.meter = StepMeter(config_of(), MESH, Clock(CPU), telemetry)
        training.bad, training.saver, training.watchdog = mock.Mock(consecutive=1), mock.Mock(), mock.MagicMock()
        training.bad_images = mock.Mock()
        training.progress, training.loader = Progress(1, 4, {}), None
        training._compare_replicas = lambda: time.sleep(0.05)
        began = time.perf_counter()
        training._save()
        ended = time.perf_counter()
        training.saver.save.assert_called_once()
        assert 0.05 <= one_line(training.meter, 1)["checkpoint_wait_seconds"] <= ended - began + 0.001


class Four(Axis):
    """Process 0 of four in two replicas: of the others it is told that they waited 0, 0.2 and 0 s for data, and 0.3,
    0.4 and 0 s for a checkpoint."""

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.repeat(4, 1)
        rows[:, PHASES.index("data")] = torch.tensor([0.1, 0.0, 0.2, 0.0])
        rows[:, -1] = torch.tensor([0.0, 0.3, 0.4, 0.0])
        return rows

    def gather_objects(self, obj: Any) -> list[Any]:
        return [Place("a", 0), Place("a", 1), Place("b", 0), Place("b", 1)]


def test_waits_for_data_and_for_checkpoints_are_those_of_all_that_wait(tmp_path: Path) -> None:
    with Telemetry(tmp_path, config_of(), True, 0) as telemetry:
        line = one_line(StepMeter(config_of(), Mesh(Four(None, 0, 4), ALONE), Clock(CPU), telemetry), 1)
    assert line["data_wait"] == pytest.approx(0.3 / 2 / 0.5)
    assert line["data_wait_max"] == pytest.approx(0.2 / 0.5)
    assert line["checkpoint_wait_seconds"] == pytest.approx(0.4), "of the one that waits longest: all wait for it"
    assert (line["slowest_rank"], line["slowest_phase"]) == (2, "data")
    assert line["rank_work_seconds"] == [0.1, 0.0, 0.2, 0.0]
    assert 0 < max(line["rank_step_seconds"]) < 10, "seconds alone"


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets time pass by the clock of the phases, which else stands still."""
    now = [100.0]
    monkeypatch.setattr(clocks, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def sleep(seconds: float) -> None:
        now[0] += seconds

    return sleep


def test_a_clock_gives_each_phase_its_time_and_costs_nothing_before_it_is_started(
    sleep: Callable[[float], None],
) -> None:
    clock = Clock(CPU)
    clock.enter("forward")
    sleep(1.0)
    clock.enter("loss")
    assert not any(clock.take().values())
    clock.start()
    clock.enter("forward")
    sleep(0.03)
    clock.enter_backward(torch.ones(1, requires_grad=True).sum() * 2)
    clock.enter("other")
    assert clock.take() == pytest.approx({**dict.fromkeys(PHASES, 0.0), "forward": 0.03})
    assert not any(clock.take().values())


def test_times_of_a_device_are_those_between_its_events_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    milliseconds = iter((0.0, 250.0, 1000.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(milliseconds)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock(torch.device("cuda"))
    clock.start()
    clock.enter("data")
    clock.enter("forward")
    assert clock.take() == {**dict.fromkeys(PHASES, 0.0), "other": 0.25, "data": 0.75}


def test_the_sums_over_replicas_begin_where_autograd_has_ended(sleep: Callable[[float], None]) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            sleep(0.03)
            return grad

    clock = Clock(CPU)
    clock.start()
    loss = Slow.apply(torch.ones(2, requires_grad=True)).sum()
    clock.enter_backward(loss)
    loss.backward()
    sleep(0.06)  # as the engine would add up
    clock.enter("optimizer")
    assert clock.take() == pytest.approx({**dict.fromkeys(PHASES, 0.0), "backward": 0.03, "reduce": 0.06})
