"""Loader processes are forked from a process that has threads, handlers of signals and garbage: how one begins without
them, and ends with its main process."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from multiprocessing.process import BaseProcess

import torch

from megatron_lcl.processes import remove_sockets

_IGNORED = {signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
_HELD = {signal.SIGTERM, signal.SIGCHLD, *_IGNORED}
_KILLED_SECONDS = 5.0
"""which one needs to end, unless it waits for a file server, for which nobody else is to wait"""
_ORPHAN_SECONDS = 1.0
"""how often a worker looks whether its main process is there"""


@contextlib.contextmanager
def forking() -> Iterator[Callable[[int], None]]:
    """Around the start of workers, in one thread at a time. Gives what each does first (`worker_init_fn` of torch's
    DataLoader).

    Until then no signal reaches it, which would run a handler of the main process there or end it; and nothing is
    collected that the main process no longer uses: the destructor of gloo's process groups (one stays behind in the
    traceback of a run that failed) waits for its threads, which a fork does not copy. (DeepSpeed turns the garbage
    collector on in what is forked; that a threshold is 0 turns it off all the same.)

    A worker that is killed while others start does not break into the main program, as torch's handler of SIGCHLD
    does, which does not stay: who asks for the next batch notices it.
    """
    threshold = gc.get_threshold()
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
        gc.set_threshold(0)
        yield partial(_begin, os.getpid(), threshold, mask)
    finally:
        gc.set_threshold(*threshold)
        if is_main:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def kill(workers: Sequence[BaseProcess]) -> None:
    """End those that have not ended when they were asked to, such as one that hangs in foreign code with Python's lock:
    the main process would wait for it when it ends."""
    left = [worker for worker in workers if worker.is_alive()]
    for worker in left:
        worker.kill()
    for worker in left:
        worker.join(_KILLED_SECONDS)


def _begin(main: int, threshold: tuple[int, int, int], mask: Collection[int], worker: int) -> None:
    """A worker ends when the main process wants it to or is gone, and by no other signal that asks a run to end.

    Schedulers and terminals signal the whole process group; the main process then saves, and needs its workers.

    What was there at the fork is never collected here (see `forking`), nor do memory pages that are shared with the
    main process become copies because the garbage collector has written into them.
    """
    gc.freeze()
    gc.set_threshold(*threshold)
    gc.enable()
    signal.set_wakeup_fd(-1)  # the main process may listen there, to its own signals
    for ignored in _IGNORED:
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {*mask, signal.SIGTERM})
    threading.Thread(target=_end_with, args=(main,), daemon=True).start()
    _drop_connections()
    torch.set_num_threads(1)


def _drop_connections() -> None:
    """Leave the main process's network connections to it alone.

    While a copy of one is open here, the other end does not see that the main process has ended; and gloo, as it ends
    with connections made on demand, is told again of one that it has closed, and aborts (Context::~Context in its
    transport/tcp/context.cc stops the device first, and Loop::unregisterDescriptor then does nothing). Their numbers
    stay in use, or an object that believes it has one would close another file.
    """
    with open(os.devnull) as nothing:
        for name in os.listdir("/dev/fd"):
            with contextlib.suppress(OSError):  # no socket, or the descriptor of the list itself
                one = socket.socket(fileno=int(name))
                if one.family in (socket.AF_INET, socket.AF_INET6):
                    os.dup2(nothing.fileno(), one.fileno())
                one.detach()


def _end_with(main: int) -> None:
    while os.getppid() == main:
        said = signal.sigtimedwait({signal.SIGTERM}, _ORPHAN_SECONDS)
        if said is not None and said.si_pid == main:
            break
    else:  # it was killed, and leaves this to us
        remove_sockets(main)
    os._exit(0)
