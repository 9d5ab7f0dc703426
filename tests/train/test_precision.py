"""Which types a machine trains in."""

from __future__ import annotations

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megatron_lcl.config import Config, Train
from megatron_lcl.errors import UserError
from megatron_lcl.train.precision import check_dtype


def test_float16_is_refused_where_a_cpu_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(train=Train(dtype="float16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(UserError, match=r"train.dtype = float16, which this CPU .* bfloat16 or float32"):
        check_dtype(config)
    check_dtype(Config(train=Train(dtype="bfloat16")))
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    check_dtype(config)
