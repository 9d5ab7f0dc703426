"""What is chosen by name and may come from another package: importers and objectives."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any


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
        return sorted({*self.built_in, *(point.name for point in entry_points(group=self.group))})

    def find(self, name: str) -> Any:
        """What the name stands for; None where there is nothing."""
        if name in self.built_in:
            module, attribute = self.built_in[name].split(":")
            return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        return next((point.load() for point in entry_points(group=self.group) if point.name == name), None)
