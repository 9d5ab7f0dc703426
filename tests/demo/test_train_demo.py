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
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from demo.test_emoji import LABELS, write_packages
from train.test_sweep import write_finished

from megatron_lcl import LCL
from megatron_lcl.claim import run as claim_run
from megatron_lcl.cli import main
from megatron_lcl.config import Config, load, replace, to_yaml
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.demo import manual
from megatron_lcl.demo import run as demo_run
from megatron_lcl.demo import train as train_module
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.train.changes import changed_settings


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    code: int,
) -> None:
    """The training had no more use for it; what follows is not begun."""

    def start(_command: Sequence[str], _processes: int, told: list[int]) -> int:
        told.append(signum)
        return 0

    monkeypatch.setattr(train_module, "check", lambda *_: None)
    monkeypatch.setattr(train_module, "start_local", start)
    monkeypatch.chdir(tmp_path)
    assert train_module.train_on_this_machine(Config(), Path("config.yaml")) == code
    assert capsys.readouterr().err == f"megatron-lcl: {signum.name}: stopped; the same command goes on\n"


def test_a_config_that_was_edited_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With other steps the command goes on, where its run can; also in a folder that has been moved, and in one of an
    earlier version, which made another config."""
    out, started = tmp_path / "out", []

    def start(command: Sequence[str], _processes: int, _told: list[int]) -> int:
        started.append(load(Path(command[-1])))
        return 0

    def train(steps: int | None = None, out: Path = out) -> Config:
        corpora = {name: out / name for name in ("labels", "contexts", "pairs")}
        config = train_module.packaged_config("megatron_lcl.demo", "train.yaml", corpora, out, steps)
        assert train_module.train_on_this_machine(config, out / "config.yaml") == 0
        assert changed_settings(load(out / "config.yaml"), config) == {} == changed_settings(started[-1], config)
        return config

    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=400))
    monkeypatch.setattr(train_module, "open_corpus", lambda _: tokenizer)
    monkeypatch.setattr(train_module, "check", lambda *_: None)
    monkeypatch.setattr(train_module, "start_local", start)
    whole = train()
    assert train(100).train.steps == 100
    assert train() == whole
    write_finished(whole)
    before = (out / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"has made 1000 of 1000 steps with .*; give .* again, or another --output$"):
        train(100)
    assert (out / "config.yaml").read_text() == before
    assert train(2000).train.steps == 2000

    edited = before.replace("steps: 1000", "steps: 900")  # and not the cooldown
    (out / "config.yaml").write_text(f"# mine\n{edited}")
    number = len(started)
    with pytest.raises(UserError) as caught:
        train()
    file = out / "config.yaml"
    assert re.fullmatch(
        rf"{file} was edited \(schedule.cooldown \d+ → \d+\); train with it: megatron-lcl train --config {file} "
        r"--train.output DIR, or delete it",
        str(caught.value),
    )
    assert (out / "config.yaml").read_text() == f"# mine\n{edited}"
    assert len(started) == number
    (out / "config.yaml").unlink()
    train()

    earlier = to_yaml(replace(whole, train__log_every=7))
    for file in (out / "config.yaml", out / "run" / "config.yaml"):
        file.write_text(earlier)
    train()
    (out / "config.yaml").write_text(f"# mine\n{before}")
    train()
    assert (out / "config.yaml").read_text() == f"# mine\n{before}", "says the same"
    shutil.copytree(out, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "run")
    train(out=tmp_path / "moved")


@pytest.mark.parametrize("command", [["demo", "emoji"], ["demo", "manual"], ["quickstart"], ["claim"]])
def test_the_output_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Before anything is fetched; what is fetched already, and a folder of its own with more in it, is no hindrance."""

    def stop(*_: object) -> None:
        raise UserError("begins")

    for module, name in (
        (demo_run, "fetch"),
        (manual, "fetch"),
        (claim_run, "demo"),
    ):
        monkeypatch.setattr(module, name, stop)
    own = {"demo": "corpora", "quickstart": "corpus", "claim": "sets"}[command[0]]
    for name, files, said in (
        ("run", [own, "metrics.jsonl"], "is a run, as its metrics.jsonl says; give a new folder"),
        ("corpus", ["corpus.json", "text"], "is a corpus, as its corpus.json says; give a new folder"),
        ("other", ["notes", "photos"], "is not empty (notes) and not of this command; give a new folder"),
        ("own", [own, "notes"], "begins"),
        ("begun", ["source", ".hidden"], "begins"),
        ("empty", [], "begins"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in files:
            (folder / file).mkdir()
        assert main([*command, "--output", str(folder)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith(said), name
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)


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
