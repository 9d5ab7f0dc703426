"""Work divided into jobs that survive their failures: processes here (`local.py`), Slurm (`slurm.py`), Ray (`ray.py`).

A command says what a job is: an importable function that, called with `job=(i, n)`, does the i-th of n parts of the
work, on folders that all machines see, and does no harm when it is called again, also while a first call still runs.
`run_jobs` calls it for every i, and again for those that fail or are lost; `task.py` is what a job does where it runs,
`children.py` starts processes here, those of `fetch` as well.

Imports config. submitit and ray are the extras `slurm` and `ray`, imported by the file of their name
only, which is imported late. Begin with `run_jobs`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from tqdm import tqdm

from megatron_lcl.data.engines.task import Task
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.interrupts import ending_on_sigterm
from megatron_lcl.processes import variables
from megatron_lcl.units import counted, listed

Executor = Literal["local", "slurm", "ray"]
EXECUTORS: tuple[Executor, ...] = get_args(Executor)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """Where jobs run, into how many the work is divided, and how often one is tried."""

    executor: Executor
    jobs: int = 8
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """slurm: submitit's, e.g. {"slurm_partition": "cpu", "timeout_min": 600}; ray: those of `ray.RaySettings`"""
    retries: int = 2
    """further tries of a job that failed or was lost"""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs}: give at least 1")


class Runner(Protocol):
    """An engine at work."""

    def submit(self, jobs: Sequence[int]) -> None:
        """Begin these jobs, as soon as there is room; they may have been tried before. UserError where none is taken,
        which may pass."""

    def ended(self) -> Mapping[int, UserError | None]:
        """Jobs that have ended since the last call, each with what went wrong, if anything; waits a moment where none
        has."""


def run_jobs(
    function: Callable[..., object],
    arguments: Mapping[str, Any],
    engine: Engine,
    *,
    output: Path,
    reads: Sequence[Path] = (),
    cpus: int = 1,
    progress: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """`function(**arguments, job=(i, n))` for every i from 0 to n-1, n being `engine.jobs`; returns when all succeeded.

    output: what they write; logs go beside it. reads: what they read; both must be seen by all machines. cpus: of a
    job. progress: a bar on stderr. environment: variables of the jobs, also of this process meanwhile, for passwords:
    Slurm's arguments lie in files beside the output. A job that fails or is lost (its process killed, its machine gone,
    out of memory) is run again up to `engine.retries` times, while the others go on; by Ray on another node if one is
    free. That it is not taken then is a further failure, and it is submitted again when another job has ended. Whatever
    ends this (Ctrl-C and SIGTERM too) ends all jobs. UserError where the engine cannot be had, or jobs still fail; the
    others' work stays.
    """
    for path in reads:
        if not exists(path):
            raise UserError(f"there is no {path}")
    logs = output.with_name(f"{output.name}.{engine.executor}")
    environment = environment or {}
    with ending_on_sigterm(), variables(environment):
        task = Task(function, arguments, engine.jobs, cpus, logs, tuple(reads))
        with (
            _opened(engine, task, environment) as runner,
            tqdm(
                desc=f"{output.name} on {engine.executor}", total=engine.jobs, unit="job", disable=not progress
            ) as bar,
        ):
            failed = _run(runner, engine, bar)
    if failed:
        first = min(failed)
        raise UserError(
            f"{listed(sorted(failed), 'job')} of {engine.jobs} failed (tried {counted(engine.retries + 1, 'time')}; "
            f"logs in {logs}), the first with: {failed[first].said()}",
            failed[first].remedies,
        )


def parse_job(text: str) -> tuple[int, int]:
    """`"i/n"` as (i, n), i from 0 to n-1. UserError for anything else."""
    index, slash, total = text.partition("/")
    if slash and index.isdecimal() and total.isdecimal() and int(index) < int(total):
        return int(index), int(total)
    raise UserError(f"--job {text}: give i/n with i from 0 to n-1, such as 0/4")


def _opened(engine: Engine, task: Task, environment: Mapping[str, str]) -> AbstractContextManager[Runner]:
    """The engine, ready for jobs; leaving it ends what still runs."""
    match engine.executor:
        case "local":
            from megatron_lcl.data.engines import local

            return local.opened(task)
        case "slurm":
            from megatron_lcl.data.engines import slurm

            return slurm.opened(task, engine.parameters)
        case "ray":
            from megatron_lcl.data.engines import ray

            return ray.opened(task, engine.parameters, environment)
    raise UserError(f"--executor {engine.executor}: give one of {', '.join(EXECUTORS)}")


def _run(runner: Runner, engine: Engine, bar: tqdm) -> dict[int, UserError]:
    """All jobs, each as often as need be; what went wrong in those that failed for good."""
    failures: Counter[int] = Counter()
    failed: dict[int, UserError] = {}
    again: dict[int, UserError] = {}
    """jobs to be submitted again, with what went wrong last"""

    def count(errors: Mapping[int, UserError]) -> None:
        for index, error in errors.items():
            failures[index] += 1
            (again if failures[index] <= engine.retries else failed)[index] = error

    runner.submit(range(engine.jobs))
    running = engine.jobs
    while running or again:
        ended = runner.ended()
        running -= len(ended)
        bar.update(sum(error is None for error in ended.values()))
        count({index: error for index, error in ended.items() if error is not None})
        if not again or (running and not ended):  # what was refused is tried when another has ended: there may be room
            continue
        logger.warning(
            "%s failed, to be run again, the first after: %s", listed(sorted(again), "job"), again[min(again)].said()
        )
        submitted = sorted(again)
        try:
            runner.submit(submitted)
            running += len(submitted)
            again.clear()
        except UserError as error:  # as while Slurm's controller restarts, or at a limit; the others run on
            again.clear()
            count(dict.fromkeys(submitted, error))
    return failed
