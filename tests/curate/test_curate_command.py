"""Protects the command `curate`, its refusals in one line, the presets, and the page of what was removed."""

from __future__ import annotations

import builtins
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from curate.corpora_of_rules import picture, write
from data.corpora import random_documents, write_corpus
from report.browser import Browser

from megatron_lcl.cli import main
from megatron_lcl.curate.languages import context_of
from megatron_lcl.curate.page import write_page
from megatron_lcl.curate.run import curate, read_curated
from megatron_lcl.curate.settings import Settings, as_recipe, preset_names, read_settings
from megatron_lcl.data.corpus import owners
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

HOSTILE = "<script>document.title = 'taken'</script> & \"quotes\""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    documents = [
        Document(
            (Text(HOSTILE), Image(picture(k, 40 + 20 * k, 60)), Text("many words of one paragraph stand here " * 3))
        )
        for k in range(6)
    ]
    return write(tmp_path_factory.mktemp("source"), documents)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, output = tmp_path / "page.html", tmp_path / "out"
    words = ["curate", str(source), "--image.min_side", "50", "--text.max_words=20", "--sample", str(page)]
    assert main([*words, "--dry-run"]) == 0
    looked = capsys.readouterr().out
    assert not output.exists()
    assert main([*words[:-1], str(output / "page.html"), "--output", str(output)]) == 0, "in the folder that it makes"
    assert (output / "page.html").exists()
    shutil.rmtree(output)
    capsys.readouterr()
    assert main([*words, "--output", str(output), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert said == looked
    table = {line.split()[0]: line.split()[1:] for line in said.splitlines()}
    assert table["image.min_side"] == ["50", "1", "16.67%"]
    assert table["text.max_words"] == ["20", "6", "50.00%"]
    assert table["before"] == ["12", "6", "6"]
    assert table["after"] == ["6", "5", "6"]
    assert verify(output) == []
    assert main([*words, "--output", str(output)]) == 0
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(output / "removed.html")
    assert (output / "removed.html").read_text().partition("<table")[2] == page.read_text().partition("<table")[2]
    assert main(["report", str(output), "--output", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").read_text().count("<main>") == 1
    assert verify(output) == []
    assert main(["report", str(source)]) == 2
    assert "was not curated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--output", "{out}", "--preset", "c4"], "no preset 'c4'; there are datacomp, mint1t, mmc4, obelics"),
        (["--output", "{out}", "--image.min_sides", "3"], "no --image.min_sides; the nearest is `image.min_side`"),
        (["--output", "{out}", "--text.min_words", "many"], "--text.min_words = 'many'"),
        (["--output", "{out}", "--text.max_special", "30"], "--text.max_special = 30"),
        (["--output", "{out}", "--image.formats", "[JPG]"], "image.formats has 'JPG'"),
        (["--output", "{out}", "--text.max_flagged_words", "0.01"], "needs lists.flagged_words"),
        (["--output", "{out}", "--lists.stop_words", "{out}/no", "--text.min_stop_words", "0.3"], "no such file"),
        (["--output", "{out}", "--lists.stop_words", "xx", "--text.min_stop_words", "0.3"], "--lists.stop_words xx"),
        (["--output", "{out}", "--document.min_language", "0.8", "--language.wanted", "xx"], "no language 'xx'"),
        (["--output", "{out}", "--document.min_language", "0.8", "--language.among", "en"], "give one besides en"),
        (["--output", "{out}", "--config", "{out}.yaml"], "no config file"),
        (["--output", "{out}", "--workers", "0"], "--workers 0"),
        (["--output", "{source}"], "give another folder"),
        (["--output", "{out}", "--text.max_words", "0", "--document.min_texts", "1"], "text.max_words = 0 removed"),
        (["--output", "{out}", "--dry-run"], "--dry-run"),
        (["--dry-run", "--sample", "{out}/no/x.html"], "--sample {out}/no/x.html: give a file in a folder that is"),
        (["--output", "{out}", "--sample", "{source}"], "--sample {source}: give a file in a folder that is"),
        ([], "give --output DIR, or --dry-run"),
        (["--output", "{out}", "--other", "word", "word"], "unexpected argument 'word'"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out = tmp_path / "out"
    assert main(["curate", str(source), *(word.format(out=out, source=source) for word in words)]) == 2
    printed, complaints = capsys.readouterr()
    lines = [line for line in complaints.splitlines() if line and "task" not in line]  # bars
    assert len(lines) == 1
    assert said.format(out=out, source=source) in lines[0]
    assert printed == "", "before the work"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_or_written_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the source is not said to be the folder that is written."""
    shard, out = str(source / "shard-00000.bin"), tmp_path / "out"

    def raising(error: OSError) -> Callable[..., None]:
        def fails(*_: object) -> None:
            raise error

        return fails

    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), shard)
    monkeypatch.setattr("megatron_lcl.curate.run.judge", raising(denied))
    for words in (["--dry-run"], ["--output", str(out)]):
        assert main(["curate", str(source), *words]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said == f"megatron-lcl curate: {shard}: Permission denied"
    with monkeypatch.context() as patch:
        full, above = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "new")), tmp_path / "new/out"
        patch.setattr("megatron_lcl.curate.run.judge", raising(full))
        assert main(["curate", str(source), "--output", str(above)]) == 2
        assert f"no space left for {above}" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["curate", str(source), "--output", str(tmp_path / "file" / "out")]) == 2
    assert f"cannot write {tmp_path / 'file' / 'out'}: Not a directory" in capsys.readouterr().err
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert main(["curate", str(source), "--dry-run"]) == 2
    assert f"cannot write {tmp_path / 'file'}: Not a directory" in capsys.readouterr().err


def test_rules_stand_anywhere(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The value of one that is not given by = is no corpus, wherever it stands."""
    for words in (
        ["--text.min_words", "5", str(source), "--dry-run"],
        ["--dry-run", "--text.min-words=5", str(source)],
        ["--dry-run", str(source), "--text.min_words", "5"],
        ["--document.min_images", "-1", str(source), "--text.min_words", "5", "--dry-run"],
    ):
        code = main(["curate", *words])
        said = capsys.readouterr()
        assert (code, "takes one CORPUS" in said.err) == ((2, False) if "-1" in words else (0, False)), said.err
        assert ("--document.min_images = -1" in said.err) == ("-1" in words)


def test_a_dry_run_removes_what_a_killed_one_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"megatron-lcl-curate-{owners.machine()}-{2**30}-{'0' * 32}"  # no process has that number
    left.mkdir()
    curate(source, None)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(("package", "rule"), [("lingua", "min_language"), ("stop_words", "min_stop_words")])
def test_a_package_that_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    package: str, rule: str,
) -> None:  # fmt: skip
    original = builtins.__import__

    def without(name: str, *more: object) -> object:
        if name == package:
            raise ImportError(name)
        return original(name, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    context_of.cache_clear()
    assert main(["curate", str(source), "--output", str(tmp_path / "out"), f"--text.{rule}", "0.1"]) == 2
    assert "pip install 'megatron-lcl[curate]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("preset", preset_names())
def test_presets(preset: str, tmp_path: Path) -> None:
    """Each runs; every number of it has its source beside it."""
    source = write_corpus(tmp_path / "in", random_documents(6, 1, matched=True))
    assert curate(source.path, None, read_settings(preset)).before["documents"] == 6
    text = (Path(sys.modules[curate.__module__].__file__ or "").parent / "presets" / f"{preset}.yaml").read_text()
    assert re.match(r"# .*arXiv \d{4}\.\d{5}", text)
    numbers = [line for line in text.splitlines() if re.search(r"^  \w+: ", line)]
    assert len(numbers) == len(as_recipe(read_settings(preset)))
    assert as_recipe(read_settings("obelics", overrides={"text.min_words": "null"}))["image.min_side"] == 150


def test_null_is_no_rule(tmp_path: Path) -> None:
    """On the command line and in a file, whatever a rule is when it is off."""
    lists = ("image.formats", "document.unsafe_names", "duplicates.against", "evaluation.sets", "language.among")
    off = (*lists, "models.match", "text.min_words", "duplicates.documents.action", "duplicates.documents", "text")
    file = tmp_path / "rules.yaml"
    for name in off:
        assert read_settings(overrides={name: "null"}) == Settings(), name
        section, _, field = name.rpartition(".")
        tree = {field: None}
        for part in reversed(section.split(".") if section else []):
            tree = {part: tree}
        file.write_text(json.dumps(tree))
        assert read_settings(file=file) == Settings(), name
    assert read_settings("mint1t", overrides={"document.unsafe_names": "null"}).document.unsafe_names == ()
    assert read_settings(overrides={"document.unsafe_names": "[null]"}).document.unsafe_names == ("null",)
    exact = read_settings(overrides={"duplicates.documents": "{threshold: null, action: keep-one}"})
    assert exact.duplicates.documents.threshold is None
    for name in ("language.wanted", "language.characters", "lists.min_words", "lists.stop_word"):
        with pytest.raises(UserError, match=name):
            read_settings(overrides={name: "null"})
    file.write_text("language: {characters: null}")
    with pytest.raises(UserError, match=r"language\.characters"):
        read_settings(file=file)


def test_a_file_of_rules(source: Path, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text("image:\n  min_side: 50\ntext:\n")
    found = curate(source, None, read_settings(file=tmp_path / "rules.yaml"))
    assert next((r.rule, r.threshold) for r in found.rules) == ("image.min_side", "50")
    (tmp_path / "rules.yaml").write_text("image:\n  min_side: 50\ntext:\nimage:\n  formats: [PNG]\n")
    with pytest.raises(UserError, match=r"rules\.yaml is not YAML: .*`image` stands twice.*, line 4, column 1"):
        read_settings(file=tmp_path / "rules.yaml")


@pytest.mark.slow
def test_the_page_shows_what_was_removed(source: Path, tmp_path: Path, browser: Browser) -> None:
    settings = read_settings(overrides={"image.min_side": "55", "text.max_special": "0.25", "document.max_words": "20"})
    page = write_page(curate(source, tmp_path / "out", read_settings(overrides={"image.min_side": "55"})))
    browser.open(page.as_uri())
    assert browser.complaints() == []
    assert browser.requests() == []
    assert browser.evaluate("document.querySelectorAll('article img').length") == 1
    assert browser.evaluate("[...document.images].every((i) => i.naturalWidth > 0)")
    page = write_page(curate(source, None, settings), tmp_path / "looked.html")
    browser.open(page.as_uri(), width=420)
    assert browser.evaluate("document.title") == "What would be removed"
    assert browser.evaluate("document.querySelector('article p').textContent").startswith("<script>")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 420
    assert browser.complaints() == []


def test_samples_are_few_and_say_what_was_removed(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "in", random_documents(60, 2, matched=True), 2)
    curate(source.path, tmp_path / "out", read_settings(overrides={"text.min_words": "9"}), task_bytes=3000)
    samples = [json.loads(line) for line in (tmp_path / "out" / "removed-samples.jsonl").read_text().splitlines()]
    assert samples == read_curated(tmp_path / "out").samples
    texts = [sample for sample in samples if sample["rule"] == "text.min_words"]
    assert len(texts) == 6
    for sample in texts:
        text = source[sample["document"]].items[sample["item"]]
        assert sample["parts"] == [{"text": text.text}]
        assert sample["name"] == source.name(sample["document"])


def test_a_sample_of_a_whole_document_is_what_was_left_of_it(tmp_path: Path) -> None:
    """Cut at 1,200 characters of a text and 8 items; a text that another rule removed is not shown with it."""
    long, short = "many words of one text " * 80, [f"words of text {k}" for k in range(8)]
    texts = [Text(text) for text in ("two words", long, *short)]
    documents = [Document((*texts[:2], Image(picture(1)), *texts[2:])), Document((Text("few words stay"),))]
    settings = read_settings(overrides={"text.min_words": "3", "document.max_words": "100"})
    found = curate(write(tmp_path, documents), tmp_path / "out", settings)
    (parts,) = (sample["parts"] for sample in found.samples if sample["rule"] == "document.max_words")
    assert parts[0] == {"text": long[:1200] + "…"}
    assert parts[1]["image"].startswith("data:image/")
    assert parts[2:] == [*({"text": text} for text in short[:6]), {"text": "… and 2 more"}]
