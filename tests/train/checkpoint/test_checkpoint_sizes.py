"""The space that a run asks for before it begins is what its checkpoints then take."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_corpus import make_corpus
from train.resilience import fleet
from train.test_averages import write_config

from megatron_lcl import config as configs
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.train.checkpoint.folder import step_folder
from megatron_lcl.train.checks import space_needed
from megatron_lcl.train.parts import frozen_parameters

FREEZE, ZERO3 = {"train.freeze": '["language.*"]'}, {"zero.stage": "3", "contrast.strategy": "recompute"}
WIDE = {
    f"model.{part}.{name}": str(value)
    for part in ("vision", "language")
    for name, value in {"width": 256, "mlp_width": 1024, "heads": 4}.items()
}
"""so that numbers are most of what is in the files"""


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "stage"), [("float32", 2), ("bfloat16", 1)])
def test_a_checkpoint_takes_what_was_asked_for(dtype: str, stage: int, tmp_path: Path) -> None:
    """With averages, also of what is frozen at a resume, and at other layouts, beside the universal form of the last
    one; where the layout is the same, no more is asked for."""
    file, run = write_config(tmp_path, make_corpus(tmp_path, seed=0)), tmp_path / "run"
    common = {**WIDE, "train.dtype": dtype, "checkpoint.every": "1", "checkpoint.keep_last": "9"}
    common |= {"average.ema": "[0.5]", "average.tail": "[]", "zero.stage": str(stage)}
    for step, size, more in ((1, 1, {}), (2, 2, FREEZE), (3, 2, FREEZE), (4, 2, {**FREEZE, **ZERO3})):
        own = {**common, **more, "train.steps": str(step)}
        config = configs.load(file, {**own, "train.output": str(run)})
        checkpoint, universal = space_needed(config, size)
        fleet.train(run, "--config", str(file), *(f"--{name}={value}" for name, value in own.items()), size=size)
        written, converted = size_of(step_folder(run, step)), size_of(step_folder(run, step - 1) / "universal")
        num_frozen = num_parameters(config.model) - num_parameters(config.model, frozen_parameters(config))
        if step > 2:  # what was frozen before need not have an average of its own
            checkpoint += 4 * num_frozen
        assert checkpoint < written, "at least"
        assert checkpoint == pytest.approx(written, rel=0.01)
        assert universal <= converted
        assert universal == pytest.approx(converted, rel=0.02)
