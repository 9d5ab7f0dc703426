"""Steps that must not count: losses and gradients that are not finite, and loss spikes.

The step itself leaves the model as it was (`train.step.nan_if_rejected`); here they are counted, and it is decided when
to rewind. All numbers are the same on every process, so every process decides the same.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from megatron_lcl.config import Guard
from megatron_lcl.errors import RunError
from megatron_lcl.model.transfer import from_host
from megatron_lcl.units import counted


class BadSteps:
    """Counts consecutive steps that were skipped, and knows what loss is a spike.

    A spike (opt-in): a loss more than `spike_sigmas` standard deviations above the mean of the last `spike_window`
    steps that counted, once half a window is there (the rule of OLMo-core's SkipStepOptimizer).
    """

    def __init__(self, config: Guard, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.config = config
        self.consecutive: int = state.get("consecutive", state.get("in_a_row", 0))  # its name in older checkpoints
        self.began: tuple[int, int] = tuple(state.get("began", (0, 0)))  # type: ignore[assignment]
        """steps done and packs consumed before the first of them"""
        self.rewinds: int = state.get("rewinds", 0)
        """since the last step that was saved and counted"""
        self.too_many = False
        """whether the run must go back to a checkpoint from before them; by a step that was recorded, not by those of
        the checkpoint alone, whose run may have allowed more"""
        # not those from before a time in which they were not watched
        losses = state.get("losses", ()) if self.watches_losses else ()
        self.losses = deque[float](losses, maxlen=config.spike_window)
        """of the last steps that counted, where they are watched"""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; plain values."""
        counts = {"consecutive": self.consecutive, "began": list(self.began), "rewinds": self.rewinds}
        return {**counts, "losses": list(self.losses)}

    def new_window(self) -> None:
        """The losses to come, of other batches or otherwise weighted, are not to be compared with those before."""
        self.losses.clear()

    def limit(self) -> float:
        """The largest loss that is no spike."""
        sigmas = self.config.spike_sigmas
        if sigmas is None or len(self.losses) < max(2, self.config.spike_window // 2):
            return math.inf
        return statistics.fmean(self.losses) + sigmas * statistics.stdev(self.losses)

    @property
    def watches_losses(self) -> bool:
        """Whether it must know every step's loss at last; else only those of steps that were not applied."""
        return self.config.spike_sigmas is not None

    def record(self, at: tuple[int, int], loss: float | None, applied: bool, loss_scale: float | None) -> str | None:
        """Count a step; why it was skipped, None if it was not.

        at: steps done and packs consumed before it. loss: None where nobody has read it, because it need not be known.
        loss_scale: that of float16 before the step, if it can be lower (`precision.lowerable_scale`). A gradient too
        large for float16 is then no bad step: the scale is being looked for.
        """
        self.too_many = False
        if applied:
            self.consecutive = 0
            if self.watches_losses:
                assert loss is not None
                self.losses.append(loss)
            return None
        assert loss is not None
        limit = self.limit()
        if math.isfinite(loss) and loss <= limit and loss_scale is not None:
            return f"gradient too large for float16 at loss scale {loss_scale:g}"
        self.began = self.began if self.consecutive else at
        self.consecutive += 1
        self.too_many = self.consecutive >= self.config.max_bad_steps
        if not math.isfinite(loss):
            return f"loss is {loss}"
        return f"loss {loss:.6g} is a spike, above {limit:.6g}" if loss > limit else "gradient is not finite"

    def rewind(self, state: dict[str, Any] | None, step: int) -> None:
        """Take up the state of the checkpoint that the run goes back to. RunError after too many times.

        What was bad before it counts no more: those packs are skipped, as those of the bad steps after it are.
        """
        rewinds = self.rewinds + 1
        if rewinds > self.config.max_rewinds:
            raise RunError(
                f"{counted(self.consecutive, 'bad step')} in a row up to step {step}, and guard.max_rewinds = "
                f"{self.config.max_rewinds} allows no further rewind to the checkpoint before; audit.jsonl says which "
                "and why. Lower optimizer.lr, or look at the packs with `replay`"
            )
        self.__init__(self.config, state)  # type: ignore[misc]
        self.consecutive, self.rewinds = 0, rewinds


class SpikeLimit:
    """`BadSteps.limit` on the device, for steps whose losses nobody has read yet: no host waits for them.

    It follows from the losses of the last steps that counted, oldest first, and from nothing else: a run that goes on
    from a checkpoint has the same bits. Without `spike_sigmas` it is infinite. The process needs what `add` is given
    to be right only where the step's loss is taken: in a pipeline on the last stage.
    """

    def __init__(self, config: Guard, device: torch.device) -> None:
        self.config, self.device = config, device
        self.begin(())

    def begin(self, losses: Iterable[float]) -> None:
        """Forget what was added; losses: of the last steps that counted, at most a window of them."""
        own, size = list(losses), self.config.spike_window
        self._losses = from_host([0.0] * (size - len(own)) + own, self.device, torch.float64)
        self._count = from_host([len(own)], self.device, torch.float64)[0]

    def limit(self) -> torch.Tensor | float:
        """The largest loss that is no spike, a float32 scalar."""
        sigmas, size = self.config.spike_sigmas, self.config.spike_window
        if sigmas is None:
            return math.inf
        real = torch.arange(size, 0, -1, device=self.device) <= self._count
        mean = self._losses.sum() / self._count.clamp(min=1)  # what is not there is 0
        squares = torch.where(real, (self._losses - mean).square(), 0.0)
        limit = mean + sigmas * (squares.sum() / (self._count - 1).clamp(min=1)).sqrt()
        return torch.where(self._count >= max(2, size // 2), limit, math.inf).float()

    def add(self, loss: torch.Tensor, skipped: torch.Tensor | bool) -> None:
        """A step was made. loss: scalar; skipped: whether it changed nothing, 1 or 0 where only the device knows."""
        if self.config.spike_sigmas is None or skipped is True:
            return
        losses = torch.cat([self._losses[1:], loss.detach().double().reshape(1)])
        count = (self._count + 1).clamp(max=self.config.spike_window)
        if isinstance(skipped, torch.Tensor):
            good = skipped.reshape(()) == 0
            losses, count = torch.where(good, losses, self._losses), torch.where(good, count, self._count)
        self._losses, self._count = losses, count
