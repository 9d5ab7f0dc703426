"""The Triton kernels: results under the interpreter and on a CUDA device, and that they compile for real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
HERE = Path(__file__).parent


def run_kernels(**environment: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "kernels.py")]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-5000:]


def test_interpreted_kernels_give_the_same():
    run_kernels(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_device_give_the_same():
    run_kernels()


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "shared_memory"), [(80, 163 * 1024), (90, 227 * 1024)])
def test_kernels_compile(architecture, shared_memory, tmp_path):
    """For A100 and H100 (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability")."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(HERE / "compile_kernels.py"), str(architecture)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) == 3 * 2 * 2 + 4
    for name, shared, tensor_cores in lines:
        assert int(shared) <= shared_memory, name
        assert "softmax" in name or tensor_cores == "True", name
