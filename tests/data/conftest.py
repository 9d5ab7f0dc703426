"""The GIMP manual, where this machine can have it, and a corpus of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare import bars
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.demo.manual import Manual, fetch_manual


@pytest.fixture
def no_waiting_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command does not say what takes it long, as it would on a machine that is busy with other tests."""
    monkeypatch.setattr(bars, "_LONG", 600.0)


@pytest.fixture(scope="session")
def manual(once: Callable[..., Any]) -> Manual:
    """The manual, unpacked; skips without apt or offline. MEGATRON_LCL_MANUAL names a folder to keep it in."""
    kept = os.environ.get("MEGATRON_LCL_MANUAL")
    try:
        return once("manual", lambda folder: fetch_manual(Path(kept) if kept else folder))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def manual_documents(manual: Manual) -> tuple[list[Document], Drops]:
    """What the importer finds in the manual, and what it leaves out."""
    importer, drops = create("html", manual.html, None, {}), Drops()
    return [d for unit in importer.units() for d in importer.documents(unit, drops)], drops


@pytest.fixture(scope="session")
def manual_corpus(manual: Manual, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The manual as a corpus and a held-out one."""
    folder = tmp_path_factory.mktemp("manual-corpus")
    return preprocess("html", manual.html, folder / "training", held_out=folder / "held-out", source=manual.source)
