"""What a command reads is its first argument; the flag that earlier versions wanted says the same."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Collection, Sequence

from megatron_lcl.errors import UserError

MODEL = (
    "a run (its newest complete checkpoint), a checkpoint, what `import` or `export` wrote, or a file in the "
    "reference's format"
)


Imported = Callable[[argparse.ArgumentParser], None]
"""adds what of a command's arguments takes long to import: done when it is called, so that `--help` is quick"""


def add_input(sub: argparse.ArgumentParser, metavar: str, help: str, *flags: str) -> None:
    """An argument that may also be given as one of the flags."""
    sub.add_argument("inputs", nargs="*", metavar=metavar, help=help)
    sub.add_argument(*flags, dest="flagged", action="append", default=[], metavar=metavar, help="the same")
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
        raise UserError(f"`{options.command}` takes one {options.input_name}, not also {others[0]!r}")
    return first


def overrides_of(rest: Sequence[str], switches: Collection[str] | None = None) -> dict[str, str]:
    """`--a.b value`, `--a.b=value`, and `--a.b` alone for a field that is true or false.

    switches: those fields; None: those of a run's config.
    """
    if switches is None:
        from megatron_lcl import config as configs

        switches = {name for name, kind, *_ in configs.describe() if kind == "bool"}
    overrides: dict[str, str] = {}
    items = deque(rest)
    while items:
        item = items.popleft()
        if not item.startswith("--"):
            raise UserError(f"unexpected argument {item!r}; overrides are --section.key value")
        key, equals, value = item[2:].partition("=")
        if not equals:
            alone = not items or items[0].startswith("--")
            if alone and key.replace("-", "_") not in switches:
                raise UserError(f"--{key} has no value")
            value = "true" if alone else items.popleft()
        overrides[key] = value
    return overrides
