"""One command: its arguments, and its errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial

from megatron_lcl.cli import corpus, curating, evaluation, fetching, planning, training
from megatron_lcl.cli.arguments import Imported, settings_joined
from megatron_lcl.cli.output import say
from megatron_lcl.errors import RunError, UserError, check_on_disk, complain, describe_os_error, is_mendable

_EXIT_CODES = """\
Exit codes: 0 done, 1 a check failed or (with a traceback) a fault of the program, 2 bad input or a run that cannot
go on; of `train` also 71, a process or a machine was lost, and 75, stopped by a signal with all saved (130 for Ctrl-C):
start it again.
"""
_PLACES = ("input", "images", "output", "held_out", "tokenizer", "work")
"""arguments that are no place in object storage, but where a command says so (`at_urls`)"""
_WITH_FIELDS = ("train", "claim", "plan")
"""commands that take the fields of a run's config, as --section.key VALUE"""
_WITH_SETTINGS = (*_WITH_FIELDS, "curate")
"""commands that take --section.key VALUE"""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code."""
    parser = _parser(arguments[0] if arguments else "")
    if not arguments:
        parser.print_help()
        return 2
    command, options = "", argparse.Namespace(command="")
    try:
        if arguments[0] == "curate":  # of these the one that also takes inputs
            arguments = settings_joined(arguments)
        options, rest = parser.parse_known_args(arguments)
        command = f" {options.command}"
        if rest and options.command not in _WITH_SETTINGS:
            parser.error(f"unknown argument {rest[0]!r} of `{command[1:]}`; see `megatron-lcl{command} --help`")
        for name in _PLACES:
            if name not in getattr(options, "at_urls", ()):
                check_on_disk(f"--{name.replace('_', '-')}", getattr(options, name, None))
        code: int = options.run(options, rest) or 0
        trains = options.command == "train" and not (options.dry_run or options.print_config)
        if not trains:  # of a training it is a log, of all else the result
            sys.stdout.flush()
        return code
    except (UserError, OSError) as error:
        if not is_mendable(error):
            raise
        if not _said_elsewhere(error):
            complain(f"megatron-lcl{command}: {_one_line(error, options)}")
        return 2
    except KeyboardInterrupt:
        return 130


def _said_elsewhere(error: BaseException) -> bool:
    """Whether the run's first process says it."""
    return isinstance(error, RunError) and os.environ.get("RANK", "0") != "0"


def _one_line(error: BaseException, options: argparse.Namespace) -> str:
    if isinstance(error, OSError) and error.strerror:
        return describe_os_error(error)
    said = error.said(partial(_has, options)) if isinstance(error, UserError) else str(error)
    return " ".join(said.split())


def _has(options: argparse.Namespace, flag: str) -> bool:
    """Whether the command takes a flag."""
    name = flag.removeprefix("--")
    if "." not in name:
        return hasattr(options, name.replace("-", "_"))
    if options.command == "claim":
        from megatron_lcl.claim.plan import OWN

        return name not in OWN
    return options.command in _WITH_FIELDS


class _OneLineEach(argparse.RawDescriptionHelpFormatter):
    """Each command's help on the command's own line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=16, width=120)
        self._action_max_length = 14  # argparse forgets that commands are indented


class _Version(argparse.Action):
    """Prints the versions and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from megatron_lcl.cli.version import version_text

        say(version_text())
        parser.exit()


@cache
def _parser(called: str) -> argparse.ArgumentParser:
    """Of all commands; of the one that is called also the arguments which must be imported first.

    Kept, since it takes 8 ms, which counts where one process calls `main` often.
    """
    parser = argparse.ArgumentParser(
        prog="megatron-lcl",
        description="Pre-training of vision encoders on interleaved image-text documents by Latent Compression\n"
        "Learning. `megatron-lcl COMMAND --help` says what a command takes.",
        epilog=_EXIT_CODES,
        formatter_class=_OneLineEach,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="of this package, torch and DeepSpeed; CUDA or not")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    add_commands(commands.add_parser, lambda name: name == called)
    return parser


def add_commands(make: Callable[..., argparse.ArgumentParser], is_whole: Callable[[str], bool]) -> None:
    """The parser of every command, by `make(name, help=…, …)`; a whole one also has what must be imported first."""
    later: list[tuple[Imported, argparse.ArgumentParser]] = []

    def add(
        name: str, run: Callable[..., int | None], help: str, imported: Imported | None = None, **extra: object
    ) -> argparse.ArgumentParser:
        sub = make(name, help=help, description=help, allow_abbrev=False, **extra)
        sub.set_defaults(run=run)
        if imported and is_whole(name):
            later.append((imported, sub))
        return sub

    for group in (training, planning, corpus, curating, fetching, evaluation):
        group.add_commands(add)
    for imported, sub in later:
        imported(sub)
