"""Commands around a run: quickstart, train, claim, checkpoint, report, selftest."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lcl.cli.arguments import add_input, inputs, overrides_of
from megatron_lcl.cli.output import say
from megatron_lcl.errors import RunError, UserError, check_on_disk, complain
from megatron_lcl.filesystem import exists, is_file

if TYPE_CHECKING:
    from megatron_lcl.train.sweep import Member

_NODES = "--nodes goes with --dry-run; processes on several machines are started by a launcher"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add(
        "quickstart",
        _quickstart,
        "fetch real documents, pre-train a small encoder on them, export it in Hugging Face format, on this machine",
    )
    sub.add_argument("--html", metavar="DIR", help="a folder of HTML pages with images (default: the GIMP manual)")
    sub.add_argument(
        "--from", dest="given", metavar="DIR", help="an offline folder of the packages, as `demo` takes it"
    )
    sub.add_argument("--output", metavar="DIR", default="runs/quickstart", help="where everything goes (%(default)s)")
    sub.add_argument("--steps", type=int, help="optimizer steps (default: what the quickstart config says)")

    sub = add(
        "train", _train, "pre-train a model; --section.key VALUE overrides the config",
        _add_fields, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    sub.add_argument("--config", metavar="FILE", help="YAML; a field that it does not name has the default below")
    sub.add_argument(
        "--processes",
        type=int,
        help="number of processes, if no launcher starts them (default: one per GPU; on CPUs two, or one on one core)",
    )
    sub.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    sub.add_argument("--dry-run", action="store_true", help="check everything, print what would be launched, and stop")
    sub.add_argument(
        "--nodes", type=int, default=1, help="with --dry-run: machines, each with --processes (%(default)s)"
    )
    sub.add_argument("--profile", metavar="A:B", help="the same as --train.profile: trace steps A to B")
    sub.add_argument(
        "--profile-ranks",
        metavar="K,K,…",
        help="the same as --train.profile_ranks: ranks of the processes that trace these steps (0)",
    )
    sub.add_argument("--resume", metavar="auto|RUN|CHECKPOINT", help="the same as --checkpoint.resume")
    sub.add_argument(
        "--sweep",
        action="append",
        metavar="FIELD=V1,V2,…",
        help="a run for each value, in a folder of its own in train.output, one after another; several --sweep: for "
        "each combination; under a job array of Slurm each task makes one",
    )
    sub.add_argument("--fail-fast", action="store_true", help="with --sweep: the first run that fails ends the sweep")

    sub = add(
        "claim", _claim, "repeat the paper's comparisons at a small scale; --section.key VALUE overrides the config"
    )
    sub.add_argument("--output", required=True, metavar="DIR", help="runs and tables; the same command goes on there")
    sub.add_argument(
        "--part",
        action="append",
        metavar="objectives|data|weight|recipe",
        help="may be repeated (default: objectives); what parts have in common is trained once",
    )
    sub.add_argument(
        "--sets", metavar="DIR", help="emoji and things as `demo` makes them; made where missing (OUTPUT/sets)"
    )
    sub.add_argument("--config", metavar="FILE", help="what all runs have in common (configs/claim/cpu.yaml)")
    sub.add_argument("--images", type=int, metavar="N", help="number of images that each run sees (90000)")
    sub.add_argument("--seeds", metavar="N,N,…", help="seeds; each row is trained once with each (0,1,2)")
    sub.add_argument("--rates", metavar="LR,LR,…", help="learning rates that are tried; one: taken (5e-4,1e-3)")
    sub.add_argument("--dry-run", action="store_true", help="make the data, say what would be run, and stop")

    sub = add("checkpoint", _checkpoint, "list, verify or prune the checkpoints of a run")
    actions = ["list", "verify", "prune"]
    sub.add_argument(
        "what", choices=actions, metavar="|".join(actions), help="verify: exit code 1 where a file is damaged"
    )
    sub.add_argument("folder", metavar="RUN", help="the run folder (train.output); list, verify: or one checkpoint")
    sub.add_argument("--quick", action="store_true", help="list, verify: the files' sizes only, nothing is read")
    sub.add_argument("--keep-last", type=int, metavar="N", help="prune: newest kept (default: as the run's config)")
    sub.add_argument("--keep-every", type=int, metavar="N", help="prune: also those at multiples of N steps (likewise)")
    sub.add_argument("--dry-run", action="store_true", help="prune: only say what would be deleted")

    sub = add("report", _report, "make one self-contained page about a run, or about several runs together")
    what = "run folders (train.output) or checkpoints of them, or folders of runs such as `train --sweep` makes; "
    what += "several runs are one picture, seeds as bands; or a corpus that `curate` wrote: what was removed"
    add_input(sub, "RUN", what, "--run")
    sub.add_argument(
        "--output", metavar="FILE",
        help="default: report.html in the run folder, or in that of all runs; removed.html in the corpus",
    )  # fmt: skip
    sub.add_argument(
        "--watch", action="store_true", help="serve the page to this machine's browsers, and let it follow the run"
    )
    sub.add_argument("--port", type=int, metavar="N", help="--watch: on 127.0.0.1 (default: a free one)")

    sub = add(
        "selftest",
        _selftest,
        "train a tiny model in 15 layouts (--all: 39), if there are enough processes, and compare with one process",
    )
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds for one layout (%(default)s)")
    sub.add_argument("--all", action="store_true", help="39 layouts, with more of the options in each, in minutes")
    sub.add_argument(
        "--all-reduce",
        action="store_true",
        help="only one sum over all processes of the launch: names those that do not answer within --timeout, and "
        "prints its bandwidth",
    )


def _quickstart(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.quickstart.run import quickstart

    html, given = (None if path is None else Path(path) for path in (options.html, options.given))
    return quickstart(Path(options.output), html, options.steps, given)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from megatron_lcl import config as configs
    from megatron_lcl.train import launch

    rest = _with_short_flags(options, rest)
    launch.adopt_slurm(os.environ)
    if options.sweep:
        from megatron_lcl.train import finished, sweep

        runs = sweep.members(options.config, overrides_of(rest), options.sweep)
        if (of_task := sweep.of_array(runs, os.environ)) is None:
            return _sweep(options, rest, runs)
        if not (options.dry_run or options.print_config) and finished.is_finished(of_task.config):
            say(f"{of_task.name} was finished before")
            return 0
        rest = [*rest, *of_task.arguments()]
    elif options.fail_fast:
        raise UserError("--fail-fast goes with --sweep")
    config = configs.load(options.config, overrides_of(rest))
    if options.print_config:
        say(configs.to_yaml(config), end="")
        return 0
    arguments = _arguments(options, rest)
    processes = options.processes or launch.default_processes(config, options.nodes)
    if options.dry_run:
        from megatron_lcl.train.dryrun import dry_run

        say(dry_run(config, arguments, options.nodes, processes))
        return 0
    if options.nodes != 1:
        raise UserError(_NODES)
    if options.processes and launch.is_launched():
        raise RunError(
            f"--processes {options.processes}: a launcher has started {os.environ['WORLD_SIZE']} of them; leave it out"
        )
    if not launch.is_launched():
        launch.check_devices(processes)  # else one process fails, and the others wait for it
        if processes == 1 or not launch.divides(config, processes):
            from megatron_lcl.train.checks import check

            check(config, processes)  # of several processes the first one does it, but where it is plain that they fail
        if processes > 1:
            return launch.start_local(["train", *arguments], processes)
    from megatron_lcl.train.resilience.signals import Interrupted, Signals, Stopped

    with Signals() as signals:  # from here on: imports may take long where many processes make them
        from megatron_lcl.train.run import train

        try:
            train(config, signals)
        except (Stopped, Interrupted) as stop:
            if os.environ.get("RANK", "0") == "0":
                complain(f"megatron-lcl train: {stop}")
            return stop.code
    return 0


def _with_short_flags(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """The overrides with those that `train` has short flags for. UserError where one is given otherwise as a field."""
    given, ranks = overrides_of(rest), options.profile_ranks
    for flag, field, value in (
        ("--resume", "checkpoint.resume", options.resume),
        ("--profile", "train.profile", options.profile),
        ("--profile-ranks", "train.profile_ranks", f"[{ranks}]" if ranks else None),
    ):
        if not value:
            continue
        if (other := given.get(field, value)) != value:
            from megatron_lcl.data.storage.store import to_show

            raise UserError(
                f"{flag} is the same as --{field}, which is {to_show(other)} beside it; give one of the two"
            )
        rest = [*rest, f"--{field}", value]
    return rest


def _sweep(options: argparse.Namespace, rest: list[str], runs: Sequence[Member]) -> int:
    """Print, check or run all members."""
    from megatron_lcl import config as configs
    from megatron_lcl.train import launch, sweep

    processes = {r.name: options.processes or launch.default_processes(r.config, options.nodes) for r in runs}
    if options.print_config:
        for run in runs:
            say(f"---  # {run.name}\n{configs.to_yaml(run.config)}", end="")
        return 0
    if options.dry_run:
        from megatron_lcl.train.dryrun import dry_run

        for run in runs:
            arguments = _arguments(options, [*rest, *run.arguments()])
            say(f"--- {run.name}\n{dry_run(run.config, arguments, options.nodes, processes[run.name])}")
        return 0
    if options.nodes != 1:
        raise UserError(_NODES)
    from megatron_lcl.train.checks import check

    for run in runs:
        try:
            launch.check_devices(processes[run.name])
            check(run.config, processes[run.name])
        except UserError as error:
            raise UserError(f"{run.name}: {error}") from None

    told: list[int] = []

    def start(run: Member) -> int:
        arguments = _arguments(options, [*rest, *run.arguments()])
        return launch.start_local(["train", *arguments], processes[run.name], told)

    return sweep.run_members(runs, start, options.fail_fast, told=told)


def _claim(options: argparse.Namespace, rest: list[str]) -> int:
    from megatron_lcl.claim import parts
    from megatron_lcl.claim.plan import check_given
    from megatron_lcl.claim.run import claim

    given = overrides_of(rest)
    chosen = list(dict.fromkeys(options.part or ["objectives"]))
    for name in chosen:
        if name not in parts.PARTS:
            raise UserError(f"--part {name}: there are {', '.join(parts.PARTS)}")
        check_given(parts.PARTS[name], given)
    for name in chosen:
        code = claim(
            parts.PARTS[name],
            Path(options.output),
            Path(options.sets) if options.sets else None,
            Path(options.config) if options.config else None,
            given,
            parts.IMAGES if options.images is None else options.images,
            _numbers("--seeds", options.seeds, int) or parts.SEEDS,
            _numbers("--rates", options.rates, float) or parts.RATES,
            options.dry_run,
        )
        if code:
            return code
    return 0


def _numbers(flag: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """`1,2` as numbers; none where it is not given."""
    try:
        return tuple(kind(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        raise UserError(f"{flag} {text}: give numbers, separated by commas") from None


def _arguments(options: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """Of the processes of one run."""
    return [*(["--config", options.config] if options.config else []), *rest]


def _checkpoint(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.train.checkpoint import inventory

    for name in ("quick",) if options.what == "prune" else ("keep_last", "keep_every", "dry_run"):
        if getattr(options, name) not in (None, False):
            goes = "list and verify" if name == "quick" else "prune"
            raise UserError(f"--{name.replace('_', '-')} goes with {goes}, not with {options.what}; leave it out")
    folder = Path(options.folder)
    if options.what == "list":
        say(inventory.table(folder, options.quick))
    elif options.what == "verify":
        faults = list(inventory.faults(folder, options.quick))
        say("\n".join(faults) if faults else f"{folder}: no fault found")
        return 1 if faults else 0
    else:
        lines = list(inventory.prune(folder, options.keep_last, options.keep_every, options.dry_run))
        say("\n".join(lines) if lines else "nothing to delete")
    return 0


def _report(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
    from megatron_lcl.report import page, runs

    for path in inputs(options):
        check_on_disk(options.input_name, path)
    given, output = list(map(Path, inputs(options))), Path(options.output) if options.output else None
    paths = [path for path in given if not is_file(path)] or given  # of `runs/*` also the page about them is one
    for folder in runs.left_out(paths):
        complain(f"megatron-lcl: the runs in {folder} are not on the page; for theirs: megatron-lcl report {folder}")
    if options.watch:
        from megatron_lcl.report.serve import serve

        if output is not None:
            raise UserError("--watch serves the page and writes none; leave out --output")
        serve(paths, options.port or 0)
        return
    if options.port is not None:
        raise UserError("--port goes with --watch")
    if len(paths) == 1 and exists(paths[0] / MANIFEST):
        from megatron_lcl.curate.page import write_page
        from megatron_lcl.curate.run import read_curated

        say(write_page(read_curated(paths[0]), output))
        return
    found = runs.find_runs(paths)
    say(page.write_report(found[0], output) if len(found) == 1 else runs.write_runs_report(paths, output))


def _selftest(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.selftest.cases import CASES, MORE_CASES
    from megatron_lcl.selftest.kernels import KernelCase
    from megatron_lcl.selftest.run import selftest
    from megatron_lcl.train import launch

    if not 0 < options.timeout < math.inf:
        raise UserError(f"--timeout {options.timeout:g}: give seconds above 0")
    launch.adopt_slurm(os.environ)
    if options.all_reduce:
        if not launch.is_launched():
            arguments = ["selftest", "--all-reduce", "--timeout", str(options.timeout)]
            return launch.start_local(arguments, launch.processes_at_hand())
        from megatron_lcl.selftest.all_reduce import check_all_reduce

        if said := check_all_reduce(options.timeout):
            say(said)
        return 0
    cases = (KernelCase(), *CASES, *(MORE_CASES if options.all else ()))
    failed = [verdict for verdict in selftest(cases, timeout=options.timeout) if verdict.faults]
    return 1 if failed else 0


def _add_fields(sub: argparse.ArgumentParser) -> None:
    """The fields of the config, for `--help`."""
    from megatron_lcl import config as configs

    lines = ["config fields (type, default); of several values of one field the last counts:"]
    for section, fields in configs.describe_sections():
        lines += ["", f"{section or 'at the top'}:"]
        for name, kind, default, help in fields:
            indent, flag = ("      ", "") if "[]" in name else ("  ", "--")  # what stands in a list is no flag
            lines += [f"{indent}{flag}{name}  ({kind}, {default})", f"{indent}    {help}"]
    sub.epilog = "\n".join(lines)
