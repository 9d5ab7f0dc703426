"""Steps that are skipped on the device; what they do is tested in tests/train/resilience/test_bad_steps.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from deepspeed.runtime import utils
from deepspeed.runtime.zero import stage3, stage_1_and_2

from megatron_lcl.errors import UserError
from megatron_lcl.train.skipping import skip_on_device


@pytest.mark.parametrize("module", [utils, stage_1_and_2, stage3])
def test_a_deepspeed_that_does_not_ask_before_a_step_is_refused(
    module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 0.19.8 it asked by another function, and a gradient that is not finite would go into the weights."""
    kind = stage3.DeepSpeedZeroOptimizer_Stage3 if module is stage3 else stage_1_and_2.DeepSpeedZeroOptimizer
    optimizer = kind.__new__(kind)
    optimizer.optimizer = SimpleNamespace()
    skip_on_device(optimizer)
    monkeypatch.delattr(module, "is_invalid_grad_norm")
    with pytest.raises(UserError, match=r"pip install 'deepspeed>=0\.19\.8"):
        skip_on_device(optimizer)
