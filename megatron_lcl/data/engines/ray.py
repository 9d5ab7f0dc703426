"""Jobs as tasks of Ray: on a cluster that runs, or on one of this machine alone that ends with the command.

Ray itself tries nothing again (`max_retries=0`), so that failures are counted in one place. A job is tried again on
a node where it has not failed, if one is free.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT
from megatron_lcl.data.engines.task import Task, do_logged, failure
from megatron_lcl.errors import UserError
from megatron_lcl.fields import build, put
from megatron_lcl.filesystem import exists
from megatron_lcl.machine import num_cores
from megatron_lcl.units import in_bytes

_POLL = 1.0
"""seconds that `ended` waits"""
_STORE_BYTES = 80 << 20
"""of the object store of a cluster of our own, of which jobs need nothing: about the least that Ray takes"""
_NODE = re.compile(r"^node (\w+):", re.MULTILINE)
_HOST_PORT = re.compile(r"([^/:]+):([0-9]{1,5})")
_PATIENCE = 10.0
"""seconds in which a cluster must answer"""
_DEATH = 60.0
"""seconds in which Ray notices that a node has died; by its defaults about 20"""
_LOCAL = "local"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, config=STRICT)
class RaySettings:
    """Where Ray is, and what it reserves for a job."""

    address: str | None = Field(
        default=None,
        description="host:port of a cluster, auto: the one that runs here, local: one for this command; "
        "null: RAY_ADDRESS's, else auto, else local",
    )
    num_cpus: Annotated[float, Field(gt=0)] | None = Field(default=None, description="null: the job's processes")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="10^9 bytes, by which nodes are chosen; Ray does not enforce it"
    )


def read_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """`RaySettings` from texts, each KEY=VALUE or an address."""
    parameters: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        put(RaySettings, parameters, *((key, value) if equals else ("address", text)))
    return parameters


@contextlib.contextmanager
def opened(task: Task, parameters: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[_Ray]:
    """Ready for jobs. environment: of jobs, besides their node's. UserError where Ray is not there or not reached."""
    settings: RaySettings = build(RaySettings, parameters, "--ray {}".format)
    with contextlib.ExitStack() as stack:
        # read when Ray is imported, by us and by the processes of a cluster of our own
        stack.enter_context(_environment(RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0"))
        try:
            import ray
        except ImportError:
            raise UserError("Ray needs the package ray: `pip install 'megatron-lcl[ray]'`") from None
        task.logs.mkdir(parents=True, exist_ok=True)
        # a folder of its own: another command would else find this cluster, which ends with us; short, for its sockets
        folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
        temporary = stack.enter_context(folder)
        stack.callback(ray.shutdown)
        handler = signal.getsignal(signal.SIGTERM)
        cpus = settings.num_cpus or task.cpus
        _connect(ray, settings, cpus, temporary)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's would abort this process
        runner = _Ray(ray, task, cpus, (settings.memory_gb or 0) * 1e9, dict(environment))
        stack.callback(runner.end)
        yield runner


def _connect(ray: Any, settings: RaySettings, cpus: float, folder: str) -> None:
    """To a cluster, or to one that is started here, with its files in `folder`."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    given = settings.address or os.environ.get("RAY_ADDRESS")
    address = _running() if given in (None, "auto") else given
    if address not in (None, _LOCAL):
        try:
            _reach(address)
            ray.init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as error:
            raise UserError(f"no Ray at {address}: {failure(error)}") from None
        return
    if given == "auto":
        raise UserError("no Ray runs on this machine: `ray start` joins it to a cluster, `--ray local` needs none")
    num_cpus = max(num_cores(), math.ceil(cpus))
    ray.init(
        address=_LOCAL, num_cpus=num_cpus, object_store_memory=_STORE_BYTES, include_dashboard=False, _temp_dir=folder,
        **quiet,
    )  # fmt: skip


def _running() -> str | None:
    """The address of the cluster that `ray start`, by this user or root, says this machine belongs to, if it still
    answers. In /tmp others could name one of their own, which jobs and passwords would then be sent to."""
    path = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray/ray_current_cluster")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
            if (owner := os.fstat(file.fileno()).st_uid) not in (0, os.geteuid()):
                logger.warning("%s is user %d's, and not followed; `--ray HOST:PORT` names a cluster", path, owner)
                return None
            address = file.read().strip()
        _reach(address)
    except OSError:
        return None
    return address


def _reach(address: str) -> None:
    """OSError where nobody listens there: Ray itself would try for minutes."""
    if place := _HOST_PORT.fullmatch(address):
        socket.create_connection((place[1], int(place[2])), _PATIENCE).close()


def _answers(node: Mapping[str, Any]) -> bool:
    """Whether the daemon of a node that Ray takes to be alive can be reached."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _POLL).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Variables of this process, unless they are set already; at the end all are as before."""
    before = dict(os.environ)
    os.environ.update({**variables, **before})
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():  # Ray adds some, too
            del os.environ[name]


class _Ray:
    def __init__(self, ray: Any, task: Task, cpus: float, memory: float, environment: dict[str, str]) -> None:
        self._ray, self._task, self._environment = ray, task, environment
        # max_calls: a process of its own, which leaves nothing to the next
        self._function = ray.remote(max_calls=1, max_retries=0)(_job)
        self._common = {"num_cpus": cpus, "memory": int(memory) or None}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if all(node.get("CPU", 0) < cpus or node.get("memory", 0) < memory for node in nodes):
            wanted = f"num_cpus {cpus:g}" + (f" and {in_bytes(memory)}" if memory else "")
            logger.warning("no node of Ray has what a job needs, %s; waiting until one comes", wanted)
        self._running: dict[Any, int] = {}
        """jobs by the reference of their result"""
        self._failed: set[int] = set()

    def submit(self, jobs: Sequence[int]) -> None:
        self._wait_for_deaths(jobs)
        for index in jobs:
            options = {**self._common, "name": f"job {index}", "scheduling_strategy": self._nodes(index)}
            job = self._function.options(**options).remote(self._task, index, self._environment)
            self._running[job] = index

    def ended(self) -> Mapping[int, UserError | None]:
        references, _ = self._ray.wait(list(self._running), timeout=_POLL)
        errors = {self._running.pop(reference): self._outcome(reference) for reference in references}
        self._failed.update(index for index, error in errors.items() if error)
        return errors

    def end(self) -> None:
        """Kill what still runs."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)

    def _nodes(self, index: int) -> Any:
        """Which nodes are preferred: all alike, or those where the job has not failed."""
        from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

        before = self._tried(index)
        return NodeLabelSchedulingStrategy({}, soft={"ray.io/node-id": NotIn(*set(before))}) if before else "SPREAD"

    def _tried(self, index: int) -> list[str]:
        """The nodes on which a job has failed."""
        log = self._task.log(index)
        return _NODE.findall(log.read_text(errors="replace")) if index in self._failed and exists(log) else []

    def _wait_for_deaths(self, jobs: Sequence[int]) -> None:
        """Until Ray knows of the nodes that have died under these jobs: what it still sends to one of them can wait
        there for ever (ray-project/ray#63405)."""
        dying, deadline = {tried[-1] for index in jobs if (tried := self._tried(index))}, time.monotonic() + _DEATH
        while dying and time.monotonic() < deadline:
            alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"]}
            dying = {node for node in dying & alive.keys() if not _answers(alive[node])}
            if dying:
                time.sleep(_POLL / 4)

    def _outcome(self, reference: Any) -> UserError | None:
        """What went wrong in a job that is over, if anything."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except errors.OutOfMemoryError:
            return UserError("its process was killed, as its node was out of memory")
        except (errors.WorkerCrashedError, errors.NodeDiedError):
            return UserError("its process was killed, or its node was lost")
        except errors.RayError as error:  # also: the function cannot be imported there
            return failure(error)


def _job(task: Task, index: int, environment: dict[str, str]) -> UserError | None:
    import ray

    os.environ.update(environment)  # not by Ray's runtime_env, which its logs repeat
    return do_logged(task, index, f"node {ray.get_runtime_context().get_node_id()}")
