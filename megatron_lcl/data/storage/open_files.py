"""How many files a process may have open: the soft limit is often 1,024, what it may be raised to much more."""

from __future__ import annotations

import resource

_ENOUGH = 65_536


def allow_open_files() -> int:
    """Raise this process's limit, as far as this user may; returns it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else min(_ENOUGH, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return _ENOUGH if soft == resource.RLIM_INFINITY else soft
