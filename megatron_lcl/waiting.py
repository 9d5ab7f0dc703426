"""Waiting in threads that must keep time."""

from __future__ import annotations

import threading
import time

_SLICE_SECONDS = 0.2


def wait_for(event: threading.Event, seconds: float) -> bool:
    """Whether an event is set: within so many seconds, seen up to 0.2 s late.

    `Event.wait(seconds)` ends by the time of day where Python was built without `sem_clockwait` (against a glibc before
    2.30, as conda's and uv's are): while it waits for a second and the clock is set back by an hour, it waits for an
    hour. `time.sleep` and `time.monotonic` do not ask for the time of day.
    """
    ends = time.monotonic() + seconds
    while not event.is_set() and (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, _SLICE_SECONDS))
    return event.is_set()
