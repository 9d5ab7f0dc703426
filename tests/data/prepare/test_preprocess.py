"""Protects: the same bytes from any number of workers and jobs, after any interruption; bad input leaves nothing."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data import writers
from data.helpers import TOKENIZER, contents, parts_in, plain
from data.writers import picture

from megatron_lcl.data.corpus import indexed
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare import finish, importers, jobs, preprocess_task, unfinished
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.jsonl import JsonlImporter
from megatron_lcl.data.prepare.preprocess import WORK, Summary, preprocess
from megatron_lcl.data.prepare.verify import verify

SMALL = {"task_bytes": 1, "shard_documents": 64}  # a task per file, several shards a task


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five JSON-lines files of 150 documents with images, some of them in several documents, and some faults."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(5):
        documents = [
            Document((Text(f"document {part} {k} " * (1 + k % 7)), Image(picture(k % 40)), Text(f"end {k % 3}")))
            for k in range(150)
        ]
        writers.write_images(documents, folder)
        lines = []
        for document in documents:
            items: list[dict[str, Any]] = [
                {"text": i.text} if isinstance(i, Text) else {"image": writers.name_of(i)} for i in document.items
            ]
            lines.append(json.dumps({"items": items}))
        lines[20] = lines[20][:30]
        lines[100] = json.dumps({"items": [{"image": "not-there.jpg"}, {"text": "alone"}]})
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "corpus"
    summary = preprocess("jsonl", source, folder, tokenizer=TOKENIZER, **SMALL)
    assert summary.counts["documents"] == 5 * 149
    assert summary.drops.bad_counts == {"document: not JSON": 5, "image: file missing": 5}
    assert not verify(folder)
    assert open_corpus(folder).num_shards == 15
    return contents(folder)


@pytest.mark.slow
def test_workers_write_the_same_bytes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, workers=2, **SMALL)
    assert contents(tmp_path / "out") == expected


def test_jobs_write_the_same_bytes(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    for index, tasks in ((2, {2}), (0, {2, 0, 3}), (1, None)):
        summary = preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(index, 3), **SMALL)
        if tasks is not None:
            assert {int(p.name.split("-")[1]) for p in (tmp_path / "out" / WORK).glob("part-*")} == tasks
    assert summary.counts["documents"] == 5 * 149
    assert contents(tmp_path / "out") == expected


def test_a_job_that_fails_leaves_the_others_work(source: Path, tmp_path: Path) -> None:
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(0, 2), **SMALL)
    parts = parts_in(tmp_path / "out" / WORK)
    assert {name.split("-")[1] for name in parts} == {"000000", "000002", "000004"}
    with pytest.raises(ValueError, match="are bad"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(1, 2), max_bad_fraction=0, **SMALL)
    assert parts.items() <= parts_in(tmp_path / "out" / WORK).items()


_JOBS = """
import os, sys, time
from megatron_lcl.data.prepare.preprocess import preprocess
if __name__ == "__main__":
    for trial in range(4):
        start, children = time.monotonic() + 0.3, []
        for index in range(8):
            if not (child := os.fork()):
                while time.monotonic() < start:
                    pass
                try:
                    preprocess("jsonl", sys.argv[1], f"{sys.argv[2]}/{trial}", tokenizer=sys.argv[3], job=(index, 8),
                               task_bytes=1, shard_documents=64)
                    os._exit(0)
                except BaseException as error:
                    print(trial, index, repr(error), flush=True)
                os._exit(1)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            sys.exit(1)
"""


@pytest.mark.slow
def test_jobs_at_the_same_moment(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "t.model")
    command = [sys.executable, "-c", _JOBS, str(source), str(tmp_path), str(tmp_path / "t.model")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for trial in range(4):
        assert contents(tmp_path / str(trial)) == expected


@pytest.mark.parametrize("where", ["cut", "in_order"])
def test_a_job_whose_corpus_others_finish_meanwhile(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Job 3 of 6 has work to do, job 5 has none; either is overtaken before it starts, or before it ends."""
    original = getattr(preprocess_module, where)

    def overtaken(*arguments: Any) -> Any:
        done = list(original(*arguments))
        monkeypatch.undo()
        for other in range(6):
            preprocess("jsonl", source, output, tokenizer=TOKENIZER, job=(other, 6), **SMALL)
        return done if where == "cut" else (result for result in done)

    for index in (3, 5):
        output = tmp_path / str(index)
        monkeypatch.setattr(preprocess_module, where, overtaken)
        summary = preprocess("jsonl", source, output, tokenizer=TOKENIZER, job=(index, 6), **SMALL)
        assert summary.counts["documents"] == 5 * 149
        assert contents(output) == expected


def test_a_job_can_be_run_again(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(0, 2), **SMALL)
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(0, 2), **SMALL)
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(1, 2), **SMALL)
    assert contents(tmp_path / "out") == expected


_RUN = """
import sys
from pathlib import Path
from megatron_lcl.data.prepare.preprocess import preprocess
if __name__ == "__main__":
    preprocess("jsonl", sys.argv[1], sys.argv[2], tokenizer=sys.argv[3], task_bytes=1, shard_documents=64)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "t.model")
    command = [sys.executable, "-c", _RUN, str(source), str(tmp_path / "out"), str(tmp_path / "t.model")]
    work = tmp_path / "out" / WORK
    for num_parts in (1, 4, 9, 14):  # kill once so many parts are finished, in the middle of the next
        process = subprocess.Popen(command)
        try:
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                if len(list(work.glob("part-*"))) >= num_parts:
                    break
                time.sleep(0.001)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert (tmp_path / "out" / "corpus.json").exists() or work.exists()
    preprocess("jsonl", source, tmp_path / "out", tokenizer=tmp_path / "t.model", **SMALL)
    assert contents(tmp_path / "out") == expected


class DeadlyImporter(JsonlImporter):
    """Kills the worker that reads the third file."""

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        if unit.name == "part-2.jsonl" and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().documents(unit, drops)


@pytest.mark.slow
def test_a_worker_that_dies(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importers, "importer_class", lambda format: DeadlyImporter)
    with pytest.raises(ValueError, match="a worker process died"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, workers=2, **SMALL)
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, **SMALL)
    assert contents(tmp_path / "out") == expected


class FaultyImporter(JsonlImporter):
    """Has a bug that the third file shows."""

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        if unit.name == "part-2.jsonl":
            raise ValueError("list.index(x): x not in list")
        return super().documents(unit, drops)


def test_an_unexpected_error_leaves_finished_parts(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(importers, "importer_class", lambda format: FaultyImporter)
        with pytest.raises(ValueError, match="not in list"):
            preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, **SMALL)
    assert len(list((tmp_path / "out" / WORK).glob("part-*"))) == 6
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, **SMALL)
    assert contents(tmp_path / "out") == expected


def test_interrupted_after_every_step_of_finishing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run gets one file further than the one before, and is stopped before the next. Of two of the input's files:
    there are as many runs as files of the corpus, and each looks at all of them."""
    two = tmp_path / "two"
    shutil.copytree(source, two, ignore=shutil.ignore_patterns("part-[234].jsonl"))
    preprocess("jsonl", two, tmp_path / "expected", tokenizer=TOKENIZER, **SMALL)
    expected = contents(tmp_path / "expected")
    assert len(expected) > 2 * 3 * 6, "six files of each shard"
    output, original, reached = tmp_path / "out", os.replace, 0

    def replace(a: Any, b: Any) -> None:
        nonlocal reached
        if Path(b).parent == output and not Path(b).exists():
            if reached == 1:
                raise KeyboardInterrupt
            reached += 1
        original(a, b)

    monkeypatch.setattr(os, "replace", replace)
    for step in range(1, len(expected)):
        reached = 0
        with pytest.raises(KeyboardInterrupt):
            preprocess("jsonl", two, output, tokenizer=TOKENIZER, **SMALL)
        assert len([p for p in output.iterdir() if p.suffix != ".tmp" and p.name != WORK]) == step
    reached = 0
    with monkeypatch.context() as patched:
        patched.setattr(unfinished, "clear_up", interrupt)  # the manifest is there, the parts' records as well
        with pytest.raises(KeyboardInterrupt):
            preprocess("jsonl", two, output, tokenizer=TOKENIZER, **SMALL)
    assert (output / WORK).exists()
    assert preprocess("jsonl", two, output, tokenizer=TOKENIZER, **SMALL).reused
    assert contents(output) == expected


def test_the_manifest_is_put_into_a_folder_that_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes to the disk itself: a machine that loses its power in between leaves no manifest without its files."""
    synced: list[set[str]] = []
    monkeypatch.setattr(finish, "sync", lambda folder: synced.append({path.name for path in folder.iterdir()} - {WORK}))
    writers.write_jsonl([Document((Text("a"),))], tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    whole = contents(tmp_path / "out").keys()
    assert synced == [whole - {"corpus.json"}, whole]


def interrupt(*_arguments: Any) -> None:
    raise KeyboardInterrupt


def test_run_twice_is_recognized(source: Path, tmp_path: Path) -> None:
    first = preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER)
    again = preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER)
    assert (first.reused, again.reused) == (False, True)
    assert first.counts == again.counts


@pytest.mark.parametrize("in_jobs", [False, True])
def test_a_finished_corpus_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_jobs: bool) -> None:
    """Once, with what to do where images in folders were changed, as none are compared."""
    monkeypatch.setattr(jobs, "run_jobs", lambda function, arguments, *_, **__: function(**arguments))
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"items": [{"text": f"text {k}"}, {"image": f"{k}.png"}]}) for k in range(10)]
    (tmp_path / "in/a.jsonl").write_text("\n".join(lines))
    for k in range(9):
        (tmp_path / f"in/{k}.png").write_bytes(picture(k))
    both = {"held_out": tmp_path / "held", "held_out_fraction": 0.3, "tokenizer": "clip"}
    told = (
        "finished before, and not read again. Images in folders are not compared: if some were added or changed, give"
    )
    for number in range(2):
        if in_jobs:
            engine = Engine("local", 1)
            found = jobs.preprocess_in_jobs("jsonl", tmp_path / "in", tmp_path / "out", engine, **both)
        else:
            found = preprocess("jsonl", tmp_path / "in", tmp_path / "out", **both)  # type: ignore[arg-type]
        assert str(found).count(told) == number
        assert str(found.at("s3://a/out", "s3://a/held")).count(told) == number
        (tmp_path / "in/9.png").write_bytes(picture(9))


def test_other_images_make_another_corpus(tmp_path: Path) -> None:
    documents = [Document((Image(picture(0), "", 0.5, 0), Text("a")))]
    writers.write_mmc4(documents, tmp_path / "in", tmp_path / "images")
    assert (
        preprocess("mmc4", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1).reused is False
    )
    with pytest.raises(ValueError, match="its images differ"):
        preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER)
    shutil.copytree(tmp_path / "images", tmp_path / "elsewhere/images")
    for where in ("images", "elsewhere/images"):
        summary = preprocess("mmc4", tmp_path / "in", tmp_path / "two", images=tmp_path / where, tokenizer=TOKENIZER)
        assert summary.counts["images"] == 1
    assert summary.reused
    with tarfile.open(tmp_path / "elsewhere/images/0.tar", "w") as tar:
        writers._add(tar, "x.png", picture(1))
    with pytest.raises(ValueError, match="its images, rules differ"):
        preprocess("mmc4", tmp_path / "in", tmp_path / "two", images=tmp_path / "elsewhere/images", tokenizer=TOKENIZER)


def run(tmp_path: Path, *args: Any, **options: Any) -> Summary:
    return preprocess(*args, tmp_path / "out", tokenizer=TOKENIZER, **options)


def test_refuses_another_corpus(source: Path, tmp_path: Path) -> None:
    run(tmp_path, "jsonl", source)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"another corpus .*tokenizer"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer="clip")
    with pytest.raises(ValueError, match="another corpus"):
        preprocess("mmc4", source, tmp_path / "out", tokenizer=TOKENIZER)
    assert contents(tmp_path / "out") == before


def test_refuses_other_files_and_other_unfinished_work(source: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"diary\.txt"):
        preprocess("jsonl", source, tmp_path / "full", tokenizer=TOKENIZER)
    assert contents(tmp_path / "full") == {"diary.txt": b"dear"}
    preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, job=(0, 2), **SMALL)
    with pytest.raises(ValueError, match="unfinished corpus"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer="clip", **SMALL)


@pytest.mark.parametrize(
    ("format", "files", "message"),
    [
        ("html", {"a.txt": b"x"}, r"no \.html.* files in .*The format reads: folder of HTML pages"),
        ("html", {"a.html": b"<p>only text"}, "page without images"),
        ("html", {"a.html": b"<p>x<img src=gone.png>"}, "file missing"),
        ("html", {"a.html": b"<p>x<img src=a.png>", "a.png": picture(0)}, "under 64 pixels"),
        ("html", {"a.html": b""}, "no usable document"),
        ("jsonl", {"a.txt": b"x"}, r"no \.jsonl"),
        ("jsonl", {"a.jsonl": b""}, "no usable document"),
        ("jsonl", {"a.jsonl": b"junk\n" * 9}, "not JSON, 9"),
        ("mmc4", {"a.txt": b"x"}, r"no \.jsonl.* files in .*docs_shard"),
        ("obelics", {"a.txt": b"x"}, r"no \.parquet"),
        ("mint1t", {"a.txt": b"x"}, r"no \.tar"),
        ("webdataset", {"a.tar": b"x"}, "damaged or truncated tar"),
        ("latin", {"a.txt": b"x"}, "no format 'latin'"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_bad_input_leaves_nothing_but_the_list_of_it(
    tmp_path: Path, format: str, files: dict[str, bytes], message: str, train: bool
) -> None:
    (tmp_path / "in").mkdir()
    for name, data in files.items():
        (tmp_path / "in" / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        preprocess(format, tmp_path / "in", tmp_path / "new" / "out", tokenizer=None if train else TOKENIZER)
    found = not message.startswith((r"no \.", "no format")) and files != {"a.jsonl": b""}
    assert sorted((tmp_path / "new").rglob("*")) == (
        [tmp_path / "new/out", tmp_path / "new/out/drops.jsonl"] if found else []
    )


def test_missing_input_and_unknown_option(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        run(tmp_path, "jsonl", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no option 'color'"):
        run(tmp_path, "jsonl", source, options={"color": 1})
    with pytest.raises(ValueError, match="no tokenizer at"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer=tmp_path / "nowhere.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer=tmp_path / "bad.model")
    assert not (tmp_path / "out").exists()


def test_budget_names_what_dominates(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"5 of 745 images are bad, 1%: .*file missing, 5 \(e\.g\. part-0"):
        run(tmp_path, "jsonl", source, max_bad_fraction=0.001)


@pytest.mark.parametrize("after", [0, 200_000])
def test_a_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    written = 0
    original = indexed.HashingFile._flush

    def flush(self: indexed.HashingFile) -> None:
        nonlocal written
        written += self._num_pending
        if written > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self)

    monkeypatch.setattr(indexed.HashingFile, "_flush", flush)
    with pytest.raises(ValueError, match="no space left"):
        run(tmp_path, "jsonl", source, **SMALL)
    left = [p.name for p in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert not any(name.endswith(".tmp") or name.startswith("task-") for name in left)
    assert (after == 0) == (not left)  # finished parts stay for the next run
    monkeypatch.undo()
    run(tmp_path, "jsonl", source, **SMALL)
    assert not verify(tmp_path / "out")


def test_max_image_side(tmp_path: Path) -> None:
    sizes = ((200, 100), (50, 40), (30, 120), (120, 30))
    documents = [Document((*(Image(picture(k, *size)) for k, size in enumerate(sizes)), Text("x")))]
    writers.write_jsonl(documents, tmp_path / "in")
    preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_image_side=80)
    corpus = open_corpus(tmp_path / "out")
    assert corpus.manifest["recipe"]["rules"] == 5  # two are of other changes, of jsonl and of blank texts
    shard = corpus.shard(0)
    assert shard.image_width.tolist() == [80, 50, 20, 80]
    assert shard.image_height.tolist() == [40, 40, 80, 20]
    assert bytes(shard.image(1)) == documents[0].images[1].data


def test_images_are_stored_once_a_shard(tmp_path: Path) -> None:
    documents = [Document((Image(picture(k % 2)), Text(f"{k}"), Image(picture(0)))) for k in range(6)]
    writers.write_jsonl(documents, tmp_path / "in")
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    assert (summary.counts["images"], summary.counts["placements"]) == (2, 12)
    assert plain(list(open_corpus(tmp_path / "out"))) == plain(documents)


def test_duplicates_are_counted_across_shards(tmp_path: Path) -> None:
    documents = [Document((Text(f"text {k % 50}"), Image(picture(0)))) for k in range(150)]
    writers.write_jsonl(documents, tmp_path / "in")
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, shard_documents=32)
    assert summary.drops.noted_counts == {"document: duplicate of another (kept)": 100}
    assert summary.counts["documents"] == 150


def test_hashes_of_documents_are_read_once(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few of them are in memory together."""
    read: Counter[Path] = Counter()
    from_file = np.fromfile

    def counted(file: Path, *given: Any, **options: Any) -> np.ndarray:
        read[file] += file.name == preprocess_task.DIGESTS
        return from_file(file, *given, **options)

    monkeypatch.setattr("megatron_lcl.data.prepare.finish._AT_ONCE", 100)
    monkeypatch.setattr(np, "fromfile", counted)
    summary = preprocess("jsonl", source, tmp_path / "out", tokenizer=TOKENIZER, **SMALL)
    assert list((+read).values()) == [1] * 15
    assert contents(tmp_path / "out") == expected
    assert summary.drops.noted_counts["document: duplicate of another (kept)"] == 4


def test_what_duplicates_are(tmp_path: Path) -> None:
    """The same pieces one by one, however they came: other boundaries make another document, as does white space
    between two texts; a blank text before the first does not."""
    image = Image(picture(0))
    twice = [Document((Text("over the"), Text("lazy dog")))]
    once = [
        Document((Text("over the lazy dog"),)),
        Document((Text("over"), Text(" the"), Text("lazy dog"))),
        Document((Text("over the"), image, Text("lazy dog"))),
        Document((image, Text("over the"), Text("lazy dog"))),
        Document((image,)),
        Document((Text("over the"), Text(" \n"), Text("lazy dog"))),
    ]
    others = [Document(tuple(Text(f"quick {k} {j}") for j in range(9))) for k in range(120)]
    # so some are written without, some with images
    assert sum(1 + len(d.items) for d in others) > 2 * preprocess_task.BATCH
    again = [Document((Text(" \n"), Text("over the"), Text("lazy dog")))]
    writers.write_jsonl([*twice, *others, *once, *again], tmp_path / "in")
    summary = preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    assert summary.drops.noted_counts == {"document: duplicate of another (kept)": 1}
