"""Protects the address at which processes of a run find each other: where it cannot be used, that is said at once."""

from __future__ import annotations

import errno
import os
import socket
import subprocess

import pytest

from megatron_lcl.config import Config
from megatron_lcl.errors import RunError
from megatron_lcl.selftest.run import selftest
from megatron_lcl.train import engine
from megatron_lcl.train.launch_store import PortTaken, check_loopback, gloo_on_loopback, open_store, serve_store


@pytest.mark.parametrize("number", [errno.ENETUNREACH, errno.EADDRNOTAVAIL])
def test_a_loopback_address_that_is_down(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(socket.socket, "connect", connect)
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    said = rf"127.0.0.1 cannot be used \({os.strerror(number)}\), .*: `ip link set lo up`"
    for begin in (lambda: engine.init_processes(Config()), lambda: open_store(9), lambda: selftest(timeout=9)):
        with pytest.raises(RunError, match=said):
            begin()
    check_loopback("elsewhere.example")


def test_what_else_the_system_says_is_not_of_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no file may be opened any more, or `localhost` is another address."""

    def create(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "create_server", create)
    check_loopback("127.0.0.1")


def test_a_loopback_address_that_is_up() -> None:
    check_loopback("127.0.0.1")


def test_a_store_gives_its_port_back_and_is_closed_in_programs_that_are_started() -> None:
    def connect() -> None:
        socket.create_connection(("127.0.0.1", port)).close()

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as `hold_port` does
        port = held.getsockname()[1]
        for _ in range(2):
            store = serve_store("127.0.0.1", port, 9)
            assert store.port == port
            store.set("of", "the first")
            assert serve_store("127.0.0.1", port, 9).get("of") == b"the first", "one server of a process"
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as program:
                connect()
                del store
                with pytest.raises(ConnectionRefusedError):
                    connect()
                program.communicate(timeout=60)


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "")])
def test_a_port_that_somebody_else_has(host: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    with socket.create_server((address, 0)) as other:
        port = other.getsockname()[1]
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(PortTaken, match=rf"^MASTER_PORT = {port}: another program .* of {host}.*; set MASTER_PORT"):
            engine.init_processes(Config())


def test_gloo_listens_where_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    gloo_on_loopback("node1")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    gloo_on_loopback("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    gloo_on_loopback("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"
