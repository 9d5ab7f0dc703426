"""What benchmarks/join_memory.py makes up: documents that are removed as an independent union-find has it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_as_many_are_removed_as_share_a_signature_or_a_digest(
    load_program: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    program = load_program("join_memory")
    monkeypatch.setattr(program, "TASK", 200)
    monkeypatch.setattr(sys, "argv", ["", "--rows", "1000"])
    program.main()
    (row,) = capsys.readouterr().out.splitlines()[1:]  # without the one that warms up

    files = program.make(tmp_path, 1000, program.DocumentDuplicates().permutations)
    facts = [np.load(file) for file in files]
    root = list(range(1000))

    def find(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    copies = {}
    for name in ("signature", "digest"):
        seen: dict[bytes, int] = {}
        values = np.concatenate([of[name] for of in facts])
        for number, value in enumerate(values):
            root[find(number)] = find(seen.setdefault(value.tobytes(), number))
        copies[name] = 1000 - len(seen)
    assert copies == {"signature": 160, "digest": 80}  # a fifth of all but the first task, and half of these
    assert row.split()[:2] == ["1000", str(1000 - len({find(number) for number in root}))] == ["1000", "160"]
