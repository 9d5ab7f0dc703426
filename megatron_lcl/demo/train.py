"""`megatron-lcl demo NAME --train`: from a data set to a trained encoder and a page about what it names.

OUTPUT/config.yaml    the run's config         OUTPUT/run/    checkpoints, metrics, evaluations
OUTPUT/report.html    see `megatron_lcl/report`
"""

from __future__ import annotations

import importlib.resources
import json
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.find import find_checkpoint
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.demo.write import CORPORA, EVALUATE, HELD_OUT, SOURCES, TRAINING
from megatron_lcl.errors import UserError, complain
from megatron_lcl.evaluate.heldout import evaluate_checkpoint
from megatron_lcl.evaluate.results import Result
from megatron_lcl.evaluate.run import evaluate
from megatron_lcl.filesystem import is_file
from megatron_lcl.report.page import REPORT, write_report
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.changes import Changes, changed_settings
from megatron_lcl.train.checks import check
from megatron_lcl.train.finished import is_finished
from megatron_lcl.train.launch import default_processes, start_local
from megatron_lcl.train.resilience.start import code_of_signal

RUN, CACHE = "run", "cache"
"""folders of the output"""
WITH_NEAR_DUPLICATES = "with-near-duplicates"
"""folder of the run with the evaluation of all pictures of the held-out artist"""
_PLACE = re.compile(r"data\.(cache|corpora\.\d+\.path)|train\.output")
"""settings that say where a folder is"""


def check_steps(steps: int | None) -> None:
    """UserError where so many are none; before the data is made, which takes longest."""
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: give at least 1")


def train_demo(output: Path, steps: int | None = None) -> int:
    """Train on the data set in `output`, evaluate, and write the report; each picks up what was finished.

    Returns the exit code: 0, or that of the training, which has said what it is.
    """
    started = time.monotonic()
    corpora = {part: output / CORPORA / part for part in TRAINING}
    config = packaged_config("megatron_lcl.demo", "train.yaml", corpora, output, steps)
    if code := train_on_this_machine(config, output / CONFIG):
        return code
    print(f"trained: {time.monotonic() - started:.0f} s", flush=True)
    run = output / RUN
    print(evaluate_checkpoint(find_checkpoint(run), output / CORPORA / HELD_OUT, run), flush=True)
    print(name_pictures(output, run, output / CACHE))
    print(write_report(run, output / REPORT))
    return 0


def packaged_config(package: str, name: str, corpora: Mapping[str, Path], output: Path, steps: int | None) -> Config:
    """A config that lies in `package`, for a run in `output`.

    Its `data.corpora` are keys of `corpora`, the folders; the size of the vocabulary is theirs. With another number of
    steps than the config's its cooldown takes the same share of them. UserError where `output`/config.yaml was edited.
    """
    overrides = {"data.cache": str(output / CACHE), "train.output": str(output / RUN)}
    vocab_size = open_corpus(next(iter(corpora.values()))).tokenizer.vocab_size
    overrides["model.language.vocab_size"] = str(vocab_size)
    with importlib.resources.as_file(importlib.resources.files(package) / name) as file:
        config = configs.load(file, overrides)
    blend = tuple(replace(corpus, path=str(corpora[corpus.path])) for corpus in config.data.corpora)
    config = replace(config, data=replace(config.data, corpora=blend))
    _check_not_edited(output / CONFIG, config)
    return config if steps is None else _with_steps(config, steps)


def _with_steps(config: Config, steps: int) -> Config:
    cooldown = round(config.schedule.cooldown * steps / config.train.steps)
    return configs.replace(config, train__steps=steps, schedule__cooldown=cooldown)


def _check_not_edited(file: Path, config: Config) -> None:
    """A file that is there is `config` with any number of steps and in any folder, or what its run was last started
    with: nothing of it is lost where it is written again."""
    if not is_file(file):
        return
    found, run = configs.load(file), Path(config.train.output) / CONFIG
    changed = changed_settings(_with_steps(config, found.train.steps), found)
    changed = {name: values for name, values in changed.items() if not _PLACE.fullmatch(name)}
    if changed and not (is_file(run) and not changed_settings(configs.load(run), found)):
        raise UserError(
            f"{file} was edited ({', '.join(map(Changes(changed).said, changed))}); train with it: "
            f"megatron-lcl train --config {file} --train.output DIR, or delete it"
        )


def write_config(config: Config, file: Path) -> None:
    """A file that has these settings already stays as it is."""
    if not is_file(file) or changed_settings(configs.load(file), config):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, configs.to_yaml(config))


def train_on_this_machine(config: Config, file: Path) -> int:
    """Train by the config, which `file` then has, with as many processes as this machine has use for; the exit code,
    that of a signal also where it came when the training had no more use for it: what follows is not begun.

    UserError where the run is not to be, before anything is written.
    """
    processes = default_processes(config)
    check(config, processes)
    is_finished(config, "--output")
    write_config(config, file)
    told: list[int] = []
    code = start_local(["train", "--config", str(file)], processes, told)
    if told and not code:
        complain(f"megatron-lcl: {signal.Signals(told[0]).name}: stopped; the same command goes on")
        return code_of_signal(told[0])
    return code


def name_pictures(data: Path, run: Path, cache: Path) -> str:
    """Name the pictures of the data set's held-out artist, zero-shot; what came out, for a terminal.

    Those without near-duplicates, which the report shows, go into the folder `run`, all of them into one below it.
    """
    artist = json.loads((data / SOURCES).read_text(encoding="utf-8"))["counts"]["held-out artist"]
    artist = f"{artist[:1].upper()}{artist[1:]} drew these, and nothing of {artist} was trained on"
    lines = []
    for name, output, about, said in (
        ("artist", run / WITH_NEAR_DUPLICATES, f"{artist}.", "all"),
        (
            "artist-distinct",
            run,
            f"{artist}; pictures that are nearly another artist's are left out.",
            "without near-duplicates",
        ),
    ):
        (result,) = evaluate(
            [str(run)], ["zero-shot"], data / EVALUATE / name, output, cache=cache / "features", about=about
        )
        lines.append(_line(said, result))
    return "\n".join(lines)


def _line(said: str, result: Result) -> str:
    top = result.metrics["accuracy"]
    assert top.chance is not None
    return (
        f"held-out artist, zero-shot, {said}: {top.value:.1%} of {result.num_items:,} pictures ({top.low:.1%} to "
        f"{top.high:.1%}), {top.value / top.chance:.0f} times chance among {result.settings['classes']:,} names"
    )
