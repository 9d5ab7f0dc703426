"""Functions that numba compiles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.caching import FunctionCache

_DAMAGED = (EOFError, pickle.UnpicklingError)
"""what a file says that a power failure has left empty or cut off"""


def compiled(function: Callable[..., Any]) -> Any:
    """A function that numba compiles when it is first called, without Python's lock.

    The result is kept for later processes beside the function's file, in the user's cache folder or in
    NUMBA_CACHE_DIR; where none of them can be written or read, each process compiles for itself.
    """
    dispatcher: Any = numba.njit(nogil=True)(function)
    try:
        dispatcher._cache = _Cache(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    return dispatcher


class _Cache(FunctionCache):
    """Numba's cache, which no call of a function fails for.

    Numba looks whether it can make a file in the folder, once. The folder's disk may have no room for what is in it, or
    be a file server whose files another machine replaces while they are read.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(OSError, *_DAMAGED):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except _DAMAGED:  # the index
                self.flush()
                super().save_overload(sig, data)
        except OSError:
            # the index is written first; what it names may still be there from an older source
            with suppress(OSError):
                os.unlink(self._cache_file._index_path)
