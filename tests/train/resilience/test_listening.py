"""Where the processes of a run listen for connections: they ask nobody who connects."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet, descendants

pytestmark = pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads sockets as Linux lists them")


def listening(pids: list[int]) -> Iterator[tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address, int]]:
    """(process, address, port) of every socket at which one of some processes listens, over TCP."""
    found = {}
    for family in ("tcp", "tcp6"):
        for line in Path("/proc/self/net", family).read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A":
                host, port = local.split(":")
                words = [bytes.fromhex(host[at : at + 8])[::-1] for at in range(0, len(host), 8)]
                found[f"socket:[{inode}]"] = (ipaddress.ip_address(b"".join(words)), int(port, 16))
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since
                if (name := os.readlink(file)) in found:
                    yield pid, *found[name]


@pytest.mark.slow
def test_a_run_on_one_machine_listens_at_its_loopback_address_alone(config_file: str, tmp_path: Path) -> None:
    with Fleet(tmp_path / "run", "--config", config_file, "--train.steps", "4000") as fleet:
        fleet.wait_for_step(2)
        first, second = (fleet.pid(rank) for rank in range(2))
        pids = [first, *descendants(first), second, *descendants(second)]
        found = list(listening(pids))
        assert [(pid, str(address)) for pid, address, _ in found if not address.is_loopback] == []
        port = fleet.port
        assert [pid for pid, _, at in found if at == port] == [first], "the store's, in no other process"
        assert {first, second} <= {pid for pid, _, at in found if at != port}, "gloo's"
