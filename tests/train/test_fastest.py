"""`train.measure_kernels`: what is measured, and what is chosen; test_training_runs.py has a run that does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl.errors import RunError
from megatron_lcl.parallel.mesh import Axis, Mesh
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

    def times(self, measured: Sequence[float], in_first: bool) -> list[Time]:
        assert in_first
        assert len(measured) == fastest.REPEATS
        return [Time(cost) for cost in measured]


def choose(rank: int, cache: str, compilers: Sequence[bool], fails: str = "") -> tuple[str, list[str]]:
    """What a process of two chooses, and what it has measured. compilers: whether each has one; fails: which of the
    candidates, on the second process."""
    asked = []
    kernels.has_compiler = lambda: compilers[rank]

    class Asked(Planted):
        def __init__(self, specs: Sequence[Any], *more: Any) -> None:
            super().__init__(specs, *more)
            self.kind = "compiled" if self.cost < 1 else "plain"
            asked.append(self.kind)

        def measure(self) -> float:
            if rank == 1 and self.kind == fails:
                raise RuntimeError("no kernel image\nis available")
            return super().measure()

    fastest.LayerSamples = Asked  # type: ignore[misc,assignment]
    config = configs.replace(Case(data=2).config(), data__cache=cache, train__measure_kernels=True)
    mesh = init_processes(config)
    try:
        found = choose_fastest(config, make_batches(config, 0)[0], mesh, torch.device("cpu"))
        return str(found), asked
    except RunError as error:
        return str(error), asked
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


def test_what_fails_on_one_process_no_process_uses(tmp_path: Path) -> None:
    """And a run goes on without it; it is tried again by the next one."""
    found = run_processes(choose, 2, str(tmp_path), (True, True), "compiled")
    said = ", per_sequence, compiled blocks failed with RuntimeError: no kernel image is available)"
    for text, asked in found:
        assert text.startswith("per_sequence (a micro-batch through all layers: per_sequence ")
        assert text.endswith(said)
        assert asked == ["plain", "compiled"]
    assert list(tmp_path.iterdir()) == []
    for text, asked in run_processes(choose, 2, str(tmp_path), (True, True), "plain"):
        assert text.startswith("per_sequence failed with RuntimeError: no kernel image is available; set ")
        assert asked == ["plain"]


@pytest.mark.parametrize(
    ("compiled", "remedy"),
    [
        (False, "set train.attention to another"),
        (True, "set train.attention to another, or train.compile to false"),
    ],
)
def test_without_its_default_a_run_ends_and_says_what_to_set(
    compiled: bool, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the default are compiled only where `train.compile` asks for it."""
    config = configs.replace(Case().config(), train__compile=compiled)
    options = [Candidate("per_sequence", compiled), Candidate("flex", compiled)]
    monkeypatch.setattr(fastest, "_first_measurement", lambda *_: (None, "KernelError: no"))
    mesh, batch = Mesh(Axis(), Axis()), make_batches(config, 0)[0]
    with pytest.raises(RunError) as ended:
        fastest._measured(options, config, batch, mesh, torch.device("cpu"))
    assert str(ended.value) == f"{options[0]} failed with KernelError: no; {remedy}"
