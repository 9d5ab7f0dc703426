"""What other processes need that this one starts: a place for the sockets over which they talk, and its own code, but
not the script that started it once more."""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import sys
import tempfile

from megatron_lcl.errors import UserError, describe_os_error

UNGUARDED = (
    'a script starts worker processes outside of `if __name__ == "__main__":`, and each of them runs the script\'s '
    "lines again; put the call there"
)
NEVER_BEGAN = f"worker processes end before they begin to work, perhaps out of memory; or {UNGUARDED}"
"""said where none of them has reached its first line of ours"""
LONGEST = 71
"""bytes of the path of a folder in which the path of a socket is not too long (107 bytes; macOS: 103), with the 32 that
`multiprocessing` adds"""


def socket_folder() -> str:
    """The folder for temporary files, or /tmp where paths in it would be too long for sockets. OSError where there is
    none that can be written."""
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) <= LONGEST else "/tmp"


def prepare_sockets() -> None:
    """Make the folder in which `multiprocessing` has its sockets, those of a fork server and those over which loader
    processes hand over tensors: this process's and, unless they have one, that of the processes that it starts. It is
    removed when this process ends. UserError where it cannot be made.

    Left to `multiprocessing`, this would fail in a thread of a loader process that drops the batch, for which the main
    process would wait for ever.
    """
    before, above = tempfile.tempdir, None
    try:
        tempfile.tempdir = above = socket_folder()
        multiprocessing.util.get_temp_dir()
    except OSError as error:
        raise UserError(
            f"{describe_os_error(error, above)}; processes need a small folder for their sockets: set TMPDIR to one "
            f"that can be written, with a path of up to {LONGEST} bytes"
        ) from None
    finally:
        tempfile.tempdir = before


def runs_script_again() -> bool:
    """Whether this is a process that `multiprocessing` has started, and still imports the script of who started it."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def same_code() -> dict[str, str]:
    """Variables with which another Python finds modules where this one does, and not first in the folder in which it is
    started, as `python -m` would: that may be another checkout, or have a file with the name of one of Python's own."""
    return {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONSAFEPATH": "1"}
