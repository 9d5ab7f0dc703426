"""What is chosen by name and may come from another package: importers and objectives."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

from megatron_lcl.errors import UserError


@dataclass(frozen=True)
class Plugins:
    """The package's own, and those that other packages name in entry points of `group`."""

    group: str
    package: str
    """of the modules in `built_in`"""
    built_in: Mapping[str, str]
    """name → "module:attribute"; imported when asked for"""

    def names(self) -> list[str]:
        """All names, those of other packages included."""
        return sorted({*self.built_in, *(point.name for point in entry_points(self.group))})

    def find(self, name: str) -> Any:
        """What the name stands for; None where there is nothing. UserError where it stands for more than one thing, as
        nothing says which of them is meant, or cannot be imported."""
        points = self._points(name)
        owners = ["megatron_lcl"] * (name in self.built_in) + [_distribution(point) for point in points]
        if len(owners) > 1:
            raise UserError(
                f"{name!r} is the name of more than one entry of {self.group}: of {' and of '.join(owners)}; rename or "
                f"remove those of other packages{'' if name in self.built_in else ' but one'}"
            )
        if name in self.built_in:
            module, attribute = self.built_in[name].split(":")
            return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        return _load(points[0]) if points else None

    def distribution(self, name: str) -> dict[str, str]:
        """The version of the other package whose entry this is, by that package's name; {} where there is none."""
        if name in self.built_in:
            return {}
        return {point.dist.name: point.dist.version for point in self._points(name) if point.dist}

    def _points(self, name: str) -> list[EntryPoint]:
        return [point for point in entry_points(self.group) if point.name == name]


def entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Those of a group of all installed packages."""
    return _entry_points(group, tuple(sys.path))


@cache  # it reads a file of every installed package, and objectives are made in each step
def _entry_points(group: str, _places: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(metadata.entry_points(group=group))


def _distribution(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else f"a package with {point.module}"


def _load(point: EntryPoint) -> Any:
    try:
        return point.load()
    except (Exception, SystemExit) as error:  # whatever another package's code raises; a script's module may exit
        said = traceback.format_exception_only(error)[-1].strip()
        raise UserError(
            f"{point.name!r} of {point.group} ({_distribution(point)}) cannot be loaded from {point.value}: {said}; "
            f"mend that package, or remove it (`python -c 'import {point.module}'` shows where its import fails)"
        ) from error
