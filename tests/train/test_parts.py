"""Names of parameters by part, what is frozen, rates by part and depth, and what of these is refused in one line."""

from __future__ import annotations

import fnmatch
from typing import Any

import pytest

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import (
    Head,
    LanguageBlock,
    Patches,
    PoolInterleave,
    VisionBlock,
    build_layers,
    layer_kinds,
)
from megatron_lcl.train.averages import check_averages, weight_of_next
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.optimizer import check_optimizer
from megatron_lcl.train.parts import (
    Rates,
    check_freeze,
    check_frozen_have_weights,
    frozen_parameters,
    parameter_names,
    rates_of,
)

MODEL = {
    "vision": {"image_size": 16, "patch_size": 8, "width": 8, "layers": 3, "heads": 2, "mlp_width": 8},
    "language": {"context_length": 8, "vocab_size": 99, "width": 8, "layers": 2, "heads": 2, "mlp_width": 8},
    "pool_heads": 2,
}


def config_of(**tree: Any) -> Config:
    return configs.from_dict({"model": MODEL, **tree})


def test_every_parameter_has_a_name_of_its_own_in_a_part() -> None:
    names = parameter_names(config_of().model)
    assert len(set(names.values())) == len(names)
    assert {name.partition(".")[0] for name in names.values()} == {"vision", "pool", "language", "head"}
    assert names["3.attention.q.weight"] == "vision.blocks.2.attention.q.weight"
    assert names["4.norm.weight"] == "vision.norm.weight"
    assert names["4.q.weight"] == "pool.q.weight"
    assert names["4.embedding.weight"] == "language.embedding.weight"
    assert names["5.mlp.up.bias"] == "language.blocks.0.mlp.up.bias"
    assert names["7.log_scale"] == "head.log_scale"


def test_kinds_are_those_of_the_layers_that_are_built() -> None:
    model = config_of().model
    kinds = {Patches: "patches", VisionBlock: "vision", PoolInterleave: "pool", LanguageBlock: "language", Head: "head"}
    built = [kinds[type(layer)] for layer in build_layers(model, 0.0)]
    assert built == [kind for kind, _ in layer_kinds(model)]
    assert [number for kind, number in layer_kinds(model) if kind == "vision"] == [0, 1, 2]


def test_patterns_freeze_what_they_match() -> None:
    config = config_of(train={"freeze": ["vision.*", "language.blocks.[1-9].*.bias"]})
    names = parameter_names(config.model)
    expected = {
        n
        for n, own in names.items()
        if fnmatch.fnmatch(own, "vision.*")
        or ("blocks.1." in own and own.startswith("language") and own.endswith("bias"))
    }
    assert frozen_parameters(config) == expected
    assert frozen_parameters(config_of()) == frozenset()


RETRIEVAL = {"head.vocabulary", "head.vocabulary_norm.weight", "head.vocabulary_norm.bias"}
GENERATION = {
    *("head.norm.weight", "head.norm.bias", "head.projection.weight", "head.log_scale", "pool.query"),
    *(f"pool.{name}.{kind}" for name in ("norm_q", "norm_k", "q", "k") for kind in ("weight", "bias")),
}
PHASES = [{"steps": 5, "contrastive_weight": 0.0, "contrastive_weight_change": "linear"}]


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "clip"}, RETRIEVAL),
        ({"name": "siglip"}, RETRIEVAL),
        ({"name": "generation"}, GENERATION),
        ({"name": "genlip"}, GENERATION),
        *(({"name": name}, set()) for name in ("lcl", "coca", "emu")),
        ({"name": "lcl", "generation_weight": 0.0}, RETRIEVAL),
        ({"name": "emu", "regression_weight": 0.0}, GENERATION),
        ({"name": "lcl", "contrastive_weight": 0.0}, set()),  # a phase may have another one
        ({"name": "of no package that is here"}, set()),
    ],
)
def test_what_the_objective_never_trains_is_frozen(objective: dict[str, Any], expected: set[str]) -> None:
    config = config_of(objective=objective)
    names = parameter_names(config.model)
    assert {names[name] for name in frozen_parameters(config)} == expected
    both = config_of(objective=objective, train={"freeze": ["vision.patches.*", "head.vocabulary*"]})
    vision = {own for own in names.values() if own.startswith("vision.patches.")}
    assert {names[name] for name in frozen_parameters(both)} == expected | vision | RETRIEVAL
    check_frozen_have_weights(config, None)
    if objective["name"] == "siglip":
        with_bias = configs.from_dict({"model": MODEL | {"logit_bias": -10.0}, "objective": {"name": "generation"}})
        assert "head.logit_bias" in {parameter_names(with_bias.model)[name] for name in frozen_parameters(with_bias)}


def test_in_every_phase_the_same_is_frozen() -> None:
    """Also in one that only measures the contrast."""
    config = config_of(objective={"contrastive_weight": 0.1}, schedule={"phases": PHASES}, train={"steps": 9})
    assert {frozen_parameters(phase.config) for phase in phases_of(config)} == {frozenset()}


def test_a_whole_part_is_frozen_by_who_says_so() -> None:
    """What the objective does not train need not be given by train.init_from, beside a rest that is frozen."""
    rest = ["head.norm.*", "head.projection.*", "head.log_scale"]
    check_frozen_have_weights(config_of(objective={"name": "clip"}, train={"freeze": rest}), None)


def test_rates_by_part_and_depth() -> None:
    """BEiT's layer-wise decay: the last of three blocks has d, the first d³, the patch embedding d⁴, the norm 1."""
    parts = {"vision": {"lr": 0.5, "layer_decay": 0.8, "weight_decay": 2.0}, "head": {"lr": 3.0}}
    config = config_of(optimizer={"parts": parts})
    expected = {
        "0.projection.weight": Rates(0.5 * 0.8**4, 2.0),
        "1.norm1.weight": Rates(0.5 * 0.8**3, 2.0),
        "3.norm1.weight": Rates(0.5 * 0.8, 2.0),
        "4.norm.weight": Rates(0.5, 2.0),
        "4.query": Rates(),
        "4.positions": Rates(),
        "7.log_scale": Rates(3.0),
    }
    assert {name: rates_of(name, config) for name in expected} == expected


CLIP_TRAINS = ["vision.*", "pool.*", "language.*", "head.norm.*", "head.projection.*", "head.log_scale"]
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
ALIGNED = {"zero_optimization": {"parameter_alignment": True}}
EMA = {"evaluate": {"average": "ema_0.9"}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train": {"freeze": ["visual.*"]}}, r"no parameter is called visual\.\*; the nearest is vision\..*"),
    ({"train": {"freeze": CLIP_TRAINS}, "objective": {"name": "clip"}}, "freezes all that the objective clip trains"),
    ({"train": {"freeze": ["*"]}}, "freezes all that the objective lcl trains"),
    (EMA, r"evaluate\.average = ema_0\.9 is no average of this run; average\.ema or average\.tail make some"),
    ({**EMA, "average": {"ema": [0.99]}}, r"is no average of this run; there are ema_0\.99"),
    ({"optimizer": {"name": "apex_fused_adam", "parts": {"pool": {"lr": 2.0}}}}, "no effect on apex_fused_adam"),
    ({"optimizer": {"eps": 1e-30}}, r"optimizer\.eps = 1e-30: .*; raise it to 1e-18 or more"),
    ({"optimizer": {"name": "apex_fused_adam"}, "deepspeed": OFFLOAD}, r"apex_fused_adam and deepspeed.*name to adamw"),
    ({"optimizer": {"name": "muon"}, "deepspeed": OFFLOAD}, r"name = muon and deepspeed.*; remove the offload"),
    (
        {"optimizer": {"name": "muon"}, "deepspeed": {"zero_optimization": {"cpu_offload": True}}},
        r"name = muon and deepspeed.*; remove the offload",
    ),
    (
        {"optimizer": {"parts": {"pool": {"lr": 2.0}}}, "deepspeed": ALIGNED},
        r"optimizer\.parts and deepspeed.*parameter_alignment: .*; remove it",
    ),
]


@pytest.mark.parametrize(("tree", "message"), REFUSED)
def test_what_is_refused(tree: dict[str, Any], message: str) -> None:
    config = config_of(**tree)
    with pytest.raises(UserError, match=message) as caught:
        check_all(config)
    assert "\n" not in str(caught.value)


def check_all(config: Config) -> None:
    check_freeze(config)
    check_averages(config)
    check_optimizer(config)


def test_a_frozen_part_needs_weights_from_somewhere() -> None:
    config = config_of(train={"freeze": ["vision.*"]})
    check_freeze(config)
    with pytest.raises(UserError, match=r"freezes all of vision, which the objective lcl needs trained, .* no weights"):
        check_frozen_have_weights(config, None)
    with pytest.raises(UserError, match="not all of its weights"):
        check_frozen_have_weights(config, ["1.norm1.weight"])
    check_frozen_have_weights(config, ["7.log_scale"])
    check_frozen_have_weights(config_of(train={"freeze": ["vision.patches.*"]}), None)  # a part of the part


@pytest.mark.parametrize(
    ("freeze", "most"),
    [
        ([], 8),
        (["vision.*"], 4),  # the pool with the embedding, two blocks, the head
        (["vision.*", "language.blocks.*"], 2),
        (["vision.*", "language.blocks.1.*weight*"], 3),  # vectors alone are left of the last block
    ],
)
def test_all_stages_have_something_of_both_kinds_to_train(freeze: list[str], most: int) -> None:
    """Refused with the layout, before anything starts; with as many stages as are named it goes."""

    def check(pipeline: int) -> None:
        check_layout(config_of(train={"freeze": freeze}, parallel={"pipeline": pipeline}), pipeline)

    check(most)
    if freeze:
        with pytest.raises(
            UserError, match=rf"no matrix or no vector to train, .* parallel\.pipeline to at most {most}"
        ):
            check(most + 1)


def test_an_exponential_average_is_unbiased() -> None:
    average, values = 0.0, [3.0, -1.0, 4.0, 1.0]
    for number, value in enumerate(values, 1):
        average += (value - average) * weight_of_next("ema_0.9", 0.9, number)
    shares = [0.9**3, 0.9**2, 0.9, 1.0]
    assert average == pytest.approx(sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares))
