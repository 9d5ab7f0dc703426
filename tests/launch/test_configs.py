"""The shipped configs: the paper's numbers stand in them, they agree with each other, and they fit their scripts."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_lcl import config as configs
from megatron_lcl.cli import command as command_module
from megatron_lcl.config import Config, Language, Vision
from megatron_lcl.train.layout import check_layout

ROOT = Path(__file__).parents[2]
MODELS, DATA = ("b32", "b16", "l14", "g"), ("pairs", "interleaved", "blend")


def load(model: str, data: str) -> Config:
    return configs.load(ROOT / "configs" / f"lcl_vit{model}_{data}.yaml")


def test_commands_in_comments_are_whole() -> None:
    lines = [line for file in ROOT.glob("configs/**/*.yaml") for line in file.read_text("utf-8").splitlines()]
    commands = [shlex.split(said) for line in lines if (said := line.partition(": megatron-lcl ")[2])]
    assert commands
    for command in commands:
        command_module._parser(command[0]).parse_args(command)  # ends where something is missing or not known


def test_the_papers_models_and_contexts() -> None:
    wide = {"width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
    narrow = {"width": 512, "layers": 12, "heads": 8, "mlp_width": 2048}
    for model, data, patch, language, context in (
        ("b32", "pairs", 32, narrow, 128),
        ("b32", "interleaved", 32, narrow, 2048),
        ("b16", "pairs", 16, wide, 280),
    ):
        config = load(model, data)
        assert config.model.vision == Vision(image_size=224, patch_size=patch, **wide)
        assert config.model.language == Language(vocab_size=49411, context_length=context, **language)
    assert load("g", "blend").model.vision == Vision(
        image_size=224, patch_size=14, width=1408, layers=40, heads=16, mlp_width=6144
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("data", DATA)
def test_the_papers_settings_and_a_layout_that_fits(model: str, data: str) -> None:
    config = load(model, data)
    optimizer = config.optimizer
    assert optimizer.lr == (5e-4 if data == "pairs" else 3e-4)
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay, optimizer.warmup) == ((0.9, 0.98), 1e-6, 0.2, 2000)
    written = yaml.safe_load((ROOT / "configs" / f"lcl_vit{model}_{data}.yaml").read_text())
    assert written["objective"] == {"contrastive_weight": 0.1, "generation_weight": 1.0}  # not only by default
    assert (config.data.image_first, config.data.min_similarity, config.data.max_images) == (0.5, 0.24, 6)
    assert config.data.tokens_per_pack >= config.model.language.context_length
    nodes = re.search(r"--nodes=(\d+)", (ROOT / "launch" / f"lcl_vit{model}.sh").read_text())
    assert nodes is not None
    check_layout(config, 8 * int(nodes[1]))
    check_layout(config, 8)  # one node, for a try


@pytest.mark.parametrize("model", MODELS)
def test_one_model_for_all_data(model: str) -> None:
    of_data = [load(model, data) for data in DATA]
    assert len({config.model.vision for config in of_data}) == 1
    assert len({dataclasses.replace(config.model.language, context_length=1) for config in of_data}) == 1
    assert len({(config.parallel, config.train.global_batch) for config in of_data}) == 1
    assert len({config.train.output for config in of_data}) == 3


def test_every_number_says_whose_it_is() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        marks: dict[int, bool] = {}  # by depth: this line's, and those of the sections around it
        for line in file.read_text().splitlines():
            if line.startswith("#"):
                continue
            depth = len(line) - len(line.lstrip())
            marks = {d: mark for d, mark in marks.items() if d < depth}
            marks[depth] = bool(re.search(r"# .*\b(paper|ours)\b", line))
            if re.search(r":\s*[\[{\d]", line):
                assert any(marks.values()), f"{file.name}: {line}"
