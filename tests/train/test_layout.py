"""What does not divide or does not go together is said before anything starts, with the nearest that does."""

from __future__ import annotations

from typing import Any

import pytest

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
        (4, {"parallel": {"tensor": 4}}, "parallel.tensor = 4 does not divide model.language.heads = 6; .* is 3$"),
        (8, {"parallel": {"pipeline": 8}}, "has 6 stages; set it to 6 or less"),
        (
            6,
            {"parallel": {"tensor": 2, "pipeline": 2}},
            "6 processes do not divide .* the nearest number that does is 8",
        ),
        (1, {"parallel": {"tensor": 2}}, "nearest number that does is 2"),
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
