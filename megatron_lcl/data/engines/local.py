"""Jobs as processes of this machine, as many at a time as it has CPUs for."""

from __future__ import annotations

import contextlib
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from megatron_lcl.data.engines.children import Children, Lost
from megatron_lcl.data.engines.task import Task, do_logged
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.machine import num_cores
from megatron_lcl.processes import NEVER_BEGAN

_POLL = 1.0
"""seconds that `ended` waits"""


@contextlib.contextmanager
def opened(task: Task) -> Iterator[_Local]:
    """Ready for jobs."""
    task.logs.mkdir(parents=True, exist_ok=True)
    children: Children[int, UserError | None] = Children()
    try:
        yield _Local(task, children)
    finally:
        children.end()


class _Local:
    def __init__(self, task: Task, children: Children[int, UserError | None]) -> None:
        self._task, self._children = task, children
        self._at_once = max(1, num_cores() // task.cpus)
        self._waiting: deque[int] = deque()

    def submit(self, jobs: Sequence[int]) -> None:
        self._waiting.extend(jobs)

    def ended(self) -> Mapping[int, UserError | None]:
        while self._waiting and len(self._children) < self._at_once:
            index = self._waiting.popleft()
            self._children.start(index, do_logged, self._task, index, "here")
        return {index: self._error(index, result) for index, result in self._children.ended(_POLL).items()}

    def _error(self, index: int, result: UserError | Lost | None) -> UserError | None:
        if not isinstance(result, Lost):
            return result
        if result.exit_code < 0:
            return UserError(f"killed by {signal.Signals(-result.exit_code).name}, perhaps out of memory")
        if not exists(self._task.log(index)):
            return UserError(NEVER_BEGAN)
        return UserError(f"ended with exit code {result.exit_code}")
