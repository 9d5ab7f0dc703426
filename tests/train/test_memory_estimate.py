"""A run that cannot fit into memory is refused; one that may fit is not."""

from __future__ import annotations

import importlib
import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl import machine
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.errors import UserError
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train import checks, fits, memory, strategy
from megatron_lcl.train.fits import check_memory, check_step
from megatron_lcl.train.kernels import check_kernels
from megatron_lcl.train.memory import Memory, Slots, estimate, largest_estimate
from megatron_lcl.train.resilience.faults import node
from megatron_lcl.train.resume_point import _local_processes
from megatron_lcl.train.settings import deepspeed_config, offloaded
from megatron_lcl.train.skipping import skips_on_device

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CARD = Memory(79.1 * 2**30, "the GPU has 85 GB", True)


def in_bfloat16(file: Path, **changes: Any) -> Config:
    return configs.replace(configs.load(file), train__dtype="bfloat16", **changes)


def images_of(file: Path) -> int:
    """Images of a pack, as the config's comment counts them."""
    (images,) = re.findall(r"at about (\d+) images a pack", file.read_text())
    return int(images)


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, int]]:
    """A step takes half as much again as its lower bound; what was simulated."""
    asked: list[tuple[Config, int]] = []

    def predicted(config: Config, processes: int, slots: Any, on_gpu: bool) -> float:
        asked.append((config, processes))
        return 1.5 * largest_estimate(config, processes, slots).total

    for module in (fits, strategy):
        monkeypatch.setattr(module, "predicted", predicted)
    return asked


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs_fit_on_one_card_and_keep_their_graphs_where_they_are_started(file: Path) -> None:
    config, images = in_bfloat16(file), images_of(file)
    model = file.stem.split("_")[1]
    (nodes,) = re.findall(r"--nodes=(\d+)", (ROOT / "launch" / f"lcl_{model}.sh").read_text())
    few = config.parallel.tensor
    assert estimate(config, few, images).total < CARD.size, "auto counts as what needs less"
    retain = configs.replace(config, contrast__strategy="retain")
    assert estimate(retain, few).total > 5e11, "even without images but one"
    assert estimate(retain, 8 * int(nodes), images).total < CARD.size


def refusal(config: Config, processes: int, has: Memory, slots: Slots = None) -> str:
    with pytest.raises(UserError) as caught:
        check_memory(config, processes, has, slots)
    return str(caught.value)


def test_the_fault_has_its_parts_and_remedies_that_fit(simulated: list[tuple[Config, int]]) -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitb32_interleaved.yaml", contrast__strategy="retain")
    message = refusal(config, 1, CARD, [54])
    assert message.startswith("a step needs at least 1,313 GB (parameters 0.36, optimizer 2.1, gradients 0.36, graphs")
    assert "graphs of 512 micro-batches 1,306" in message
    remedy = (
        "add --contrast.strategy recompute (then about 14 GB), or take 32 processes in place of 1 (then about 62 GB)"
    )
    assert message.endswith(f"the GPU has 85 GB; {remedy}")
    assert [(c.contrast.strategy, n) for c, n in simulated] == [("recompute", 1), ("retain", 32)]
    for changed, processes in simulated:
        check_memory(changed, processes, CARD, [54])
    check_memory(configs.replace(config, contrast__strategy="auto"), 1, CARD, [54])


def test_a_run_whose_bound_passes_is_refused_for_a_simulated_step(simulated: list[tuple[Config, int]]) -> None:
    """Of a step that takes half as much again as its bound; far from the memory that there is nothing is simulated."""
    config = in_bfloat16(ROOT / "configs" / "lcl_vitl14_interleaved.yaml", contrast__strategy="recompute")
    bound = estimate(config, 8, 23).total
    has = Memory(1.4 * bound, "the GPU has little", True)
    check_memory(config, 8, has, [23])
    with pytest.raises(UserError) as caught:
        check_step(config, 8, has, [23])
    said, remedy = str(caught.value).split("; ")
    assert said == f"a step needs about {memory.in_gb(1.5 * bound)} GB a process, as simulated, and the GPU has little"
    assert re.match(r"add --\S+ \S+.* \(then about \S+ GB\)", remedy), remedy
    changed, processes = simulated[1]
    assert processes == 8
    assert 1.5 * estimate(changed, 8, 23).total <= fits.ROOM * has.size, "the first that was tried fits"
    check_step(config, 8, Memory(1.4 * bound, "this machine has as little, within what is known"), [23])
    simulated.clear()
    check_step(config, 8, Memory(fits.DOUBT * bound, "", True), [23])
    assert not simulated


def test_a_remedy_has_the_fewest_settings(simulated: list[tuple[Config, int]]) -> None:
    file = ROOT / "configs" / "lcl_vitl14_interleaved.yaml"
    config = in_bfloat16(file, train__micro_batch=4, contrast__strategy="retain")

    def remedy(size: float) -> str:
        simulated.clear()
        said = refusal(config, 2, Memory(size, "this machine has little"), [23]).split("; ")[1]
        assert len(simulated) <= 2 * fits._TRIES
        return said

    assert remedy(70e9).startswith("add --contrast.strategy recompute (then")
    assert remedy(30e9).startswith("add --contrast.strategy recompute --train.micro_batch 1 (then")
    # the lower bound of the same two is within 16 GB, but no step with them
    assert remedy(16e9).startswith("add --contrast.strategy recompute --train.activation_checkpointing full (then")
    assert remedy(11.5e9).startswith("add --contrast.strategy recompute --train.micro_batch 1 --train.activation_")
    assert remedy(1e9).startswith("nothing that was tried fits: make packs smaller")


def test_fewer_processes_of_a_cpu_have_more_memory_each(simulated: list[tuple[Config, int]]) -> None:
    """Where all are on one machine; what was tried with one setting or none is simulated with what each would have."""
    config = in_bfloat16(ROOT / "configs" / "lcl_vitb32_interleaved.yaml", contrast__strategy="recompute")
    size = 0.9 * estimate(config, 4, 54).total
    has = Memory(size, "this machine has little for 4 processes", local=4)
    said = refusal(config, 4, has, [54])
    of_two, of_one = (1.5 * largest_estimate(config, n, [54]).total for n in (2, 1))
    assert of_two > fits.ROOM * 2 * size
    assert of_one < fits.ROOM * 4 * size
    assert said.endswith(f"take 1 process in place of 4 (then about {memory.in_gb(of_one)} GB)"), said
    assert [n for _, n in simulated if n < 4] == [2, 1]
    assert "in place of" not in refusal(config, 4, replace(has, local=2), [54])
    little = replace(has, size=0.66 * estimate(config, 4, 54).total)  # enough for one, which has no use for ZeRO
    assert "; add --train.activation_checkpointing full and take 1 process (then" in refusal(config, 4, little, [54])


ZERO_3 = {"zero__stage": 3, "contrast__strategy": "recompute"}
OFFLOAD = {"zero_optimization": {"offload_param": {"device": "cpu"}}}


@pytest.mark.parametrize("changes", [{"train__compile": True}, {**ZERO_3, "deepspeed": OFFLOAD}])
def test_no_remedy_is_refused_when_it_is_typed(changes: dict[str, Any]) -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitl14_interleaved.yaml", parallel__tensor=1, **changes)
    tried = [changed for changed, _ in fits._changed(config) if fits._bound(changed, 8, [23], False) < math.inf]
    assert tried
    for changed in tried:
        deepspeed_config(changed, 8)
        check_kernels(changed, elsewhere=True)


def test_more_gpus_are_named_where_no_setting_is_enough(simulated: list[tuple[Config, int]]) -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitg_interleaved.yaml", parallel__tensor=1)
    message = refusal(config, 1, Memory(20e9, "the GPU has 20 GB", True), [23])
    assert re.search(r"; add (--\S+ \S+ )+and take \d+ processes \(then about \S+ GB\)$", message), message


def test_without_corpora_packs_are_taken_as_full(simulated: list[tuple[Config, int]]) -> None:
    config = in_bfloat16(ROOT / "configs" / "lcl_vitb32_interleaved.yaml", contrast__strategy="retain")
    assert refusal(config, 1, CARD).endswith("GB, with packs full of images)")
    (changed, _), *_ = simulated
    assert f"(then about {1.5 * estimate(changed, 1, 8192 // 51).total / 1e9:.0f} GB" in refusal(config, 1, CARD)


@pytest.mark.usefixtures("simulated")
def test_the_commands_as_typed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """README's, on one card; and with the strategy that it would not take."""
    monkeypatch.chdir(ROOT)
    for name in ("SLURM_JOB_ID", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(checks, "available", lambda local: CARD)
    (line,) = re.findall(r"^ +megatron-lcl (train --config .*)$", (ROOT / "README.md").read_text(), re.M)
    arguments = [*shlex.split(line), "--dry-run", "--processes", "1"]
    assert main(arguments) == 2
    assert "corpora/mine is not a corpus" in capsys.readouterr().err, "memory comes before the corpora"
    assert main([*arguments, "--contrast.strategy", "retain"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-lcl train: a step needs at least "), said
    assert "add --contrast.strategy recompute (then" in said
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
    weights = [estimate(configs.from_dict({**BIG, "zero": {"stage": stage}}), 8).parameters for stage in (1, 2)]
    assert weights[0] == weights[1], "whole until ZeRO-3"


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("moved", [{"offload_optimizer": {"device": "cpu"}}, {"cpu_offload": True}])
def test_what_is_offloaded_counts_by_where_the_run_is(
    moved: dict[str, Any], has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the machine that asks, unless nobody says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = configs.from_dict({**BIG, "deepspeed": {"zero_optimization": moved}})
    on_gpu, on_cpu = (estimate(config, 8, on_gpu=on_gpu) for on_gpu in (True, False))
    assert (on_gpu.optimizer, on_gpu.gradients) == (0, 0)
    assert on_cpu == estimate(configs.from_dict(BIG), 8, on_gpu=False)
    assert estimate(config, 8) == (on_gpu if has_gpu else on_cpu)
    assert largest_estimate(config, 8, on_gpu=True) == on_gpu


@pytest.mark.parametrize("section", [{"device": "none"}, {"pin_memory": True}])
def test_without_a_device_nothing_is_offloaded(section: dict[str, Any]) -> None:
    """As DeepSpeed has it."""
    sections = {"zero_optimization": {"offload_optimizer": section, "offload_param": section}}
    for stage in (1, 3):
        zero: dict[str, Any] = {"zero": {"stage": stage}, "contrast": {"strategy": "recompute"}}
        plain, moved = (configs.from_dict({**BIG, **zero, **more}) for more in ({}, {"deepspeed": sections}))
        assert offloaded(moved) == frozenset()
        assert estimate(moved, 8, on_gpu=True) == estimate(plain, 8, on_gpu=True)
        assert skips_on_device(moved) == skips_on_device(plain)


def test_what_is_trained_keeps_its_graph() -> None:
    """Of layers that are trained as a whole; the bound of one that is frozen in part is that of one that is frozen."""
    config = configs.from_dict(BIG)

    def graph(*patterns: str) -> float:
        return estimate(configs.replace(config, train__freeze=patterns), 8).graph

    whole, without_vision, without_language = graph(), graph("vision.*"), graph("language.blocks.*", "head.*")
    assert 0 < without_vision < whole
    assert 0 < without_language < whole
    pool = graph("vision.*", "language.blocks.*", "head.*")
    assert without_vision + without_language == pytest.approx(whole + pool)
    blocks = [graph(f"vision.blocks.{index}.mlp.*") for index in range(config.model.vision.layers)]
    assert len(set(blocks)) == 1
    assert config.model.vision.layers * (whole - blocks[0]) < whole - without_vision  # which has the patches too


def test_batches_of_loader_processes_need_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's default is 64 MB, which a ViT-B/16's loader processes fill."""
    config = in_bfloat16(ROOT / "configs" / "lcl_vitb16_interleaved.yaml")
    batch = 27 * 3 * 224**2 + 20 * 8192
    has = {"shared": 2 * 8 * batch, "local": 1}
    check_memory(config, 1, replace(CARD, **has), [27])
    message = refusal(config, 1, replace(CARD, **{**has, "shared": 2 * 8 * batch - 1}), [27])
    assert message.startswith("the 8 loader processes hand over their batches in /dev/shm, up to 67.6 MB at once, and")
    assert message.endswith("give the container more (--shm-size or --ipc=host of docker), or lower data.workers (8)")
    with pytest.raises(UserError) as caught:
        check_memory(config, 1, replace(CARD, shared=0), [27])
    assert "data.workers" not in caught.value.said()
    assert "of each of 4 replicas on a machine" in refusal(config, 8, replace(CARD, **{**has, "local": 4}), [27])
    pipeline = configs.replace(config, parallel__pipeline=4, contrast__strategy="recompute")
    check_memory(pipeline, 4, replace(CARD, **{**has, "local": 4}), [27])  # one process of four reads
    check_memory(configs.replace(config, data__workers=0), 1, replace(CARD, shared=0), [27])
    later = configs.replace(config, schedule__phases=({"steps": 9, "image_size": 448},))
    assert "up to " in refusal(later, 1, replace(CARD, **has), [27] * len(phases_of(later)))
    # on a CPU, a step's micro-batches stay there beside those of the loader processes
    slow = configs.replace(config, train__dtype="float32", contrast__strategy="recompute", train__global_batch=4)
    memory_of_host = Memory(1e12, "", False, (2 * 8 + 4) * batch - 1)
    assert "up to 84.6 MB" in refusal(slow, 1, memory_of_host, [27])
    check_memory(slow, 1, replace(memory_of_host, shared=(2 * 8 + 4) * batch), [27])
    # evaluations during the run have loader processes of their own, for packs of a context with ten images each
    measured = configs.replace(config, evaluate__corpus="held-out", train__evaluate_every=10)
    both = 2 * 8 * (batch + 4 * (10 * 3 * 224**2 + 20 * 2048))
    check_memory(measured, 1, replace(CARD, shared=both), [27])
    assert "hand over their batches" in refusal(measured, 1, replace(CARD, shared=both - 1), [27])

    for blocks, free in ((16384, 64 * 2**20), (0, math.inf)):  # a tmpfs without a limit says 0
        found = SimpleNamespace(f_blocks=blocks, f_bavail=blocks, f_frsize=4096)
        monkeypatch.setattr(os, "statvfs", lambda _, found=found: found)
        assert memory.available(1).shared == free

    def nothing(_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(os, "statvfs", nothing)
    assert memory.available(1).shared == math.inf


def test_the_least_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def limits(own: str, root: str) -> list[float]:
        monkeypatch.setattr(machine, "OWN", tmp_path / own)
        monkeypatch.setattr(machine, "ROOT", tmp_path / root)
        return sorted(memory._limits())

    assert limits("cgroup", "root") == [7, 5000]
    old = tmp_path / "old" / "memory" / "docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("6000\n")
    (tmp_path / "cgroup").write_text("9:cpu,cpuacct:/docker\n8:memory:/docker\n")
    assert limits("cgroup", "old") == [6000]
    assert limits("none", "root") == []
    if not torch.cuda.is_available():
        assert memory.available(2).size == memory.available(1).size / 2 > 0


def counted(rank: int) -> list[int]:
    """Processes of a machine, with what launchers may say; the last of them is one of another machine."""
    dist.init_process_group("gloo")
    world, found = Axis.of_group(dist.group.WORLD), []
    for said in ({}, {"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_SIZE": "2"}, {"SLURMD_NODENAME": f"node-{rank // 2}"}):
        for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
            os.environ.pop(name, None)
        os.environ |= said
        found.append(_local_processes(world.gather_objects(node())))
    dist.destroy_process_group()
    return found


def test_processes_of_a_machine_are_counted_where_the_launcher_does_not_say() -> None:
    assert run_processes(counted, 3) == [[3, 3, 2, 2], [3, 3, 2, 2], [3, 3, 2, 1]]


@pytest.mark.slow
def test_the_bound_is_below_what_is_measured_and_a_simulated_step_is_what_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("memory_estimate")
    bound, simulated, planned, measured = benchmark.run("retain, one layer")
    assert measured > 1e9
    assert 0.6 * measured < bound < measured
    assert simulated == pytest.approx(measured, rel=0.1)
    assert planned == simulated  # nothing to extrapolate
