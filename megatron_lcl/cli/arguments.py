"""Arguments that several commands have.

What a command reads is its first argument; the flag that earlier versions wanted says the same. What can be divided
into jobs takes `--job`, or an engine that does them all.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lcl.errors import UserError

if TYPE_CHECKING:
    from megatron_lcl.data.engines import Engine

MODEL = (
    "a run (its newest complete checkpoint), a checkpoint, what `import` or `export` wrote, or a file in the "
    "reference's format"
)


Imported = Callable[[argparse.ArgumentParser], None]
"""adds what of a command's arguments takes long to import: done when it is called, so that `--help` is quick"""


def add_input(sub: argparse.ArgumentParser, metavar: str, help: str, *flags: str) -> None:
    """An argument that may also be given as one of the flags."""
    sub.add_argument("inputs", nargs="*", metavar=metavar, help=help)
    sub.add_argument(
        *flags, dest="flagged", action="append", default=[], metavar=metavar, help=f"the same as {metavar} above"
    )
    sub.set_defaults(input_name=metavar)


def inputs(options: argparse.Namespace) -> list[str]:
    """What was given, one at least."""
    given = [*options.flagged, *options.inputs]
    if not given:
        raise UserError(f"{options.input_name} is missing; see `megatron-lcl {options.command} --help`")
    return given


def single_input(options: argparse.Namespace) -> str:
    """What was given, and only one."""
    first, *others = inputs(options)
    if others:
        from megatron_lcl.data.storage.store import to_show

        raise UserError(f"`{options.command}` takes one {options.input_name}, not also {to_show(others[0])!r}")
    return first


def add_jobs(sub: argparse.ArgumentParser, workers: str) -> None:
    """What divides a command's work among processes and machines. workers: help of `--workers`."""
    sub.add_argument("--workers", type=int, default=1, help=workers + " (%(default)s)")
    sub.add_argument(
        "--job", metavar="I/N", help="only the I-th of N jobs (from 0), on any machine that sees the folders"
    )
    sub.add_argument(
        "--executor", choices=["local", "slurm", "ray"], default="local",
        help="slurm, ray: runs all --jobs there; jobs that fail or are lost are run again (docs/engines.md)",
    )  # fmt: skip
    sub.add_argument("--jobs", type=int, metavar="N", help="number of jobs with --executor slurm or ray (8)")
    sub.add_argument(
        "--slurm", action="append", default=[], metavar="KEY=VALUE", help="a parameter of submitit; may be repeated"
    )
    sub.add_argument(
        "--ray", action="append", default=[], metavar="ADDRESS|KEY=VALUE",
        help="host:port, auto or local (default: RAY_ADDRESS, else a cluster that runs here, else one for this "
        "command); num_cpus or memory_gb of a job",
    )  # fmt: skip


def jobs_of(options: argparse.Namespace) -> tuple[Engine | None, tuple[int, int] | None]:
    """What `add_jobs` was given: the engine that does all jobs, or the one job to do here, or neither."""
    from megatron_lcl.data.engines import Engine, parse_job

    if options.executor == "local":
        if options.slurm or options.ray or options.jobs is not None:
            raise UserError("--jobs, --slurm and --ray are for --executor slurm or ray; here --workers does it")
        return None, parse_job(options.job) if options.job else None
    if options.job:
        raise UserError(f"--job does one job here; --executor {options.executor} does all --jobs: give one of the two")
    if options.executor == "slurm":
        from megatron_lcl.data.engines import slurm

        other, parameters = options.ray, slurm.read_parameters(pairs(options.slurm))
    else:
        from megatron_lcl.data.engines import ray

        other, parameters = options.slurm, ray.read_parameters(options.ray)
    if other:
        raise UserError(f"--executor is {options.executor}: --slurm is for slurm, --ray for ray")
    return Engine(options.executor, 8 if options.jobs is None else options.jobs, parameters), None


def add_output(sub: argparse.ArgumentParser, help: str, *others: str, required: bool = True) -> argparse.Action:
    """Where a command writes: a folder, or one in object storage. others: further arguments that may be URLs."""
    output = sub.add_argument("--output", required=required, metavar="DIR|URL", help=help)
    sub.add_argument(
        "--work", metavar="DIR",
        help="with an output s3://bucket/folder: the folder where it is written before it is uploaded (default: "
        "outputs in the user's cache folder; with --job and --executor give one that all machines see)",
    )  # fmt: skip
    sub.set_defaults(at_urls=("output", *others))
    return output


@contextlib.contextmanager
def output_folder(
    options: argparse.Namespace, last: str | None, *, resumes: bool = False, name: str = "output"
) -> Iterator[Path]:
    """The folder that a command writes: the output, or one that is uploaded to it at the end.

    last, resumes: as `data.corpus.upload.uploaded` has them. name: of the argument.
    """
    from megatron_lcl.data.corpus.cache_folders import user_cache
    from megatron_lcl.data.corpus.upload import uploaded
    from megatron_lcl.data.storage.store import url_of

    place = getattr(options, name)
    if (url := url_of(place)) is None:
        yield Path(place)
        return
    job = getattr(options, "job", None)
    if options.work is None and (job or getattr(options, "executor", "local") != "local"):
        raise UserError(f"jobs that write {url} need --work DIR, a folder that all machines see")
    work = Path(options.work) if options.work else user_cache() / "outputs"
    with uploaded(url, work, last, resumes=resumes, keep=bool(job)) as folder:
        yield folder


def pairs(items: Sequence[str]) -> dict[str, str]:
    """["key=value", …] as a dict."""
    for item in items:
        if "=" not in item:
            raise UserError(f"{item!r} is not KEY=VALUE")
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def settings_joined(arguments: Sequence[str]) -> list[str]:
    """`--a.b value` as `--a.b=value`: argparse, which does not know these flags, would take the value for an input."""
    joined: list[str] = []
    for item in arguments:
        if joined and re.fullmatch(r"--[\w-]+(\.[\w-]+)+", joined[-1]) and not item.startswith("--"):
            joined[-1] += f"={item}"
        else:
            joined.append(item)
    return joined


def overrides_of(rest: Sequence[str], switches: Collection[str] | None = None) -> dict[str, str]:
    """`--a.b value`, `--a.b=value`, and `--a.b` alone for a field that is true or false.

    Of several values the last one counts, so that what a script is given overrides what it says itself. switches: the
    fields that are true or false; None: those of a run's config.
    """
    if switches is None:
        from megatron_lcl import config as configs

        switches = {name for name, kind, *_ in configs.describe() if kind == "bool"}
    overrides: dict[str, str] = {}
    items = deque(rest)
    while items:
        item = items.popleft()
        if not item.startswith("--"):
            from megatron_lcl.data.storage.store import to_show

            raise UserError(f"unexpected argument {to_show(item)!r}; overrides are --section.key value")
        key, equals, value = item[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            alone = not items or items[0].startswith("--")
            if alone and key not in switches:
                raise UserError(f"{item} has no value")
            value = "true" if alone else items.popleft()
        overrides[key] = value
    return overrides
