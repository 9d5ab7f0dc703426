"""Protects the bytes of a curated corpus: the same from one process and from three, and after `kill -9`."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from curate.corpora_of_rules import files
from data.corpora import random_documents, write_corpus
from forks import status_of

from megatron_lcl.curate import passes, run, write
from megatron_lcl.curate.documents import ranges
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import Settings, read_settings
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare import cut
from megatron_lcl.data.prepare.unfinished import WORK
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

RULES = {"text.min_words": "4", "image.max_places": "6", "document.min_images": "1", "document.max_words": "15"}
TASK_BYTES, SHARD_BYTES = 4000, 10_000
POINTS = [
    ("curate.passes", "_judge", 3, "in pass 1"),
    ("curate.run", "_join", 1, "between the passes"),
    ("curate.passes", "_decide_range", 4, "in pass 2"),
    ("curate.write", "_copy_document", 10, "amid the copy"),
    ("curate.run", "_write_removed", 1, "after the copy"),
    ("data.prepare.finish", "_replace", 7, "while the parts are put in place"),
    ("data.prepare.finish", "write_manifest", 1, "before the manifest"),
]


@pytest.fixture(scope="module", autouse=True)
def _small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "SHARD_BYTES", SHARD_BYTES)
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "corpus"
    return write_corpus(folder, random_documents(80, 5, matched=True, num_jpegs=30), num_shards=3).path


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "corpus"
    found = curate(source, folder, rules(), task_bytes=TASK_BYTES)
    assert {r.rule for r in found.rules if r.texts or r.images or r.documents} >= {*RULES, "image.matched_text"}
    assert verify(folder) == []
    assert 3 < open_corpus(folder).num_shards < open_corpus(source).manifest["counts"]["documents"] / 4
    return files(folder)


def rules() -> Settings:
    return read_settings(overrides=RULES)


def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what this process makes in the work folder from now on."""
    names: list[str] = []

    def watch(module: ModuleType, function: str, name_of: Callable[..., str]) -> None:
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *given: (names.append(name_of(*given)), original(*given)))

    for function in ("_judge", "_decide_range"):
        watch(passes, function, lambda _work, _task, folder: folder.name)
    watch(write, "_write_group", lambda _work, _group, folder: f"shards/{folder.name}")
    watch(run, "_join", lambda work, number, *_: work.joined(number).name)
    return names


def kill_at_call(module: ModuleType, name: str, nth: int) -> None:
    """This process, when the function is called for the nth time."""
    original, calls = getattr(module, name), 0

    def killed(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)

    setattr(module, name, killed)


@pytest.mark.slow
def test_three_processes_write_what_one_writes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    curate(source, tmp_path / "out", rules(), task_bytes=TASK_BYTES, workers=3)
    assert files(tmp_path / "out") == expected


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name", "nth", "_when"), POINTS, ids=[when for *_, when in POINTS])
def test_killed_and_gone_on_with(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    nth: int,
    _when: str,
) -> None:
    output = tmp_path / "out"

    def curate_until_killed() -> None:
        kill_at_call(import_module(f"megatron_lcl.{module}"), name, nth)
        curate(source, output, rules(), task_bytes=TASK_BYTES)

    assert status_of(curate_until_killed) == -signal.SIGKILL
    assert (output / WORK).is_dir()
    assert not (output / "corpus.json").exists()
    work = output / WORK
    done = {str(path.relative_to(work)) for kind in ("judged-*", "joined-*", "part-*") for path in work.rglob(kind)}
    parts = {"_decide_range": ["part-000000-0000"], "_copy_document": ["shards/part-000000-0000"]}
    assert {"judged-000000", *parts.get(name, ())} <= done
    again = made(monkeypatch)
    found = curate(source, output, rules(), task_bytes=TASK_BYTES)
    assert not found.reused
    assert files(output) == expected
    assert done.isdisjoint(again), "what was finished is done again"


@pytest.mark.parametrize(
    ("most", "recorded", "said"),
    [
        (1 << 14, False, ""),
        (4, False, "was begun by another release"),
        (4, True, "would now be cut into other tasks"),
    ],
    ids=["of an earlier release", "and of a large corpus", "of one with other ranges"],
)
def test_unfinished_work_with_other_ranges_is_refused(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    recorded: bool,
    said: str,
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, "_join", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curate(source, output, rules(), task_bytes=TASK_BYTES)
    if not recorded:
        shutil.rmtree(output / WORK / "tasks")
    monkeypatch.setattr(cut, "MOST_TASKS", most)
    if said:
        with pytest.raises(UserError, match=f"{said}.* remove {output / WORK} "):
            curate(source, output, rules(), task_bytes=TASK_BYTES)
    else:
        curate(source, output, rules(), task_bytes=TASK_BYTES)
        assert files(output) == expected


def test_a_large_corpus_has_larger_ranges(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = open_corpus(source)
    monkeypatch.setattr(cut, "MOST_TASKS", 6)
    found = ranges(corpus, 1)
    assert len(found) < 20, "of 80 documents in three shards"
    assert sum(task.last - task.first for task in found) == 80


def test_finished_tasks_are_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left", str(tmp_path / "out" / "file"))

    calls = made(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", full)
        with pytest.raises(UserError, match="no space left"):
            curate(source, tmp_path / "out", rules(), task_bytes=TASK_BYTES)
    first = len(calls)
    assert first > 6
    curate(source, tmp_path / "out", rules(), task_bytes=TASK_BYTES)
    assert len(calls) == first
