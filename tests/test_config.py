"""The config tree: what it takes, what it refuses, what it says then, and that every field is documented."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lcl import config as configs
from megatron_lcl.errors import UserError
from megatron_lcl.fields import annotation_of, parse, read_yaml
from megatron_lcl.train.optimizer import learning_rate


def test_yaml_round_trip(tmp_path: Path) -> None:
    changed = configs.load(None, {"train.steps": "7", "optimizer.lr": "5e-4", "data.corpora": "[{path: a, weight: 2}]"})
    file = tmp_path / "config.yaml"
    file.write_text(configs.to_yaml(changed))
    assert configs.load(file) == changed
    assert changed.optimizer.lr == 5e-4
    assert changed.data.corpora == (configs.Corpus("a", 2.0),)


def test_infinity_and_nan_stay_in_what_is_deepspeeds() -> None:
    given = "{flops_profiler: {least: [.inf, -.inf]}, clip: .nan}"
    config = configs.load(None, {"deepspeed": given})
    again = configs.replace(config, train__steps=7)
    for found in (config, again, configs.from_dict(read_yaml(configs.to_yaml(config)))):
        assert found.deepspeed["flops_profiler"] == {"least": [math.inf, -math.inf]}
        assert math.isnan(found.deepspeed["clip"])


def test_another_objective_in_a_whole_config_has_its_own_start(tmp_path: Path) -> None:
    """As someone edits what `--print-config` prints."""
    whole = tmp_path / "whole.yaml"
    whole.write_text(configs.to_yaml(configs.Config()))
    config = configs.load(whole, {"objective.name": "siglip"})
    assert (config.initial_log_scale, config.model.logit_bias) == (math.log(10), -10.0)  # arXiv 2303.15343, section 3
    assert configs.load(whole).initial_log_scale == math.log(1 / 0.07)
    assert configs.load(whole, {"contrast.initial_log_scale": "0"}).initial_log_scale == 0.0


def test_the_optimizer_s_defaults_are_the_paper_s() -> None:
    ours = configs.Config().optimizer
    assert (ours.lr, ours.betas, ours.eps, ours.weight_decay, ours.warmup) == (5e-4, (0.9, 0.98), 1e-6, 0.2, 2000)
    muon = ours.muon
    assert (muon.momentum, muon.newton_schulz_steps, muon.dtype) == (0.95, 5, "bfloat16")  # Jordan et al. 2024


def test_one_path_is_a_corpus() -> None:
    assert configs.load(None, {"data.corpora": "some/dir"}).data.corpora == (configs.Corpus("some/dir"),)
    for name in ("a #b", "a: b", "no", "*a", " b"):
        assert configs.load(None, {"data.corpora": name}).data.corpora == (configs.Corpus(name.strip()),)
    assert configs.load(None, {"data.corpora": ""}).data.corpora == (), "and not the current folder"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        *(("train.output", name, name) for name in ("0123", "no", "7", "1e3", "null", "2020-01-01", "[a", "a: b", "~")),
        *(("evaluate.corpus", name, name) for name in ("0123", "off", "nullable")),
        ("evaluate.corpus", "null", None),
        ("checkpoint.resume", "0x10", "0x10"),
        ("train.steps", "0123", 123),
        ("train.steps", "1_000", 1000),
        ("data.images_per_pack", "null", None),
        ("data.images_per_pack", "010", 10),
        ("guard.spike_sigmas", "6", 6.0),
        ("optimizer.lr", "1e-3", 1e-3),
        ("optimizer.betas", "[0.9, .95]", (0.9, 0.95)),
        ("optimizer.betas", "[0, 1e-1]", (0.0, 0.1)),
        ("train.progress", "no", False),
        ("train.progress", "True", True),
        ("data.corpora", "0123", (configs.Corpus("0123"),)),
        ("data.corpora", "[{path: 01, weight: 010}, {path: no}]", (configs.Corpus("01", 10.0), configs.Corpus("no"))),
        ("evaluate.tasks", "[retrieval]", ("retrieval",)),
        # what belongs to DeepSpeed has no type here
        ("deepspeed", "{communication_data_type: fp32, a: [1, 0.5, true]}",
         {"communication_data_type": "fp32", "a": [1, 0.5, True]}),
    ],
)  # fmt: skip
def test_the_field_decides_what_a_text_means(key: str, text: str, value: object) -> None:
    found: Any = configs.load(None, {key: text})
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_of_a_section_and_below_a_mapping() -> None:
    config = configs.load(None, {"train": "{output: 0123, steps: 007}", "deepspeed.zero_optimization.x": "007"})
    assert (config.train.output, config.train.steps) == ("0123", 7)
    assert config.deepspeed == {"zero_optimization": {"x": 7}}


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: 3, seed: 4}\n")
    config = configs.load(file, {"train.steps": "5"})
    assert (config.train.steps, config.train.seed) == (5, 4)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.stepz", "3", "there is no config key `train.stepz`; the nearest is `train.steps`"),
        ("steps", "3", "there is no config key `steps`; the nearest is `train.steps`"),
        ("optimzer.lr", "3", "there is no config key `optimzer`; the nearest is `optimizer`"),
        ("data.corpora", "[{path: a}, {path: b, name: c}]", "`data.corpora.1.name`; the nearest is `data.corpora.1"),
        ("schedule.phases", "[{steps: 2, globalbatch: 4}]", "the nearest is `schedule.phases.0.global_batch`"),
        ("train.steps", "many", "config key `train.steps` = 'many'"),
        ("train.steps", "0", "config key `train.steps` = 0"),
        ("zero.stage", "4", "config key `zero.stage` = 4: input should be less than or equal to 3"),
        (
            "model.vision.patch_size",
            "30",
            "patch_size = 30 does not divide .*; the nearest smaller value that does is 28",
        ),
        ("model.vision.heads", "7", "model.vision.heads = 7 does not divide"),
        ("data.crop_scale", "[0.9, 0.1]", "data.crop_scale is"),
        ("train", "3", "config section `train` is '3'"),
        ("train.steps", "true", "config key `train.steps` = 'true': input should be a valid integer"),
        ("train.steps", "2.0", "config key `train.steps` = '2.0': input should be a valid integer"),
        ("optimizer.lr", "true", "config key `optimizer.lr` = 'true': input should be a valid number"),
        ("optimizer.lr", "fast", "config key `optimizer.lr` = 'fast'"),
        ("optimizer.lr", "nan", "config key `optimizer.lr` = nan: input should be a finite number"),
        ("optimizer.lr", "1:30", "config key `optimizer.lr` = '1:30': input should be a valid number"),
        ("optimizer.betas", "[0.9, true]", "config key `optimizer.betas.1` = 'true'"),
        ("optimizer.betas", "[0.9, 1.0]", r"config key `optimizer.betas.1` = 1.0: .*less than or equal to 0\.9999999"),
        ("optimizer.muon.momentum", "1.0", r"config key `optimizer.muon.momentum` = 1.0: .*less than or equal"),
        ("optimizer.betas", "0.9", "config key `optimizer.betas` = '0.9'"),
        ("objective.generation_weight", "inf", "config key `objective.generation_weight` = inf"),
        ("objective.contrastive_weight", "-0.1", "config key `objective.contrastive_weight` = -0.1: .*greater than or"),
        ("objective.generation_weight", "-1", "config key `objective.generation_weight` = -1.0: .*greater than or"),
        ("train.progress", "1", "config key `train.progress` = '1': input should be a valid boolean"),
        ("zero.stage", "true", "config key `zero.stage` = 'true'"),
        ("data.corpora", "[{path: a, weight: true}]", "config key `data.corpora.0.weight` = 'true'"),
        ("train.output", "r\udcfcn", r"config key `train.output` = 'r\\udcfcn': the name is not UTF-8; rename it"),
        ("data.corpora", "[{path: a}, {path: \udcfc}]", "config key `data.corpora.+ the name is not UTF-8; rename it"),
        ("train.trackers", "[\udcfc]", "config key `train.trackers` = .+: the name is not UTF-8; rename it"),
    ],
)
def test_errors_name_the_key_and_the_nearest(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        configs.load(None, {key: value})
    assert "\n" not in str(caught.value)


def test_where_names_of_files_are_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LC_ALL=C and PYTHONUTF8=0 Python has every other character's bytes as it has those that are not UTF-8."""
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    with pytest.raises(UserError, match=r"`train.output` = .+: Python reads names of files as ASCII .+ PYTHONUTF8=1"):
        configs.load(None, {"train.output": "r\udcc3\udcbcn"})


def test_the_smallest_learning_rate_is_that_of_the_step_after_the_last() -> None:
    """open_clip's cosine_lr, as the reference trains: 0.5 * (1 + cos(pi * step / steps)) * lr after the warmup."""
    config = configs.from_dict({"optimizer": {"lr": 1.0, "warmup": 0, "min_lr": 0.0}, "train": {"steps": 10}})
    theirs = [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(11)]
    assert [learning_rate(step, config) for step in range(11)] == pytest.approx(theirs, abs=1e-12)
    assert round(theirs[9], 3) == 0.024
    (said,) = (help for name, _, _, help in configs.describe() if name == "optimizer.min_lr")
    assert "one step after the last" in said


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer: {lr: 1e-3, eps: 1E-6, betas: [0, 5e-1]}\ntrain: {steps: 1_000, output: '1e3'}\n")
    config = configs.load(
        file, {"optimizer.weight_decay": "1", "optimizer.min_lr": ".5e-5", "optimizer.clip_norm": "2."}
    )
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.betas) == (1e-3, 1e-6, (0.0, 0.5))
    assert (config.optimizer.weight_decay, config.optimizer.min_lr, config.optimizer.clip_norm) == (1.0, 5e-6, 2.0)
    assert (config.train.steps, config.train.output) == (1000, "1e3")
    assert isinstance(config.optimizer.weight_decay, float)


def test_an_empty_section_has_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("train:\nmodel:\n  vision:\n")
    assert configs.load(file) == configs.Config()
    assert configs.load(file, {"train.steps": "5", "model.vision.layers": "2"}) == configs.load(
        None, {"train.steps": "5", "model.vision.layers": "2"}
    )
    assert configs.load(None, {"train": "null"}) == configs.Config()
    assert configs.load(None, {"train.trackers": "null"}) == configs.Config(), "as an empty list"


def test_a_file_that_is_not_a_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config file"):
        configs.load(tmp_path / "absent.yaml")
    file = tmp_path / "config.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match="a config is a mapping"):
        configs.load(file)
    file.write_text("train: {steps: [\n")
    with pytest.raises(ValueError, match="is not YAML"):
        configs.load(file)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("train:\n  steps: 5\nmodel:\ntrain:\n  seed: 1\n", "train", 4),
        ("train:\n  steps: 5\n  'steps': 6\n", "steps", 3),
        ("deepspeed: {a: 1, a: 1}\n", "a", 1),
    ],
)
def test_a_key_stands_once(tmp_path: Path, text: str, key: str, line: int) -> None:
    """Else the first one's values would be lost without a word."""
    with pytest.raises(yaml.constructor.ConstructorError) as found:
        read_yaml(text)
    assert found.value.problem_mark is not None
    assert found.value.problem_mark.line + 1 == line
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        configs.load(file)
    said = str(caught.value)
    assert re.match(rf"{re.escape(str(file))} is not YAML: .*`{key}` stands twice.*, line {line}, column \d+", said)
    assert "\n" not in said


def test_a_key_stands_once_in_an_override() -> None:
    with pytest.raises(UserError, match="deepspeed"):
        configs.load(None, {"deepspeed": "{a: 1, a: 2}"})
    with pytest.raises(yaml.constructor.ConstructorError, match="`weight` stands twice"):
        parse(annotation_of(configs.Config, "data.corpora"), "[{path: a, weight: 1, weight: 2}]")


def test_a_merged_key_may_stand_again() -> None:
    """Also where the mapping that holds it is merged elsewhere before it is itself made."""
    text = """
        one: &one {steps: 1, seed: 2}
        outer: {inner: &inner {<<: *one, seed: 3}}
        last: {<<: *inner, steps: 4}
        both: {<<: *one, <<: {train: 5}}
    """
    one, inner, last = {"steps": 1, "seed": 2}, {"steps": 1, "seed": 3}, {"steps": 4, "seed": 3}
    assert read_yaml(text) == {"one": one, "outer": {"inner": inner}, "last": last, "both": one | {"train": 5}}


def aliases(depth: int) -> str:
    """Of ten values, then lists of ten aliases of the list before: 10^depth values."""
    lines = ["data: {corpora: [{path: c}]}", "train:", "  output: o", "  trackers:", f"  - &a0 [{', '.join('x' * 10)}]"]
    return "\n".join([*lines, *(f"  - &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, depth))])


@pytest.mark.parametrize("depth", [5, 7])
def test_aliases_that_stand_for_too_much_are_no_config(tmp_path: Path, depth: int) -> None:
    """Whoever walks through the values would meet each of them."""
    file = tmp_path / "config.yaml"
    file.write_text(aliases(depth))
    with pytest.raises(UserError, match=r"is not YAML: aliases stand for more than 100,000 characters; .* line 9,"):
        configs.load(file)
    with pytest.raises(yaml.constructor.ConstructorError, match="aliases stand for more"):
        parse(annotation_of(configs.Config, "data.corpora"), f"[&a {'x' * 1000}, {', '.join(['*a'] * 100)}]")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}"])
def test_an_alias_inside_of_what_it_stands_for(text: str) -> None:
    with pytest.raises(yaml.constructor.ConstructorError, match=r"the alias \*a is inside of what it stands for"):
        read_yaml(text)


def test_what_is_written_out_may_be_long() -> None:
    written = [{"path": "x" * 50, "weight": 1}] * 3000
    assert read_yaml(json.dumps(written)) == written
    assert read_yaml("[&a [x, y], *a, *a]") == [["x", "y"]] * 3


def test_an_error_shows_the_beginning_of_long_values(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(aliases(4))
    with pytest.raises(UserError, match=r"`train\.trackers\.3` = \[\[\[\['x', .*…: input should be 'wandb'") as found:
        configs.load(file)
    assert len(str(found.value)) < 1500
    file.write_text(json.dumps({"data": {"corpora": [{"path": "c", **{f"nope{k}": 1 for k in range(500)}}]}}))
    with pytest.raises(UserError, match=r"`data\.corpora\.0\.nope0`; .*; and 480 more$"):
        configs.load(file)


def test_every_field_is_documented() -> None:
    fields = list(configs.describe())
    assert len(fields) > 40
    assert all(help for _, _, _, help in fields)
    assert len({name for name, *_ in fields}) == len(fields)


def test_fields_of_what_a_list_holds_are_documented_behind_it() -> None:
    told = list(configs.describe(items=True))
    assert [field for field in told if "[]" not in field[0]] == list(configs.describe())
    names = [name for name, *_ in told]
    first = names.index("data.corpora") + 1
    assert [field[:3] for field in told[first : first + 2]] == [
        ("data.corpora[].path", "str", "(required)"),
        ("data.corpora[].weight", "float", "1"),
    ]
    assert "s3://" in told[first][3]
    assert "share of the blend's tokens" in told[first + 1][3]
    assert names[names.index("schedule.phases") + 1] == "schedule.phases[].steps"
    assert all(help for *_, help in told)


def test_shipped_configs_load() -> None:
    files = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
    assert {"configs", "claim"} == {file.parent.name for file in files}
    for file in files:
        configs.load(file)
        title, *lines = file.read_text(encoding="utf-8").splitlines()
        for line in lines:
            assert not [model for model in re.findall(r"as in (\S+)", line) if model in title], line
