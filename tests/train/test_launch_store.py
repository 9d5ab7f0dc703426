"""Protects the address at which processes of a run find each other: where it cannot be used, that is said at once."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist
from ports import hold_port

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.errors import RunError
from megatron_lcl.selftest.run import selftest
from megatron_lcl.train import engine
from megatron_lcl.train.launch_store import (
    PortTaken,
    check_loopback,
    gloo_on_loopback,
    open_store,
    serve_store,
    wait_for_keys,
)


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
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match=said):
        open_store(9)
    check_loopback("elsewhere.example")


def test_a_layout_that_does_not_fit_is_said_before_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process would end as soon as it has joined; others, who then find no store, look for it for minutes."""
    monkeypatch.setattr(engine, "open_store", lambda timeout: pytest.fail("looks for the store"))
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(RunError, match=r"2 processes cannot be divided into replicas of parallel\.tensor = 4"):
        engine.init_processes(configs.from_dict({"parallel": {"tensor": 4}}))


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


def test_one_process_serves_and_the_others_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torchrun its agent serves, and all ask. All wait as long as is said, and gloo listens where they meet."""

    def open_as(rank: int, agent: str, port: int, timeout: float) -> dist.TCPStore:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        for name, value in (
            ("RANK", str(rank)),
            ("TORCHELASTIC_USE_AGENT_STORE", agent),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", str(port)),
        ):
            monkeypatch.setenv(name, value)
        store = open_store(timeout)
        assert store.timeout == timedelta(seconds=timeout)  # type: ignore[attr-defined]
        assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
        return store

    with hold_port() as nobody:
        for rank, agent in ((1, "False"), (0, "True"), (1, "True")):
            with pytest.raises(dist.DistError):
                open_as(rank, agent, nobody.getsockname()[1], 0.5)
    served = open_as(0, "False", 0, 60.0)
    served.set("of", "the first")
    for rank, agent in ((1, "False"), (0, "True"), (1, "True")):
        assert open_as(rank, agent, served.port, 60.0).get("of") == b"the first"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_a_store_at_the_loopback_address_listens_only_there() -> None:
    store = serve_store("127.0.0.1", 0, 9)
    socket.create_connection(("127.0.0.1", store.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))


def test_a_store_that_cannot_listen_there_listens_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(socket, "create_server", create)
    with pytest.raises(dist.DistNetworkError, match=f"^127.0.0.1:0: {os.strerror(errno.EMFILE)}$"):
        serve_store("127.0.0.1", 0, 9)


def test_a_wait_for_keys_ends() -> None:
    answers = iter([False] * 9)
    assert not wait_for_keys(lambda keys: next(answers), ["a"], 0.1)
    answers = iter([False, True])
    assert wait_for_keys(lambda keys: next(answers), ["a"], 60.0)


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
