"""The run that benchmarks/report_million.py makes up: its page has all that the program looks for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lxml import html

from megatron_lcl.errors import UserError
from megatron_lcl.report.page import write_report


@pytest.fixture
def program(load_program: Callable[[str], Any]) -> Any:
    return load_program("report_million")


def test_the_page_has_all_numbers_and_pictures(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "REPEATS", 8)
    monkeypatch.setattr(program, "NUM_MARKS", 20)
    monkeypatch.setattr(program, "DOCUMENTS", 60)
    page = html.fromstring(write_report(program.make_run(tmp_path / "run", 50)).read_text(encoding="utf-8"))
    assert len(page.xpath("//svg//path[starts-with(@class, 'line ')]")) >= len(program.numbers_drawn()) > 50
    shown = {
        "//svg[@class='map']//image": 20,
        "//*[contains(@class, 'pictures')]//img": 2 * program.NUM_EXAMPLES,
        "//*[contains(@class, 'example')]//img": 8,
        "//*[@id='batch']//img": 100,
    }
    found = {where: len(page.xpath(where)) for where in shown}
    assert all(found[where] >= least for where, least in shown.items()), found


def test_without_chromium(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "find_chromium", lambda: None)
    monkeypatch.setattr(sys, "argv", ["", "--lines", "50", "--loads", "1"])
    with pytest.raises(UserError, match="Chromium"):
        program.main()
