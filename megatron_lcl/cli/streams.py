"""Standard streams that end no command: closed ones, logs on a full disk, and pipes that nobody reads any more."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


@contextmanager
def lasting_streams() -> Iterator[None]:
    """What is written on stderr (bars, warnings) and cannot be is dropped, and so is what is written on stdout when its
    reader has gone (`| head`): neither changes what a command does, nor its exit code. A result on a full disk is lost,
    which stays an OSError.

    Descriptors 0 to 2 that were closed lead to /dev/null from then on. Else a file of data, or a pipe, would be opened
    as one of them, and processes that are started would write their messages there.
    """
    _open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid Unicode
    before = sys.stdout, sys.stderr
    lasting: list[Any] = [_Lasting(sys.stdout, BrokenPipeError), _Lasting(sys.stderr, OSError)]
    sys.stdout, sys.stderr = lasting
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except OSError:  # Python would try once more when it ends, and change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_closed() -> None:
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it is the lowest that is free
        if getattr(sys, name) is None:  # as Python has what was closed when it began
            mode = "w" if descriptor else "r"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False))


class _Lasting:
    """A stream that drops what it cannot write for one kind of error; else the stream itself."""

    def __init__(self, stream: TextIO, dropped: type[OSError]) -> None:
        self._stream, self._dropped = stream, dropped

    def write(self, text: str) -> int:
        with suppress(self._dropped):
            self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with suppress(self._dropped):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # as of a copy, whose stream is not set yet
            raise AttributeError(name)
        return getattr(self._stream, name)
