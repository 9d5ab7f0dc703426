"""A run that cannot fit into memory is refused; one that may fit is not."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.train import memory
from megatron_lcl.train.memory import Memory, check_memory, estimate

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CARD = Memory(79.1 * 2**30, "the GPU has 85")


def in_bfloat16(file: Path, **changes: Any) -> Config:
    return configs.replace(configs.load(file), train__dtype="bfloat16", **changes)


def images_of(file: Path) -> int:
    """Images of a pack, as the config's comment counts them."""
    (images,) = re.findall(r"at about (\d+) images a pack", file.read_text())
    return int(images)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda local: CARD)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_fit_where_they_are_started_and_not_on_one_card(file: Path) -> None:
    config, images = in_bfloat16(file), images_of(file)
    model = file.stem.split("_")[1]
    (nodes,) = re.findall(r"--nodes=(\d+)", (ROOT / "launch" / f"lcl_{model}.sh").read_text())
    assert estimate(config, 8 * int(nodes), images).total < CARD.size
    few = config.parallel.tensor
    assert estimate(config, few).total > 5e11, "even without images but one"
    again = configs.replace(config, contrast__strategy="recompute")
    assert estimate(again, few, images).total < CARD.size


@pytest.mark.usefixtures("card")
def test_the_fault_has_its_parts_and_a_remedy() -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitb32_interleaved.yaml")
    with pytest.raises(UserError) as caught:
        check_memory(config, 1, 1, images_per_pack=54)
    message = str(caught.value)
    assert message.startswith("a step needs at least 1,313 GB (parameters 0.36, optimizer 2.1, gradients 0.36, graphs")
    assert "graphs of 512 micro-batches 1,306" in message
    assert message.endswith("the GPU has 85 GB; set contrast.strategy to recompute (then at least 9.2 GB)")
    check_memory(configs.replace(config, contrast__strategy="recompute"), 1, 1, images_per_pack=54)
    check_memory(config, 32, 8, images_per_pack=54)


def test_remedies_are_added_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitl14_interleaved.yaml", train__micro_batch=4)

    def remedy(size: float) -> str:
        monkeypatch.setattr(memory, "available", lambda local: Memory(size, "the GPU has little"))
        with pytest.raises(UserError) as caught:
            check_memory(config, 2, 2, images_per_pack=23)
        return str(caught.value).split("; ")[1]

    assert remedy(40e9).startswith("set contrast.strategy to recompute (then")
    assert remedy(16e9).startswith("set contrast.strategy to recompute and train.micro_batch to 1 (then")
    assert "and train.activation_checkpointing to full (then" in remedy(9e9)
    assert remedy(1e9).startswith("split the model over more processes")


@pytest.mark.usefixtures("card")
def test_the_commands_as_typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """README's, on one card; and what a config does that is taken as it is."""
    monkeypatch.chdir(ROOT)
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    (line,) = re.findall(r"^ +megatron-lcl (train --config .*)$", (ROOT / "README.md").read_text(), re.M)
    arguments = [*shlex.split(line), "--dry-run", "--processes", "1"]
    assert main(arguments) == 2
    assert "corpora/mine is not a corpus" in capsys.readouterr().err, "memory comes before the corpora"
    at = arguments.index("--contrast.strategy")
    assert main([*arguments[:at], *arguments[at + 2 :]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-lcl train: a step needs at least "), said
    assert "set contrast.strategy to recompute" in said
    assert said.count("\n") == 1


BIG = {
    "model": {
        "vision": {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16, "mlp_width": 4096},
        "language": {"width": 1024, "layers": 12, "heads": 16, "mlp_width": 4096},
        "pool_heads": 16,
    },
    "train": {"global_batch": 64, "dtype": "bfloat16"},
    "data": {"images_per_pack": 16, "tokens_per_pack": 8192},
}


def total(processes: int = 8, **sections: Any) -> float:
    tree: dict[str, Any] = {**BIG}
    for name, section in sections.items():
        tree[name] = {**BIG.get(name, {}), **section}  # type: ignore[dict-item]
    return estimate(configs.from_dict(tree), processes).total


def test_what_each_setting_saves() -> None:
    retain = total()
    assert total(contrast={"strategy": "recompute"}) < retain / 4
    assert total(objective={"name": "generation"}) < retain / 4
    full, attention = (total(train={"activation_checkpointing": kind}) for kind in ("full", "attention"))
    assert full < attention < retain
    every = total(train={"activation_checkpointing": "full", "activation_checkpointing_every": 2})
    assert full < every < retain
    for split in ({"tensor": 2}, {"pipeline": 2}):
        # half the replicas, so twice the packs of each, on half the layers
        assert total(parallel=split) == pytest.approx(retain, rel=0.2)
    recompute = {"strategy": "recompute"}
    stages = [total(contrast=recompute, zero={"stage": stage}) for stage in (1, 2, 3)]
    assert stages == sorted(stages, reverse=True)


def test_the_least_limit_counts(tmp_path: Path) -> None:
    """Of the machine and of the control groups around this process, of both versions."""
    (tmp_path / "meminfo").write_text("MemTotal:  1000 kB\nMemFree: 1 kB\nSwapTotal: 24 kB\n")
    assert memory._physical(tmp_path / "meminfo") == 2**20
    assert memory._physical(tmp_path / "nothing") == math.inf
    job = tmp_path / "root" / "slurm" / "job"
    job.mkdir(parents=True)
    (tmp_path / "root" / "memory.max").write_text("7\n")
    (job.parent / "memory.max").write_text("5000\n")
    (job / "memory.max").write_text("max\n")
    (tmp_path / "cgroup").write_text("0::/slurm/job\n")
    assert sorted(memory._limits(tmp_path / "cgroup", tmp_path / "root")) == [7, 5000]
    old = tmp_path / "old" / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("6000\n")
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/docker\n8:memory:/docker\n")
    assert list(memory._limits(tmp_path / "cgroup", tmp_path / "old")) == [6000]
    assert list(memory._limits(tmp_path / "none", tmp_path / "root")) == []
    if not torch.cuda.is_available():
        assert memory.available(2).size == memory.available(1).size / 2 > 0


@pytest.mark.slow
def test_the_bound_is_below_what_is_measured_and_a_simulated_step_is_what_is_measured() -> None:
    file = ROOT / "benchmarks" / "memory_estimate.py"
    spec = importlib.util.spec_from_file_location("memory_estimate", file)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    bound, simulated, measured = benchmark.run("retain, a small model")
    assert 0.6 * measured < bound < measured
    assert simulated == pytest.approx(measured, rel=0.1)
