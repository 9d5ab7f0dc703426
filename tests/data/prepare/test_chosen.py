"""Protects that all jobs and all who resume them write by one choice of held-out documents and one trained tokenizer,
though each of them, on its processor and with its libraries, would choose otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data import writers
from data.helpers import contents
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare import train_tokenizer
from megatron_lcl.data.prepare.holdout import Grouping
from megatron_lcl.data.prepare.preprocess import WORK, preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

Contents = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, and so two tasks, of 15 documents with an image each."""
    folder = tmp_path_factory.mktemp("source")
    for part in range(2):
        documents = [
            Document((Image(picture(15 * part + k, 80, 70)), Text(f"document {part} {k} of these " * 9)))
            for k in range(15)
        ]
        writers.write_jsonl(documents, folder)
        (folder / "documents.jsonl").rename(folder / f"part-{part}.jsonl")
    return folder


def run(source: Path, output: Path, job: tuple[int, int] | None = None, fraction: float = 0.3) -> Contents:
    """What is in the finished ones of both folders, of training and of held-out documents."""
    places = output / "training", output / "held-out"
    preprocess("jsonl", source, places[0], held_out=places[1], held_out_fraction=fraction, vocab_size=400, task_bytes=1,
               job=job)  # fmt: skip
    return {place.name: contents(place) for place in places if (place / "corpus.json").exists()}


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return run(source, tmp_path_factory.mktemp("expected"))


def other_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tokenizer, "_training_lines", lambda _: iter(["quite other words than those"] * 9))


def other_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Grouping.held_out
    monkeypatch.setattr(Grouping, "held_out", lambda self, fraction, seed: original(self, fraction, seed + 1))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A context for what is run on another machine, which would choose otherwise."""
    with monkeypatch.context() as patch:
        other_tokenizer(patch)
        other_groups(patch)
        yield patch


def test_another_machine_would_choose_otherwise(
    source: Path, expected: Contents, tmp_path: Path, elsewhere: pytest.MonkeyPatch
) -> None:
    """Else the other tests see nothing."""
    found = run(source, tmp_path)
    for name, files in expected.items():
        assert found[name]["names-00000.bin"] != files["names-00000.bin"]
        assert found[name]["tokenizer.model"] != files["tokenizer.model"]


def test_jobs_write_by_the_choice_of_the_first(
    source: Path, expected: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path, (0, 2))
    other_tokenizer(monkeypatch)
    other_groups(monkeypatch)
    assert run(source, tmp_path, (1, 2)) == expected
    for name in expected:
        assert not verify(tmp_path / name)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_who_resumes_writes_by_the_choice_that_was_made(
    source: Path, expected: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Interrupted after so many of the four tasks: amid the training corpus, between the two, amid the held-out one."""
    begun: list[Any] = []

    def run_task(*arguments: Any) -> Any:
        begun.append(arguments)
        if len(begun) > after:
            raise KeyboardInterrupt
        return original(*arguments)

    original = preprocess_module.run_task
    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "run_task", run_task)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path)
    assert (tmp_path / "training/corpus.json").exists() == (after > 1)
    other_tokenizer(monkeypatch)
    other_groups(monkeypatch)
    assert run(source, tmp_path) == expected


def test_a_job_that_could_not_choose_leaves_no_claim(
    source: Path, expected: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its error asks for is taken, whichever job says so; of jobs that fail at once the last leaves nothing."""
    original = preprocess_module.choose

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(preprocess_module, "choose", original)
        monkeypatch.setattr("fcntl.flock", lambda file, operation: None)  # as if this one had not got so far
        with pytest.raises(ValueError, match="nothing to hold out"):
            run(source, tmp_path, (1, 2), 1e-9)
        assert (tmp_path / "held-out" / WORK / "recipe.json").exists()
        return original(*arguments)

    monkeypatch.setattr(Grouping, "groups", lambda self: [sorted(self._group_of)])
    monkeypatch.setattr(preprocess_module, "choose", meanwhile)
    with pytest.raises(ValueError, match="nothing to hold out"):
        run(source, tmp_path, (0, 2), 1e-9)
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    run(source, tmp_path, (0, 2))
    assert run(source, tmp_path, (1, 2)) == expected


def test_what_is_prepared_stays_where_a_job_fails_in_its_first_task(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the other jobs, and for the same one again."""

    def fail(*_: Any) -> Any:
        raise UserError("a worker process ended; run the same command again")

    monkeypatch.setattr(preprocess_module, "run_task", fail)
    with pytest.raises(UserError, match="run the same command again"):
        preprocess("jsonl", source, tmp_path / "out", tokenizer="clip", task_bytes=1, job=(0, 2))
    assert (tmp_path / "out" / WORK / "recipe.json").exists()
    with pytest.raises(UserError, match="run the same command again"):
        preprocess("jsonl", source, tmp_path / "alone", tokenizer="clip", task_bytes=1)
    assert not (tmp_path / "alone").exists()
    with pytest.raises(UserError, match="run the same command again"):
        preprocess("jsonl", source, tmp_path / "trained", vocab_size=400, task_bytes=1)
    assert (tmp_path / "trained" / WORK / "chosen/tokenizer.model").exists()


def test_of_two_that_choose_at_once_both_take_the_first_choice(
    source: Path, expected: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no locks. The one that is second to begin is the first to have chosen."""
    monkeypatch.setattr("fcntl.flock", lambda file, operation: None)

    def overtaken(_: Any) -> Iterator[str]:
        monkeypatch.undo()
        monkeypatch.setattr("fcntl.flock", lambda file, operation: None)
        run(source, tmp_path, (0, 2))
        return iter(["quite other words than those"] * 9)

    monkeypatch.setattr(train_tokenizer, "_training_lines", overtaken)
    assert run(source, tmp_path, (1, 2)) == expected


def test_a_half_that_is_written_again_has_the_tokenizer_of_the_other(
    source: Path, expected: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path)
    other_tokenizer(monkeypatch)
    for name in expected:
        shutil.rmtree(tmp_path / name)
        assert run(source, tmp_path) == expected
    shutil.rmtree(tmp_path / "held-out")
    other_groups(monkeypatch)
    with pytest.raises(ValueError, match=r"training was written with another .* other held-out documents than .* both"):
        run(source, tmp_path)
    assert not (tmp_path / "held-out/corpus.json").exists()
    manifest = json.loads((tmp_path / "training/corpus.json").read_text())
    del manifest["files"]["names-00000.bin"]  # as of earlier releases, which kept no names
    (tmp_path / "training/corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"training was made by another version's rules for jsonl, and its other half"):
        run(source, tmp_path)


@pytest.mark.parametrize("of_groups_alone", [False, True])
def test_parts_of_two_choices_are_no_corpus(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_groups_alone: bool
) -> None:
    """The folder of what was chosen was removed between two jobs: whoever finds parts of another choice says so."""
    if of_groups_alone:
        other_tokenizer(monkeypatch)  # which is the same whatever is held out
    run(source, tmp_path, (0, 2))
    shutil.rmtree(tmp_path / "held-out" / WORK / "chosen")
    (other_groups if of_groups_alone else other_tokenizer)(monkeypatch)
    said = f"{tmp_path}/training/{WORK}/part-000000-0000 was written with another tokenizer, .*; remove "
    said += f"{tmp_path}/training/{WORK} and {tmp_path}/held-out/{WORK}, and run"
    for job in ((1, 2), (0, 2)):
        with pytest.raises(ValueError, match=said):
            run(source, tmp_path, job)
    assert not (tmp_path / "training/corpus.json").exists()
    shutil.rmtree(tmp_path / "training" / WORK)
    shutil.rmtree(tmp_path / "held-out" / WORK)
    monkeypatch.undo()
    run(source, tmp_path)
    assert (
        open_corpus(tmp_path / "training").tokenizer.fingerprint
        == open_corpus(tmp_path / "held-out").tokenizer.fingerprint
    )


def test_without_held_out_documents_the_tokenizer_is_one_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"vocab_size": 400, "task_bytes": 1}
    preprocess("jsonl", source, tmp_path / "expected", **options)
    preprocess("jsonl", source, tmp_path / "out", job=(0, 2), **options)
    other_tokenizer(monkeypatch)
    preprocess("jsonl", source, tmp_path / "out", job=(1, 2), **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_no_tokenizer_is_trained_on_what_is_held_out(tmp_path: Path) -> None:
    """Each document repeats a word of its own, from which another vocabulary comes."""
    rare = ["zyxwvu", "qponml", "kjihgf", "edcbaz", "mnbvcx", "lkjhgf"]
    texts = [f"what is said in all of these documents {word} " * 12 for word in rare]
    writers.write_jsonl([Document((Text(text),)) for text in texts], tmp_path / "in")
    folders = [tmp_path / "training", tmp_path / "held-out"]
    preprocess("jsonl", tmp_path / "in", folders[0], held_out=folders[1], held_out_fraction=0.2, vocab_size=400)
    training, held_out = (
        [text.text for document in open_corpus(folder) for text in document.texts] for folder in folders
    )
    assert (len(held_out), sorted(training + held_out)) == (1, sorted(texts))
    trained = open_corpus(folders[0]).tokenizer
    assert trained.content == train_tokenizer.train_sentencepiece(training, 400).content
    assert trained.content != train_tokenizer.train_sentencepiece(texts, 400).content, "or a leak would not show"
