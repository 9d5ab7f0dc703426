"""Saves that fail: on all processes together, with nothing left behind, and training goes on undisturbed."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes
from small_runs import FIRST, GLOBAL_BATCH, LR, Job, build_config, pack

from megatron_lcl import config as configs
from megatron_lcl.train import checkpoint


def failing_saves(rank: int, folder: str, background: bool) -> dict[str, Any]:
    """Process 1 cannot write files of more than 4 kB; then it can."""
    import torch.distributed as dist

    from megatron_lcl.train.checkpoint import Progress
    from megatron_lcl.train.checkpointer import Checkpointer, SaveError
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = configs.replace(build_config(Path(folder), Job("run", 3)), checkpoint__background=background)
    mesh = init_processes(config)
    own = range(rank, GLOBAL_BATCH, 2)

    def prepare() -> tuple[Any, Callable[[int], tuple[float, float]]]:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)

        def run_step(step: int) -> tuple[float, float]:
            result = stepper.run([pack(step, number, config) for number in own], LR[step])
            return result.loss, result.grad_norm

        return engine, run_step

    _, undisturbed = prepare()
    expected = [undisturbed(step) for step in range(FIRST)]
    engine, run_step = prepare()
    run, rows, said = Path(config.train.output), [], []
    leftovers = run / "checkpoints" / ".step-00000099.tmp" / "state"  # of a run that was killed
    if mesh.is_first:
        leftovers.mkdir(parents=True)
    with Checkpointer(engine, config, mesh, run) as checkpoints:
        for step in range(FIRST):
            rows.append(run_step(step))
            if rank == 1:
                soft = 4096 if step == 1 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
            try:
                checkpoints.save(Progress(step + 1, (step + 1) * GLOBAL_BATCH, {}))
                checkpoints.wait()
            except SaveError as error:
                said.append((step + 1, str(error)))
                dist.barrier()
                said.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
                dist.barrier()
    dist.destroy_process_group()
    return {"rows": rows, "expected": expected, "said": said}


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_process_that_cannot_write(background: bool, tmp_path: Path) -> None:
    first, second = run_processes(failing_saves, 2, str(tmp_path), background)
    assert first["said"] == second["said"], "all processes raise the same, together"
    (step, message), left = first["said"]
    assert step == 2
    assert message.startswith("process 1 could not write the checkpoint: File too large")
    assert left == ["step-00000001"], "nothing of the save that failed, nor of the one that was killed"
    saved = checkpoint.list_checkpoints(tmp_path / "run")
    assert [f.name for f in saved] == ["step-00000001", "step-00000003"]
    assert all(checkpoint.verify(f) == [] for f in saved)
    assert first["rows"] == first["expected"], "training has not noticed"
