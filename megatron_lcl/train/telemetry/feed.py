"""A thread that gives a tracker its lines: training waits for no server that is slow, or does not answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping

from megatron_lcl.train.telemetry.sinks import Sink

WAITING = 1_000
"""lines that may wait; one of a large model takes some 8 kB"""
START_SECONDS = 30.0
"""for which a start waits for the tracker's own: loader processes, which are forked, then find nothing half imported"""
END_SECONDS = 60.0
"""for which an end waits for what is not sent yet; well below `guard.timeout`"""


class Feed(threading.Thread):
    """A sink, fed in order. What waits when the process ends is lost.

    begin: begins the tracker's run, in the thread. failed: told there, once, by what the tracker has failed; it gets
    no more.
    """

    def __init__(self, begin: Callable[[], Sink], failed: Callable[[Exception], None]) -> None:
        super().__init__(name="tracker", daemon=True)
        self._begin, self._failed = begin, failed
        self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(WAITING)
        self._begun = threading.Event()
        self._run_failed = False

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
            self._failed(error)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, by name. TimeoutError where too many lines wait."""
        self._put((step, numbers))

    def close(self, failed: bool) -> None:
        """No more come; returns when all are sent. failed: whether the run has. TimeoutError where that takes long."""
        self._run_failed = failed
        self._put(None)
        self.join(END_SECONDS)
        if self.is_alive():
            raise TimeoutError(f"its server has not answered for {END_SECONDS:g} s")

    def _put(self, line: tuple[int, Mapping[str, float]] | None) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            raise TimeoutError(f"{WAITING:,} lines wait for its server") from None
