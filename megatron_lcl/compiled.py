"""Functions that numba compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """A function that numba compiles when it is first called, without Python's lock.

    The result is kept for later processes beside the function's file, in the user's cache folder or in
    NUMBA_CACHE_DIR; where none of them can be written, each process compiles for itself.
    """
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
        return numba.njit(nogil=True)(function)
