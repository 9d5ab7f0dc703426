"""What is wrong in JSON lines is named by file and line, wherever units begin."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from data.helpers import TOKENIZER

from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import Unit, lines
from megatron_lcl.data.prepare.preprocess import preprocess

GOOD = '{"items": [{"text": "words of some length, so that there are several units"}]}\n'


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_are_named_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(lines, "RANGE", 100)
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    rows = [GOOD] * 40
    rows[6], rows[22], rows[30], rows[39] = "{bad\n", '{"items": 3}\n', "{bad again\n", '{"items": ['
    (folder / "a.jsonl").write_text("".join(rows))
    (folder / "b.jsonl").write_text(GOOD + '{"items": [{"image": "none.png"}, {"text": "a"}]}\n')
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("".join(rows[:7]))
    out = tmp_path / "out"
    drops = preprocess("jsonl", folder, out, tokenizer=TOKENIZER, max_bad_fraction=1, workers=workers).drops
    assert drops.names["document: not JSON"] == ["a.jsonl:7", "a.jsonl:31", "c.jsonl.gz:7"]
    assert drops.names['document: no list "items"'] == ["a.jsonl:23"]
    assert drops.names["document: cut last line"] == ["a.jsonl:40"]
    assert drops.names["image: file missing"] == ["b.jsonl:2: none.png"]
    assert open_corpus(out).manifest["drops"]["names"]["document: not JSON"][0] == "a.jsonl:7"
    with pytest.raises(ValueError, match=r"mostly document: .*\(e\.g\. a\.jsonl:7\)"):
        preprocess(
            "jsonl", folder / "a.jsonl", tmp_path / "none", tokenizer=TOKENIZER, max_bad_fraction=0.01, workers=workers
        )


def test_lines_are_counted_once_in_any_order(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same.jsonl").write_text("x\n" * 9)
    (tmp_path / "a.jsonl").write_text("x\n" * 100_000)
    files = [tmp_path / "a.jsonl", tmp_path / "one" / "same.jsonl", tmp_path / "two" / "same.jsonl"]
    numbers = lines.LineNumbers([Unit(file.relative_to(tmp_path).as_posix(), 1, (file, 0, 1)) for file in files])
    for line in (99_999, 5, 40_000, 5, 1, 100_000):
        assert numbers.name(f"a.jsonl@{2 * (line - 1)}: an image @3") == f"a.jsonl:{line}: an image @3"
    assert numbers.name("two/same.jsonl@4") == "two/same.jsonl:3"
    for other in ("same.jsonl@4", "page.html", "b.jsonl@3", "a.jsonl:3", "a.jsonl@x"):
        assert numbers.name(other) == other
