"""Jobs as arrays of Slurm, through `submitit`; those that fail are submitted again alone."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_type_hints

import yaml

from megatron_lcl.data.engines.task import Task, do
from megatron_lcl.errors import UserError
from megatron_lcl.fields import parse
from megatron_lcl.interrupts import ENDING, holding_interrupts

_POLL = 2.0
"""seconds between checks for the jobs' results"""
_QUERY = 10.0
"""seconds between queries of the queue, and for which a result may be delayed by a network file system"""
_OF_THE_USER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SBATCH_")
"""what variables begin with by which a user says which Slurm takes jobs, whose, and with which of sbatch's options"""
logger = logging.getLogger(__name__)


@contextmanager
def opened(task: Task, parameters: Mapping[str, Any]) -> Iterator[_Slurm]:
    """Ready for jobs. parameters: submitit's. UserError where submitit is not installed, or Slurm takes no jobs."""
    try:
        import submitit
    except ImportError:
        raise UserError("Slurm needs the package submitit: `pip install 'megatron-lcl[slurm]'`") from None
    if "%" in str(task.logs.absolute()):  # submitit, which has no way to write one, and Slurm replace %j and the like
        raise UserError(f"Slurm's jobs cannot log to {task.logs}, for the % in it; give an output whose path has none")
    name = f"megatron-lcl-{task.function.__name__}"
    try:
        executor = submitit.AutoExecutor(folder=task.logs, cluster="slurm")
        executor.update_parameters(**{"name": name, "cpus_per_task": task.cpus, "timeout_min": 1440, **parameters})
    except NameError as error:  # what submitit says of a parameter that it does not know
        raise UserError(str(error).splitlines()[0]) from None
    except (RuntimeError, FileNotFoundError) as error:
        raise UserError(f"Slurm did not take the jobs: {error}") from None
    runner = _Slurm(task, executor)
    try:
        yield runner
    finally:
        runner.end()


def read_parameters(texts: Mapping[str, str]) -> dict[str, Any]:
    """submitit's parameters from text, each as submitit's own annotation wants it (`fields.parse`).

    One without an annotation is text. UserError for a list or mapping that is not YAML.
    """
    try:
        from submitit import AutoExecutor
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError:  # `opened` says so
        return dict(texts)
    types = {f"slurm_{name}": kind for name, kind in get_type_hints(_make_sbatch_string).items()}
    types |= AutoExecutor._typed_parameters()
    try:
        return {name: parse(types.get(name, str), text) for name, text in texts.items()}
    except yaml.YAMLError as error:
        raise UserError(f"a parameter for Slurm is not YAML: {' '.join(str(error).split())}") from None


class _Slurm:
    def __init__(self, task: Task, executor: Any) -> None:
        self._task, self._executor = task, executor
        self._running: dict[int, Any] = {}
        """submitit's jobs by index"""
        self._queried = time.monotonic()
        self._missing: set[int] = set()
        """jobs without a result that the queue no longer had when it was last queried"""

    def submit(self, jobs: Sequence[int]) -> None:
        from submitit.core.utils import FailedJobError

        # held: else Slurm may have jobs that nobody here knows to cancel
        with holding_interrupts(ENDING), _outside_of_jobs():
            try:
                submitted = self._executor.map_array(do, [self._task] * len(jobs), list(jobs))
            except (FailedJobError, RuntimeError, FileNotFoundError) as error:
                raise UserError(f"Slurm did not take the jobs: {error}") from None
            self._running |= dict(zip(jobs, submitted, strict=True))
        logger.info("submitted %d jobs as %s", len(submitted), submitted[0].job_id)

    def ended(self) -> Mapping[int, UserError | None]:
        errors = {index: _outcome(job) for index, job in self._running.items() if job.done()}
        errors |= self._lost(set(self._running) - set(errors))
        for index in errors:
            del self._running[index]
            self._missing.discard(index)
        if not errors:
            time.sleep(_POLL)
        return errors

    def end(self) -> None:
        """Cancel what is pending or runs."""
        if self._running:
            with holding_interrupts(ENDING):
                subprocess.run(["scancel", *(job.job_id for job in self._running.values())], check=False)

    def _lost(self, unfinished: set[int]) -> dict[int, UserError]:
        """Jobs that will have no result.

        submitit learns of them only from Slurm's accounting, which many clusters do not keep: so the queue is queried,
        too. A job is lost that is twice not in it: in between its result may come over a network file system.
        """
        if time.monotonic() - self._queried < _QUERY:
            return {}
        self._queried = time.monotonic()
        if (queued := _queued()) is None:
            return {}
        missing = {index for index in unfinished if self._running[index].job_id not in queued}
        lost, self._missing = missing & self._missing, missing
        return {
            index: UserError(
                f"job {self._running[index].job_id} ended without a result; it was killed, or its node failed"
            )
            for index in lost
        }


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """Without the variables of the job in which this may run, which sbatch would pass on.

    The jobs would read from them another job's memory and binding to CPUs, and a place in another's array.
    """
    from submitit.helpers import clean_env

    if "SLURM_JOB_ID" not in os.environ:  # they are all the user's
        yield
        return
    kept = {name: os.environ[name] for name in os.environ if name.startswith(_OF_THE_USER)}
    with clean_env():
        os.environ.update(kept)
        yield


def _outcome(job: Any) -> UserError | None:
    """What went wrong in a job that is over, if anything."""
    error = job.exception()
    if error is None:
        result: UserError | None = job.result()
        return result
    return UserError((str(error).strip().splitlines() or [repr(error)])[-1])


def _queued() -> set[str] | None:
    """The user's pending and running jobs, an array's each by its own name; None where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--me", "--format=%i"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    return set(result.stdout.split())
