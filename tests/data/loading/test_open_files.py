"""However many corpora a run has: it begins where the system's limit of open files is the usual one, or a low one."""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import MakeCorpus, random_documents
from forks import status_of

from megatron_lcl.config import Data
from megatron_lcl.data.corpus import cache_folders
from megatron_lcl.data.corpus.cache_folders import Use, in_use
from megatron_lcl.data.corpus.files import save_array
from megatron_lcl.data.corpus.indexed import map_array
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.source import open_source
from megatron_lcl.data.prepare.importers.sorted_runs import SortedRuns


def limited(more: int, raisable: bool) -> None:
    """Let this process open so many more files; raisable: or as many as it asks for."""
    most = max(map(int, os.listdir("/proc/self/fd"))) + 1 + more
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (most, resource.getrlimit(resource.RLIMIT_NOFILE)[1] if raisable else most)
    )


@pytest.mark.parametrize(("more", "raisable"), [(150, False), (50, True)])
def test_a_source_keeps_one_file_open_and_as_many_as_are_needed_may_be(
    make_corpus: MakeCorpus, more: int, raisable: bool
) -> None:
    corpus = open_corpus(make_corpus("a", random_documents(3, num_jpegs=2)).path)
    tokens = open_source(corpus, Data(), 4, 96, 4).tokens.tolist()

    def opened() -> None:
        limited(more, raisable)
        sources = [open_source(corpus, Data(), 4, 96, 4) for _ in range(100)]
        assert all(source.tokens.tolist() == tokens for source in sources)

    assert status_of(opened) == 0


class Numbers(SortedRuns):
    """The numbers below 200 and ten times each."""

    def columns(self) -> Iterator[tuple[int, ...]]:
        yield from ((k, 10 * k) for k in reversed(range(200)))


def test_sorted_runs_keep_no_file_open(tmp_path: Path) -> None:
    """They are many where an earlier release has written them."""
    (tmp_path / "numbers").mkdir()
    for k in range(0, 200, 2):
        run = np.array([[k, k + 1], [10 * k, 10 * k + 10]], np.uint64)
        save_array(tmp_path / "numbers" / f"{k:06d}.npy", run)
    numbers = Numbers([tmp_path], "numbers", 2)
    numbers.prepare(tmp_path)

    def found() -> None:
        limited(20, raisable=False)
        assert [numbers.find(k) for k in range(201)] == [[[10 * k]] for k in range(200)] + [[]]

    assert status_of(found) == 0


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.arange(6).reshape(2, 3).T, np.empty((2, 0), np.uint64)]
)
def test_a_mapped_array_is_the_saved_one(tmp_path: Path, array: np.ndarray) -> None:
    save_array(tmp_path / "a.npy", array)
    mapped = map_array(tmp_path / "a.npy")
    assert (mapped.dtype, mapped.shape, mapped.tolist()) == (array.dtype, array.shape, array.tolist())
    assert not mapped.flags.writeable


@pytest.mark.parametrize("size", [0, 5, 60, 150])
def test_a_damaged_array_is_a_value_error(tmp_path: Path, size: int) -> None:
    """So that what holds it is built again."""
    save_array(tmp_path / "a.npy", np.arange(6))
    os.truncate(tmp_path / "a.npy", size)
    with pytest.raises(ValueError, match=r"EOF|magic|a\.npy ends too early"):
        map_array(tmp_path / "a.npy")


@pytest.mark.parametrize("suspended", [False, True])
def test_a_folder_is_locked_though_another_process_looks_at_it_just_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspended: bool
) -> None:
    """`in_use` of that one has the exclusive lock for a moment; one that keeps it is not waited for without end."""
    (tmp_path / "source.json").touch()
    pauses: list[float] = []
    with open(tmp_path / "source.json", "r+b") as looks:
        fcntl.flock(looks, fcntl.LOCK_EX)

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if not suspended:
                fcntl.flock(looks, fcntl.LOCK_UN)

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", pause)
            use = Use(tmp_path, "source.json", 3600.0)
    if suspended:
        assert sum(pauses) == pytest.approx(cache_folders._TRIES * cache_folders._PAUSE_SECONDS)
    else:
        assert len(pauses) == 1
        assert in_use(tmp_path, unknown=False)
    del use
    assert not in_use(tmp_path, unknown=True)
