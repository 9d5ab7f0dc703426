"""The launch's store of keys and values, through which processes find each other, and what they say there."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_lcl.errors import RunError, UserError

LOOPBACK = "127.0.0.1"


class PortTaken(UserError):
    """Another program listens at the port at which processes are to meet."""


def open_store(timeout: float) -> dist.TCPStore:
    """The launch's store, which its first process serves, or torchrun's agent. dist.DistError where none answers,
    PortTaken as `serve_store`.

    timeout: seconds for every request of it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return serve_store(host, port, timeout)
    check_loopback(host)
    gloo_on_loopback(host)
    return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def serve_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    """A store that this process serves; port: 0 for any, which then is its `port`. timeout: as of `open_store`.
    PortTaken where another program has the port.

    It asks nobody who he is. At the loopback address it listens only there, where torch's own would at all addresses of
    the machine. A second run of this process shares the first one's server, while parts of that one's groups are left.
    """
    check_loopback(host)
    gloo_on_loopback(host)
    listening = None
    if host == LOOPBACK:
        try:
            server = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
            port, listening = server.getsockname()[1], server.detach()  # which is torch's from here on
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise dist.DistNetworkError(f"{LOOPBACK}:{port}: {error.strerror}") from None
            # by a server of this process, which torch knows, or by somebody else, of whom torch says it
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=True,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=listening,
        )
    except dist.DistNetworkError as error:
        if errno.errorcode[errno.EADDRINUSE] not in str(error):
            raise
        raise PortTaken(
            f"MASTER_PORT = {port}: another program has this port of {host}, where the processes are to meet; set "
            "MASTER_PORT to a free one in all processes (DeepSpeed's launcher: --master_port)"
        ) from None


def gloo_on_loopback(host: str) -> None:
    """Where processes meet at the loopback address, gloo's groups made from now on listen there, too; by default at the
    address that this machine's name resolves to."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}  # of Linux, of BSD and macOS
    if host == LOOPBACK and names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names.pop())


def check_loopback(host: str) -> None:
    """RunError where processes are to find each other at this machine's loopback address, and there is none, as in a
    network namespace of its own: a store waits ten minutes for it, also that of one process."""
    if host != LOOPBACK:
        return
    try:
        with socket.create_server((LOOPBACK, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.ENETUNREACH):  # of others the store itself speaks
            raise RunError(
                f"{LOOPBACK} cannot be used ({os.strerror(error.errno)}), and there the processes of a run find each "
                "other, also where it has one; make it usable: `ip link set lo up`"
            ) from None


def keys_set(check: Callable[[list[str]], bool], keys: Sequence[str]) -> list[str]:
    """Those of some keys that a store has: one question for all, and for halves while the answer is no.

    A question for each, from each process, would be as many, to the one server, as the square of the processes. check:
    the store's, whether all of some keys are set.
    """
    if not keys or check(list(keys)):
        return list(keys)
    half = len(keys) // 2
    return [*keys_set(check, keys[:half]), *keys_set(check, keys[half:])] if half else []


def wait_for_keys(check: Callable[[list[str]], bool], keys: list[str], timeout: float) -> bool:
    """Whether a store has all of some keys within so many seconds. It is asked every 0.2 s: a wait in the store, as
    `exchange_in_store` has it, lets no signal through. check: as of `keys_set`."""
    deadline = time.monotonic() + timeout
    while not (there := check(keys)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return there


def exchange_in_store(
    store: dist.Store, key: str, rank: int, ranks: Sequence[int], said: str, timeout: float
) -> dict[int, str]:
    """What each of some processes says, once all have, or as far as they have within so many seconds.

    In few requests, whose number does not grow with that of the processes: one server answers all of them.
    """
    keys = {f"{key} {r}": r for r in ranks}
    store.set(f"{key} {rank}", said)
    there = list(keys)
    try:
        store.wait(there, timedelta(seconds=timeout))
    except dist.DistStoreError:
        there = keys_set(store.check, there)
    return {keys[name]: value.decode() for name, value in zip(there, store.multi_get(there), strict=True)}
