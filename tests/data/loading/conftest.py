"""Fixtures of the tests of batches."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import MakeCorpus, write_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pack indices go into the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_corpus(tmp_path: Path) -> MakeCorpus:
    """Write documents into a new folder: make_corpus("name", documents, num_shards=2)."""
    return lambda name, documents, **options: write_corpus(tmp_path / name, documents, **options)
