"""A training run, from config to final checkpoint: its processes, and what they build; `loop.py` makes the steps."""

from __future__ import annotations

import contextlib
from pathlib import Path

from megatron_lcl.config import Config
from megatron_lcl.errors import RunError
from megatron_lcl.parallel.mesh import set_timeouts
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
from megatron_lcl.train.determinism import determinism
from megatron_lcl.train.engine import (
    build_engine,
    build_module,
    init_processes,
    leave_processes,
)
from megatron_lcl.train.first_batch import measure_kernels, pipeline_partition
from megatron_lcl.train.kernels import compile_fault
from megatron_lcl.train.loop import Training
from megatron_lcl.train.resilience.faults import blaming, exit_if_lost
from megatron_lcl.train.resilience.signals import Signals, Stopped, start_compilers
from megatron_lcl.train.resilience.watchdog import Watchdog, timeout_of
from megatron_lcl.train.resume_point import resolve_resume_point
from megatron_lcl.train.telemetry import Telemetry


@exit_if_lost()
def train(config: Config, signals: Signals | None = None) -> Path:
    """Run (or resume) the training that `config` describes; the final checkpoint's folder.

    Every process of the launch calls it. Resumes from the newest checkpoint in `train.output` that verifies. Raises
    `signals.Stopped` where a signal requested the end and all is saved (`signals.Interrupted` where that signal has
    also ended what a step needs); RunError on every process where the run cannot go on, SystemExit where this machine
    or the network has failed (`faults`). A process that dies or hangs ends the others (`watchdog`).

    signals: open since before the call, where there are any.
    """
    if signals is None:
        with Signals() as signals:
            return train(config, signals)
    with determinism(config.train.deterministic):
        return _train(config, signals)


def _train(config: Config, signals: Signals) -> Path:
    mesh = init_processes(config)  # within DeepSpeed's ten minutes: nobody watches yet
    try:
        set_timeouts(timeout_of(config.guard))
        with (
            Watchdog(mesh.world, config.guard.timeout, config.guard.long_timeout) as watchdog,
            contextlib.ExitStack() as until_end,
            watchdog.telling(),
            blaming(signals),
        ):
            point = resolve_resume_point(config, mesh, until_end, signals, watchdog)
            kernels = None
            if point.config.train.compile or (point.measure_kernels and compile_fault(point.config) is None):
                start_compilers()
            if point.measure_kernels:
                kernels, point = measure_kernels(point, mesh)
            config = point.config
            module = build_module(config, mesh, pipeline_partition(config, mesh, point), point.weights)
            engine = build_engine(module, config, mesh, point.deepspeed)
            set_timeouts(timeout_of(config.guard))  # also in the groups of DeepSpeed
            run = Path(config.train.output)
            telemetry = until_end.enter_context(Telemetry(run, config, mesh.is_first, point.progress.step))
            checkpoints = until_end.enter_context(Checkpointer(engine, config, mesh, run))
            watchdog.leave_out(checkpoints.background_group)
            if kernels:
                telemetry.say(f"kernels measured: {kernels}")
            training = Training(config, mesh, engine, point, telemetry, checkpoints, signals, watchdog)
            until_end.callback(training.close)
            last = training.run()
    except BaseException as error:
        leave_processes(others_wait=not isinstance(error, RunError | Stopped))
        raise
    leave_processes(others_wait=False)
    return last
