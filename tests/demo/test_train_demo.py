"""Protects `demo NAME --train`: by its config it trains on the data set's documents, it names the held-out artist's
pictures before and after near-duplicates are left out, and the report opens with them.

What is trained here is nothing: the weights are the initial ones. `tests/quickstart` runs the same functions with real
processes.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from demo.test_emoji import LABELS, write_packages

from megatron_lcl import LCL
from megatron_lcl.cli import main
from megatron_lcl.config import Config, load
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.demo import train as train_module
from megatron_lcl.evaluate.sources import open_images


def test_train_goes_with_what_has_a_held_out_artist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["manual", "--train"], "`megatron-lcl quickstart` trains on the manual"),
        (["emoji", "--steps", "3"], "--steps goes with --train"),
        (["emoji", "--train", "--steps", "0"], "--steps 0: give at least 1"),
    ):
        assert main(["demo", *words, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_at_the_last_step_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signum: signal.Signals, code: int
) -> None:
    """The training had no more use for it; what follows is not begun."""

    def start(_command: Sequence[str], _processes: int, told: list[int]) -> int:
        told.append(signum)
        return 0

    monkeypatch.setattr(train_module, "check", lambda *_: None)
    monkeypatch.setattr(train_module, "start_local", start)
    assert train_module.train_on_this_machine(Config(), Path("config.yaml")) == code
    assert capsys.readouterr().err == f"megatron-lcl: {signum.name}: stopped; the same command goes on\n"


def save_untrained(command: Sequence[str], processes: int, told: list[int]) -> int:
    """In place of training: the weights that a run of this config begins with."""
    assert command[0] == "train"
    config = load(Path(command[-1]))
    folder = Path(config.train.output)
    folder.mkdir()
    save_checkpoint(LCL(config.model), config, folder)
    return 0


@pytest.mark.slow
def test_emoji_are_trained_on_and_named(
    once: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("resvg_py")

    def make(folder: Path) -> Path:  # as in test_emoji
        write_packages(folder / "packages")
        assert main(["demo", "emoji", "--from", str(folder / "packages"), "--output", str(folder / "out")]) == 0
        return folder / "out"

    out = tmp_path / "out"
    shutil.copytree(once("demo-emoji", make), out)
    monkeypatch.setattr(train_module, "start_local", save_untrained)
    given = str(once("demo-emoji", make).parent / "packages")
    assert main(["demo", "emoji", "--from", given, "--output", str(out), "--train", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    config = yaml.safe_load((out / "run" / "config.yaml").read_text())
    assert {Path(corpus["path"]).name for corpus in config["data"]["corpora"]} <= {"labels", "contexts", "pairs"}
    assert config["train"]["steps"] == 2
    for folder, name, words in (
        (out / "run", "artist-distinct", "without near-duplicates"),
        (out / "run" / "with-near-duplicates", "artist", "all"),
    ):
        num = len(open_images(out / "evaluate" / name))
        (result,) = json.loads((folder / "results.json").read_text())
        assert result["num_items"] == result["settings"]["classes"] == num
        right = json.loads((folder / "gallery.json").read_text())["num_right"]
        line = f"zero-shot, {words}: {right / num:.1%} of {num:,} pictures"
        assert line in said
        assert f"{right:.0f} times chance among {num} names" in said  # chance is 1 / num
    page = (out / "report.html").read_text(encoding="utf-8")
    gallery = page[page.index('class="gallery"') : page.index("On documents that")]
    names = set(re.findall(r"<figcaption>\s*<b>([^<]+)</b>", gallery)) | set(
        re.findall(r"<span>is ([^<]+)<br>", gallery)
    )
    assert names <= set(LABELS)
    num = len(open_images(out / "evaluate" / "artist-distinct"))
    assert gallery.count("<figure") == gallery.count("<image ") == num
    assert all(source.startswith("data:image/webp") for source in re.findall(r'(?:src|href)="([^"]*)"', gallery))
