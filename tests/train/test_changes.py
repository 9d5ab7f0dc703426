"""What a resumed run says: settings that have changed, a schedule that jumps, a loss that counted otherwise."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.config.results import ROUNDING
from megatron_lcl.errors import UserError
from megatron_lcl.train import changes
from megatron_lcl.train.changes import changes_since
from megatron_lcl.train.finished import has_all_steps
from megatron_lcl.train.optimizer import SCHEDULE

LAYOUT = {"tensor": 1, "pipeline": 1, "data": 1, "zero_stage": 1, "dtype": "float32", "deepspeed": {}}


def checkpoint(run: Path, config: Config, step: int, first_layers: str = "partition") -> Path:
    """What is read of a checkpoint; `cuts` is what earlier versions called the first layers of stages."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    progress = {"step": step, "packs": 0, "ledger": {}, "layout": {**LAYOUT, first_layers: [0]}}
    (folder / "progress.json").write_text(json.dumps(progress))
    return folder


def test_each_setting_that_really_changed_is_a_line(tmp_path: Path) -> None:
    before = configs.load(None, {
        "data.corpora": "[{path: a}, {path: b, weight: 2}]", "optimizer.betas": "[0.9, 0.98]", "train.output": "x",
        "train.steps": "100",
    })  # fmt: skip
    now = configs.load(None, {
        "data.corpora": "[{path: a, weight: 1.0}, {path: b, weight: 3}, {path: c}]", "optimizer.betas": "[0.9, 0.95]",
        "train.output": "y", "train.progress": "false", "checkpoint.every": "7", "data.workers": "5", "train.seed": "9",
        "data.look_ahead": "3", "data.storage_cache_gb": "0", "train.trackers": "[wandb]", "train.steps": "100",
        "deepspeed": "{zero_optimization: {sub_group_size: 8}}", "train.dtype": "float16",
    })  # fmt: skip
    folder = checkpoint(tmp_path, before, 10)
    assert list(changes_since(folder, now).lines()) == [
        "setting changed: data.corpora.1.weight 2.0 → 3.0",
        "setting changed: data.corpora.2.path (not set) → c",
        "setting changed: data.corpora.2.weight (not set) → 1.0",
        "setting changed: deepspeed.zero_optimization.sub_group_size (not set) → 8",
        "setting changed: optimizer.betas [0.9, 0.98] → [0.9, 0.95]",
        "setting changed: train.dtype auto → float16",
        "changed without effect on what is trained: checkpoint.every 1000 → 7, data.look_ahead 8 → 3, "
        'data.storage_cache_gb 100.0 → 0.0, data.workers 2 → 5, train.seed 0 → 9, train.trackers [] → ["wandb"]',
    ]
    assert list(changes_since(folder, before).lines()) == []
    for unset in (
        "objective: {contrastive_weight: 0.1, generation_weight: 1.0}",
        "objective: {regression_weight: 3.0}",
    ):
        (folder / "config.yaml").write_text(f"train: {{output: x, steps: 100}}\n{unset}\n")  # the same for `lcl`
        assert list(changes_since(folder, configs.load(None, {"train.steps": "100"})).settings) == ["train.output"]
    (folder / "config.yaml").write_text("train: {output: x, steps: 100}\n")  # of a version with fewer settings
    shown = changes_since(folder, configs.load(None, {"train.steps": "100"}))
    assert (list(shown.settings), list(shown.lines())) == (["train.output"], [])


def test_a_config_of_an_earlier_version_has_the_number_that_null_stands_for(tmp_path: Path) -> None:
    now = configs.load(None, {"train.steps": "100"})
    tree = configs.to_dict(now)
    tree["contrast"]["initial_log_scale"] = math.log(1 / 0.07)
    assert not changes_since(checkpoint(tmp_path, configs.from_dict(tree), 10), now).settings
    siglip = configs.replace(now, objective__name="siglip")
    found = changes.changed_settings(now, siglip)
    assert found["contrast.initial_log_scale"] == (math.log(1 / 0.07), math.log(10))


A, B = "{steps: 4, image_size: 96, contrastive_weight: 0.2}", "{steps: 6, global_batch: 8}"


@pytest.mark.parametrize(
    ("was", "now", "step", "changed", "without"),
    [
        ("", A, 3, "contrastive_weight image_size steps", ""),
        (A, "", 3, "contrastive_weight image_size steps", ""),
        ("", A, 4, "", "contrastive_weight image_size steps"),
        (A, A.replace("96", "64"), 4, "", "image_size"),
        (A, A.replace("4", "2"), 4, "", "steps"),
        (A, A.replace("4", "2"), 3, "steps", ""),
        (A, A.replace("4", "9"), 4, "steps", ""),
        # what follows moves with it, or not
        (f"{A}, {B}", f"{A.replace('4', '2')}, {B}", 8, "steps", ""),
        (f"{A}, {B}", f"{A.replace('4', '2')}, {B}", 10, "", "steps"),
        (f"{{steps: 4}}, {{steps: 3}}, {B}", f"{{steps: 2, micro_batch: 1}}, {{steps: 5}}, {B}", 8, "",
         "micro_batch steps steps"),
    ],
)  # fmt: skip
def test_phases_that_are_over_change_nothing(
    was: str, now: str, step: int, changed: str, without: str, tmp_path: Path
) -> None:
    """And what a phase leaves as it is is not told."""
    before, after = (
        configs.load(None, {"train.steps": "20", "schedule.phases": f"[{phases}]"}) for phases in (was, now)
    )
    lines = list(changes_since(checkpoint(tmp_path, before, step), after).lines())
    found = [[], []]
    for line in lines:
        found[line.startswith("changed without effect")] += re.findall(r"schedule\.phases\.\d\.(\w+)", line)
    assert found == [changed.split(), without.split()]
    assert len(lines) == len(found[0]) + bool(found[1])
    of_step = (phase_at(config, step).config for config in (before, after))
    assert changed or len({configs.to_yaml(config) for config in of_step}) == 1


def test_doublings_that_are_over_change_nothing(tmp_path: Path) -> None:
    before, after = (
        configs.load(None, {"train.steps": "20", "train.global_batch": "8", "schedule.batch_doublings": doublings})
        for doublings in ("[4, 12]", "[12]")
    )
    for step, told in ((3, "setting changed: "), (4, "changed without effect on what is trained: ")):
        lines = list(changes_since(checkpoint(tmp_path / str(step), before, step), after).lines())
        assert lines == [f"{told}schedule.batch_doublings [4, 12] → [12]"]


def test_the_seed_matters_where_paths_are_dropped(tmp_path: Path) -> None:
    given = {"model.vision.drop_path": "0.1", "train.steps": "100"}
    folder = checkpoint(tmp_path, configs.load(None, given), 10)
    now = configs.load(None, {**given, "train.seed": "9", "data.workers": "5"})
    assert list(changes_since(folder, now).lines()) == [
        "setting changed: train.seed 0 → 9",
        "changed without effect on what is trained: data.workers 2 → 5",
    ]


def test_terms_that_their_package_weights_otherwise_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configs.load(None, {"train.steps": "100"})
    folder = checkpoint(tmp_path, config, 100)
    was = {"Contrast": 0.1, "Square": 0.01, "Gone": 1.0}
    progress = json.loads((folder / "progress.json").read_text())
    for parts, told in (({}, False), ({"parts": was}, True)):  # an earlier version recorded none
        (folder / "progress.json").write_text(json.dumps(progress | parts))
        monkeypatch.setattr(objectives, "parts_of", lambda config: was)
        assert not changes_since(folder, config).settings
        assert has_all_steps(folder, config)
        monkeypatch.setattr(objectives, "parts_of", lambda config: {"Contrast": 0.1, "Square": 0.02})
        found = changes_since(folder, config)
        assert found.new_loss == told
        expected = ["objective.parts.Gone 1.0 → (not set)", "objective.parts.Square 0.01 → 0.02"]
        assert list(found.lines()) == [f"setting changed: {line}" for line in expected if told]
    with pytest.raises(UserError, match=r"objective\.parts\.Square = 0\.01 where this command has 0\.02"):
        has_all_steps(folder, config)
    assert not changes_since(folder, configs.replace(config, objective__name="clip")).settings.keys() & {
        "objective.parts.Square"
    }
    monkeypatch.setattr(objectives, "parts_of", lambda config: {})
    assert not changes_since(folder, config).settings, "its package is not installed here"


def steps_of_adamw(betas: tuple[float, float], before: int, steps: int) -> list[float]:
    """Of a number whose gradient is 1 after `before` steps of others, in learning rates, by torch."""
    parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=1.0, betas=betas, eps=0, weight_decay=0)
    state = optimizer.state[parameter]
    state["step"] = torch.tensor(float(before))
    state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
    moved, last = [], 0.0
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(last - parameter.item())
        last = parameter.item()
    return moved


@pytest.mark.parametrize(
    ("betas", "before", "largest", "number"),
    [
        ((0.9, 0.999), 10**6, 6.57, 12),
        ((0.9, 0.98), 10**6, 1.55, 14),
        ((0.9, 0.999), 1000, 5.24, 12),
        ((0.0, 0.9), 10**6, 3.16, 1),
        ((0.9, 0.999), 0, 1.0, 1),
    ],
)
def test_the_largest_step_of_what_begins_without_moments(
    betas: tuple[float, float], before: int, largest: float, number: int
) -> None:
    steps = steps_of_adamw(betas, before, 100)
    assert changes.largest_step(betas, before)[0] == pytest.approx(max(steps), rel=1e-6)
    assert max(steps) == pytest.approx(largest, abs=5e-3)
    if before:
        assert changes.largest_step(betas, before)[1] == steps.index(max(steps)) + 1 == number


TOWER = {"train.freeze": "[vision.*]"}
BETAS = {"optimizer.betas": "[0.9, 0.999]"}


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (TOWER, {}, "more of vision is trained than before: its moments begin at zero"),
        (TOWER, {"optimizer.betas": "[0.9, 0.98]"}, "steps are up to 1.55 learning rates"),
        (TOWER, BETAS, "up to 6.57 learning rates (optimizer.betas = [0.9, 0.999], step 12 from here). To have none "
         "above one: optimizer.parts.vision.lr 0.15 for the first steps, or a new run with --train.init_from"),
        ({"objective.name": "clip"}, {}, "more of head is trained"),
        ({"objective.name": "clip", **TOWER}, BETAS, "optimizer.parts.head.lr and optimizer.parts.vision.lr 0.15"),
        (TOWER, {"optimizer.name": "muon"}, "more of vision is"),  # its vectors, by AdamW
        ({"train.freeze": "[vision.blocks.0.mlp.up.weight]"}, {"optimizer.name": "muon"}, None),
        (TOWER, {"optimizer.name": "stable_adamw"}, None),  # which clips them
        (TOWER, {"optimizer.betas": "[0.9, 0.9]"}, None),
        (TOWER, TOWER, None),
        ({}, TOWER, None),
    ],
)  # fmt: skip
def test_what_begins_without_moments_is_said(
    tmp_path: Path, was: dict[str, str], now: dict[str, str], said: str | None
) -> None:
    before, after = (configs.load(None, {"train.steps": "20000", **given}) for given in (was, now))
    found = [line for line in changes_since(checkpoint(tmp_path, before, 10_000), after).lines() if "moments" in line]
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_the_settings_that_are_treated_apart_exist() -> None:
    names = [name for name, *_ in configs.describe()]
    for prefix in (*changes.NO_EFFECT, *ROUNDING, *SCHEDULE):
        assert [name for name in names if name.startswith(prefix)], prefix


PHASES = "[{steps: 20, image_size: 96, contrastive_weight: 0.2}]"


@pytest.mark.parametrize(
    ("was", "now", "new"),
    [
        ({}, {}, False),
        ({}, {"objective.contrastive_weight": "1"}, True),
        ({"objective.name": "clip"}, {"objective.generation_weight": "7"}, False),  # of which it has none
        ({}, {"objective.name": "siglip"}, True),
        ({}, {"data.corpora": "[{path: b}]"}, False),  # whether these are other documents is for the ledger to know
        ({}, {"data.tokens_per_pack": "4096"}, True),
        ({}, {"model.vision.patch_dropout": "0.5"}, True),
        ({}, {"train.global_batch": "32"}, True),
        # what trains otherwise, or gives the same loss but for rounding
        ({}, {"optimizer.lr": "1e-3", "train.steps": "200", "train.freeze": "[vision.*]"}, False),
        ({}, {"train.micro_batch": "4", "parallel.tensor": "2", "zero.stage": "3"}, False),
        ({}, {"data.workers": "9", "data.cache": "there", "data.max_bad_images": "7"}, False),
        # where the phase of the tenth step is another, and only there
        ({"schedule.phases": PHASES}, {}, False),
        ({}, {"schedule.phases": PHASES}, True),
        ({"schedule.phases": PHASES}, {"schedule.phases": PHASES.replace("0.2", "0.3")}, True),
        ({"schedule.phases": PHASES}, {"schedule.phases": PHASES.replace("20", "30")}, False),
        ({"schedule.phases": PHASES.replace("20", "10")}, {"schedule.phases": PHASES.replace("20", "9")}, False),
        ({"schedule.batch_doublings": "[50]"}, {"schedule.batch_doublings": "[60]"}, False),
        (
            {"model.vision.patch_dropout": "0.5", "model.vision.unmasked_steps": "95"},
            {"model.vision.unmasked_steps": "80"},
            True,
        ),
        (
            {"model.vision.patch_dropout": "0.5", "model.vision.unmasked_steps": "95"},
            {"train.steps": "200"},  # in the middle of its unmasked steps it has others to come
            True,
        ),
    ],
)  # fmt: skip
def test_whether_losses_can_be_compared_with_those_before(
    was: dict[str, str], now: dict[str, str], new: bool, tmp_path: Path
) -> None:
    before = {"data.corpora": "[{path: a}]", "train.steps": "100", **was}
    folder = checkpoint(tmp_path, configs.load(None, before), 10)
    assert changes_since(folder, configs.load(None, {**before, **now})).new_loss == new


def lr(step: int, total: int, warmup: int = 10, peak: float = 3e-4) -> float:
    """The schedule's closed form, at steps counted from 0."""
    return (
        peak * (step + 1) / warmup
        if step < warmup
        else peak * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2
    )


@pytest.mark.parametrize(
    ("step", "now", "last", "following", "cause"),
    [
        (990, {"train.steps": "2000"}, lr(989, 1000), lr(990, 2000), "train.steps 1000 → 2000"),
        (1000, {"train.steps": "1400"}, lr(999, 1000), lr(1000, 1400), "train.steps 1000 → 1400"),
        (500, {"train.steps": "600"}, lr(499, 1000), lr(500, 600), "train.steps 1000 → 600"),
        (500, {"optimizer.lr": "6e-4"}, lr(499, 1000), 2 * lr(500, 1000), "optimizer.lr 0.0003 → 0.0006"),
        (500, {"optimizer.min_lr": "1e-4"}, lr(499, 1000), None, "optimizer.min_lr 0.0 → 0.0001"),
        (5, {"optimizer.warmup": "30"}, lr(4, 1000), lr(5, 1000, 30), "optimizer.warmup 10 → 30"),
    ],
)  # fmt: skip
def test_a_schedule_that_jumps_is_a_warning_with_both_rates(
    step: int, now: dict[str, str], last: float, following: float | None, cause: str, tmp_path: Path
) -> None:
    was = {"train.steps": "1000", "optimizer.warmup": "10", "optimizer.lr": "3e-4"}
    folder = checkpoint(tmp_path, configs.load(None, was), step)
    config = configs.load(None, {**was, **now})
    following, so_far = following if following is not None else 1e-4 + 2 / 3 * lr(step, 1000), lr(step, 1000)
    (warning,) = changes_since(folder, config).warnings
    if step < 1000:  # the old schedule goes on, and what it has there is another than the last step's
        said = f"of step {step + 1}, the next one, is {following:.2g}, where the schedule so far has {so_far:.2g}"
        assert f"the learning rate {said} ({cause}); step {step}, the last one, had {last:.2g}. If that is" in warning
    else:
        jump = f"from {last:.2g} in step {step}, the last one, to {following:.2g} in step {step + 1}, the next one"
        assert f"the learning rate jumps {jump} ({cause}). If that is" in warning
    name, before, _, _ = cause.split()
    assert (f"--{name} {before} goes on as before" in warning) == (step < 1000)
    assert f"--train.init_from {folder}" in warning


@pytest.mark.parametrize(
    ("step", "now"),
    [
        (0, {"train.steps": "2000"}),  # nothing was trained
        (5, {"train.steps": "2000"}),  # in the warmup
        (500, {"train.steps": "1010"}),
        (0, {}), (1, {}), (9, {}), (10, {}), (500, {}), (999, {}),  # however steep the schedule itself is
        (1000, {}), (990, {"train.steps": "900"}),  # no step is left
        (1000, {"train.steps": "1001"}),  # ends as low
        (500, {"optimizer.weight_decay": "0.3"}),
    ],
)  # fmt: skip
def test_a_schedule_that_goes_on_is_no_warning(step: int, now: dict[str, str], tmp_path: Path) -> None:
    was = {"train.steps": "1000", "optimizer.warmup": "10", "optimizer.lr": "3e-4"}
    folder = checkpoint(tmp_path, configs.load(None, was), step)
    assert changes_since(folder, configs.load(None, {**was, **now})).warnings == ()


OLD_LINE = '{"step": 3, "loss": 0.2302585, "generation": 5.5, "contrastive": 2.302585, "log_scale": 2.6, "time": 1.5}\n'
"""of a `clip` run of a version that weighted its loss with objective.contrastive_weight"""
NEW_LINE = OLD_LINE.replace('"loss": 0.2302585', '"loss": 2.302585')


@pytest.mark.parametrize(
    ("metrics", "first_layers", "verb"),
    [
        (OLD_LINE, "cuts", "weighted"),
        ('{"step": 0, "attention": "dense"}\n' + OLD_LINE + NEW_LINE.replace("3", "9", 1) + '{"st', "cuts", "weighted"),
        (NEW_LINE, "cuts", None),  # between both changes
        ("", "cuts", "may have weighted"),
        (None, "cuts", "may have weighted"),
        (OLD_LINE, "partition", None),  # of this version; what its metrics say does not matter
    ],
)
def test_a_clip_run_of_an_earlier_version_is_told_of_its_weight(
    metrics: str | None, first_layers: str, verb: str | None, tmp_path: Path
) -> None:
    was: dict[str, Any] = {"objective.name": "clip", "objective.contrastive_weight": "0.1", "train.steps": "100"}
    folder = checkpoint(tmp_path, configs.load(None, was), 4, first_layers)
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    warnings = changes_since(folder, configs.load(None, was)).warnings
    assert len(warnings) == changes_since(folder, configs.load(None, was)).new_loss == (verb is not None)
    if verb is not None:
        assert f"{verb} the loss of `clip` with objective.contrastive_weight = 0.1" in warnings[0]
        assert "gradients 10 times as large" in warnings[0]
        assert warnings[0].endswith(": --optimizer.clip_norm 10 --optimizer.eps 1e-05")
    heeded = configs.load(None, {**was, "optimizer.clip_norm": "10", "optimizer.eps": "1e-5"})
    assert len(changes_since(folder, heeded).warnings) == (verb == "may have weighted")
    for other in ({"objective.name": "lcl"}, {"objective.name": "generation"}):
        assert changes_since(folder, configs.load(None, {**was, **other})).warnings == ()


def test_generation_with_a_weight_is_told_too(tmp_path: Path) -> None:
    for run, weight in ((tmp_path / "a", "0.5"), (tmp_path / "b", "1")):
        config = configs.load(None, {"objective.name": "generation", "objective.generation_weight": weight})
        warnings = changes_since(checkpoint(run, config, 4, "cuts"), config).warnings
        assert [f"objective.generation_weight = {weight}" in warning for warning in warnings] == [True] * (
            weight != "1"
        )
