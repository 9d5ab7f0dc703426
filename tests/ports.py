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
    """A socket with a port as `free_port` gives them. Until it is closed nobody else finds the port free; who is told
    of it can listen there, by a socket with SO_REUSEADDR as servers have it."""
    from megatron_lcl.train.launch import free_port  # torch, for which most tests have no use

    while True:
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", free_port()))
        except OSError:  # another process has held it since
            held.close()
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
