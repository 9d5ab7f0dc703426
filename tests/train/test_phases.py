"""A run with phases, through the command line: what each does, going on in one at any layout, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl import load_model, objectives
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Data
from megatron_lcl.config.phases import phase_at, phases_of
from megatron_lcl.convert.find import find_checkpoint, read_config
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.train import checks
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checks import check_phases
from megatron_lcl.train.layout import num_micro_batches
from megatron_lcl.train.memory import estimate, largest_estimate

CONFIG = """
model:
  vision: {{image_size: 24, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64, patch_dropout: 0.5,
    unmasked_steps: 2}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 32, layers: 2, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {folder}/cache, tokens_per_pack: 96, workers: 1}}
schedule:
  phases: [{{steps: 1, image_size: 16, patch_dropout: 0, context_length: 40, tokens_per_pack: 64, global_batch: 2,
    micro_batch: 1, contrastive_weight: 1.0}},
    {{steps: 3, micro_batch: 1, contrastive_weight: 0.7, contrastive_weight_change: cosine}}]
  learning_rate: constant
  cooldown: 2
  cooldown_shape: linear
objective: {{contrastive_weight: 0.1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 6, global_batch: 4, micro_batch: 2, log_every: 1, progress: false, evaluate_every: 3}}
evaluate: {{corpus: {corpus}}}
checkpoint: {{every: 1, keep_last: 9}}
"""
WEIGHTS = (1.0, 0.7, 0.55, 0.25, 0.1, 0.1)
"""of the contrast in each step: half a cosine has gone a quarter of its way after a third of its time"""


@pytest.fixture(scope="module")
def run(once: Callable[..., Any]) -> Path:
    """Six steps on two processes: small images; half of the patches; all of them. A checkpoint after each.

    The first phase ends after one micro-batch of each process, where a step of the next one has two, and of the last
    one a single micro-batch of two packs.
    """

    def make(folder: Path) -> str:
        corpus = make_corpus(folder / "documents", seed=0)
        vocab_size = open_corpus(corpus).tokenizer.vocab_size
        (folder / "config.yaml").write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, folder=folder))
        (folder / "said.txt").write_text(fleet.train(folder / "run", "--config", str(folder / "config.yaml")))
        return str(folder / "run")

    return Path(once("phases", make))


def going_on(run: Path, step: int, output: Path, *layout: str) -> list[tuple[Any, ...]]:
    """What the steps after the checkpoint of a step give at another layout, or the same."""
    resume = ("--checkpoint.resume", str(checkpoint.step_folder(run, step)))
    fleet.train(output, "--config", str(run.parent / "config.yaml"), *resume, *layout)
    return fleet.losses(output)


@pytest.mark.slow
def test_each_phase_is_trained_as_it_says(run: Path) -> None:
    lines = fleet.lines(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for line, weight in zip(steps, WEIGHTS, strict=True):
        assert line["loss"] == pytest.approx(line["generation"] + weight * line["contrastive"], rel=1e-5)
        assert line["contrastive_weight"] == pytest.approx(weight)
    assert [line["lr"] for line in steps] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.01, 0.005])
    phases = [line for line in lines if "phase" in line]
    names = ("step", "phase", "image_size", "num_patches", "global_batch", "micro_batch")
    found = [tuple(line[name] for name in names) for line in phases]
    assert found == [(0, 1, 16, 4, 2, 1), (1, 2, 24, 4, 4, 1), (4, 3, 24, 9, 4, 2)]
    slots = [line["images_per_pack"] for line in lines if "images_per_pack" in line]
    assert slots[1] >= slots[2], "where fewer placeholders are needed more images fit"
    progress = checkpoint.read_progress(checkpoint.step_folder(run, 6))
    assert progress.packs == 2 + 5 * 4
    assert [s.first_pack for s in Ledger.from_json(progress.ledger).segments] == [0, 2, 14]
    said = (run.parent / "said.txt").read_text()
    assert "phase 2, steps 2 to 4: images of 24 px, 4 of 9 patches kept, sequences of up to 64 tokens" in said


@pytest.mark.slow
def test_evaluation_is_at_the_full_resolution_with_all_patches(run: Path) -> None:
    measured = [line for line in fleet.lines(run) if "heldout/bits_per_token" in line]
    assert [line["step"] for line in measured] == [3, 6]
    for line in measured:  # the first one in the midst of patch dropout
        folder = checkpoint.step_folder(run, line["step"])
        config = replace(read_config(folder), data=Data(cache=str(run.parent / "cache")))
        result, _ = evaluate_heldout(load_model(folder), config, config.evaluate.corpus, progress=False)
        for name, value in result.numbers().items():
            assert line[f"heldout/{name}"] == pytest.approx(value, rel=1e-4), name
    assert load_model(find_checkpoint(run)).config.vision.image_size == 24


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 3])
def test_a_run_goes_on_in_its_phase_bit_for_bit(run: Path, tmp_path: Path, step: int) -> None:
    """From where a phase ends, and from its midst, where the weight of the contrast is on its way."""
    assert going_on(run, step, tmp_path / "run") == fleet.losses(run)[step:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ("--parallel.tensor", "2"),
        ("--parallel.pipeline", "2", "--contrast.strategy", "recompute"),
        ("--train.micro_batch", "1"),
    ],
)
def test_a_run_goes_on_at_another_layout(run: Path, tmp_path: Path, layout: tuple[str, ...]) -> None:
    """(ZeRO-3, and phases from their beginning at every layout: the selftest.)"""
    ours, theirs = going_on(run, 3, tmp_path / "run", *layout), fleet.losses(run)[3:]
    assert len(ours) == 3
    bits = [
        [line["heldout/bits_per_token"] for line in fleet.lines(folder) if "heldout/seconds" in line][-1]
        for folder in (run, tmp_path / "run")
    ]
    assert bits[1] == pytest.approx(bits[0], rel=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=2e-5)


@pytest.mark.slow
def test_a_cooldown_from_any_checkpoint(run: Path, tmp_path: Path) -> None:
    """It begins at the learning rate that the run had there, and its patches are all there at its end."""
    changed = ("--train.steps", "5", "--schedule.cooldown", "2", "--model.vision.unmasked_steps", "1")
    rows = going_on(run, 3, tmp_path / "run", *changed)
    assert [row[-1] for row in rows] == pytest.approx([0.01, 0.005])
    phases = [line for line in fleet.lines(tmp_path / "run") if "phase" in line]
    assert [(line["step"], line["num_patches"]) for line in phases] == [(3, 4), (4, 9)]


@pytest.mark.slow
def test_phases_that_are_removed_are_told_to_be_over(run: Path, tmp_path: Path) -> None:
    resume = ("--checkpoint.resume", str(checkpoint.step_folder(run, 3)))
    without = ("--schedule.phases", "[]", "--model.vision.patch_dropout", "0", "--model.vision.unmasked_steps", "0")
    said = fleet.train(tmp_path / "run", "--config", str(run.parent / "config.yaml"), *resume, *without)
    assert "phase 1, steps 4 to 6: images of 24 px, sequences" in said
    phases = [line for line in fleet.lines(tmp_path / "run") if "phase" in line]
    assert [(line["step"], line["phase"], line["num_patches"]) for line in phases] == [(3, 1, 9)]
    assert [line for line in said.splitlines() if "phases.1" in line] == [
        "setting changed: schedule.phases.1.contrastive_weight 0.7 → (not set)",
        "setting changed: schedule.phases.1.contrastive_weight_change cosine → (not set)",
        "setting changed: schedule.phases.1.micro_batch 1 → (not set)",
        "setting changed: schedule.phases.1.steps 3 → (not set)",
    ]


@pytest.mark.slow
def test_the_dry_run_says_the_phases(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", str(run.parent / "config.yaml"), "--train.output", str(tmp_path / "new")]
    assert main([*arguments, "--dry-run", "--processes", "2"]) == 0
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("phase", "packs"))]
    assert [line.split()[0] for line in lines] == ["phase", "packs"] * 3
    assert (
        "steps 1 to 1: images of 16 px, sequences of up to 40 tokens, 2 packs of 64 tokens a step in micro-batches of 1"
        in lines[0]
    )
    assert main([*arguments, "--dry-run", "--processes", "4"]) == 2
    assert "in phase 1, schedule.phases[0].global_batch = 2 packs do not divide into 4" in capsys.readouterr().err


# --- the config --------------------------------------------------------------------------------------------------


def config_of(**fields: Any) -> Config:
    return configs.load(None, {key.replace("__", "."): str(value) for key, value in fields.items()})


def test_a_run_without_a_schedule_is_one_phase() -> None:
    config = config_of(train__steps=10)
    (phase,) = phases_of(config)
    assert (phase.first, phase.stop, phase.config) == (0, 10, config)


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ({"global_batch": 3}, r"in phase 1, schedule.phases\[0\].global_batch = 3 packs do not divide into 2"),
        (
            {"micro_batch": 4},
            r"in phase 1, train.global_batch = 4 .* with schedule.phases\[0\].micro_batch = 4; the nearest .* is 8",
        ),
        (
            {"tokens_per_pack": 40},
            r"in phase 1, a sequence of 40 tokens cannot .*; give schedule.phases\[0\].tokens_per_pack at least 54",
        ),
        (
            {"tokens_per_pack": 40, "context_length": 40},
            r"give schedule.phases\[0\].context_length and schedule.phases\[0\].tokens_per_pack at least 54",
        ),
        (
            {"contrastive_weight": 0},
            r"in phase 1, schedule.phases\[0\].contrastive_weight and objective.generation_weight are both 0",
        ),
    ],
)
def test_what_is_wrong_with_a_phase_is_said_before_the_run_begins(phase: dict[str, Any], message: str) -> None:
    config = config_of(
        train__steps=10,
        train__global_batch=4,
        objective__generation_weight=0,
        schedule__phases=json.dumps([{"steps": 2, **phase}]),
    )
    with pytest.raises(ValueError, match=message):
        check_phases(config, 2)
    other = configs.replace(config, objective__name="clip")
    if "contrastive_weight" in phase:
        with pytest.raises(ValueError, match=r"give a contrastive_weight, which .* does not have"):
            check_phases(other, 2)
    doubled = configs.replace(other, schedule__phases=(), schedule__batch_doublings=(2,), train__micro_batch=2)
    message = r"in phase 1, train.global_batch / 2 \(schedule.batch_doublings\) = 2 packs .*; the nearest .* is 4"
    with pytest.raises(ValueError, match=message):
        check_phases(doubled, 2)
    phases = json.dumps([{"steps": 2, "contrastive_weight_change": "linear"}])
    with pytest.raises(ValueError, match=r"give a contrastive_weight_change, which .* does not have"):
        check_phases(config_of(objective__name="clip", objective__contrastive_weight=1, schedule__phases=phases), 1)


def test_the_weight_of_the_contrast_goes_smoothly_to_the_next_value() -> None:
    """Whatever else changes on the way; its first step has its own, the first one behind it the next value."""
    phases = [
        {"steps": 5, "contrastive_weight": 0, "contrastive_weight_change": "linear"},
        {"steps": 2, "contrastive_weight": 2},
        {"steps": 4, "contrastive_weight": 1, "contrastive_weight_change": "cosine"},
    ]
    config = config_of(
        train__steps=13,
        train__global_batch=8,
        objective__contrastive_weight=0.5,
        schedule__phases=json.dumps(phases),
        schedule__batch_doublings="[3]",
    )
    found = [phase_at(config, step).config_at(step) for step in range(13)]
    weights = [here.objective.contrastive_weight for here in found]
    half = math.sqrt(0.5) / 2
    cosine = [1, 0.5 + half / 2 + 0.25, 0.75, 0.5 + 0.25 - half / 2]
    assert weights == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2, 2, *cosine, 0.5, 0.5])
    assert [weights[n] for n in (0, 7, 11)] == [0, 1, 0.5], "ends are exact"
    assert [(p.first, p.stop) for p in phases_of(config)] == [(0, 3), (3, 5), (5, 7), (7, 11), (11, 13)]
    assert [here.train.global_batch for here in found] == [4] * 3 + [8] * 10
    assert "contrastive weight 1.2 to 2 (linear)" in phases_of(config)[1].describe()
    assert "contrastive weight 2" in phases_of(config)[2].describe()
    assert "steps 10 to 11: " in (late := phases_of(config)[3].describe(9))
    assert f"contrastive weight {weights[9]:g} to 0.5 (cosine)" in late, "from where the run goes on"
    assert "steps 13 to 13: " in phases_of(config)[4].describe(13), "all are made"


def test_what_any_phase_trains_may_be_evaluated() -> None:
    phases = '[{"steps": 5, "contrastive_weight": 0.1}]'
    assert objectives.trained_by(config_of(train__steps=10, objective__contrastive_weight=0)) == ("generation",)
    both = config_of(train__steps=10, objective__contrastive_weight=0, schedule__phases=phases)
    assert objectives.trained_by(both) == ("retrieval", "generation")


def test_a_corpus_without_pairs_in_any_phase_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever phase comes last."""
    lacking: dict[int, tuple[str, ...]] = {28: ("short", "all"), 40: ("short", "long", "all"), 64: ("all",)}
    monkeypatch.setattr(checks, "corpora_without_pairs", lambda _data, _patches, length, *_: lacking[length])
    phases = '[{"steps": 2, "context_length": 28}, {"steps": 2, "context_length": 40}]'
    config = config_of(train__steps=9, model__language__context_length=64, schedule__phases=phases)
    assert checks.without_pairs(config) == {"short": " in some phase", "all": "", "long": " in some phase"}


def test_the_global_batch_doubles() -> None:
    config = config_of(train__steps=10, train__global_batch=32, schedule__batch_doublings="[2, 3, 7]")
    phases = phases_of(config)
    assert [(p.first, p.stop, p.config.train.global_batch) for p in phases] == [
        (0, 2, 4),
        (2, 3, 8),
        (3, 7, 16),
        (7, 10, 32),
    ]
    assert phase_at(config, 6).number == 2
    assert phase_at(config, 10).number == 3, "behind the end"


def test_the_end_is_unmasked_whatever_the_phases_say() -> None:
    phases = json.dumps([{"steps": 4, "patch_dropout": 0.75}, {"steps": 3, "image_size": 160}])
    own = {"model__vision__patch_dropout": 0.5, "model__vision__unmasked_steps": 5}
    config = config_of(train__steps=10, schedule__phases=phases, **own)
    found = [
        (p.first, p.config.model.vision.patch_dropout, p.config.model.vision.image_size) for p in phases_of(config)
    ]
    assert found == [(0, 0.75, 224), (4, 0.5, 160), (5, 0.0, 160), (7, 0.0, 224)]
    vision = phases_of(config)[0].config.model.vision
    assert (vision.num_patches, vision.num_kept, vision.num_placeholders) == (49, 12, 12)
    assert replace(vision, patch_dropout_places="all").num_placeholders == 49


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule__phases": "[{steps: 10}]"}, "take 10 of train.steps = 10 steps; they must leave at least one"),
        ({"schedule__phases": "[{steps: 1, image_size: 100}]"}, "image_size = 100 is no multiple of .* 96 or 128"),
        ({"schedule__phases": "[{steps: 1, context_length: 4096}]"}, "context_length = 4096 is over"),
        ({"schedule__batch_doublings": "[3, 2]"}, "give ascending steps"),
        ({"schedule__batch_doublings": "[3, 10]"}, "step 10 is not before the end"),
        ({"schedule__batch_doublings": "[3]", "train__global_batch": 7}, "global_batch = 7 is no multiple of 2"),
        (
            {"schedule__batch_doublings": "[3]", "schedule__phases": "[{steps: 1, global_batch: 2}, {steps: 1}]"},
            "give one of the two",
        ),
        (
            {"model__vision__patch_dropout": 0.5, "model__vision__unmasked_steps": 10},
            "leave none of train.steps.* or set model.vision.patch_dropout to 0",
        ),
        (
            {"schedule__phases": "[{steps: 1}, {steps: 1, patch_dropout: 0.5}]", "model__vision__unmasked_steps": 10},
            r"or set schedule.phases\[1\].patch_dropout to 0",
        ),
        ({"schedule__cooldown": 11}, "cooldown = 11 is more than train.steps = 10"),
        (
            {"schedule__phases": "[{steps: 2, contrastive_weight: 0, contrastive_weight_change: linear}]"},
            r"phases\[0\].contrastive_weight_change = linear goes .*objective.contrastive_weight is null; give it one",
        ),
        ({"schedule__phases": "[{steps: 2, contrastive_weight_change: sqrt}]"}, "linear.*cosine"),
        ({"schedule__phases": "[{steps: 1, images: 2}]"}, "there is no config key `schedule.phases.0.images`"),
    ],
)
def test_a_schedule_that_does_not_fit_is_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        phases_of(config_of(train__steps=10, **fields))
    assert "\n" not in str(caught.value)


def test_a_phase_has_a_micro_batch_of_its_own() -> None:
    phases = json.dumps([{"steps": 4, "image_size": 96, "micro_batch": 8}, {"steps": 2}])
    config = config_of(train__steps=10, train__global_batch=16, train__micro_batch=2, schedule__phases=phases)
    found = [(p.first, p.config.train.micro_batch, num_micro_batches(p.config, 2)) for p in phases_of(config)]
    assert found == [(0, 8, 1), (4, 2, 4)]
    slots = configs.replace(config, data__images_per_pack=8, contrast__strategy="recompute")
    ours, alone = largest_estimate(slots, 2), estimate(phases_of(slots)[0].config, 2)
    assert ours.graph == alone.graph > estimate(phases_of(slots)[1].config, 2).graph, "it counts for memory"


def test_the_estimate_is_that_of_the_hungriest_phase() -> None:
    large = json.dumps([{"steps": 5, "image_size": 448}])
    config = config_of(train__steps=10, schedule__phases=large, data__images_per_pack=8)
    plain = config_of(train__steps=10, data__images_per_pack=8)
    at_448 = configs.replace(plain, model__vision__image_size=448)
    ours, theirs = largest_estimate(config, 1), estimate(at_448, 1)
    assert (ours.graph, ours.batches) == (theirs.graph, theirs.batches)
    assert ours.parameters == estimate(plain, 1).parameters < theirs.parameters, "positions are the run's"
    small = config_of(train__steps=10, schedule__phases='[{"steps": 5, "image_size": 64}]', data__images_per_pack=8)
    assert largest_estimate(small, 1) == estimate(plain, 1)
    dropped = configs.replace(plain, model__vision__patch_dropout=0.75)
    row = 3 * 32**2 + 768 + 12 * (8 * 768 + 2 * 3072) + 4 * 768 + 2 * 512  # numbers that are kept of a patch
    assert estimate(plain, 1).graph - estimate(dropped, 1).graph == 8 * (49 - 12) * row * 4
