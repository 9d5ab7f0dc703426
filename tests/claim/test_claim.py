"""Protects `claim`: rows see the same images, nothing is run twice, and the table says what the result files say."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.claim import data as claim_data
from megatron_lcl.claim import measure, parts
from megatron_lcl.claim.data import CORPORA, HELD_OUT, in_validation, prepare
from megatron_lcl.claim.measure import RESULT, VALIDATION, Measure
from megatron_lcl.claim.parts import PARTS, Part
from megatron_lcl.claim.plan import OWN, plan
from megatron_lcl.claim.run import _steps_of, _untrained, claim, default_config, steps_to
from megatron_lcl.claim.table import Trained, markdown, table
from megatron_lcl.cli import main
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.demo.licenses import License
from megatron_lcl.demo.pictures import Picture
from megatron_lcl.demo.write import DataSet, write
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.settings import AttentiveSettings, LinearSettings, Settings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.train.sweep import Member
from megatron_lcl.train.telemetry import read_metrics

KINDS = ("fruit", "beast", "tool")
ARTISTS = ("a", "b", "c", "d", "held")
TINY = {
    "model.vision": "{image_size: 16, patch_size: 8, width: 16, layers: 1, heads: 1, mlp_width: 32}",
    "model.language": "{context_length: 128, width: 16, layers: 1, heads: 1, mlp_width: 32}",
    "model.pool_heads": "1",
    "data.images_per_pack": "32",
    "data.workers": "0",
    "train.global_batch": "2",
    "train.micro_batch": "1",
    "train.progress": "false",
    "checkpoint.every": "0",
}

ZERO_SHOT = "zero-shot classification"
QUICK = Settings(
    linear_probe=LinearSettings(strengths=(1.0,), max_iterations=10),
    attentive_probe=AttentiveSettings(epochs=1, seeds=(0,)),
)


def tiny_set(name: str, seed: int) -> DataSet:
    """Forty names drawn by five artists, in noise of the kind's color."""
    rng, pictures = random.Random(seed), []
    words = [
        f"{a}{b}" for a in ("ka", "lo", "mi", "nu", "pe", "ro", "su") for b in ("ba", "do", "fi", "gu", "ve", "zo")
    ]
    for k, word in enumerate(words[:40]):
        for artist in ARTISTS:
            noise = np.frombuffer(rng.randbytes(16 * 16 * 3), np.uint8).reshape(16, 16, 3).copy()
            noise[..., k % 3] |= 192
            png = io.BytesIO()
            Pillow.fromarray(noise).save(png, "PNG")
            about = " ".join(rng.choices(words, k=rng.randint(2, 9)))
            file = f"pictures/{artist}/{word}.png"
            pictures.append(Picture(artist, word, about, KINDS[k % 3], KINDS[k % 3], file, png.getvalue()))
    licenses = [License(name, "CC0-1.0", "Noise.", "Nothing is reserved.")]
    return DataSet(name, pictures, licenses, "held", 0.1, 600, 120)


@pytest.fixture(scope="module")
def sets(once: Callable[..., Any]) -> Path:
    """`emoji` and `things`, as `demo` leaves them, but tiny."""

    def make(folder: Path) -> Path:
        for seed, name in enumerate(claim_data.SETS):
            write(tiny_set(name, seed), [], folder / name)
        return folder

    return once("claim-sets", make)


@pytest.fixture(scope="module")
def data(once: Callable[..., Any], sets: Path) -> Path:
    """What `claim` makes of them."""

    def make(folder: Path) -> Path:
        prepare(sets, folder)
        return folder

    return once("claim-data", make)


def images_of(config: configs.Config) -> dict[str, int]:
    """Images of a run, by corpus, as the training loader finds them; of each phase as if the run began with it."""
    sequences = objectives.create(config).sequences
    images = {Path(corpus.path).name: 0 for corpus in config.data.corpora}
    for phase in phases_of(config):
        ledger = open_run_ledger(phase.config, sequences)
        reader = loader_of(ledger.reading_at(0, phase.config)[0], phase.config.data, sequences, ledger=ledger).reader
        for number in range((phase.stop - phase.first) * phase.config.train.global_batch):
            for origin in reader.provenance(number):
                images[Path(origin.corpus).name] += len(origin.images)
    return images


@pytest.mark.slow
def test_all_rows_see_the_same_images_of_the_same_documents(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.name: row for part in PARTS.values() for row in part.rows}
    assert len(rows) == 5 + 3 + 3 + 6
    wanted = 3000
    steps, members = {}, {}
    monkeypatch.setitem(parts.SMALL, "image_size", 8)
    for name, row in rows.items():
        given = {**TINY, "checkpoint.mirror": "s3://b/claim"}
        found = plan(row, default_config(), given, data / "corpora", tmp_path / "cache", wanted)
        member = found.member(tmp_path, name, wanted, 1e-3, 0)
        assert member.overrides.keys() <= given.keys() | OWN.keys() | row.sets, "all others can be given"
        run = member.config
        assert run.checkpoint.mirror == f"s3://b/claim/{name}", "its own copies, as in a sweep"
        assert run.train.global_batch == 2
        assert bool(found.counts(wanted)[:, 1].sum()) == (name != "generation"), name
        steps[name], members[name] = run.train.steps, run
        images = images_of(run)
        half = found.counts(wanted)[:, 0].max() / 2
        assert sum(images.values()) == pytest.approx(wanted, abs=half * len(phases_of(run))), name  # a step's, each
        total = sum(row.shares.values())
        for corpus, share in row.shares.items():
            assert images[corpus] / sum(images.values()) == pytest.approx(
                share / total, abs=0.05 if row.early else 0.02
            ), (name, corpus)
    assert max(steps.values()) <= 1.1 * min(steps.values()), steps
    sizes = {phase.config.model.vision.image_size for phase in phases_of(members["small-first"])}
    assert sizes == {8, 16}
    assert [phase.config.model.vision.patch_dropout for phase in phases_of(members["combined"])] == [0, 0.5, 0]
    assert len({tuple(rows[name].shares.items()) for name in ("lcl", "clip", "coca", "generation", "emu")}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lcl", "combined"])
def test_rows_are_planned_with_the_config_for_a_gpu(name: str, data: Path, tmp_path: Path) -> None:
    """With its model's sizes as they are, and those that the row's phases put in their place."""
    row = {row.name: row for part in PARTS.values() for row in part.rows}[name]
    file = default_config().with_name("gpu.yaml")
    found = plan(row, file, {}, data / "corpora", tmp_path / "cache", 2000)
    run = found.member(tmp_path, name, 2000, 1e-3, 0).config
    assert run.model.vision == configs.load(file).model.vision
    assert run.model.language.width == 384
    sizes = [phase.config.model.vision.image_size for phase in phases_of(run)]
    assert sizes == ([32, 64, 64] if row.early else [64])
    assert found.flops(2000) > 0


def test_validation_and_test_share_nothing(data: Path, sets: Path) -> None:
    for name in claim_data.SETS:
        kinds = {
            split: {blob.read() for blob in open_images(data / "evaluate" / f"{name}-kinds", split).images}
            for split in ("train", "validation", "test")
        }
        assert all(kinds.values())
        assert not kinds["train"] & (kinds["validation"] | kinds["test"])
        assert not kinds["validation"] & kinds["test"]
        assert all(map(in_validation, kinds["validation"]))
        held_out = {blob.read() for blob in open_images(sets / name / "evaluate" / "kinds", "test").images}
        assert kinds["validation"] | kinds["test"] == held_out
        names = open_images(data / "evaluate" / f"{name}-names")
        assert len(names.classes) == len(names) == len(set(names.need_labels()))
        assert not {blob.read() for blob in names.images} & kinds["validation"]
        if name != claim_data.TRAINED:
            continue
        documents = {
            image.data for document in open_corpus(data / "corpora" / "emoji-heldout") for image in document.images
        }
        assert documents
        assert not documents & kinds["validation"]
        assert not documents & kinds["train"]
    digits = open_images(data / "evaluate" / "digits", "train")
    assert (len(digits), digits.classes[7]) == (1200, "7")


def train(_rank: int, arguments: list[str]) -> int:
    return main(["train", *arguments])


def numbers_of(run: Path, file: str = RESULT) -> dict[tuple[str, str, str], float]:
    return {(m["data"], m["task"], m["metric"]): m["value"] for m in json.loads((run / file).read_text())}


@pytest.mark.slow
def test_a_part_from_end_to_end(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows, two seeds, two rates; the second call repeats nothing and fills in what is missing."""
    monkeypatch.setattr(measure, "SETTINGS", QUICK)
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    few = {"images": digits.images[:200], "target": digits.target[:200]}
    monkeypatch.setattr(datasets, "load_digits", lambda: SimpleNamespace(**few))
    monkeypatch.setattr(claim_data, "_DIGITS_TRAIN", 150)
    part = Part(
        "objectives", "Two objectives", tuple(r for r in PARTS["objectives"].rows if r.name in ("lcl", "generation"))
    )
    started: list[str] = []

    def start(member: Member) -> int:
        started.append(member.name)
        (code,) = run_processes(train, 1, ["--config", str(default_config()), *member.arguments()])
        return code

    def run(**changed: Any) -> int:
        how = {"images": 190, "seeds": (0, 1), "rates": (1e-3, 2e-3), "start": start, "given": TINY, **changed}
        return claim(part, tmp_path / "out", sets, **how)

    assert run() == 0
    numbers = json.loads((tmp_path / "out" / "objectives.json").read_text())
    runs = {row["name"]: f"{row['name']},lr={row['lr']:g}" for row in numbers["rows"][:2]}
    tuned = [f"{name},lr={rate},seed=0" for name in ("lcl", "generation") for rate in ("0.001", "0.002")]
    assert started == tuned + [f"{runs[name]},seed=1" for name in ("lcl", "generation")]
    page = (tmp_path / "out" / "objectives.md").read_text()

    # what was trained
    where = tmp_path / "out" / "data" / CORPORA, tmp_path / "out" / "cache"
    planned = {row.name: plan(row, default_config(), TINY, *where, 190) for row in part.rows}
    for row in numbers["rows"][:2]:
        name = row["name"]
        tried = {}
        for rate in ("0.001", "0.002"):
            values = numbers_of(tmp_path / "out" / "runs" / f"{name},lr={rate},seed=0", VALIDATION)
            assert {data for data, *_ in values} == {"emoji-kinds"}
            (tried[rate],) = (v for (_, _, metric), v in values.items() if metric == "accuracy")
        assert row["tried"] == pytest.approx(tried)
        assert tried[f"{row['lr']:g}"] == max(tried.values())
        for seed in (0, 1):
            folder = tmp_path / "out" / "runs" / f"{runs[name]},seed={seed}"
            config = configs.load(folder / "config.yaml")
            assert (config.train.seed, config.data.seed, config.optimizer.lr) == (seed, seed, row["lr"])
            lines = [line for line in read_metrics(folder) if "loss" in line]
            assert len(lines) == row["steps"] == config.train.steps
            assert row["images seen"][seed] == sum(line["num_images"] for line in lines)
            assert row["images seen"][seed] == pytest.approx(190, rel=0.1)
        needed = planned[name].flops(190) / 1e12
        assert row["TFLOP"] == pytest.approx([needed, needed], rel=0.05)
    lcl, generation, untrained = numbers["rows"]
    assert min(lcl["images in the contrast"]) > 80
    assert generation["images in the contrast"] == [0, 0]
    assert untrained == {"name": "untrained", "about": ""}

    stats = pytest.importorskip("scipy.stats")
    # what was measured: mean and interval, again, from the runs' files
    (of_model,) = (tmp_path / "out" / "untrained").iterdir()
    folders = {name: f"runs/{run}," for name, run in runs.items()} | {"untrained": f"untrained/{of_model.name}/"}
    measured = {
        name: [numbers_of(tmp_path / "out" / f"{start}seed={seed}") for seed in (0, 1)]
        for name, start in folders.items()
    }
    assert {(line["data"], line["task"], line["metric"]) for line in numbers["measures"]} == set(measured["lcl"][0])
    tasks = {(line["data"], line["task"]) for line in numbers["measures"]}
    assert tasks >= {("emoji-kinds", "linear probe"), ("things-kinds", "attentive probe"), ("digits", "k-NN")} | {
        ("emoji-names", ZERO_SHOT), ("things-names", ZERO_SHOT), ("emoji-names", "retrieval"),
        ("emoji-heldout", "held-out documents"),
    }  # fmt: skip
    for line in numbers["measures"]:
        key = line["data"], line["task"], line["metric"]
        for name, of_seeds in measured.items():
            if key not in of_seeds[0]:
                assert name == "generation"
                assert line["task"] in (ZERO_SHOT, "retrieval", "held-out documents")
                assert name not in line["rows"]
                continue
            values = [of_seed[key] for of_seed in of_seeds]
            low, high = (
                stats.t.interval(0.95, 1, np.mean(values), stats.sem(values)) if len(set(values)) > 1 else values
            )
            found = line["rows"][name]
            assert found["values"] == values
            assert [found["mean"] - found["half"], found["mean"] + found["half"]] == pytest.approx([low, high])
    labels = open_images(tmp_path / "out" / "data" / "evaluate" / "emoji-kinds", "test").need_labels()
    frequent = max(np.bincount(labels)) / len(labels)
    chances = {(line["data"], line["task"], line["metric"]): line["chance"] for line in numbers["measures"]}
    assert chances["emoji-kinds", "attentive probe", "accuracy"] == pytest.approx(frequent)
    assert "| emoji-kinds: attentive probe, accuracy (" in page
    assert "12.71" in page, "t of one degree of freedom"
    assert (tmp_path / "out" / "objectives.html").read_text().count("<figure") > 1

    # again
    capsys.readouterr()
    started.clear()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob(RESULT)}
    assert run() == 0
    assert started == []
    assert (tmp_path / "out" / "objectives.md").read_text() == page
    (lost := tmp_path / "out" / "runs" / f"{runs['lcl']},seed=1" / RESULT).unlink()
    assert run() == 0
    assert started == []
    assert (tmp_path / "out" / "objectives.md").read_text() == page, "measured again, the same"
    assert {file for file, at in before.items() if file.stat().st_mtime_ns == at} == set(before) - {lost}
    with pytest.raises(UserError, match=r"is a run of \d+ steps, and this would be one of \d+; give a new --output"):
        run(images=320)
    with pytest.raises(
        UserError, match=r"has made \d+ of \d+ steps with optimizer\.weight_decay = 0\.2 where this command has 0\.1"
    ):
        run(given=TINY | {"optimizer.weight_decay": "0.1"})
    monkeypatch.setattr(claim_data, "_RULES", 0)
    with pytest.raises(UserError, match="was made of other sets"):
        run()


def test_another_untrained_model_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def width_of(_folder: Path, _model: str, config: configs.Config, _data: Path) -> list[Measure]:
        measured_of.append(config.model.vision.width)
        return [Measure("d", "k-NN", "accuracy", config.model.vision.width)]

    measured_of: list[int] = []
    monkeypatch.setattr(measure, "_measure", width_of)
    for width in ("192", "384", "192"):
        config = configs.load(default_config(), {"model.vision.width": width, "train.steps": width})
        ((found,),) = _untrained(tmp_path, config, tmp_path, [0])
        assert found.value == int(width)
    assert measured_of == [192, 384], "each once"


def test_what_other_rules_measured_of_held_out_documents_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table has numbers of one version; what knows no held-out documents stays."""
    config, rounds = configs.load(default_config()), iter(range(9))
    monkeypatch.setattr(measure, "_labeled", lambda *_: [])
    monkeypatch.setattr(measure, "_held_out", lambda *_: [Measure(HELD_OUT, "generation", "bits", next(rounds))])

    def bits() -> float:
        (found,) = measure.measured(tmp_path, "run", config, tmp_path)
        return found.value

    assert [bits(), bits()] == [0, 0]
    monkeypatch.setattr(measure, "VERSION", measure.VERSION + 1)
    assert [bits(), bits()] == [1, 1]
    (of_earlier,) = json.loads((tmp_path / RESULT).read_text())
    of_earlier.pop("rules", None)
    (tmp_path / RESULT).write_text(json.dumps([of_earlier]))
    assert bits() == 2, "an earlier release kept no version"
    (tmp_path / RESULT).write_text(json.dumps([{**of_earlier, "data": "digits"}]))
    assert bits() == 1


def test_features_that_a_killed_claim_left_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_by_killed: Path
) -> None:
    """They are large, and of no use to the next."""
    monkeypatch.setattr(measure, "evaluate", lambda *_, cache, **__: [cache.parent, 1 / 0])
    with pytest.raises(ZeroDivisionError):
        list(measure._labeled(tmp_path, "run", [], tmp_path, "digits"))
    assert not left_by_killed.exists()
    assert list(tmp_path.iterdir()) == []


def measures(**values: float) -> list[Measure]:
    return [Measure("d", "linear probe", name, value, 0.5, 10) for name, value in values.items()]


def test_intervals_are_students(tmp_path: Path) -> None:
    """Three seeds, by hand: t(0.975, 2) = 4.3027; differences are taken seed by seed."""
    facts = {"lr": 0.1, "tried": {}, "at the edge": True, "steps": 3, "images seen": [5, 7]}
    facts |= {"images in the contrast": [0, 0], "TFLOP": [3.0, 5.0], "minutes": [1.0, 2.0]}
    facts |= {"steps to the same loss": [2, None]}
    half = {**facts, "TFLOP": [1.0, 1.0], "steps to the same loss": []}
    rows = [
        Trained("one", "this", [measures(accuracy=v) for v in (0.6, 0.7, 0.8)], facts),
        Trained("two", "that", [measures(accuracy=v) for v in (0.5, 0.61, 0.69)], facts),
        Trained("three", "that", [measures(accuracy=v) for v in (0.5, 0.61, 0.7)], half, beside="two"),
        Trained("untrained", "", [measures(accuracy=v) for v in (0.5, 0.5, 0.5)], {}),
    ]
    numbers = table(rows, (0, 1, 2))
    (line,) = numbers["measures"]
    assert line["rows"]["one"]["mean"] == pytest.approx(0.7)
    assert line["rows"]["one"]["half"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert line["differences"]["two"]["mean"] == pytest.approx(-0.1)
    assert line["differences"]["two"]["half"] == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert line["differences"]["three"]["values"] == pytest.approx([0, 0, 0.01])
    assert line["at chance"] == ["one", "two", "three", "untrained"], "0.7 ± 0.25 has 0.5 in it"
    page = markdown("Title", numbers)
    assert "70.00 ± 24.84 % ○ △" in page
    assert "**-10.00 ± 2.48 %**" in page
    assert "n = 3 seeds, by Student's t distribution (t = 4.30)" in page
    assert "0.1 (at the edge of what was tried)" in page
    assert "5 to 7" in page
    assert "| two − one | three − two |" in page
    assert "| 1.000 | 2, not |" in page
    assert "| 0.250 |  |" in page
    alone = markdown("Title", table([rows[0].__class__("one", "this", rows[0].measures[:1], facts), rows[2]], (0,)))
    assert "no intervals" in alone
    assert "60.00 %" in alone


def test_steps_to_the_same_loss() -> None:
    goal = [10.0 - step / 10 for step in range(60)]  # the last three: 4.3, 4.2, 4.1
    assert steps_to(goal, goal) == 60
    assert steps_to([2 * loss - 10.05 for loss in goal], goal) == 31  # 4.35, 4.15, 3.95
    assert steps_to([loss + 0.01 for loss in goal], goal) is None
    assert steps_to([9, 9, 9, 0, 9, 4.1, 4.1, 4.1], goal) == 8, "one small loss is not enough"
    assert steps_to([math.nan, 9, 9, 0, math.inf, 4.1, 4.1, 4.1], goal) == 8
    assert steps_to([math.nan] * 60, goal) is None
    for losses in ([first, *(10 - step / 70 for step in range(399))] for first in (1e9, 1e10, 1e11, 1e12)):
        assert steps_to(losses, losses) == 400, "where it ends itself, whatever sums are rounded to"


def test_each_loss_is_added_once(tmp_path: Path) -> None:
    """And of a run's lines no more is held than what is used."""

    class Losses(list[float]):
        def __getitem__(self, at: Any) -> Any:
            found = super().__getitem__(at)
            read.append(len(found) if isinstance(at, slice) else 1)
            return found

    read: list[int] = []
    goal = [1.0] * 1000
    assert steps_to(Losses([2.0] * 1000), goal) is None
    assert sum(read) <= 1000
    lines = [{"step": 1, "loss": 2.0, "num_images": 3, "of each layer": [0.0] * 99}, {"step": 1, "validation/loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    member: Any = SimpleNamespace(config=SimpleNamespace(train=SimpleNamespace(output=str(tmp_path))))
    assert _steps_of([member]) == [[{"loss": 2.0, "num_images": 3}]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "wieght"], "there are objectives, data, weight, recipe"),
        (["--seeds", "0,x"], "--seeds 0,x: give numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: give each value once"),
        (["--rates", "nan", "--dry-run"], "--rates nan: give each value once, finite and from 0 on"),
        (["--images", "0"], "--images 0: give a number from 1"),
        *(([f"--{key}", "1"], f"--{key}: `claim` sets it itself; {instead}") for key, instead in OWN.items()),
        (["--optimizer", "{lr: 1e-3}"], "--optimizer.lr: `claim` sets it itself; give --rates"),
        (["--objective.name", "clip"], "--objective.name: row lcl of part objectives has its own; leave it out"),
        (["--part", "data", "--part", "recipe", "--schedule.cooldown", "3"], "row wsd-ema of part recipe has its own"),
        (["--part", "data", "--part", "recipe", "--optimizer.name", "muon"], "row muon of part recipe has its own"),
        (["--data.images_per_pack", "null"], "data.images_per_pack is open"),
        (["--data.images_per_pak", "3"], "no config key"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], said: str, sets: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").symlink_to(data)
    assert main(["claim", "--output", str(tmp_path), "--sets", str(sets), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_dry_run_says_what_would_be_run(
    sets: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").symlink_to(data)
    how = [f"--{key}={value}" for key, value in TINY.items()]
    command = ["claim", "--output", str(tmp_path), "--sets", str(sets), "--part", "data", "--dry-run", *how]
    assert main([*command, "--images", "1600"]) == 0
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["lcl", "lcl-pairs", "lcl-blend", "clip-pairs"]
    assert all(1550 <= int(row.split()[1].replace(",", "")) <= 1650 for row in rows), rows
    assert "no contrast" not in "".join(rows)
    assert last == f"{4 * (len(parts.RATES) + 2)} runs, of which 12 are compared"
