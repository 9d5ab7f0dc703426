"""Whose fault an error is: exit codes, and the nodes that are told to the launch script."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_lcl.data.loading.loader import LoaderKilled
from megatron_lcl.errors import UserError
from megatron_lcl.train.resilience.faults import blaming, code_of, exit_if_lost, is_local
from megatron_lcl.train.resilience.signals import Interrupted, Signals
from megatron_lcl.train.resilience.start import LOST


def cuda_error(said: str, number: str) -> torch.AcceleratorError:
    """As torch words it: c10_cuda_check_implementation in its c10/cuda/CUDAException.cpp."""
    return torch.AcceleratorError(
        f"CUDA error: {said}\nSearch for `{number}' in https://docs.nvidia.com/cuda/cuda-runtime-api/"
        "group__CUDART__TYPES.html for more information.\nCUDA kernel errors might be asynchronously reported at some "
        "other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
        "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
    )


def test_whose_fault_an_error_is() -> None:
    """2 and 1 would only happen again; 71 may go better on other machines."""
    ours: list[Exception] = [
        cuda_error("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable"),
        cuda_error("an illegal memory access was encountered", "cudaErrorIllegalAddress"),
        OSError(errno.EIO, "Input/output"),
    ]
    ours += [LoaderKilled("loader process 7 was killed"), OSError("Caught OSError in DataLoader … [Errno 116] Stale")]
    assert {code_of(error) for error in ours} == {LOST}
    assert all(is_local(error) for error in ours)
    for said, number in (
        ("device-side assert triggered", "cudaErrorAssert"),
        ("invalid device ordinal", "cudaErrorInvalidDevice"),
        ("no kernel image is available for execution on the device", "cudaErrorNoKernelImageForDevice"),
    ):
        assert code_of(cuda_error(said, number)) == 1
    assert code_of(dist.DistBackendError("NCCL error: remote process exited or there was a network error")) == LOST
    assert [code_of(error) for error in (UserError("data.corpora is empty"), OSError(errno.ENOSPC, "full"))] == [2, 2]
    others: list[Exception] = [ValueError("shapes"), IndexError(), OSError("no number"), OSError(errno.EBADF, "closed")]
    assert [code_of(error) for error in others] == [1] * 4


def test_an_error_after_a_signal_is_taken_to_come_from_it() -> None:
    """Where it is the program's, or tells of a file, which a process that has ended may not have left."""
    signals = Signals()
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/tmp/compiled.so")
    for answered, error, raised in (
        (False, RuntimeError("C++ compile error"), Interrupted),
        (False, missing, Interrupted),
        (True, missing, FileNotFoundError),
        (False, UserError("data.corpora is empty"), UserError),
        (False, OSError(errno.EIO, "Input/output"), OSError),
    ):
        signals.received, signals.answered = signal.SIGTERM, answered
        with pytest.raises(raised), blaming(signals):
            raise error


def test_a_machines_fault_keeps_its_traceback_and_names_the_node(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGATRON_LCL_FAULTS", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n042")
    with pytest.raises(SystemExit) as ended, exit_if_lost():
        raise cuda_error("uncorrectable ECC error encountered", "cudaErrorECCUncorrectable")
    assert ended.value.code == LOST
    assert "Traceback" in capfd.readouterr().err
    assert (tmp_path / "fault-0").read_text() == "n042\n"
    with pytest.raises(ValueError, match="shapes"), exit_if_lost():
        raise ValueError("shapes")
