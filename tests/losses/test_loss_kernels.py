"""The Triton kernels: results under the interpreter and on a CUDA device, and that they compile for real devices."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.version import Version

pytest.importorskip("triton")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_kernels(**environment: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    flags = ["-q", "-p", "no:cacheprovider", "-m", "gpu or not gpu"]  # all, and conftest.py hides no GPU
    command = [sys.executable, "-m", "pytest", *flags, str(HERE / "kernels.py")]
    result = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-5000:]


@pytest.mark.skipif(
    Version(metadata.version("triton")) < Version("3.7") and Version(metadata.version("numpy")) >= Version("2.5"),
    reason="the interpreter of this Triton converts arrays in a way that NumPy 2.5 does not have",
)
def test_interpreted_kernels_give_the_same():
    """In a process that, as on a machine with GPUs, keeps those that it is given."""
    run_kernels(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="0")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_device_give_the_same():
    run_kernels()


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Of each compute capability the benchmark's lines, a kernel each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(ROOT / "benchmarks" / "kernel_resources.py"), "80", "90", "100"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    parts = result.stdout.split("compute capability ")[1:]
    return {part.split(",")[0]: [line.split() for line in part.splitlines()[2:]] for part in parts}


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0"])
def test_kernels_compile(capability, resources):
    """For A100, H100 and B200: each variant fits, and matrices are multiplied on tensor cores."""
    kernels = resources[capability]
    assert len(kernels) == 3 * 2 * 2 + 4
    for kernel in kernels:
        name, (registers, _, _, spilled, tensor_cores, _) = " ".join(kernel[:-6]), kernel[-6:]
        assert int(registers) <= 255, name
        assert int(spilled) <= 256, name
        assert ("contrastive" in name) == (tensor_cores == "yes"), name
