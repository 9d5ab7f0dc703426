"""Protects the address at which processes of a run find each other: where it cannot be used, that is said at once."""

from __future__ import annotations

import errno
import os
import socket

import pytest

from megatron_lcl.config import Config
from megatron_lcl.errors import RunError
from megatron_lcl.selftest.run import selftest
from megatron_lcl.train import engine
from megatron_lcl.train.launch_store import check_loopback, open_store


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
