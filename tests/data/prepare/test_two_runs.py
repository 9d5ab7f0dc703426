"""Protects a corpus that several processes write at once: without locks, too, stopped, killed, and started anew."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from data import writers
from data.helpers import TOKENIZER, contents, parts_in
from data.writers import picture

from megatron_lcl.data.corpus import owners
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare import importers, unfinished
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.jsonl import JsonlImporter
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.data.prepare.preprocess import WORK, preprocess
from megatron_lcl.data.prepare.unfinished import remove_work
from megatron_lcl.data.prepare.verify import verify

SMALL = {"tokenizer": "clip", "task_bytes": 1, "shard_documents": 64}
RUN = """
import fcntl, json, os, signal, sys
from megatron_lcl.data.prepare.importers.jsonl import JsonlImporter
from megatron_lcl.data.prepare.preprocess import preprocess
num, locks, stop, source, output, options = json.loads(sys.argv[1])
original = JsonlImporter.documents
def documents(self, unit, drops):
    for k, document in enumerate(original(self, unit, drops)):
        if [unit.name, k] == stop:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield document
JsonlImporter.documents = documents
if not locks:
    fcntl.flock = lambda file, operation: None  # as where it is not coherent over the cluster
children = []
while len(children) < num - 1:
    if not (child := os.fork()):
        children = []
        break
    children.append(child)
preprocess("jsonl", source, output, **options)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""
BEGINNING, MIDDLE = ("part-0.jsonl", 40), ("part-1.jsonl", 150)
"""a file and a document, at which a process stops by itself: amid its first part, or after some"""
KINDS = ("natural", "pairs", None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of 200 documents, of one kind and of three, with some faults."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(3):
        documents = [
            Document((Image(picture(k % 30)), Text(f"document {part} {k} " * (1 + k % 5))), kind=KINDS[part * k % 3])
            for k in range(200)
        ]
        writers.write_jsonl(documents, folder)
        lines = (folder / "documents.jsonl").read_text().splitlines()
        lines[50] = lines[50][:20]
        lines[60] = json.dumps({"items": [{"image": "not-there.jpg"}, {"text": "alone"}]})
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "documents.jsonl").unlink()
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "corpus"
    preprocess("jsonl", source, folder, **SMALL)  # type: ignore[arg-type]
    assert not verify(folder)
    return contents(folder)


@contextmanager
def run(
    source: Path, output: Path, num: int = 1, locks: bool = False, stop: tuple[str, int] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`num` processes, which begin at the same moment; the first is returned, and ends last."""
    arguments = json.dumps([num, locks, stop, str(source), str(output), SMALL])
    command = [sys.executable, "-c", RUN, arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            if stop:
                os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> str:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_several_at_once(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for num in (2, 3):
        output = tmp_path / str(num)
        with run(source, output, num) as processes:
            ended(processes)
        assert contents(output) == expected


@pytest.mark.slow
def test_a_job_that_is_submitted_again_while_it_lives(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The first one stands still amid its work; the second does all; then the first goes on, to the same end."""
    output = tmp_path / "out"
    with run(source, output, stop=MIDDLE) as first:
        with run(source, output) as second:
            ended(second)
        assert contents(output) == expected
        first.send_signal(signal.SIGCONT)
        ended(first)
    assert contents(output) == expected  # the work folder is gone too


@pytest.mark.slow
def test_one_that_is_overtaken_by_a_job(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The same, but that the other does this task alone, so the work is not finished when the first goes on."""
    output = tmp_path / "out"
    with run(source, output, stop=MIDDLE) as first, monkeypatched_flock():
        preprocess("jsonl", source, output, job=(1, 3), **SMALL)  # type: ignore[arg-type]
        parts = parts_in(output / WORK)
        first.send_signal(signal.SIGCONT)
        ended(first)
    assert {name.split("-")[1] for name in parts} == {"000000", "000001"}
    assert contents(output) == expected


@contextmanager
def monkeypatched_flock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcntl.flock", lambda file, operation: None)
        yield


@pytest.mark.slow
def test_one_that_is_killed_leaves_its_scratch_to_the_next(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with run(source, output, stop=MIDDLE) as first:
        first.kill()
    assert len(list((output / WORK).glob("scratch-*"))) == 2  # of the run and of the task
    preprocess("jsonl", source, output, job=(2, 3), **SMALL)  # type: ignore[arg-type]
    assert not list((output / WORK).glob("scratch-*"))
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert contents(output) == expected


@pytest.mark.slow
def test_with_locks_a_task_has_one_owner(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """The second waits while the first lives, however long it takes, and goes on where that was killed."""
    output = tmp_path / "out"
    with run(source, output, locks=True, stop=MIDDLE) as first:
        before = parts_in(output / WORK)
        with run(source, output, locks=True) as second:
            assert second.stderr
            assert "lock-000001: another process is at work; waiting for it" in second.stderr.readline()
            assert second.poll() is None
            assert parts_in(output / WORK) == before
            first.kill()
            ended(second)
    assert contents(output) == expected


@pytest.mark.slow
def test_one_that_fails_leaves_the_other_s_work(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with run(source, output, stop=BEGINNING) as first, monkeypatched_flock():
        with pytest.raises(ValueError, match="are bad"):
            preprocess("jsonl", source, output, max_bad_fraction=0, **SMALL)  # type: ignore[arg-type]
        first.send_signal(signal.SIGCONT)
        ended(first)
    assert contents(output) == expected


class OtherwiseOccupied(JsonlImporter):
    """At the third file another run of the same command comes, does all, and is done."""

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        if unit.name == "part-2.jsonl" and not os.environ.get("NESTED"):
            os.environ["NESTED"] = "1"
            preprocess("jsonl", self.root, os.environ["OUTPUT"], **SMALL)  # type: ignore[arg-type]
        return super().documents(unit, drops)


def test_one_that_is_overtaken_amid_a_task(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importers, "importer_class", lambda format: OtherwiseOccupied)
    monkeypatch.setattr("fcntl.flock", lambda file, operation: None)
    monkeypatch.setenv("OUTPUT", str(tmp_path / "out"))
    monkeypatch.setenv("NESTED", "")
    preprocess("jsonl", source, tmp_path / "out", **SMALL)  # type: ignore[arg-type]
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("left", [None, "", "chosen"], ids=["no folder", "an empty one", "half a choice"])
def test_a_job_that_waits_while_another_finishes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str | None
) -> None:
    """When it gets the lock the manifest is written, and of the work all is removed, or all but this."""
    output, original = tmp_path / "out", preprocess_module.waiting_for_others
    options: dict[str, Any] = {**SMALL, "tokenizer": None, "vocab_size": 400}

    @contextmanager
    def overtaken(_: Path) -> Iterator[None]:
        monkeypatch.setattr(preprocess_module, "waiting_for_others", original)
        preprocess("jsonl", source, output, **options)
        assert not (output / WORK).exists()
        monkeypatch.setattr(preprocess_module, "choose", lambda *_: pytest.fail("chosen once more"))
        if left is not None:
            (output / WORK / left).mkdir(parents=True)
        yield

    monkeypatch.setattr(preprocess_module, "waiting_for_others", overtaken)
    assert preprocess("jsonl", source, output, job=(1, 2), **options).vocab_size
    assert not (output / WORK).exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_what_was_written_is_compared_before_the_manifest_is(
    source: Path, expected: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    output = tmp_path / "out"
    preprocess("jsonl", source, output, job=(0, 2), **SMALL)  # type: ignore[arg-type]
    part = output / WORK / "part-000000-0001"
    file = part / "tokens-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[5] ^= 16
    file.write_bytes(raw[:-40] if damage == "cut" else raw)
    if damage == "remove":
        file.unlink()
    why = {"cut": f"has .* bytes, but was written with {len(raw):,}", "flip": "has changed", "remove": "is missing"}[
        damage
    ]
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{file} {why}.*; remove {part} and run the same command again"):
            preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
        assert not (output / "corpus.json").exists()
    for left in part.iterdir():
        left.unlink()
    part.rmdir()
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert contents(output) == expected


@pytest.mark.parametrize("layout", [None, 3, 5])
def test_work_that_another_release_began_is_refused(source: Path, tmp_path: Path, layout: int | None) -> None:
    """None: an early one, which did not record its layout."""
    output = tmp_path / "out"
    preprocess("jsonl", source, output, job=(0, 2), **SMALL)  # type: ignore[arg-type]
    record = json.loads((output / WORK / "recipe.json").read_text())
    assert record.pop("unfinished") == 4
    if layout is not None:
        record["unfinished"] = layout
    (output / WORK / "recipe.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{output / WORK} was begun by another release.* remove it"):
        preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]


def test_work_is_not_removed_from_one_that_has_come_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have found the record that is removed: it is there again, and what that one has written stays."""
    work, original = tmp_path / WORK, unfinished.sync

    def comes(folder: Path) -> None:
        (work / "scratch-other").mkdir()
        original(folder)

    with unfinished.in_work_folder(work) as scratch:
        unfinished.claim(work, {"a": 1}, 4, scratch)
    (work / "chosen").mkdir()
    record = (work / "recipe.json").read_bytes()
    monkeypatch.setattr(unfinished, "sync", comes)
    remove_work(tmp_path, [tmp_path])
    assert (work / "recipe.json").read_bytes() == record
    assert {path.name for path in work.iterdir()} - {"lock"} == {"recipe.json", "chosen", "scratch-other"}


def test_of_one_that_finishes_while_another_begins_the_corpus_is_taken(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked for the corpus before, and has its scratch folder when the work folder is removed."""
    output, original = tmp_path / "out", unfinished.claim

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(unfinished, "claim", original)
        preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
        original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(unfinished, "claim", overtaken)
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert unfinished.claim is original
    assert contents(output) == expected


def test_the_work_folder_is_gone_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is removed file by file, one that is overtaken would find it without parts, and begin anew."""
    output, original = tmp_path / "out", shutil.rmtree
    left: list[tuple[str, bool]] = []

    def rmtree(folder: Path, **options: Any) -> None:
        if (output / "corpus.json").exists():
            left.append((folder.parent.name, (output / WORK).exists()))
        original(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert ("out", False) in left
    assert ("out", True) not in left
    assert not [path for path in output.iterdir() if path.is_dir()]


def test_of_one_that_was_killed_while_it_cleared_up_the_rest_is_removed(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    process = subprocess.Popen(["true"])
    process.wait(timeout=60)
    (output / f"scratch-{owners.machine()}-{process.pid}-{'0' * 32}" / WORK).mkdir(parents=True)
    assert preprocess("jsonl", source, output, **SMALL).reused  # type: ignore[arg-type]
    assert contents(output) == expected


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE], ids=["not there", "gone while it was open, on NFS"])
def test_what_is_gone_as_another_process_has_finished_is_no_error(tmp_path: Path, number: int) -> None:
    def failing(finished: bool) -> None:
        with unfinished.work_folder(tmp_path, {}, 4, lambda error: False):
            if finished:
                (tmp_path / "corpus.json").touch()
            raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        failing(finished=False)
    failing(finished=True)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.json"]


def test_what_took_long_stays_where_a_run_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index of the images, before any document is read."""
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in/images.tar", "w") as archive:
        (tmp_path / "0.png").write_bytes(picture(0))
        archive.add(tmp_path / "0.png", "0.png")
    (tmp_path / "in/a.jsonl").write_text('{"items": [{"text": "one"}, {"image": "0.png"}]}')
    arguments: tuple[Any, ...] = "jsonl", tmp_path / "in/a.jsonl", tmp_path / "out"
    options: dict[str, Any] = {**SMALL, "images": tmp_path / "in"}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "run_task", interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess(*arguments, **options)
    assert (tmp_path / "out" / WORK / "images-in-archives").is_dir()
    monkeypatch.setattr(ImageSource, "write_runs", interrupt)
    assert preprocess(*arguments, **options).counts["images"] == 1


@pytest.mark.parametrize("links", [True, False])
def test_of_two_commands_at_once_one_has_the_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Both found it empty; the other was sooner to say that it is its own."""
    output, original = tmp_path / "out", unfinished.claim

    def overtaken(*arguments: object) -> None:
        monkeypatch.setattr(unfinished, "claim", original)
        preprocess("jsonl", source, output, job=(0, 2), **{**SMALL, "shard_documents": 100})  # type: ignore[arg-type]
        original(*arguments)  # type: ignore[arg-type]

    def no_links(a: object, b: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(unfinished, "claim", overtaken)
    with pytest.raises(ValueError, match=r"another unfinished corpus \(different: layout\)"):
        preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert any((output / WORK).glob("part-*"))


@pytest.mark.parametrize("earlier", [True, False], ids=["by an earlier release", "by this one"])
def test_of_work_that_was_not_wholly_removed_nothing_is_taken(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool
) -> None:
    """Too much was bad, and what was written was being removed when the process was killed; then other options."""
    output, renames = tmp_path / "out", [True, True]

    def renamed(path: Path, target: Path) -> None:
        if not renames:
            raise KeyboardInterrupt
        renames.pop()
        os.rename(path, target)

    def interrupted(folder: Path, created: list[Path]) -> None:
        if earlier:
            (folder / WORK / "recipe.json").unlink()
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", renamed)
            remove_work(folder, created)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "remove_work", interrupted)
        with pytest.raises(KeyboardInterrupt):
            preprocess("jsonl", source, output, max_bad_fraction=0.001, **{**SMALL, "tokenizer": TOKENIZER})  # type: ignore[arg-type]
    assert any(output.glob(f"{WORK}/part-*/part.json"))
    preprocess("jsonl", source, output, **SMALL)  # type: ignore[arg-type]
    assert contents(output) == expected


def test_on_a_full_disk_the_work_folder_of_a_finished_corpus_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no room for a folder that it could be moved to."""

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / WORK / "images-in-archives").mkdir(parents=True)
    monkeypatch.setattr(unfinished, "scratch_folder", full)
    unfinished.clear_up(tmp_path)
    assert [*tmp_path.iterdir()] == []
