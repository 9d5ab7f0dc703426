"""`train --profile A:B`: what steps A to B do, traced by torch's profiler on chosen processes.

In RUN/profile, for each of them: `steps-A-B.rank-K.json.gz`, the trace (for Perfetto or chrome://tracing);
`steps-A-B.rank-K.txt`, the time by part and by operation; on CUDA `steps-A-B.rank-K.memory.pickle`, every allocation of
these steps (for pytorch.org/memory_viz). The time by part is printed as well. Outside these steps nothing is hooked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_lcl.config import Config, Model
from megatron_lcl.errors import UserError, describe_os_error
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.layers import part_of_layer
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.run_folder import PROFILE
from megatron_lcl.train.telemetry.clock import Clock

OPERATIONS = 30
"""rows of the table by operation"""


def profiled_steps(config: Config) -> range | None:
    """The steps that are to be traced, counted from 1, up to the run's last. UserError where the last one comes before
    the first, or the first after all steps of the run."""
    if config.train.profile is None:
        return None
    first, last = map(int, config.train.profile.split(":"))
    steps = config.train.steps
    if last < first:
        raise UserError(f"train.profile = {config.train.profile} ends before it begins; give the first step first")
    if first > steps:
        raise UserError(
            f"train.profile = {config.train.profile} begins behind train.steps = {steps}; name steps of the run"
        )
    return range(first, min(last, steps) + 1)


def check_profile(config: Config, processes: int) -> None:
    """UserError where `train.profile` names no steps, or `train.profile_ranks` a process that is not there."""
    if profiled_steps(config) is None:
        return
    for rank in config.train.profile_ranks:
        if rank >= processes:
            raise UserError(f"train.profile_ranks names process {rank}, and the run has 0 to {processes - 1}")


class Profile:
    """Of one run; every process has one, and all call it at the same steps."""

    def __init__(
        self, config: Config, mesh: Mesh, module: nn.Module, clock: Clock, run: Path, say: Callable[[str], None]
    ) -> None:
        """module: this process's layers; say: prints a line on the first process."""
        self._steps, self._mesh, self._say = profiled_steps(config) or range(0), mesh, say
        self._traces = mesh.world.rank in config.train.profile_ranks
        self._module, self._model, self._clock = module, config.model, clock
        self._path = run / PROFILE / f"steps-{self._steps.start}-{self._steps.stop - 1}.rank-{mesh.world.rank}"
        self._profiler: Any = None
        self._num_traced = 0
        self._until_end = contextlib.ExitStack()

    def before(self, step: int) -> None:
        """Step number `step` (from 1) is to begin."""
        if step not in self._steps or not self._traces:
            return
        if self._profiler is None:
            self._start()
        self._num_traced += 1

    def ends_after(self, step: int, last: bool) -> bool:
        """Whether that step is the last one traced. last: no step comes after it."""
        return step in self._steps and (last or step == self._steps[-1])

    def finish(self) -> None:
        """Write what was traced, and print every process's table; all call it. Steps that are made again, as after a
        rewind, are traced anew."""
        text = self._finish()
        for rank, table in enumerate(self._mesh.world.gather_objects(text)):
            if table:
                self._say(f"process {rank}, {table}")

    def close(self) -> None:
        """No step comes any more; what was traced is written."""
        self._finish()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()  # which may fail: then there is nothing to finish
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(stacks="python")  # C++ frames take minutes to be named
        detail = self._clock.detail = Clock(self._clock.device)
        self._until_end.enter_context(layers_timed(self._module, self._model, detail))
        self._profiler, self._num_traced = profiler, 0
        detail.start()

    def _finish(self) -> str | None:
        """Stop and write; the table by part. None where nothing was traced."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler.stop()
        self._until_end.close()
        detail, self._clock.detail = self._clock.detail, None
        assert detail is not None
        table = table_by_part(detail.take(), self._num_traced)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(f"{self._path}.json.gz")
            sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            operations = profiler.key_averages().table(sort_by=sort, row_limit=OPERATIONS)
            Path(f"{self._path}.txt").write_text(f"{table}\n\n{operations}", encoding="utf-8")
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(f"{self._path}.memory.pickle")
        except OSError as error:
            return f"the profile cannot be written: {describe_os_error(error, self._path)}"
        except RuntimeError as error:  # torch's, of a trace or of frames that it cannot name
            return f"the profile cannot be written: {self._path}: {error}"
        finally:
            if torch.cuda.is_available():
                torch.cuda.memory._record_memory_history(enabled=None)
        return f"{table}\n  {self._path}.json.gz"


def table_by_part(seconds: dict[str, float], steps: int) -> str:
    """What a step spent its time on, a line each, longest first."""
    total = max(sum(seconds.values()), 1e-9)
    lines = [f"  {'part':<20} {'ms a step':>10} {'share':>7}"]
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        if value:
            lines.append(f"  {name:<20} {1e3 * value / steps:>10.2f} {value / total:>7.1%}")
    return "\n".join([f"{steps} steps of {1e3 * total / steps:.1f} ms:", *lines])


@contextlib.contextmanager
def layers_timed(module: nn.Module, model: Model, clock: Clock) -> Iterator[None]:
    """Inside, the clock enters `vision forward`, `vision backward` and so on where the layers of a part begin, and the
    traces have ranges of these names for the forwards."""
    ranges: list[Any] = []

    def watch(layer: nn.Module, part: str) -> list[Any]:
        def before(_module: nn.Module, _args: Any) -> None:
            ranges.append(torch.profiler.record_function(f"{part} forward"))
            ranges[-1].__enter__()
            clock.enter(f"{part} forward")

        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            clock.enter("forward")
            ranges.pop().__exit__(None, None, None)
            for tensor in [out.hidden] if isinstance(out, Activations) else out[:3]:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: clock.enter(f"{part} backward"))

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    hooks = []
    for name, layer in module.named_children():
        if name.isdigit():
            hooks += watch(layer, part_of_layer(int(name), model))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
