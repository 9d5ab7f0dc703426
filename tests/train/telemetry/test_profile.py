"""What `--profile` takes and refuses, and the table by part."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call, create_autospec

import pytest
import torch
from small_model_of_telemetry import batch, config_of

from megatron_lcl.cli import main
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LayerList
from megatron_lcl.train.telemetry.clock import Clock
from megatron_lcl.train.telemetry.profile import Profile, check_profile, layers_timed, profiled_steps, table_by_part


def profile_of(tmp_path: Path, said: list[str]) -> Profile:
    config = config_of(profile="3:9")
    model, clock = LayerList(*build_layers(config.model, 2.0)), Clock(torch.device("cpu"))
    world = SimpleNamespace(rank=0, gather_objects=lambda text: [text])
    return Profile(config, SimpleNamespace(world=world), model, clock, tmp_path, said.append)  # type: ignore[arg-type]


def test_steps_and_processes_that_are_not_there_are_refused() -> None:
    assert profiled_steps(config_of()) is None
    assert profiled_steps(config_of(profile="3:5")) == range(3, 6)
    assert profiled_steps(config_of(profile="9:12")) == range(9, 10)
    with pytest.raises(ValueError, match=r"^train\.profile = 10:12 begins behind train\.steps = 9; name steps"):
        check_profile(config_of(profile="10:12"), 2)
    with pytest.raises(ValueError, match=r"train\.profile = 5:3 ends before it begins"):
        check_profile(config_of(profile="5:3"), 2)
    with pytest.raises(ValueError, match=r"names process 2, and the run has 0 to 1"):
        check_profile(config_of(profile="3:5", profile_ranks=[0, 2]), 2)
    check_profile(config_of(profile_ranks=[7]), 2)
    for wrong in ("3", "0:2", "a:b", "3:"):
        with pytest.raises(ValueError, match="profile"):
            config_of(profile=wrong)


def test_the_command_has_them_as_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--profile", "3:5", "--profile-ranks", "0,1", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "profile: '3:5'" in printed or "profile: 3:5" in printed
    assert "profile_ranks:\n  - 0\n  - 1" in printed


@pytest.mark.parametrize("graphs", [True, False])
def test_every_part_has_a_forward_and_a_backward(graphs: bool) -> None:
    config = config_of()
    layers = build_layers(config.model, 2.0)
    initialize(dict(enumerate(layers)), config.model, 0)
    model, clock = LayerList(*layers), Clock(torch.device("cpu"))
    clock.start()
    with layers_timed(model, config.model, clock), torch.set_grad_enabled(graphs):
        out = model(batch(config))
        if graphs:
            (out.generation + out.latents.sum() + out.contexts.sum()).backward()
        clock.enter("other")
    taken = {name for name, seconds in clock.take().items() if seconds}
    ways = ("forward", "backward") if graphs else ("forward",)
    assert taken >= {f"{part} {way}" for part in ("vision", "pool", "language", "head") for way in ways}
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model), "hooks are gone"


def test_the_table_is_of_one_step_longest_first() -> None:
    table = table_by_part({"data": 1.0, "forward": 3.0, "other": 0.0}, 2).splitlines()
    assert table[0] == "2 steps of 2000.0 ms:"
    assert [line.split() for line in table[2:]] == [["forward", "1500.00", "75.0%"], ["data", "500.00", "25.0%"]]


def test_steps_that_are_made_again_are_traced_anew(tmp_path: Path) -> None:
    """As after a rewind: what was traced is written, nothing stays hooked, and the next trace counts from its first."""
    said: list[str] = []
    profile = profile_of(tmp_path, said)
    model, clock = profile._module, profile._clock
    for steps in ((3, 4, 5), (2, 3, 4)):
        for step in steps:
            profile.before(step)
        assert any(layer._forward_hooks for layer in model)
        profile.finish()
        assert not any(layer._forward_hooks for layer in model)
        assert clock.detail is None
        (trace,) = tmp_path.rglob("*.json.gz")
        trace.unlink()
    assert [text.split(" of ")[0] for text in said] == ["process 0, 3 steps", "process 0, 2 steps"]
    profile.finish()
    assert len(said) == 2


def test_a_trace_that_cannot_start_has_nothing_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a GPU's counters are for its administrator only: the last error is the first."""
    profile = profile_of(tmp_path, [])
    monkeypatch.setattr(torch.profiler.profile, "start", Mock(side_effect=RuntimeError("insufficient privileges")))
    with pytest.raises(RuntimeError, match="insufficient privileges"):
        profile.before(3)
    profile.close()
    assert profile._clock.detail is None
    assert not any(layer._forward_hooks for layer in profile._module)


def test_on_cuda_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch cannot always name the frames of an allocation. Those of Python alone are asked for: C++'s take minutes."""
    said: list[str] = []
    profile, memory = profile_of(tmp_path, said), torch.cuda.memory
    recorded = create_autospec(memory._record_memory_history)
    for name, value in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "memory._record_memory_history": recorded,
        "memory._dump_snapshot": Mock(side_effect=RuntimeError("stoi")),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    profile.before(3)
    profile.finish()
    assert said == [f"process 0, the profile cannot be written: {profile._path}: stoi"]
    assert recorded.call_args_list == [call(stacks="python"), call(enabled=None)]
