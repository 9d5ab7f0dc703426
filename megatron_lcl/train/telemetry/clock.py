"""What a process spends its time on, without waiting for the device.

A step is a line of phases, one after another. On CPU they are timed by the host's clock. On CUDA an event is recorded
where a phase begins, and read once a result has been waited for: the times are those of the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch

Phase = Literal["data", "exchange", "forward", "loss", "backward", "reduce", "optimizer", "other"]
"""reading the batch; what processes tell each other and hand over; forward; the loss over the global batch, with the
wait for the others' features; backward; sums over replicas, with the wait for the others; the optimizer's step; what
lies between two steps, such as saving and evaluating"""
PHASES: tuple[Phase, ...] = get_args(Phase)
STEP: tuple[Phase, ...] = PHASES[:-1]
"""those of a step: all but what lies between two"""
WORK: tuple[Phase, ...] = ("data", "forward", "backward")
"""the phases in which a process waits for no other, as long as it is alone with its layers (`parallel.tensor: 1`)"""


class Clock:
    """Times the phases of this process, once it is started."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.detail: Clock | None = None
        """enters the phases too, and others within them"""
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._now: tuple[str, Any] | None = None
        self._passed: list[tuple[str, Any, Any]] = []
        """on CUDA: phases whose events have not been read yet"""
        self._free: list[Any] = []

    def start(self) -> None:
        """From here on phases are timed."""
        self._now = "other", self._mark()

    def enter(self, phase: str) -> None:
        """The phase before ends, and this one begins."""
        if self._now is None:
            return
        (before, began), now = self._now, self._mark()
        self._now = phase, now
        if self.device.type == "cuda":
            self._passed.append((before, began, now))
        else:
            self._seconds[before] = self._seconds.get(before, 0.0) + now - began
        if self.detail is not None:
            self.detail.enter(phase)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is entered inside counts for the present phase."""
        now, self._now = self._now, None
        try:
            yield
        finally:
            self._now = now

    def enter_backward(self, loss: torch.Tensor) -> None:
        """Backward begins; the sums over replicas do where autograd has ended."""
        self.enter("backward")
        if self._now is not None and loss.requires_grad:
            engine = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            loss.register_hook(lambda _: engine.queue_callback(lambda: self.enter("reduce")))

    def take(self) -> dict[str, float]:
        """Seconds of each phase that ended since the last call. On CUDA to be called when a result of a step that
        began the present phase has been read: what passed before is over then."""
        for phase, began, ended in self._passed:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + began.elapsed_time(ended) / 1e3
            self._free.append(began)
        self._passed.clear()
        taken, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return taken

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event
