"""`plan`: what a run would take, before it starts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from megatron_lcl.cli.arguments import overrides_of
from megatron_lcl.cli.output import say
from megatron_lcl.filesystem import exists


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add(
        "plan", _plan,
        "predict memory, time and network traffic of a run, and list the layouts that fit, fastest first; "
        "--section.key VALUE overrides the config",
    )  # fmt: skip
    sub.add_argument("--config", required=True, metavar="FILE", help="as `train` takes it; corpora need not be there")
    sub.add_argument("--gpus", required=True, type=int, metavar="N", help="GPUs in all; with --gpu cpu, processes")
    sub.add_argument(
        "--gpu", default="h100", metavar="NAME",
        help="h100, h200, b200, a100, a100-40gb, mi300x, l40s, a6000, rtx4090, rtx3090, by their data sheets, or cpu: "
        "this machine, measured (%(default)s)",
    )  # fmt: skip
    sub.add_argument("--nodes", type=int, metavar="N", help="machines that share the GPUs (default: 8 GPUs each)")
    sub.add_argument("--images", type=float, metavar="N", help="images that the run reads (default: by its steps)")
    sub.add_argument(
        "--images-per-pack", type=int, metavar="N",
        help="image slots of a pack, where data.images_per_pack leaves them to the corpora (default: as a run would "
        "choose with 100 tokens of text an image)",
    )  # fmt: skip
    sub.add_argument("--write", metavar="FILE", help="the config in the best layout, whole, as YAML")
    sub.add_argument(
        "--json", metavar="FILE",
        help="numbers of the config's own layout; as RUN/plan.json `report` shows them beside what was measured",
    )  # fmt: skip


def _plan(options: argparse.Namespace, rest: list[str]) -> None:
    from megatron_lcl import config as configs
    from megatron_lcl.data.corpus.files import replace_text
    from megatron_lcl.errors import UserError, complain
    from megatron_lcl.plan import describe, run

    if options.images is not None and options.images <= 0:
        raise UserError(f"--images {options.images:g}: give a number above 0")
    if options.write and exists(Path(options.write)):
        raise UserError(f"{options.write} exists; name another file for --write")
    config = configs.load(options.config, overrides_of(rest))
    for file in filter(None, (options.json, options.write)):  # before the minutes that a plan may take
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    report = lambda line: complain(f"({line})")  # noqa: E731
    found = run.plan(config, options.gpus, options.gpu, options.nodes, options.images_per_pack, report)
    for line in describe.lines(found, options.images):
        say(line)
    if options.json:
        replace_text(Path(options.json), json.dumps(describe.numbers(found), indent=1) + "\n")
        say(f"written     {options.json}")
    if options.write:
        run.write(found.best.config, Path(options.write))
        say(f"written     {options.write}")
