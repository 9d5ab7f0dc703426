from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load_program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Loads a program of benchmarks/ whose name a folder of tests/ has too: as a module with another name, since that
    folder is imported by its own."""

    def load(name: str) -> Any:
        monkeypatch.syspath_prepend(BENCHMARKS)  # for what the program imports of benchmarks/
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load
