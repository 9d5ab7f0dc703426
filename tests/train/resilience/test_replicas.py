"""Parameters that differ between replicas are found, and the processes named, before the next save."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_lines import read_audit
from fleet import lines, train
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.resilience.replicas import _describe, fingerprint


def flip_a_bit(rank: int, faulty: int, step: int) -> None:
    """After one step, the lowest bit of one parameter of one process."""
    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        result = plain(self, *arguments)
        calls.append(1)
        if rank == faulty and len(calls) == step:
            parameter = dict(self.engine.module.named_parameters())["1.attention.q.weight"]
            parameter.data.view(torch.int32)[3, 5] ^= 1
        return result

    Stepper.start = run  # type: ignore[method-assign]


@pytest.mark.slow
def test_one_of_three_is_named_and_nothing_is_saved(config_file: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", config_file, "--train.global_batch", "6", "--guard.every", "3"]
    said = train(run, *words, code=2, size=3, plant=flip_a_bit, planted=(1, 6))
    assert "differ after step 6: process 1 differs from the 2 others in 1.attention.q.weight" in said
    assert said.count("megatron-lcl train:") == 1
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [4]
    (line,) = read_audit(run)
    assert (line["event"], line["step"]) == ("replicas differ", 6)
    assert lines(run)[-1]["step"] == 6


@pytest.mark.slow
def test_before_a_save_it_is_asked_too(config_file: str, tmp_path: Path) -> None:
    """Between two there is no majority."""
    run = tmp_path / "run"
    said = train(run, "--config", config_file, "--guard.every", "100", code=2, plant=flip_a_bit, planted=(1, 8))
    assert "differ after step 8: processes 0 and 1 differ in 1.attention.q.weight, and none has a majority" in said
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [4]


def drift(rank: int) -> None:
    """After the fourth step, one process's optimizer has another value of a parameter of which all have the same."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    from megatron_lcl.train.step import Stepper

    plain, calls = Stepper.start, []

    def run(self, *arguments):  # type: ignore[no-untyped-def]
        result = plain(self, *arguments)
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            parameter = dict(self.engine.module.named_parameters())["1.attention.out.bias"]
            value = safe_get_full_fp32_param(parameter).clone()
            value.view(torch.int32)[3] ^= 1 << 12  # the last bits could be rounded away as the value grows
            safe_set_full_fp32_param(parameter, value)
        return result

    Stepper.start = run  # type: ignore[method-assign]


@pytest.mark.slow
def test_along_the_tensor_axis_a_difference_stays_and_is_found(config_file: str, tmp_path: Path) -> None:
    """Without it, all that is not split stays the same to the last bit."""
    words = ["--config", config_file, "--parallel.tensor", "2", "--guard.every", "1"]
    train(tmp_path / "good", *words)
    said = train(tmp_path / "bad", *words, "--guard.every", "6", code=2, plant=drift)
    assert re.search(r"differ after step 6: processes 0 and 1 differ in .*1\.attention\.out\.bias", said), said


@given(st.data(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]))
def test_every_flipped_bit_changes_the_fingerprint(data: st.DataObject, dtype: torch.dtype) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    count = data.draw(st.integers(1, 40))
    raw = np.frombuffer(data.draw(st.binary(min_size=count * width, max_size=count * width)), np.uint8).copy()
    before = fingerprint([torch.from_numpy(raw).view(dtype)])
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[bit // 8] ^= 1 << bit % 8
    assert fingerprint([torch.from_numpy(raw).view(dtype)]) != before


def test_a_fingerprint_does_not_depend_on_pieces_or_shape() -> None:
    tensor = torch.randn(3, 1_500_000)
    whole = tensor.view(torch.int32).reshape(-1).numpy().astype(np.int64)
    with np.errstate(over="ignore"):
        expected = (whole * (2 * np.arange(len(whole)) + 1)).sum()
    assert int(fingerprint([tensor])) == int(expected)
    assert fingerprint([tensor, tensor.reshape(-1)]).tolist() == [int(expected)] * 2


def test_votes() -> None:
    names = ["a", "b", "c", "d", "e"]
    same = [1, 2, 3, 4, 5]
    assert _describe([same, same], (0, 4), names) == ""
    assert _describe([same, [1, 2, 3, 4, 0], same], (0, 4, 8), names) == "process 4 differs from the 2 others in e"
    two = _describe([same, [0, 0, 0, 0, 5], same, same, [9, 2, 3, 4, 5]], range(5), names)
    assert two == "process 1, 4 differs from the 3 others in a, b, c and others"
    assert json.dumps(two)
