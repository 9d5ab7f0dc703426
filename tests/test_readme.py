"""The commands of the README and of the report, as they are typed, in their order, on a few documents."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from data.writers import picture, write_jsonl
from launch.conftest import TINY, WORDS

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image, Text

ROOT = Path(__file__).parents[1]
COMMAND = re.compile(r"^ *(megatron-lcl (?:preprocess|verify|inspect|train|evaluate|export) .*)$", re.M)
README, REPORT = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "megatron_lcl/report/report.html")
)


def test_the_reports_commands_are_the_readmes() -> None:
    ours, theirs = ([c.split("<")[0] for c in COMMAND.findall(text)] for text in (REPORT, README))
    assert len(ours) == 4
    assert [command for command in theirs if command in ours] == ours


def test_files_and_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in (README, REPORT):
        (wanted,) = re.findall(r"pip install -e \"\.\[(.*?)\]", text)
        assert set(wanted.split(",")) <= extras.keys()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert {f"docs/{file.name}" for file in (ROOT / "docs").glob("*.md")} <= set(links)
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.slow
def test_every_command_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("open_clip", "transformers"):
        pytest.importorskip(package)
    write_jsonl([Document((Text(" ".join(WORDS[k:])), Image(picture(k)), Text(WORDS[k]))) for k in range(9)], tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(command)[1:] for command in COMMAND.findall(README) if "--help" not in command]
    assert [command[0] for command in commands] == ["preprocess", "verify", "inspect", "train", "evaluate", "export"]
    for command in commands:
        assert main([*command, "--dry-run"] if command[0] == "train" else command) == 0
        if command[0] == "train":  # the real one is for GPUs and weeks
            small = ["--train.steps", "1", "--train.dtype", "float32", "--data.cache", str(tmp_path / "cache")]
            assert main([*command, *TINY, "--train.global_batch", "2", *small, "--processes", "1"]) == 0
    for written in ("corpora/heldout/corpus.json", "sample.html", "exports/b32/config.json"):
        assert (tmp_path / written).is_file()
