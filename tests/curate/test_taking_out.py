"""Protects what leaves a corpus because somebody asks for it: found by its whole name, and nothing of it stays."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from curate.corpora_of_rules import picture, removed, write
from data.helpers import TOKENIZER

from megatron_lcl.cli import main
from megatron_lcl.curate.result import Unmatched
from megatron_lcl.curate.run import SAMPLES_FILE, curate, curate_in_jobs
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.corpus_manifest import MANIFEST, read_manifest, write_manifest
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.export_corpus import export_corpus
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

URLS = (
    "https://site2.org/page1",
    "https://site2.org/page10",
    "https://www.Site2.org:8080/page1?x=1",
    "https://mysite2.org/page1",
    "https://other.org/?from=site2.org",
    "https://other.org/page1",
    "http://[odd",
    "7",
    "HTTPS://site3.org./page1",
    "https://other.org/?q=a site2.org",
    "",
)
LONG = f"https://site4.org/{'é' * 490}"
"""cut in a name, within a character"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a document for each URL: `a.jsonl@BYTE URL`; then of a file with spaces in its path, and of one
    with a long URL."""
    folder = tmp_path_factory.mktemp("source")
    for file, urls in (("a", URLS), ("my dir/b c", ["https://site3.org/page2"]), ("zz", [LONG + "1/2"])):
        lines = [{"items": [{"text": f"A text about number {n}."}], "url": url} for n, url in enumerate(urls)]
        (folder / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "in" / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    preprocess("jsonl", folder / "in", folder / "corpus", tokenizer=TOKENIZER)
    return folder / "corpus"


@pytest.fixture(scope="module")
def exported(source: Path) -> Path:
    """The same documents, `00000.jsonl@BYTE a.jsonl@BYTE URL`."""
    export_corpus(source, source.parent / "exported")
    preprocess("jsonl", source.parent / "exported", source.parent / "again", tokenizer=TOKENIZER)
    return source.parent / "again"


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("lines", "gone"),
    [
        ("https://site2.org/page1\n", [0]),
        ("\ufeffhttps://site2.org/page1\n\n  https://other.org/page1  \r\n", [0, 5]),
        ("a.jsonl@0 https://site2.org/page1\n", [0]),
        ("\ufeff\nhttps://site2.org/page1\n", [0]),
        ("page1\nc.jsonl\nhttps\nhttps://site2.org\norg2\n", []),
        ("SITE2.org\n", [0, 1, 2]),
        ("site2.org\n", [0, 1, 2]),
        ("site2.org/\n*.site2.org\nsite2.org:8080\n", []),
        ("www.site2.org\n", [2]),
        ("site2.org/page1\n", []),
        ("org\n", [0, 1, 2, 3, 4, 5, 8, 9, 11, 12]),
        ("7\n", [7]),
        ("site3.org\n", [8, 11]),
        ("https://site3.org/page2\n", [11]),
        ("my dir/b c.jsonl@0 https://site3.org/page2\n", [11]),
        ("https://other.org/?q=a site2.org\n", [9]),
        (f"{LONG}1/2\n", [12]),
        (f"{LONG[:-40]}\n{LONG[:-40]}1/2\n{LONG[:450]}x1/2\n", []),
    ],
)
def test_a_name_is_excluded_as_a_whole(
    source: Path, exported: Path, tmp_path: Path, lines: str, gone: list[int], again: bool
) -> None:
    corpus = open_corpus(source)
    assert corpus.name(0) == "a.jsonl@0 https://site2.org/page1"
    assert corpus.name(11) == "my dir/b c.jsonl@0 https://site3.org/page2"
    assert len(corpus.name(12).encode()) == 999
    if again:
        source = exported
        assert open_corpus(source).name(0) == "00000.jsonl@0 a.jsonl@0 https://site2.org/page1"
        assert open_corpus(source).name(11).endswith(" my dir/b c.jsonl@0 https://site3.org/page2")
    (tmp_path / "names").write_text(lines, "utf-8")
    given = read_settings(overrides={"document.excluded_names": str(tmp_path / "names")})
    found = curate(source, tmp_path / "out", given)
    assert removed(tmp_path / "out") == [(n, -1, "document.excluded_names") for n in gone]
    assert next(r.documents for r in found.rules if r.rule == "document.excluded_names") == len(gone)


def test_a_list_of_names_that_is_none(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--document\.excluded_names .*: there is no such file"):
        read_settings(overrides={"document.excluded_names": str(tmp_path / "names")})
    (tmp_path / "names").write_text("\n \n")
    with pytest.raises(UserError, match="names has no line; give the names of documents to remove, one a line"):
        curate(source, tmp_path / "out", read_settings(overrides={"document.excluded_names": str(tmp_path / "names")}))


def test_no_job_begins_for_a_list_that_is_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.curate.run.run_jobs", lambda *_, **__: pytest.fail("a job begins"))
    (tmp_path / "names").write_text("\n")
    given = read_settings(overrides={"document.excluded_names": str(tmp_path / "names")})
    with pytest.raises(UserError, match="names has no line"):
        curate_in_jobs(source, tmp_path / "out", Engine("ray"), given)


def test_names_are_excluded_from_no_corpus_that_has_none(source: Path, tmp_path: Path) -> None:
    """As of an earlier release, and what was curated from one."""
    old = tmp_path / "old"
    shutil.copytree(source, old)
    manifest = {key: value for key, value in read_manifest(old).items() if key != "fingerprint"}
    manifest["files"] = {name: info for name, info in manifest["files"].items() if not name.startswith("names-")}
    for file in old.glob("names-*"):
        file.unlink()
    write_manifest(old, manifest)
    curate(old, tmp_path / "new", read_settings(overrides={"text.min_words": "1"}))
    (tmp_path / "names").write_text("https://site2.org/page1\n")
    given = read_settings(overrides={"document.excluded_names": str(tmp_path / "names")})
    for corpus in (old, tmp_path / "new"):
        with pytest.raises(UserError, match=r"does not know where the documents of shard 0 came from.*`preprocess`"):
            curate(corpus, tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def _all_of(folder: Path) -> Mapping[str, bytes]:
    """Of each file its bytes, and what a table holds."""
    found = {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for path in folder.glob("*.parquet"):
        found[f"{path.name}, decoded"] = json.dumps(read_table(path).to_pylist()).encode()
    return found


def _curate(*words: str | Path) -> None:
    assert main(["curate", *map(str, words)]) == 0


def test_without_samples_nothing_is_said_of_what_was_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of what goes now, nor of what went, or was remarked on, on the way to the source; numbers stay."""
    documents = [
        Document((Text("secret words"), Text("a text that is long enough for the rule"), Image(picture(k % 8))))
        for k in range(9)
    ]
    documents.append(Document((Text("no picture stands in this document of ours"),)))
    before = write(tmp_path, documents)
    source = tmp_path / "source"
    _curate(before, "--output", source, "--text.min_words", "3")
    names = [open_corpus(source).name(n) for n in range(len(open_corpus(source)))]
    for file in ("names", "other"):
        (tmp_path / file).write_text("\n".join([*names[:4], names[9]]))
    rules = ("--document.excluded_names", tmp_path / "names")
    capsys.readouterr()
    assert any(b"secret" in content for content in _all_of(source).values())

    _curate(source, "--output", tmp_path / "out", *rules, "--samples", "0")
    assert verify(tmp_path / "out") == []
    for name, content in _all_of(tmp_path / "out").items():
        assert b"secret" not in content, name
        if not name.startswith("names-"):  # of what stays
            assert b"DOCUMENTS.jsonl@" not in content, name
    assert (tmp_path / "out" / SAMPLES_FILE).read_bytes() == b""
    assert [row[0] for row in removed(tmp_path / "out")] == [0, 1, 2, 3, 9]
    manifest = read_manifest(tmp_path / "out")
    assert manifest["drops"]["left_out"] == {
        "document: document.excluded_names": 5,
        "text: text.min_words 3": 9,
    }
    _curate(source, "--output", tmp_path / "same", rules[0], tmp_path / "other", "--samples", "0")
    assert _all_of(tmp_path / "same") == _all_of(tmp_path / "out"), "nor where the list was"

    _curate(source, "--output", tmp_path / "alike", "--duplicates.images.action", "drop-all", "--samples", "0")
    rows = read_table(tmp_path / "alike" / "removed.parquet").to_pylist()
    assert [(row["document"], row["matched"]) for row in rows] == [(0, ""), (8, "")]


def test_without_samples_no_fault_of_the_source_is_named(tmp_path: Path) -> None:
    """It may be one of a document that goes; how many there were stays."""
    lines = [{"items": [{"text": f"text {n}"}, {"image": f"gone-{n}.png"}]} for n in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    preprocess("jsonl", tmp_path / "in.jsonl", tmp_path / "source", tokenizer=TOKENIZER, max_bad_fraction=1)
    (tmp_path / "names").write_text(open_corpus(tmp_path / "source").name(1))
    rules = ("--document.excluded_names", tmp_path / "names")
    for samples, names in ((1, ["gone-0.png", "gone-1.png", "gone-2.png"]), (0, [])):
        out = tmp_path / f"out{samples}"
        _curate(tmp_path / "source", "--output", out, *rules, "--samples", f"{samples}")
        assert sorted(set(re.findall(r"gone-\d.png", (out / MANIFEST).read_text()))) == names
        assert read_manifest(out)["drops"]["bad"] == read_manifest(tmp_path / "source")["drops"]["bad"] != {}


def test_a_finished_corpus_with_samples_is_no_corpus_without(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _curate(source, "--output", tmp_path / "out", "--document.unsafe_names", "[page]")
    _curate(source, "--output", tmp_path / "six", "--document.unsafe_names", "[page]", "--samples", "6")
    assert _all_of(tmp_path / "out") == _all_of(tmp_path / "six")
    assert len((tmp_path / "out" / SAMPLES_FILE).read_bytes().splitlines()) == 6
    assert "samples" not in read_manifest(tmp_path / "out")["recipe"]
    assert main(
        ["curate", str(source), "--output", str(tmp_path / "out"), "--document.unsafe_names=[page]", "--samples=0"]
    )
    assert "holds another corpus (its samples differ); give a new folder" in capsys.readouterr().err
    for num, expected in ((2, 2), (20, 11)):
        for _ in range(2):  # recognized
            _curate(source, "--output", tmp_path / f"{num}", "--document.unsafe_names", "[http]", "--samples", f"{num}")
        assert len((tmp_path / f"{num}" / SAMPLES_FILE).read_bytes().splitlines()) == expected
    assert main(["curate", str(source), "--dry-run", "--samples", "-1"])
    assert "--samples -1: give 0 or more" in capsys.readouterr().err


def test_lines_that_match_nothing_are_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where other rules remove the documents, in several processes, after a run that was killed, and of two lines
    that match one document; by name only where the corpus may name what somebody wants removed."""
    wrong = [f"https://site2.org/pgae{n}" for n in range(6)]
    right = ["other.org", "https://other.org/page1", "Site2.ORG", "www.site2.org", f"{LONG}1/2", "a.jsonl@0 " + URLS[0]]
    (tmp_path / "names").write_text("\n".join([wrong[0], *right, *wrong, "7"]), "utf-8")
    rules = {"document.unsafe_names": "[site4]", "document.excluded_names": str(tmp_path / "names")}
    said = "6 of 13 lines matched no document: "
    first = ", ".join(map(repr, wrong[:5])) + ", and 1 more"

    def printed(*words: str | Path) -> str:
        capsys.readouterr()
        assert (
            main(["curate", str(source), *map(str, words), "--document.excluded_names", f"{tmp_path / 'names'}"]) == 0
        )
        return capsys.readouterr().out.splitlines()[-1]

    assert printed("--dry-run", "--samples", "0") == f"document.excluded_names: {said}{first}"
    for _ in range(2):  # recognized
        assert printed("--output", tmp_path / "out") == f"document.excluded_names: {said}{first}"
    recorded = {"lines": 13, "unmatched": 6, "first": wrong[:5]}
    assert read_manifest(tmp_path / "out")["curated"]["unmatched"] == recorded
    assert printed("--output", tmp_path / "0", "--samples", "0").endswith(f"{said}`--dry-run` names them")
    assert read_manifest(tmp_path / "0")["curated"]["unmatched"] == {**recorded, "first": []}

    given = read_settings(overrides=rules)
    options = {"task_bytes": 100, "workers": 2}
    with monkeypatch.context() as patch:
        patch.setattr("megatron_lcl.curate.run._finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            curate(source, tmp_path / "resumed", given, **options)  # type: ignore[arg-type]
    found = curate(source, tmp_path / "resumed", given, **options).unmatched  # type: ignore[arg-type]
    assert found == Unmatched(**recorded)  # type: ignore[arg-type]
    (tmp_path / "names").write_text("other.org\n7\n")
    assert printed("--dry-run") == "document.excluded_names: every one of 2 lines matched a document"
