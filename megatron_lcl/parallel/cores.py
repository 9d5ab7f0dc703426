"""How many cores there are to share."""

import os


def num_cores() -> int:
    """Cores that this process may run on, which are fewer than the machine's in a container or a job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
