"""Processes that are forked from a server in which everything is imported: seconds saved a process."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
from multiprocessing.context import ForkServerContext

from megatron_lcl.processes import prepare_sockets


def forkserver() -> ForkServerContext:
    """Starts processes from a server that has imported what a run imports sooner or later (`preload.py`).

    The server begins with that at once, also for who has no process to start yet. UserError as `prepare_sockets`.
    """
    prepare_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_lcl.train.preload"])
    multiprocessing.forkserver.ensure_running()
    return context


def stop_forkserver() -> None:
    """End the server, if this process has started it: it holds some hundred MB. The next process starts it again."""
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]
