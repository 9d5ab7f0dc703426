"""benchmarks/fetch_speed.py: all images are fetched, or nothing is compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def program(load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(sys, "argv", ["", "--urls", "48"])
    return load_program("fetch_speed")


def test_every_host_lets_itself_be_asked(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    program.main()
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[:4] == ["fetch", "48", "1", "48"]


def test_other_numbers_of_images_are_not_compared(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "measured", lambda command, log: (1.0, 1.0, 1.0))
    monkeypatch.setattr(program, "images_in", lambda folder: (folder.mkdir(), 47)[1])
    with pytest.raises(SystemExit, match=r"^fetch has kept 47 of 48 images"):
        program.main()
