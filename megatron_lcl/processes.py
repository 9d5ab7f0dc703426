"""What other processes need that this one starts: a place for the sockets over which they talk, variables, and its own
code, but not the script that started it once more."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_lcl.errors import UserError, describe_os_error

UNGUARDED = (
    'a script starts worker processes outside of `if __name__ == "__main__":`, and each of them runs the script\'s '
    "lines again; put the call there"
)
NEVER_BEGAN = (
    "worker processes end before they begin to work; what they have written above this says why. Each of them imports "
    "the script that starts them: it has to be a file (not standard input), with the call inside of "
    '`if __name__ == "__main__":`. If they have written nothing, they may be out of memory'
)
"""said where none of them has reached its first line of ours"""
_LONGEST = 71
"""bytes of the path of a folder in which the path of a socket is not too long (107 bytes; macOS: 103), with the 32 that
`multiprocessing` adds"""
_MADE = "megatron_lcl"
"""in what a process of `multiprocessing` hands on to those that it starts: who has made the folder of sockets, and
which"""


class _CollectingLater:
    """What comes after it is imported in a process with no garbage collector."""

    def __reduce__(self) -> tuple[Any, ...]:
        return gc.disable, ()


def importing_first(function: Callable[..., object], *arguments: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, arguments) for a process that is spawned, to call this function with these arguments.

    What it imports for them stays: looked at for garbage again and again it takes a quarter longer. Later garbage is
    collected, as seldom as in the command itself.
    """
    return _call, (_CollectingLater(), function, *arguments)


def _call(_: None, function: Callable[..., object], *arguments: Any) -> object:
    gc.freeze()
    gc.enable()
    gc.set_threshold(20_000)
    return function(*arguments)


def make_socket_folder(prefix: str, who: str) -> str:
    """A new folder for sockets, where temporary files are, or in /tmp where paths would be too long for sockets there.

    who: "processes need", for the UserError where it cannot be made.
    """
    above: str | None = None
    try:
        above = tempfile.gettempdir()
        if len(os.fsencode(above)) > _LONGEST:
            above = "/tmp"
        return tempfile.mkdtemp(prefix=prefix, dir=above)
    except OSError as error:
        raise UserError(
            f"{describe_os_error(error, above)}; {who} a small folder for sockets: set TMPDIR to one that can be "
            f"written, with a path of up to {_LONGEST} bytes"
        ) from None


def prepare_sockets() -> None:
    """Make the folder in which `multiprocessing` has its sockets, those of a fork server and those over which loader
    processes hand over tensors: this process's and, unless they have one, that of the processes that it starts. It is
    removed when this process ends. UserError where it cannot be made.

    Left to `multiprocessing`, this would fail in a thread of a loader process that drops the batch, for which the main
    process would wait for ever. Where two threads each make one, both are removed.
    """
    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    if config.get("tempdir") is None:  # as multiprocessing.util.get_temp_dir does, which chooses no place
        folder = make_socket_folder("pymp-", "processes need")
        multiprocessing.util.Finalize(None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=-100)
        config["tempdir"] = folder
        config[_MADE] = os.getpid(), folder


def remove_sockets(maker: int) -> None:
    """Remove the folder of `prepare_sockets` if the process with this number has made it: this one, which ends at once
    and without Python's own end, or the one that started this one, and was killed."""
    made_by, folder = multiprocessing.current_process()._config.get(_MADE, (None, ""))  # type: ignore[attr-defined]
    if made_by == maker:
        shutil.rmtree(folder, ignore_errors=True)


def runs_script_again() -> bool:
    """Whether this is a process that `multiprocessing` has started, and still imports the script of who started it."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def same_code() -> dict[str, str]:
    """Variables with which another Python finds modules where this one does, and not first in the folder in which it is
    started, as `python -m` would: that may be another checkout, or have a file with the name of one of Python's own."""
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}


@contextmanager
def variables(given: Mapping[str, str | None]) -> Iterator[None]:
    """Variables of this process, which those that it starts inherit, None: not set; at the end they are as before."""
    before = {name: os.environ.get(name) for name in given}
    _set(given)
    try:
        yield
    finally:
        _set(before)


def _set(given: Mapping[str, str | None]) -> None:
    for name, value in given.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
