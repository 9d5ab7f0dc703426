"""Steps that must not count change nothing; too many of them, and the run goes back and jumps over their packs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_lines import read_audit
from bad_packs import poison, poison_and_stop, saved_steps, without_packs
from fleet import lines, losses, train
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl.config import Guard
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.errors import RunError
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.resilience.bad_steps import BadSteps, SpikeLimit
from megatron_lcl.train.step import nan_if_rejected

# --- one step -----------------------------------------------------------------------------------------------------

FAULTS = ["loss", "gradient", "contrast", "spike"]


Layout = tuple[int, str, str, float, bool]
"""ZeRO stage, dtype, optimizer, norm to which gradients are clipped, whether the optimizer is on the CPU"""


def skip_steps(rank: int, layouts: list[Layout]) -> dict[Layout, dict[str, Any]]:
    """For each layout: `skip_at`."""
    import torch.distributed as dist

    outcomes = {layout: skip_at(rank, *layout) for layout in layouts}
    dist.destroy_process_group()
    return outcomes


def skip_at(rank: int, zero: int, dtype: str, optimizer: str, clip_norm: float, on_cpu: bool) -> dict[str, Any]:
    """Two good steps, with bad ones of every kind before them, and the same without: all state of both, by bits.

    The faults come from the second process alone; the spike is one because of the limit. Without faults DeepSpeed asks
    on the host whether a gradient is not finite, as it comes, as it always does where the optimizer is on the CPU or is
    apex's.
    """
    import sys
    from types import ModuleType
    from unittest.mock import patch

    import apex_stand_in
    from small_model import batches_of, build_config

    from megatron_lcl.train.averages import Averages
    from megatron_lcl.train.engine import build_engine, build_module, init_processes
    from megatron_lcl.train.step import Stepper

    config = build_config(zero, dtype)
    config = configs.replace(config, optimizer__name=optimizer, optimizer__clip_norm=clip_norm)
    config = configs.replace(config, train__steps=2, average__ema=(0.9,), average__tail=(0.5,))
    if on_cpu:
        config = configs.replace(config, deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}})
    apex = {"apex": ModuleType("apex"), "apex.optimizers": apex_stand_in}
    mesh = init_processes(config)
    outcomes: dict[str, Any] = {}
    for faults in ([], FAULTS):
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.dict(sys.modules, apex))
            if not faults:
                stack.enter_context(patch("megatron_lcl.train.engine.skips_on_device", lambda _: False))
            engine = build_engine(build_module(config, mesh), config, mesh)
        stepper, averages = Stepper(engine, config, mesh), Averages(config, engine)
        results = []
        for step in range(2):
            for fault in faults:  # before the first the optimizer has no state
                plant(engine, fault if rank == 1 else "")
                limit = 0.5 if fault == "spike" else math.inf
                pending = stepper.start(batches_of(9, rank, config), 1e-2, limit)
                averages.update(step + 1, pending.skipped)
                result = pending.read()
                plant(engine, "")
                outcomes[f"{fault} {step}"] = result.applied, result.loss, result.grad_norm
            pending = stepper.start(batches_of(step, rank, config), 1e-2)
            averages.update(step + 1, pending.skipped)
            results.append(pending.read())
            assert results[-1].applied
        outcomes["with" if faults else "without"] = results, state_of(engine)
    same = outcomes["with"][0] == outcomes["without"][0]
    pairs = zip(outcomes["with"][1], outcomes["without"][1], strict=True)
    equal = [bool(torch.equal(a, b)) for a, b in pairs]
    bad = {name: value for name, value in outcomes.items() if not name.startswith("with")}
    return {"same": same, "equal": equal, "bad": bad}


def plant(engine: Any, fault: str) -> None:
    """Every forward of the engine's module from now on has this fault."""
    from megatron_lcl.model.activations import Outputs

    module = engine.module
    if not fault:
        module.__dict__.pop("forward", None)
        return

    def forward(batch: Any) -> Outputs:
        out: Outputs = type(module).forward(module, batch)
        if fault == "loss":  # infinite, with gradients that are not
            return out._replace(generation=out.generation + math.inf)
        if fault == "contrast":
            return out._replace(contexts=out.contexts * math.nan)
        if fault == "gradient" and torch.is_grad_enabled():
            out.generation.register_hook(lambda gradient: gradient * math.inf)
        return out

    module.forward = forward


def state_of(engine: Any) -> list[torch.Tensor]:
    """Parameters as the forward reads them, and every tensor of the optimizer, averages of the weights among them."""
    found = [p.detach().clone() for p in engine.module.parameters()]
    inner = engine.optimizer.optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            found.append(parameter.detach().clone())
            values = inner.state[parameter].items()
            found += [v.clone() for _, v in sorted(values) if isinstance(v, torch.Tensor)]
    return found


@pytest.mark.slow
def test_a_bad_step_changes_nothing() -> None:
    dtypes = ("float32", "bfloat16")
    layouts: list[Layout] = [(zero, dtype, "adamw", 0.5, False) for zero in (1, 2, 3) for dtype in dtypes]
    layouts += [(1, "bfloat16", "muon", 1e6, False), (2, "float32", "stable_adamw", 1e6, False)]
    layouts += [(zero, "bfloat16", "adamw", 0.5, True) for zero in (1, 2, 3)]
    layouts += [(1, "float32", "apex_fused_adam", 0.5, False)]
    for outcomes in run_processes(skip_steps, 2, layouts):
        for layout, outcome in outcomes.items():
            assert outcome["same"], layout
            assert len(outcome["equal"]) > 50
            assert all(outcome["equal"]), layout
            bad = outcome["bad"]
            assert len(bad) == 8
            assert not any(applied for applied, _, _ in bad.values()), layout
            assert all(math.isinf(norm) for _, _, norm in bad.values()), layout
            assert bad["loss 1"][1] == math.inf
            assert math.isnan(bad["contrast 1"][1])
            assert math.isfinite(bad["gradient 1"][1])
            assert math.isfinite(bad["spike 1"][1])


# --- counting -----------------------------------------------------------------------------------------------------


def test_a_spike_is_far_above_the_mean_of_half_a_window_at_least() -> None:
    guard = BadSteps(Guard(spike_sigmas=6.0, spike_window=8))
    for step, loss in enumerate([3.0, 3.1, 2.9]):
        assert guard.limit() == math.inf
        guard.record((step, 0), loss, True, None)
    guard.record((3, 0), 3.0, True, None)
    deviation = math.sqrt((0.1**2 + 0.1**2) / 3)
    assert guard.limit() == pytest.approx(3.0 + 6 * deviation)
    before = guard.limit()
    reason = guard.record((4, 16), 9.0, False, None)
    assert reason is not None
    assert "spike" in reason
    assert guard.limit() == before, "a spike is no measure of spikes"
    assert guard.began == (4, 16)
    again = BadSteps(guard.config, json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state()
    assert BadSteps(Guard()).limit() == math.inf
    unwatched = BadSteps(Guard(), guard.state()).state()
    assert BadSteps(guard.config, unwatched).limit() == math.inf, "a resume without spikes, another with them again"


def test_a_spike_in_float16_is_no_search_for_the_scale() -> None:
    """Though the scale can still be lower."""
    guard = BadSteps(Guard(spike_sigmas=6.0, spike_window=4))
    for loss in (1.0, 1.1, 1.0, 0.9):
        guard.record((0, 0), loss, True, 65536.0)
    reason = guard.record((4, 16), 9.0, False, 65536.0)
    assert reason is not None
    assert "is a spike" in reason
    assert guard.consecutive == 1


def test_a_phase_measures_spikes_by_its_own_losses() -> None:
    guard = BadSteps(Guard(spike_sigmas=6.0, spike_window=4))
    for loss in (1.0, 1.1, 1.0, 0.9):
        guard.record((0, 0), loss, True, None)
    assert guard.limit() < 2
    guard.new_window()
    assert guard.limit() == math.inf
    assert guard.record((4, 16), 5.0, True, None) is None


@pytest.mark.parametrize("window", [4, 9])
def test_what_the_device_takes_for_a_spike_the_host_does(window: int) -> None:
    """A recorded series with spikes and losses that are not finite, resumed in the middle, by bits."""
    config, device = Guard(spike_sigmas=3.0, spike_window=window), torch.device("cpu")
    draw = torch.Generator().manual_seed(0)
    series = (4 + torch.linspace(5, 0, 120) + 0.2 * torch.randn(120, generator=draw)).tolist()
    for step, loss in {0: math.nan, 2: 1e4, 30: math.nan, 31: math.inf, 50: 40.0, 51: 41.0, 60: -math.inf}.items():
        series[step] = loss
    host, on_device, resumed = BadSteps(config), SpikeLimit(config, device), SpikeLimit(config, device)
    decisions: list[tuple[bool, bool]] = []
    for step, number in enumerate(series):
        loss = torch.tensor(number)
        if step == 70:
            resumed.begin(BadSteps(config, json.loads(json.dumps(host.state()))).losses)
        limits = host.limit(), on_device.limit()
        assert float(limits[1]) == pytest.approx(limits[0], rel=1e-6)
        applied, same = (bool(nan_if_rejected(torch.ones(()), loss, limit) == 1) for limit in limits)
        decisions.append((applied, same))
        host.record((step, 0), float(loss), applied, None)
        skipped = torch.tensor(0.0 if applied else 1.0) if step % 2 else not applied  # of a device, or known
        for one in (on_device, resumed) if step >= 70 else (on_device,):
            one.add(loss, skipped)
        if step >= 70:
            assert torch.equal(torch.as_tensor(resumed.limit()), torch.as_tensor(on_device.limit()))
    assert all(applied == same for applied, same in decisions)
    skipped_steps = [step for step, (applied, _) in enumerate(decisions) if not applied]
    assert {0, 30, 31, 50, 51, 60} <= {*skipped_steps}
    assert 2 not in skipped_steps, "half a window is not there"
    assert SpikeLimit(Guard(), device).limit() == math.inf


def test_a_lower_limit_counts_from_the_next_bad_step_on() -> None:
    """After a resume between bad steps, of which the run before allowed more."""
    state = {"consecutive": 3, "began": [5, 20]}
    guard = BadSteps(Guard(max_bad_steps=2), state)
    assert not guard.too_many, "a step may be good of which nobody knows yet"
    assert guard.record((8, 32), 3.0, False, 65536.0) == "gradient too large for float16 at loss scale 65536"
    assert not guard.too_many
    assert guard.record((9, 36), 3.0, True, None) is None
    assert not guard.too_many
    guard = BadSteps(Guard(max_bad_steps=2), state)
    guard.record((8, 32), math.nan, False, None)
    assert guard.too_many
    assert guard.began == (5, 20)


def test_consecutive_bad_steps_are_counted() -> None:
    guard = BadSteps(Guard(max_bad_steps=2, max_rewinds=1))
    assert guard.record((0, 0), math.nan, False, None) == "loss is nan"
    assert not guard.too_many
    assert guard.record((1, 4), 3.0, True, None) is None
    assert guard.record((2, 8), 3.0, False, None) == "gradient is not finite"
    assert guard.record((3, 12), 3.0, False, 65536) == "gradient too large for float16 at loss scale 65536"
    assert not guard.too_many, "float16 looks for its scale"
    assert guard.record((4, 16), math.inf, False, None) == "loss is inf"
    assert guard.too_many
    assert guard.began == (2, 8)
    guard.rewind({"consecutive": 1, "began": [2, 8]}, 5)
    assert guard.consecutive == 0, "of a checkpoint that was saved between bad steps the run begins to count anew"
    guard.record((5, 20), math.inf, False, None)
    with pytest.raises(RunError, match=r"1 bad step in a row up to step 5, and guard\.max_rewinds = 1 allows no"):
        guard.rewind({}, 5)


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bad_steps_are_left_out_together_and_audited(
    config_file: str, undisturbed: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """Steps 7 and 8, each because of one pack of one process; step 8 was to be saved, and step 9 is in its place."""
    run = tmp_path / "run"
    said = train(run, "--config", config_file, plant=poison, planted=([26, 31], "nan"))
    assert "step 7 skipped: loss is nan" in said
    assert losses(run)[:6] == undisturbed[:6]
    assert [line["step"] for line in lines(run) if "loss" in line] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12]
    events = [(line["event"], line["step"], line["reason"], line["packs"]) for line in read_audit(run)]
    assert events == [
        ("step skipped", 7, "loss is nan", [[24, 28]]),
        ("step skipped", 8, "loss is nan", [[28, 32]]),
    ]
    assert saved_steps(run) == [4, 9, 12], "no good state is saved between bad steps"
    assert "warning" not in said
    for text in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    rarely = tmp_path / "rarely"
    train(rarely, "--config", config_file, "--train.log_every", "5", plant=poison, planted=([26, 31], "nan"))
    assert saved_steps(rarely) == saved_steps(run)


@pytest.mark.slow
def test_a_run_whose_last_steps_were_skipped_says_so(config_file: str, tmp_path: Path) -> None:
    """Steps 7 and 8 are bad, the run ends with them: also where the last one is stopped for, and made after a resume,
    and where there is nothing left to make."""
    run, folder = tmp_path / "run", checkpoint.step_folder(tmp_path / "run", 8)
    words = ["--config", config_file, "--train.steps", "8"]
    said = f"warning: the last 2 steps were skipped (audit.jsonl says why): {folder} has the weights of step 6\n"
    assert said not in train(run, *words, plant=poison_and_stop, planted=([26, 31], 7, {}), code=75)
    assert said in train(run, *words, plant=poison, planted=([26, 31], "nan"))
    assert said in train(run, *words)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nan", "spike", "late"])
def test_too_many_bad_steps_rewind(kind: str, config_file: str, without: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Steps 7 and 8 are bad: back to step 4, again to step 6, and on with the packs after theirs.

    late, spike: the host learns it at step 12, the next one that is logged; what was made since then is forgotten.
    """
    run, profiled = tmp_path / "run [1] *?", []  # not to be taken for a pattern
    words = ["--config", config_file, "--guard.max_bad_steps", "2"]
    if kind == "spike":
        words += ["--guard.spike_sigmas", "6", "--guard.spike_window", "8"]
    if kind != "nan":
        words += ["--train.log_every", "12", "--checkpoint.every", "6"]
    else:
        words += ["--profile", "7:11"]
        profiled = ["2", "5"]
    said = train(run, *words, plant=poison, planted=([26, 31], "spike" if kind == "spike" else "nan"))
    assert re.findall(r"process 0, (\d+) steps of", said) == profiled, "it is not left running over steps 5 and 6"
    assert losses(run) == (without if kind == "nan" else without[-1:])
    events = [(line["event"], line["step"]) for line in read_audit(run)]
    assert events == [("step skipped", 7), ("step skipped", 8), ("rewind", 8)]
    (skip,) = read_audit(run)[-1]["skip"]
    assert (skip["from_pack"], skip["skip"]) == (24, 8)
    progress = checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1])
    assert (progress.step, progress.packs) == (12, 48)
    assert progress.ledger["entries"][-1] == skip


@pytest.mark.slow
def test_a_lower_limit_at_a_resume_counts_alike_however_often_steps_are_logged(
    config_file: str, tmp_path: Path
) -> None:
    """Stopped after the bad steps 7 and 8; step 9, the first after the resume, is good."""
    words, planted, ends = ["--config", config_file], ([26, 31], "nan"), []
    options: dict[str, Any] = {"plant": poison_and_stop, "planted": ([26, 31], 8, {}), "size": 1}
    train(tmp_path / "1", *words, code=75, **options)
    shutil.copytree(tmp_path / "1", tmp_path / "5")
    for every in ("1", "5"):
        run, limit = tmp_path / every, ["--guard.max_bad_steps", "2", "--train.log_every", every]
        train(run, *words, *limit, plant=poison, planted=planted, size=1)
        assert not [line for line in read_audit(run) if line["event"] == "rewind"]
        ends.append(checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1]))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_rewind_from_one_phase_into_the_one_before(config_file: str, tmp_path: Path) -> None:
    """Step 7 is the first phase's last and step 8 the next one's first: both go on behind the packs of both."""
    words = ["--config", config_file, "--guard.max_bad_steps", "2"]
    words += ["--schedule.phases", "[{steps: 7, image_size: 8, tokens_per_pack: 48, context_length: 40}]"]
    train(tmp_path / "without", *words, plant=without_packs, planted=(24, 8))
    train(tmp_path / "run", *words, plant=poison, planted=([26, 31], "nan"))
    events = [(line["event"], line["step"]) for line in read_audit(tmp_path / "run")]
    assert events == [("step skipped", 7), ("step skipped", 8), ("rewind", 8)]
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    ledger = Ledger.from_json(checkpoint.read_progress(checkpoint.list_checkpoints(tmp_path / "run")[-1]).ledger)
    assert [segment.first_pack for segment in ledger.segments] == [0, 28, 32, 36]


def poison_a_pipeline(rank: int, packs: list[int]) -> None:
    """The last stage's processes get a loss of NaN for these packs. The partition is given, not measured."""
    from megatron_lcl.train import first_batch
    from megatron_lcl.train.pipeline.engine import PipelineStepper
    from megatron_lcl.train.step import StepLoss

    first_batch.choose_partition = lambda *_: (0, 3)

    plain, loss, bad = PipelineStepper.start, StepLoss.mean, [False]

    def run(self, batches, *arguments):  # type: ignore[no-untyped-def]
        bad[0] = any(set(batch.packs) & set(packs) for batch in batches)
        return plain(self, batches, *arguments)

    def mean(self: StepLoss) -> Any:
        return loss(self) * math.nan if bad[0] else loss(self)

    PipelineStepper.start, StepLoss.mean = run, mean  # type: ignore[method-assign]


def without_packs_in_a_pipeline(rank: int, consumed: int, count: int) -> None:
    """As `without_packs`, with the same partition."""
    poison_a_pipeline(rank, [])
    without_packs(rank, consumed, count)


@pytest.mark.slow
def test_in_a_pipeline_all_stages_skip_and_rewind(config_file: str, tmp_path: Path) -> None:
    words = ["--config", config_file, "--parallel.pipeline", "2", "--guard.max_bad_steps", "2"]
    train(tmp_path / "without", *words, plant=without_packs_in_a_pipeline, planted=(24, 8))
    train(tmp_path / "run", *words, plant=poison_a_pipeline, planted=([26, 31],))
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    events = [(line["event"], line["step"]) for line in read_audit(tmp_path / "run")]
    assert events == [("step skipped", 7), ("step skipped", 8), ("rewind", 8)]


def damage(rank: int, packs: list[int], run: str) -> None:
    """As `poison`; in the eighth step a byte of the checkpoint of step 6 changes."""
    from megatron_lcl.train.step import Stepper

    poison(rank, packs, "nan")
    plain, calls = Stepper.start, []

    def damaging(self, *arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 8 and rank == 0:
            file = checkpoint.step_folder(Path(run), 6) / "model.safetensors"
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return plain(self, *arguments)

    Stepper.start = damaging  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_rewind_rejects_damage_and_says_so(config_file: str, without: list[tuple[Any, ...]], tmp_path: Path) -> None:
    """Saves of steps 2, 4 and 6; back to step 4."""
    run = tmp_path / "run"
    words = ["--config", config_file, "--guard.max_bad_steps", "2", "--checkpoint.every", "2"]
    said = train(run, *words, "--checkpoint.background", "false", plant=damage, planted=([26, 31], str(run)))
    assert losses(run) == without
    damaged = checkpoint.step_folder(run, 6)
    assert f"rejected {damaged}: model.safetensors: changed since it was written" in said
    audited = read_audit(run)
    events = [(line["event"], line["step"]) for line in audited]
    assert events == [("step skipped", 7), ("step skipped", 8), ("checkpoint rejected", 8), ("rewind", 8)]
    assert audited[2]["folder"] == str(damaged)
    assert audited[2]["faults"] == ["model.safetensors: changed since it was written"]
    assert (audited[3]["to"], audited[3]["folder"]) == (4, str(checkpoint.step_folder(run, 4)))


@pytest.mark.slow
def test_a_run_that_cannot_go_back_says_so(config_file: str, tmp_path: Path) -> None:
    words = ["--config", config_file, "--guard.max_bad_steps", "2"]
    said = train(tmp_path / "early", *words, code=2, plant=poison, planted=([5, 9], "nan"))
    assert "steps 2 to 3 were bad, and there is no checkpoint before them" in said
    everything = list(range(20, 400))
    said = train(tmp_path / "ever", *words, code=2, plant=poison, planted=(everything, "nan"))
    assert "2 bad steps in a row" in said
    assert "and guard.max_rewinds = 3 allows no further rewind to the checkpoint before" in said
    assert said.count("megatron-lcl train:") == 1
    assert sum(line["event"] == "rewind" for line in read_audit(tmp_path / "ever")) == 3


def allow_float16(rank: int) -> None:
    """Also on a CPU without instructions for it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


@pytest.mark.slow
def test_a_gradient_that_overflows_is_bad_where_the_loss_scale_is_fixed(config_file: str, tmp_path: Path) -> None:
    """Else the scale is lower in the next step, as often as it takes, and what is saved meanwhile is whole."""
    words = ["--config", config_file, "--train.dtype", "float16", "--guard.max_bad_steps", "2", "--train.steps", "3"]
    run, options = tmp_path / "run", {"plant": allow_float16, "size": 1}
    said = train(tmp_path / "fixed", *words, "--deepspeed", f"{{fp16: {{loss_scale: {2**40}}}}}", code=2, **options)
    assert "steps 1 to 2 were bad, and there is no checkpoint before them" in said
    said = train(run, *words, "--deepspeed", "{fp16: {initial_scale_power: 40, hysteresis: 1}}", **options)
    reasons = [line["reason"] for line in read_audit(run)]
    assert reasons == [f"gradient too large for float16 at loss scale {2.0 ** (40 - n):g}" for n in range(3)]
    folder = checkpoint.step_folder(run, 3)
    assert f"warning: the last 3 steps were skipped (audit.jsonl says why): {folder} has the weights of step 0" in said
    (last,) = checkpoint.list_checkpoints(run)
    rising = "{fp16: {initial_scale_power: 8, loss_scale_window: 1}}"
    train(tmp_path / "rising", *words, "--deepspeed", rising, **options)
    assert [line["loss_scale"] for line in lines(tmp_path / "rising") if "loss" in line] == [256, 256, 512]
    assert checkpoint.read_progress(last).guard["consecutive"] == 0
    assert checkpoint.verify(last) == []


def test_the_config_says_what_a_guard_may_be() -> None:
    with pytest.raises(ValueError, match=r"guard\.timeout"):
        configs.from_dict({"guard": {"timeout": 1}})
