"""Preprocessing as a Slurm job array, through `submitit`; a job that fails is run again alone."""

from __future__ import annotations

import logging
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.errors import UserError
from megatron_lcl.fields import parse

logger = logging.getLogger(__name__)
_POLL = 2.0
"""seconds between checks for a job's result"""
_QUERY = 10.0
"""seconds between queries of the queue, and for which a result may be delayed by a network file system"""


def preprocess_on_slurm(
    format: str,
    input: str | Path,
    output: str | Path,
    *,
    jobs: int,
    workers: int = 1,
    logs: str | Path | None = None,
    retries: int = 2,
    slurm: Mapping[str, Any] | None = None,
    **options: Any,
) -> Summary:
    """`preprocess` as an array of `jobs` jobs, on folders that all nodes see; waits, and returns its summary.

    The corpus is the same, byte for byte, as from one process. workers: processes, and so CPUs, of a job. logs: folder
    for the jobs' logs (default: beside the output). slurm: submitit's parameters, e.g. {"slurm_partition": "cpu",
    "timeout_min": 600, "slurm_array_parallelism": 64}. A job that failed or was lost is submitted again, up to
    `retries` times. Raises UserError where submitit is not installed, Slurm refuses the array, or a job still fails
    after that.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("Slurm needs the package submitit: `pip install megatron-lcl[slurm]`") from None
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: give at least 1")
    output = Path(output).resolve()
    folder = Path(logs) if logs is not None else output.with_name(output.name + ".slurm")
    arguments = {
        **options,
        "format": format,
        "input": str(Path(input).resolve()),
        "output": str(output),
        "workers": workers,
    }
    for name in ("images", "held_out", "tokenizer"):
        if isinstance(value := options.get(name), str | Path) and str(value) != "clip":
            arguments[name] = str(Path(value).resolve())
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm")
        executor.update_parameters(
            **{"name": "megatron-lcl-preprocess", "cpus_per_task": workers, "timeout_min": 1440, **(slurm or {})}
        )
        waiting = list(range(jobs))
        for attempt in range(retries + 1):
            submitted = executor.map_array(_run_job, [arguments] * len(waiting), waiting, [jobs] * len(waiting))
            logger.info("submitted %d jobs as %s; logs in %s", len(submitted), submitted[0].job_id, folder)
            errors = {index: _outcome(job) for index, job in zip(waiting, submitted, strict=True)}
            waiting = [index for index, error in errors.items() if error]
            if not waiting:
                break
            if attempt < retries:
                logger.warning("%d jobs failed and are run again: %s", len(waiting), errors[waiting[0]])
    except NameError as error:  # what submitit says of a parameter that it does not know
        raise UserError(str(error).splitlines()[0]) from None
    except (submitit.core.utils.FailedJobError, RuntimeError, FileNotFoundError) as error:
        raise UserError(f"Slurm did not take the jobs: {error}") from None
    if waiting:
        raise UserError(f"jobs {waiting} of {jobs} failed, the first with: {errors[waiting[0]]}; logs in {folder}")
    return preprocess(**arguments)  # finished: only reads the summary


def read_parameters(texts: Mapping[str, str]) -> dict[str, Any]:
    """submitit's parameters from text, each as submitit's own annotation wants it (`fields.parse`).

    One without an annotation is text. UserError for a list or mapping that is not YAML.
    """
    try:
        from submitit import AutoExecutor
        from submitit.slurm.slurm import _make_sbatch_string
    except ImportError:  # `preprocess_on_slurm` says so
        return dict(texts)
    types = {f"slurm_{name}": kind for name, kind in get_type_hints(_make_sbatch_string).items()}
    types |= AutoExecutor._typed_parameters()
    try:
        return {name: parse(types.get(name, str), text) for name, text in texts.items()}
    except yaml.YAMLError as error:
        raise UserError(f"a parameter for Slurm is not YAML: {' '.join(str(error).split())}") from None


def _run_job(arguments: dict[str, Any], index: int, num_jobs: int) -> int:
    return preprocess(**arguments, job=(index, num_jobs)).counts["documents"]


def _outcome(job: Any) -> str:
    """What went wrong in a job, once it is over; "" for a good one.

    submitit learns of a job that left no result only from Slurm's accounting, which many clusters do not keep: so the
    queue is queried, too.
    """
    looked = time.monotonic()
    while not job.done():
        time.sleep(_POLL)
        if time.monotonic() - looked > _QUERY:
            if not _is_queued(job.job_id):
                time.sleep(_QUERY)
                if not job.done():
                    return f"job {job.job_id} ended without a result; it was killed, or its node failed"
            looked = time.monotonic()
    error = job.exception()
    return "" if error is None else (str(error).strip().splitlines() or [repr(error)])[-1]


def _is_queued(job_id: str) -> bool:
    """Whether the job is pending or running; True where Slurm does not answer."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return bool(result.stdout.strip()) if result.returncode == 0 else "Invalid job id" not in result.stderr
