"""Forks of the tests' own process, in which earlier tests have left what a child had better not end."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkContext


def fork() -> int:
    """`os.fork`, with no garbage in the child.

    Of a training run that failed in this process a process group may be left in the cycle of an error's traceback. A
    child that collects it waits for threads that a fork does not copy.
    """
    gc.collect()
    return os.fork()


def fork_context() -> ForkContext:
    """Of multiprocessing, for processes that start now, for the same reason."""
    gc.collect()
    return multiprocessing.get_context("fork")


def status_of(action: Callable[[], object]) -> int:
    """Exit status of a forked process that does this and no more: 0 where it does not raise."""
    if child := fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        action()
        os._exit(0)
    finally:
        os._exit(1)
