"""Ports that no other test can get: the suite runs in several processes, which choose among the same ones."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """A port of 127.0.0.1 at which connections are refused: it is taken, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def hold_port() -> socket.socket:
    """As `launch.hold_port`, which is imported where it is needed: with it comes torch, for which most tests have no
    use."""
    from megatron_lcl.train import launch

    return launch.hold_port()
