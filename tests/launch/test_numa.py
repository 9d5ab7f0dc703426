"""`launch/numa.sh` runs a task next to its GPU: which node it finds, and that it stands aside where there is none."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "numa.sh"
PROGRAMS = {
    "nvidia-smi": """case $1 in
--id=0) echo 00000000:1B:00.0 ;; --id=1) echo 00000000:CB:00.0 ;; --id=GPU-a) echo 00010000:CB:00.0 ;;
--id=2) echo 00000000:02:00.0 ;; *) echo "No devices were found"; exit 6 ;;
esac""",
    # Linux's files, by which every GPU of the table above but number 2 has a node
    "cat": """case $1 in
/sys/bus/pci/devices/0000:1b:00.0/numa_node) echo 0 ;; /sys/bus/pci/devices/0000:cb:00.0/numa_node) echo 3 ;;
/sys/bus/pci/devices/10000:cb:00.0/numa_node) echo 1 ;; /sys/bus/pci/devices/0000:02:00.0/numa_node) echo -1 ;;
*) exit 1 ;;
esac""",
    "numactl": """printf '<%s>' "$@"; while [ "$1" != -- ]; do shift; done; shift; exec "$@" """,
}


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def run(programs: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "CUDA_VISIBLE_DEVICES")}
    path = {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), "printf", "(%s)", "a word"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env={**kept, **path, **environment})


@pytest.mark.parametrize(
    ("environment", "node"),
    [
        ({"SLURM_LOCALID": "0"}, 0),
        ({"SLURM_LOCALID": "1"}, 3),
        ({"SLURM_LOCALID": "0", "LOCAL_RANK": "1"}, 3),
        ({"SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "1,0"}, 3),
        ({"SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "1,GPU-a"}, 1),
        ({"SLURM_LOCALID": "2"}, None),  # the machine does not tell
        ({"SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "2"}, None),
        ({"SLURM_LOCALID": "5"}, None),  # there is no such GPU
        ({}, 0),
    ],
)
def test_a_task_runs_next_to_its_gpu(programs: Path, environment: dict[str, str], node: int | None) -> None:
    result = run(programs, **environment)
    bound = f"<--all><--cpunodebind={node}><--preferred={node}><--><printf><(%s)><a word>" if node is not None else ""
    assert (result.returncode, result.stdout) == (0, f"{bound}(a word)")
    said = re.fullmatch(r"numa\.sh: (.*) on \S+; unbound\n", result.stderr)
    assert bool(said) == (node is None)


def test_without_gpus_or_numactl(programs: Path) -> None:
    tools = programs / "tools"
    tools.mkdir()
    for name in ("bash", "printf", "uname"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    (programs / "numactl").rename(programs / "elsewhere")
    result = run(programs, PATH=f"{programs}:{tools}")
    assert (result.returncode, result.stdout) == (2, "")
    assert "numactl is not installed on " in result.stderr
    result = run(programs, PATH=str(tools))
    assert (result.returncode, result.stdout) == (0, "(a word)")
    assert result.stderr.startswith("numa.sh: no nvidia-smi ")
