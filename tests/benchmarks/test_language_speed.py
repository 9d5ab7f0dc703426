"""The time of the rule of language, as benchmarks/curate.py measures it: of texts that it reads to the end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


def test_a_line_for_each_way_to_tell_a_language(
    load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lingua")
    program, asked = load_program("curate"), []

    def language_score(settings: program.Language) -> object:
        asked.append((settings.model, settings.among))
        score = four if settings.model is None else lambda text: 0.0
        return lambda text: (lengths.append(len(text)), score(text))[1]

    lengths: list[int] = []
    four = program.language_score(program.Language(among=("de", "fr", "es")))
    monkeypatch.setattr(program, "language_score", language_score)
    monkeypatch.setattr(program, "LANGUAGE_DOCUMENTS", 20)
    monkeypatch.setattr(sys, "argv", ["", "--language", "all", "four", "lid.bin", "--repeats", "2"])
    program.main()
    assert asked == [(None, ()), (None, ("de", "fr", "es")), ("lid.bin", ())]
    assert lengths == [1000] * 20 * 3 * 3
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["all", "four", "lid.bin"]
    assert [int(row[-5]) >= 15 for row in rows] == [True, True, False]
