"""A thread that gives a tracker its lines: training waits for no server that is slow, or does not answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from megatron_lcl.train.telemetry.sinks import Sink

WAITING = 1_000
"""lines that may wait; one of a large model takes some 8 kB"""
START_SECONDS = 30.0
"""for which a start waits for the tracker's own: loader processes are then not forked while its thread is busy"""
END_SECONDS = 60.0
"""for which an end waits for what is not sent yet; well below `guard.timeout`"""


class Feed(threading.Thread):
    """A sink, fed in order. What waits when the process ends is lost.

    begin: begins the tracker's run, in the thread. failed: told once, by either thread, by what the tracker has failed;
    it gets no more.
    """

    def __init__(self, begin: Callable[[], Sink], failed: Callable[[Exception], None]) -> None:
        super().__init__(name="tracker", daemon=True)
        self._begin, self._failed = begin, failed
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._begun = threading.Event()
        self._run_failed = False
        self._left_alone, self._telling = False, threading.Lock()

    def start(self) -> None:
        """Returns when the tracker's run has begun, or does not soon."""
        super().start()
        self._begun.wait(START_SECONDS)

    def run(self) -> None:
        try:
            try:
                sink = self._begin()
            finally:
                self._begun.set()
            while (line := self._lines.get()) is not None:
                sink.write(*line)
            sink.close(self._run_failed)
        except Exception as error:  # noqa: BLE001 whatever it is, a run does not end for want of a tracker
            self._leave_alone(error)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""
        if not self._left_alone:
            self._put((step, numbers))

    def close(self, failed: bool) -> None:
        """No more come; returns when all are sent, or that takes long. failed: whether the run has."""
        self._run_failed = failed
        self._put(None)
        with self._telling:  # else the process might end before it is told
            left_alone = self._left_alone
        if not left_alone:
            self.join(END_SECONDS)
            if self.is_alive():
                self._leave_alone(TimeoutError(f"its server has not answered for {END_SECONDS:g} s"))

    def _put(self, line: tuple[int, Mapping[str, float]] | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._leave_alone(TimeoutError(f"{WAITING:,} lines wait for its server"))

    def _leave_alone(self, error: Exception) -> None:
        with self._telling:
            if not self._left_alone:
                self._left_alone = True
                self._failed(error)
