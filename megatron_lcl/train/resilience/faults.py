"""What an error is due to: the machine, so that a restart on others may succeed, or the program.

Launch scripts read it from two sources: the exit code, and, where MEGATRON_LCL_FAULTS names a folder, the nodes to
exclude, one file for each process that knows of any.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_lcl.data.loading.loader import LoaderKilled
from megatron_lcl.errors import is_mendable
from megatron_lcl.train.resilience.signals import Interrupted, Signals, Stopped
from megatron_lcl.train.resilience.start import LOST, WRITE_SECONDS, within

FAULTS = "MEGATRON_LCL_FAULTS"
"""variable with the folder in which processes say which nodes have failed"""
_OF_THE_PROGRAM = (
    "device-side assert",
    "invalid argument",
    "invalid configuration",
    "invalid device ordinal",  # more processes than GPUs that they see
    "no kernel image",
)
"""of CUDA's errors: on another machine they would be the same"""
_STORAGE = {errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV, errno.ETIMEDOUT}


def node() -> str:
    """This machine's name as Slurm knows it, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def name_nodes(nodes: Sequence[str], rank: int | str) -> None:
    """Tell the launch script, if it wants to know, which nodes have failed."""
    if FAULTS not in os.environ or not nodes:
        return
    file, line = Path(os.environ[FAULTS], f"fault-{rank}"), ",".join(sorted(set(nodes))) + "\n"

    within(WRITE_SECONDS, lambda: file.write_text(line, encoding="utf-8"))


@contextlib.contextmanager
def blaming(signals: Signals) -> Iterator[None]:
    """An error of the program between a signal and the answer to it is taken to come from it: Interrupted.

    A scheduler's signal also reaches the processes that others than the loader and `start_compilers` start, and these
    end by it: simulations, C++ compilers.
    """
    try:
        yield
    except BaseException as error:
        # of the system, too: what has ended may not have left its files
        program = code_of(error) == 1 or (isinstance(error, OSError) and not is_local(error))
        if not signals.received or signals.answered or not program:
            raise
        raise Interrupted(signals.received, error) from error


def is_distributed(error: BaseException | None) -> bool:
    """Whether a collective failed here because of another process. gloo raises plain RuntimeErrors."""
    words = ("gloo", "nccl", "connection", "peer", "timed out", "socket", "broken pipe")
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)
    )


def is_local(error: BaseException | None) -> bool:
    """Whether this machine has failed: its GPU, its memory (a loader process was killed), or its way to the files."""
    if isinstance(error, OSError):  # one of a loader process has its number in the text alone
        numbers = {error.errno, *map(int, re.findall(r"\[Errno (\d+)\]", str(error)))}
        return bool(numbers & _STORAGE)
    if isinstance(error, torch.AcceleratorError):
        first = str(error).partition("\n")[0]  # torch's advice below it tells of device-side assertions in every error
        return not any(words in first for words in _OF_THE_PROGRAM)
    return isinstance(error, LoaderKilled)


def code_of(error: BaseException | None) -> int:
    """The exit code for an error: 2 bad input, LOST the machine's fault, 1 the program's; or that of a signal."""
    if isinstance(error, Stopped | Interrupted):
        return error.code
    if is_local(error) or is_distributed(error):
        return LOST
    return 2 if is_mendable(error) else 1


@contextlib.contextmanager
def exit_if_lost() -> Iterator[None]:
    """An error that is a machine's fault is printed with its traceback and ends the process with LOST (SystemExit)."""
    try:
        yield
    except Exception as error:
        if code_of(error) != LOST:
            raise
        with contextlib.suppress(OSError):  # a log on a full disk
            traceback.print_exception(error)
        if is_local(error):  # a collective tells only that there is a fault, not where
            name_nodes([node()], os.environ.get("RANK", "0"))
        raise SystemExit(LOST) from error
