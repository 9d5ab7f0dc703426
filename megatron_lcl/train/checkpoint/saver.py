"""Saves that may fail: the run goes on without them up to `checkpoint.max_failures` times in a row."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_lcl.config import Checkpoint
from megatron_lcl.errors import RunError
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer, SaveError
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.resilience.audit import Audit
from megatron_lcl.train.telemetry import Telemetry


class Saver:
    """Counts consecutive saves that failed; logs and audits each. Used by all processes together."""

    def __init__(self, checkpoints: Checkpointer, config: Checkpoint, telemetry: Telemetry, audit: Audit) -> None:
        self.checkpoints = checkpoints
        self.config = config
        self.telemetry = telemetry
        self.audit = audit
        self.step = 0
        """step of the last save that is complete"""
        self.folder = Path()
        """and its folder"""
        self.failures = 0
        """saves that failed since then"""
        self.fault = ""
        """why the last of them did"""
        self._writing: tuple[int, Path] | None = None

    def go_on_from(self, folder: Path, progress: Progress) -> None:
        """The run goes on from a checkpoint. Where copying it had failed, or was interrupted, it is copied now."""
        self.step, self.folder = progress.step, folder
        self._say_if_not_copied(progress.step, self.checkpoints.make_up_copy(folder, progress))

    def go_back_to(self, folder: Path, step: int) -> None:
        """The run has gone back to a checkpoint; those of the steps in between go with the next save."""
        self.step, self.folder, self.checkpoints.back_to = step, folder, step

    def save(self, progress: Progress) -> None:
        """Save, in the background if the config says so; RunError after `max_failures` in a row that failed."""
        since = time.perf_counter()
        self.finish_pending()
        try:
            self._writing = progress.step, self.checkpoints.save(progress, since)
        except SaveError as error:
            self._failed(progress.step, error)
        if not self.config.background:
            self.finish_pending()

    def finish_pending(self) -> None:
        """Wait for a save in the background, if there is one, and count how it ended."""
        if self._writing is None:
            return
        (step, folder), self._writing = self._writing, None
        try:
            self.checkpoints.wait()
        except SaveError as error:
            self._failed(step, error)
            return
        self.step = step
        self.folder = folder
        self.failures = 0
        for saved in self.checkpoints.finished():
            numbers = {"checkpoint_bytes": saved.num_bytes, "checkpoint_stall_seconds": saved.stall_seconds}
            self.telemetry.write({"step": saved.step, **numbers, "checkpoint_write_seconds": saved.write_seconds})
            self._say_if_not_copied(saved.step, saved.not_copied)
            if saved.not_deleted:
                self.audit.write("not deleted", saved.step, files=saved.not_deleted)
                self.telemetry.say(f"could not delete {'; '.join(saved.not_deleted[:3])}")

    def _say_if_not_copied(self, step: int, reason: str) -> None:
        if reason:
            self.audit.write("not copied", step, reason=reason)
            self.telemetry.say(f"no copy of the checkpoint of step {step}: {reason}")

    def _failed(self, step: int, error: SaveError) -> None:
        self.failures += 1
        self.fault = str(error)
        self.audit.write("checkpoint failed", step, reason=str(error), consecutive=self.failures)
        if self.failures >= self.config.max_failures:
            raise RunError(f"{error}; it is save number {self.failures} in a row that failed; {self.last}")
        self.telemetry.say(f"no checkpoint of step {step}: {error}; {self.last}")

    @property
    def last(self) -> str:
        """Where the run can go on, in words."""
        return f"the last complete checkpoint is of step {self.step}" if self.step else "there is no checkpoint yet"
