"""`megatron-lcl claim`: train, measure and compare the rows of a part.

OUTPUT/data/                     corpora and labeled pictures (`data.py`)
OUTPUT/runs/ROW,lr=R,seed=N/     the runs: of the first seed with each learning rate that is tried, of the others with
                                 the one that was chosen; each with its numbers (`measure.VALIDATION`, `RESULT`)
OUTPUT/untrained/MODEL/seed=N/   the numbers of an encoder that was not trained; MODEL: a hash of its sizes
OUTPUT/PART.md, .json            the table               OUTPUT/PART.html   the curves
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import xxhash

import megatron_lcl
from megatron_lcl import config as configs
from megatron_lcl.claim.data import CORPORA, SETS, prepare
from megatron_lcl.claim.measure import measured, validated
from megatron_lcl.claim.parts import IMAGES, RATES, SEEDS, Part, Row
from megatron_lcl.claim.plan import Plan, check_given, plan
from megatron_lcl.claim.table import UNTRAINED, Trained, table, write
from megatron_lcl.convert.find import find_average
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.demo.run import check_is_own, demo
from megatron_lcl.demo.write import EVALUATE, SOURCES
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_file
from megatron_lcl.report.runs import write_runs_report
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train import launch
from megatron_lcl.train.checks import check
from megatron_lcl.train.sweep import Member, run_members
from megatron_lcl.train.telemetry import read_metrics

DATA, RUNS, MADE = "data", "runs", "sets"
"""folders of the output"""
_USED = "loss", "contrastive", "num_images", "num_pairs", "step_seconds", "flops_per_second"
"""what the tables say of a run's metrics"""
Start = Callable[[Member], int]


def default_config() -> Path:
    """configs/claim/cpu.yaml of the checkout. UserError outside of one."""
    file = Path(megatron_lcl.__file__).parents[1] / "configs" / "claim" / "cpu.yaml"
    if not is_file(file):
        raise UserError(f"there is no {file}, as this is no checkout; give --config FILE")
    return file


def claim(
    part: Part,
    output: Path,
    sets: Path | None = None,
    file: Path | None = None,
    given: Mapping[str, str] | None = None,
    images: int = IMAGES,
    seeds: Sequence[int] = SEEDS,
    rates: Sequence[float] = RATES,
    dry_run: bool = False,
    start: Start | None = None,
) -> int:
    """Everything that is not there yet; 0, or the exit code of the run that failed or was told to end.

    sets: folder with `emoji` and `things` as `demo` makes them; what is missing there is made (default: `output`/sets).
    file: config that all runs have in common; given: dotted fields over it. images: that each run sees; rates: learning
    rates that are tried, one alone is taken. dry_run: only say what would be run. start: makes a run, and returns its
    exit code (default: processes of this machine).
    """
    _check(images, seeds, rates)
    check_given(part, given or {})
    check_is_own(output, (MADE, f"{DATA}/{EVALUATE}"))
    began = time.monotonic()
    file, sets = file or default_config(), sets or output / MADE
    configs.load(file, given)  # what is wrong with it is said before the data is made
    for name in SETS:
        if not is_file(sets / name / SOURCES):
            demo(name, sets / name)
    data = output / DATA
    prepare(sets, data)
    plans = {row.name: plan(row, file, given or {}, data / CORPORA, output / "cache", images) for row in part.rows}
    first = next(iter(plans.values()))
    for row in plans.values():
        print(_line(row, first, images), flush=True)
    config = first.config
    processes = launch.default_processes(config)

    def member(name: str, rate: float, seed: int) -> Member:
        return plans[name].member(output / RUNS, f"{name},lr={rate:g},seed={seed}", images, rate, seed)

    for name in plans:
        _checked(member(name, rates[0], seeds[0]), processes)
    if dry_run:
        print(f"{len(plans) * (len(rates) + len(seeds) - 1)} runs, of which {len(plans) * len(seeds)} are compared")
        return 0

    told: list[int] = []

    def launched(member: Member) -> int:
        return launch.start_local(["train", "--config", str(file), *member.arguments()], processes, told)

    start = start or launched
    tuned = {(name, rate): member(name, rate, seeds[0]) for name in plans for rate in rates}
    for run in tuned.values():
        _check_length(run)
    if code := run_members(list(tuned.values()), start, fail_fast=True, told=told):
        return code
    tried: dict[str, dict[float, float]] = {name: {} for name in plans}
    for (name, rate), run in tuned.items() if len(rates) > 1 else ():
        tried[name][rate] = validated(Path(run.config.train.output), _model(run, plans[name].row), data)
        print(f"{name}: learning rate {rate:g}: validation accuracy {tried[name][rate]:.2%}", flush=True)
    chosen = {name: max(found, key=found.__getitem__) if found else rates[0] for name, found in tried.items()}

    members = {name: [member(name, chosen[name], seed) for seed in seeds] for name in plans}
    for of_seed in zip(*members.values(), strict=True):  # all rows of a seed: what is there can be compared
        if code := run_members(of_seed, start, fail_fast=True, told=told):
            return code
        for of_row, run in zip(part.rows, of_seed, strict=True):
            print(f"measuring {run.name}", flush=True)
            measured(Path(run.config.train.output), _model(run, of_row), run.config, data)
    trained = [
        Trained(
            name,
            plans[name].row.about,
            [measured(Path(m.config.train.output), _model(m, plans[name].row), m.config, data) for m in of_row],
            _facts(of_row, members[first.row.name], tried[name], chosen[name]),
            plans[name].row.beside,
        )
        for name, of_row in members.items()
    ]
    trained.append(Trained(UNTRAINED, "", list(_untrained(output, config, data, seeds)), {}))
    write(part.title, table(trained, seeds), output / part.name)
    folders = [Path(run.config.train.output) for of_row in members.values() for run in of_row]
    page = write_runs_report(folders, output / f"{part.name}.html")
    print((output / f"{part.name}.md").read_text(encoding="utf-8"))
    print(f"{output / part.name}.md, .json; curves: {page}; {(time.monotonic() - began) / 60:.1f} minutes")
    return 0


def _model(member: Member, row: Row) -> str:
    """What is measured of a run."""
    run = Path(member.config.train.output)
    return str(find_average(run, row.average) if row.average else run)


def _check(images: int, seeds: Sequence[int], rates: Sequence[float]) -> None:
    if images < 1:
        raise UserError(f"--images {images}: give a number from 1")
    for what, values in (("--seeds", seeds), ("--rates", rates)):
        if not values or len(set(values)) < len(values) or not all(0 <= value < math.inf for value in values):
            raise UserError(f"{what} {','.join(map(str, values))}: give each value once, finite and from 0 on")


def _checked(member: Member, processes: int) -> None:
    try:
        check(member.config, processes)
    except UserError as error:
        raise UserError(f"{member.name}: {error}") from None


def _check_length(member: Member) -> None:
    """A run of another length is not gone on with: its learning rate fell over other steps."""
    file = Path(member.config.train.output) / CONFIG
    if is_file(file) and (steps := configs.load(file).train.steps) != member.config.train.steps:
        raise UserError(
            f"{file.parent} is a run of {steps} steps, and this would be one of {member.config.train.steps}; give a "
            "new --output"
        )


def _line(row: Plan, first: Plan, images: int) -> str:
    """What a row's runs are, in a line; beside the first row's."""
    steps = row.steps(images)
    counts = row.counts(images)
    seen, contrasted = counts.sum(0)
    contrast = f"{contrasted:,} of them in the contrast" if contrasted else "no contrast"
    few, many = counts[:, 0].min(), counts[:, 0].max()
    return (
        f"{row.row.name:12} {seen:,} images in {steps} steps of {few} to {many}, {contrast}; "
        f"packs of {row.config.data.tokens_per_pack} tokens"
        + ("" if row is first else f"; {row.flops(images) / first.flops(images):.3f} of {first.row.name}'s operations")
    )


def _facts(
    members: Sequence[Member], first: Sequence[Member], tried: Mapping[float, float], lr: float
) -> dict[str, Any]:
    """How a row was trained: what was tuned, and of each seed what the run's metrics say.

    first: the runs of the part's first row.
    """
    lines = _steps_of(members)
    config, wanted = members[0].config, first[0].config
    same = (config.objective, config.data.corpora) == (wanted.objective, wanted.data.corpora)
    contrasts = [any(line["contrastive"] for line in of_run if line.get("contrastive")) for of_run in lines]
    return {
        "lr": lr,
        "tried": {f"{rate:g}": accuracy for rate, accuracy in tried.items()},
        "at the edge": len(tried) > 1 and lr in (min(tried), max(tried)),
        "steps": members[0].config.train.steps,
        "images seen": [sum(line["num_images"] for line in of_run) for of_run in lines],
        "images in the contrast": [
            sum(line["num_pairs"] for line in of_run) if contrasted else 0
            for of_run, contrasted in zip(lines, contrasts, strict=True)
        ],
        "TFLOP": [
            sum(line.get("flops_per_second", 0.0) * line["step_seconds"] for line in of_run) / 1e12 for of_run in lines
        ],
        "minutes": [sum(line["step_seconds"] for line in of_run) / 60 for of_run in lines],
        "steps to the same loss": [
            steps_to([line["loss"] for line in of_run], [line["loss"] for line in goal])
            for of_run, goal in zip(lines, _steps_of(first), strict=True)
        ]
        if same
        else [],
    }


def _steps_of(members: Sequence[Member]) -> list[list[dict[str, Any]]]:
    """Of each run, the lines of its metrics that are of a step, and of these what is used: a line has several kB."""
    runs = (read_metrics(Path(member.config.train.output)) for member in members)
    return [
        [{name: line[name] for name in _USED if name in line} for line in run if "num_images" in line] for run in runs
    ]


def steps_to(losses: Sequence[float], goal: Sequence[float]) -> int | None:
    """Steps after which the mean loss of the last twentieth of a run is what it is at the end of the run `goal`.

    None: it is above that to the end.
    """
    width = max(1, len(goal) // 20)
    level = math.fsum(goal[-width:]) / width
    # sums of all losses so far, exact: rounded ones would say that a run does not end where it ends itself. Of a step
    # whose loss is no number the windows are left out
    finite = [math.isfinite(loss) for loss in losses]
    sums = [*itertools.accumulate((Fraction(x) if ok else 0 for x, ok in zip(losses, finite, strict=True)), initial=0)]
    counts = [*itertools.accumulate(finite, initial=0)]
    for end in range(width, len(losses) + 1):
        start = end - width
        if counts[end] - counts[start] == width and float(sums[end] - sums[start]) / width <= level:
            return end
    return None


def _untrained(output: Path, config: configs.Config, data: Path, seeds: Sequence[int]) -> Iterator[list[Any]]:
    """The numbers of the same model as it is before training, of each seed; in a folder named by what it is."""
    model = json.dumps(configs.to_dict(config)["model"], sort_keys=True)
    folder = output / UNTRAINED / xxhash.xxh3_64_hexdigest(model.encode())
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(file := folder / CONFIG, configs.to_yaml(config))
    for seed in seeds:
        yield measured(folder / f"seed={seed}", f"random:{file}?seed={seed}", config, data)
