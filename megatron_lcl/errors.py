"""Errors that users can mend. Every other exception is a fault of the program and keeps its traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, settings or surroundings. The message says in one line what is wrong and what to do about it.

    The command line prints that line and ends with exit code 2.
    """


class RunError(UserError):
    """What every process of a run finds, with the same message; only the first process prints it."""
