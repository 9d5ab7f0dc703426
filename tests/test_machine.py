"""Cores and GPUs that a process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_lcl import machine
from megatron_lcl.machine import num_cores, num_gpus


@pytest.fixture
def cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 cores; the folder of its control groups, without any."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(machine, "OWN", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "ROOT", tmp_path / "root")
    assert num_cores() == 64
    return tmp_path / "root"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_the_least_quota_counts(cores: Path) -> None:
    """Of the control groups around this process, as `docker run --cpus` and limits of Kubernetes set them."""
    machine.OWN.write_text("0::/kubepods/pod/container\n")
    write(cores / "kubepods" / "pod" / "container" / "cpu.max", "max 100000\n")
    assert num_cores() == 64
    write(cores / "kubepods" / "cpu.max", "1000000 100000\n")
    assert num_cores() == 10
    write(cores / "kubepods" / "pod" / "cpu.max", "250000 100000\n")
    assert num_cores() == 3, "two and a half"
    write(cores / "cpu.max", "10000 100000\n")
    assert num_cores() == 1, "a tenth"
    write(cores / "cpu.max", "12800000 100000\n")
    assert num_cores() == 3


def test_quotas_of_the_first_version_count(cores: Path) -> None:
    machine.OWN.write_text("9:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/docker/1\n0::/\n")
    write(cores / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(cores / "cpu" / "cpu.cfs_period_us", "100000\n")
    write(cores / "memory" / "cpu.cfs_quota_us", "100000\n")
    assert num_cores() == 64
    write(cores / "cpu" / "cpu.cfs_quota_us", "200000\n")  # a container shows its own group as the root
    assert num_cores() == 2
    write(cores / "cpu" / "docker" / "1" / "cpu.cfs_quota_us", "50000\n")
    write(cores / "cpu" / "docker" / "1" / "cpu.cfs_period_us", "50000\n")
    assert num_cores() == 1


def test_torch_is_asked_for_gpus_only_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert num_gpus() == 3, "it is imported already"
    for platform, is_asked in (("hip", True), ("cuda", False), ("", False)):
        program = (
            "import sys\nfrom megatron_lcl import machine\nmachine.num_cuda_devices = lambda: 5\n"
            f"machine.torch_built_for = {{{platform!r}: '6.4'}}.get\n"
            "print(machine.num_gpus(), 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        found, asked = done.stdout.split()
        assert asked == str(is_asked)
        assert is_asked or int(found) == (5 if platform else 0)
