"""Pages that come from the code: every field of the config, every command's help."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl.cli.command import add_commands


def config() -> str:
    """A table for each section of the config."""
    lines = []
    for section, fields in configs.describe_sections():  # with `data.corpora[].path` in that of `data.corpora`
        lines += ["", f"## `{section}`" if section else "## At the top", ""]
        lines += ["| field | type | default | |", "| --- | --- | --- | --- |"]
        for name, kind, default, about in fields:
            cells = (f"`{name.removeprefix(f'{section}.')}`", f"`{kind}`", f"`{default}`" if default else "", about)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def commands() -> str:
    """The help of each command, as the terminal has it."""
    lines = []
    parsers: dict[str, argparse.ArgumentParser] = {}

    def make(name: str, help: str, **options: Any) -> argparse.ArgumentParser:
        parsers[name] = argparse.ArgumentParser(f"megatron-lcl {name}", **options)
        vars(parsers[name])["color"] = False  # of Python 3.14, in a terminal
        return parsers[name]

    add_commands(make, is_whole=lambda _: True)
    for name, parser in parsers.items():
        lines += ["", f"## `{name}`", "", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines)
