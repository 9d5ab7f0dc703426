"""What does not divide or does not go together is said before anything starts, with the nearest that does."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl import config as configs
from megatron_lcl.train.layout import check_layout

MODEL = {
    "vision": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "heads": 12, "mlp_width": 96},
    "language": {"context_length": 64, "vocab_size": 101, "width": 48, "layers": 1, "heads": 6, "mlp_width": 96},
    "pool_heads": 6,
}


def layout(processes: int, **sections: Any) -> int:
    train = {"global_batch": 16, "micro_batch": 1, **sections.pop("train", {})}
    return check_layout(configs.from_dict({"model": MODEL, "train": train, **sections}), processes)


def test_what_is_left_is_data_parallel() -> None:
    assert layout(1) == 1
    assert layout(16, parallel={"tensor": 2, "pipeline": 2}) == 4
    assert layout(6, parallel={"tensor": 6}) == 1
    assert layout(8, zero={"stage": 3}, contrast={"strategy": "recompute"}) == 8


@pytest.mark.parametrize(
    ("processes", "sections", "message"),
    [
        (4, {"parallel": {"tensor": 4}}, "parallel.tensor = 4 does not divide model.language.heads = 6; .* is 2$"),
        (12, {"parallel": {"tensor": 12}}, "does not divide model.language.heads = 6; .* is 6$"),
        (8, {"parallel": {"tensor": 8}}, "nearest that divides all that it splits is 2$"),
        (8, {"parallel": {"pipeline": 8}}, "has 6 layers; the nearest that goes is 4$"),
        (
            6,
            {"parallel": {"tensor": 2, "pipeline": 2}},
            "6 processes cannot be divided .* the nearest number that can is 4",
        ),
        (1, {"parallel": {"tensor": 2}}, "nearest number that can is 2"),
        (10, {"parallel": {"tensor": 3}}, "nearest number that can is 12"),
        (3, {}, "global_batch = 16 packs do not divide into 3 data-parallel replicas .* is 15"),
        (2, {"train": {"global_batch": 1, "micro_batch": 4}}, "nearest that does is 8"),
        (
            2,
            {"parallel": {"pipeline": 2}, "zero": {"stage": 2}},
            "zero.stage = 2 does not go with parallel.pipeline = 2",
        ),
        (2, {"parallel": {"tensor": 2}, "zero": {"stage": 3}}, "set zero.stage to 1 or 2, or parallel.tensor to 1"),
        (2, {"zero": {"stage": 3}}, "set contrast.strategy to recompute"),
    ],
)
def test_what_does_not_go_is_said(processes: int, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout(processes, **sections)


def replace(config: configs.Config, field: str, value: int) -> configs.Config:
    return configs.replace(config, **{field.replace(".", "__"): value})


def complaint(config: configs.Config, processes: int) -> str:
    """What is wrong with a layout; "" for nothing."""
    try:
        check_layout(config, processes)
    except ValueError as error:
        return str(error)
    return ""


@settings(max_examples=150)
@given(
    heads=st.tuples(*[st.sampled_from([1, 2, 3, 4, 6, 8, 12])] * 3),
    tensor=st.integers(1, 9),
    pipeline=st.integers(1, 9),
    global_batch=st.integers(1, 40),
    micro_batch=st.integers(1, 3),
    processes=st.integers(1, 40),
)
def test_a_proposal_goes(
    heads: tuple[int, int, int], tensor: int, pipeline: int, global_batch: int, micro_batch: int, processes: int
) -> None:
    """Where one number is wrong the nearest that goes is named; where more are, each is named once."""
    model = {"vision": MODEL["vision"] | {"heads": heads[0]}, "language": MODEL["language"] | {"heads": heads[1]}}
    model = {**model, "pool_heads": heads[2]}
    for encoder in ("vision", "language"):
        model[encoder] |= {"width": 48, "mlp_width": 96}
    config = configs.from_dict(
        {
            "model": model,
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "train": {"global_batch": global_batch, "micro_batch": micro_batch},
        }
    )
    changed = set()
    while message := complaint(config, processes):
        field, value = re.match(r"(?:(parallel\.\w+|train\.global_batch) = )?(\d+)", message).groups()  # type: ignore[union-attr]
        proposed = int(message.split(" is ")[-1])
        assert field not in changed
        changed.add(field)
        distance = abs(proposed - int(value))
        for nearer in range(max(1, int(value) - distance + 1), int(value) + distance):
            other = (config, nearer) if field is None else (replace(config, field, nearer), processes)
            assert complaint(*other) or nearer == proposed, f"{message}: but {nearer} goes"
        if field is None:
            processes = proposed
        else:
            config = replace(config, field, proposed)
