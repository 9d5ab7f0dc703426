"""A job whose node has died is not submitted again before Ray knows: Ray could send it to the dead node, where it would
wait for ever (ray-project/ray#63405). With a stand-in for Ray, since that happens in one of many runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lcl.data.engines import ray as engine


class StandIn:
    """A Ray of two nodes, `dead` (nobody listens at its port) and `alive`; it notices when it is asked for the
    `notices`-th time."""

    def __init__(self, port: int, notices: int) -> None:
        self.exceptions = pytest.importorskip("ray").exceptions
        self._port, self._notices = port, notices
        self.asked, self.submitted = 0, list[tuple[int, int]]()
        """how often it was asked for its nodes; (job, how often until then)"""

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        place = {"NodeManagerAddress": "127.0.0.1", "Resources": {"CPU": 1.0}}
        return [
            {"NodeID": "dead", "NodeManagerPort": 1, "Alive": self.asked < self._notices, **place},
            {"NodeID": "alive", "NodeManagerPort": self._port, "Alive": True, **place},
        ]

    def remote(self, **_: Any) -> Any:
        def submit(_task: Any, index: int, _environment: Any) -> str:
            self.submitted.append((index, self.asked))
            return f"result {index}"

        return lambda function: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=submit))

    def wait(self, references: list[str], timeout: float) -> tuple[list[str], list[str]]:
        return references, []

    def get(self, reference: str) -> str:
        raise self.exceptions.WorkerCrashedError


@pytest.fixture
def port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


@pytest.mark.parametrize(("node", "asked"), [("dead", 5), ("alive", 2), (None, 1)])
def test_a_job_of_a_dead_node_waits_until_ray_knows(
    node: str | None, asked: int, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once after another failure, also of a job that has not said where it began."""
    monkeypatch.setattr(engine, "_POLL", 0.01)
    cluster, task = StandIn(port, notices=5), SimpleNamespace(log=lambda index: tmp_path / f"{index}")
    jobs = engine._Ray(cluster, task, 1.0, 0.0, {})
    jobs.submit([0, 1])
    if node:
        (tmp_path / "0").write_text(f"node {node}: job 0 of 2\n")
    assert list(jobs.ended()) == [0, 1]
    jobs.submit([0])
    assert cluster.submitted == [(0, 1), (1, 1), (0, asked)]


def test_what_ray_never_notices_is_waited_for_a_while(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_POLL", 0.5)
    monkeypatch.setattr(engine, "_DEATH", 2.0)
    clock = [0.0]
    moments = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(engine, "time", moments)
    cluster, task = StandIn(port, notices=10**6), SimpleNamespace(log=lambda index: tmp_path / f"{index}")
    jobs = engine._Ray(cluster, task, 1.0, 0.0, {})
    jobs.submit([0])
    (tmp_path / "0").write_text("node alive: job 0 of 1\nnode dead: job 0 of 1\n")
    jobs.ended()
    jobs.submit([0])
    assert [index for index, _ in cluster.submitted] == [0, 0]
    assert cluster.asked == 1 + 16
