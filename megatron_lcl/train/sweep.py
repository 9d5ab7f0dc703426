"""`train --sweep FIELD=V1,V2`: a run for each of several values of fields, in a folder of its own.

The members of a sweep are the product of the values of its fields, the last field changing fastest. Each is a run as
`train` makes it, in `train.output`/NAME, NAME saying the values, so that a sweep which is started again goes on: it
passes over the members that are finished, and the others resume. In a job array of Slurm each task is one member.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl import fields
from megatron_lcl.config import Config
from megatron_lcl.data.storage.names import shortened
from megatron_lcl.data.storage.store import to_show
from megatron_lcl.errors import UserError, complain
from megatron_lcl.train.finished import is_finished
from megatron_lcl.train.resilience.start import REQUEUE, SIGNALS, code_of_signal

ARRAY_TASK = "SLURM_ARRAY_TASK_ID"
MAX_NAME = 150
"""bytes of a member's name"""
STOPPED = {REQUEUE, *(128 + signum for signum in SIGNALS)}
"""exit codes of a run that was told to end, once or twice"""
_OUTPUT, _MIRROR = "train.output", "checkpoint.mirror"


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    overrides: Mapping[str, str]
    """dotted fields and their values as text: the sweep's, and the run folder"""
    config: Config

    def arguments(self) -> list[str]:
        """The overrides as arguments of `train`."""
        return [f"--{key}={value}" for key, value in self.overrides.items()]


def members(file: str | Path | None, overrides: Mapping[str, str], sweeps: Sequence[str]) -> list[Member]:
    """The runs of a sweep, every one's config read and checked as `config.load` does.

    overrides: dotted fields of all members; sweeps: one `FIELD=V1,V2,…` for each field. UserError for a wrong one, for
    two members that are the same, and for a field that is given twice.
    """
    overrides = {key.replace("-", "_"): value for key, value in overrides.items()}
    values = [_values(sweep) for sweep in sweeps]
    keys = [key for key, _ in values]
    for key in keys:
        if key == _OUTPUT:
            raise UserError(f"--sweep {_OUTPUT}: a sweep names its run folders itself, inside of {_OUTPUT}")
        if keys.count(key) > 1 or key in overrides:
            raise UserError(f"{key} is given twice; give all its values in one --sweep {key}=V1,V2")
    output = Path(configs.load(file, overrides).train.output)
    found: dict[str, Member] = {}
    for chosen in itertools.product(*(texts for _, texts in values)):
        of_member = dict(zip(keys, map(to_show, chosen), strict=True))  # the values go into names and messages
        config = configs.load(file, {**overrides, **of_member})
        name = _name({key: fields.flat(configs.to_dict(config)).get(key, text) for key, text in of_member.items()})
        if name in found:
            raise UserError(f"two runs of the sweep would be {name}; give each value once")
        of_member[_OUTPUT] = str(output / name)
        if _MIRROR not in keys:
            of_member |= own_mirror(config, name)
        found[name] = Member(name, of_member, configs.load(file, {**overrides, **of_member}))
    return list(found.values())


def own_mirror(config: Config, name: str) -> dict[str, str]:
    """The override that gives one of several runs its own URL below `checkpoint.mirror`; empty where there is none.

    At one URL are the copies of one run.
    """
    mirror = config.checkpoint.mirror
    return {} if mirror is None else {_MIRROR: f"{mirror.rstrip('/')}/{name}"}


def of_array(sweep: Sequence[Member], environment: Mapping[str, str]) -> Member | None:
    """The member that is this task's of a job array of Slurm, which are counted from 0; None outside of an array.

    UserError where a launcher has started this process elsewhere: its processes make one run.
    """
    if ARRAY_TASK not in environment:
        if "RANK" in environment:
            raise UserError(
                f"a launcher's processes make one run of a sweep: submit it as a job array ({ARRAY_TASK} says which), "
                "or start `megatron-lcl train --sweep` without a launcher"
            )
        return None
    text = environment[ARRAY_TASK]
    if not text.isdecimal() or int(text) >= len(sweep):
        raise UserError(
            f"{ARRAY_TASK} = {text}, but the sweep has {len(sweep)} runs; submit it with --array=0-{len(sweep) - 1}"
        )
    return sweep[int(text)]


def run_members(
    sweep: Sequence[Member],
    start: Callable[[Member], int],
    fail_fast: bool,
    say: Callable[[str], Any] | None = None,
    told: Sequence[int] = (),
) -> int:
    """Run the members that are not finished, one after another; the exit code of the first that failed, else 0.

    start: runs a member to its end, and returns its exit code. fail_fast: the first failure ends the sweep. A run that
    was told to end (`STOPPED`) ends it always; told: signals that `start` has met by then, also those for which a run
    that was at its end had no use. What became of every member is said at the end.
    """
    say = say or complain
    finished = {member.name for member in sweep if is_finished(member.config)}
    became: dict[str, str] = {}
    code = 0
    for number, member in enumerate(sweep, 1):
        if member.name in finished:
            became[member.name] = "was finished before"
            continue
        say(f"--- run {number} of {len(sweep)}: {member.name}")
        own = start(member)
        became[member.name] = "finished" if own == 0 else f"exit code {own}"
        code = code or own
        if told and own not in STOPPED:
            own = code_of_signal(told[0])
        if own in STOPPED:
            code = own
        if own in STOPPED or (own and fail_fast):
            break
    width = max(len(member.name) for member in sweep)
    for member in sweep:
        say(f"{member.name:<{width}}  {became.get(member.name, 'not begun')}")
    return code


def _values(sweep: str) -> tuple[str, list[str]]:
    """`FIELD=V1,V2` as the field and its values; commas inside of brackets, braces and quotes part no values."""
    key, equals, text = sweep.partition("=")
    key = key.removeprefix("--").replace("-", "_")
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "[{") - (character in "]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    if not equals or not all(parts):
        raise UserError(f"--sweep {sweep}: give a field and its values, as in --sweep optimizer.lr=1e-3,2e-3")
    return key, [re.sub(r"""^(["'])((?:(?!\1).)+)\1$""", r"\2", part) for part in parts]  # a value in quotes


def _name(values: Mapping[str, Any]) -> str:
    """`lr=0.001,seed=0`: the last parts of the fields, where they differ; of `objective.name` the first."""
    short = [key.removesuffix(".name").rsplit(".", 1)[-1] for key in values]
    keys = short if len(set(short)) == len(short) else list(values)
    name = ",".join(f"{key}={_text(value)}" for key, value in zip(keys, values.values(), strict=True))
    return shortened(name, MAX_NAME)


def _text(value: Any) -> str:
    """A value as a part of a folder's name."""
    if isinstance(value, bool) or value is None:
        text = {True: "true", False: "false", None: "null"}[value]
    elif isinstance(value, list):
        text = "[" + ",".join(map(_text, value)) + "]"
    elif isinstance(value, Mapping):
        text = "{" + ",".join(f"{key}:{_text(part)}" for key, part in value.items()) + "}"
    else:
        text = str(value)
    return re.sub(r"[\s/\\\0]+", "_", text).strip("_") or "_"
