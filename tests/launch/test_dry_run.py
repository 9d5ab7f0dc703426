"""`train --dry-run`: what it prints, what it finds wrong; and the ranks of a task of srun."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from data.writers import picture, write_jsonl
from local_slurm import Slurm
from packaging.requirements import Requirement

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError
from megatron_lcl.selftest.cases import Case
from megatron_lcl.train import checks, dryrun, launch, memory
from megatron_lcl.train.engine import check_built_for, init_processes
from megatron_lcl.train.launch import adopt_slurm, hosts

TASK = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["train", "--dry-run", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_it_prints_what_would_be_launched(capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:
    run, cache = tmp_path / "a run", tmp_path / "cache"
    more = [
        "--parallel.tensor",
        "2",
        "--train.micro_batch",
        "2",
        "--data.cache",
        str(cache),
        "--train.output",
        str(run),
    ]
    code, out, err = dry_run(capsys, "--nodes", "2", "--processes", "4", *tiny, *more)
    assert (code, err) == (0, "")
    assert {path.name.partition("-")[0] for path in cache.iterdir()} == {"documents", "packs"}, "what the run needs"
    lines = {line[:12].strip(): line[12:] for line in out.splitlines()}
    assert lines["processes"] == "8: 4 on each of 2 nodes"
    assert lines["each node"].startswith(f"{dryrun.TORCHRUN_WAITS} torchrun --nnodes=2 --nproc-per-node=4 ")
    assert f" {dryrun.TORCHRUN_SIGNALS} -m megatron_lcl train " in lines["each node"]
    assert lines["each node"].endswith(f"--train.output '{run}'")
    assert "data 4 x pipeline 1 x tensor 2, ZeRO stage 1" in lines["layout"]
    assert "8 packs of 96 tokens: 768 tokens a step; a replica runs 1 micro-batch of 2" in lines["batch"]
    assert lines["data"].endswith(": 40 documents")
    said = r"4 image slots a pack \(given\); in 64 packs (\d+) of \1 images \(100.0%\) are in the contrast, 0 of \1 doc"
    assert re.match(said, lines["packs"])
    assert lines["run"] == f"{run}: starts at step 0"
    assert f"torch {metadata.version('torch')}" in lines["software"]
    assert "warning" not in lines
    assert list(lines)[-1] == "checks"
    assert lines["checks"].startswith("passed: ")
    assert not run.exists()


def test_a_warmup_that_lasts_longer_than_the_run_is_said(
    capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path
) -> None:
    more = ["--optimizer.warmup", "2000", "--train.steps", "20", "--train.output", str(tmp_path / "run")]
    code, out, _ = dry_run(capsys, "--processes", "1", *tiny, *more)
    assert code == 0, "a trial of a config"
    assert "unused" not in out
    assert "\nwarning     optimizer.warmup = 2000 is not over before the end, train.steps = 20: " in out


def test_settings_without_effect_are_said(capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:
    tiny = [*tiny, "--objective.name", "clip", "--objective.contrastive_weight", "0.5"]
    code, out, _ = dry_run(capsys, "--processes", "1", *tiny, "--train.output", str(tmp_path / "run"))
    assert code == 0, "a sweep over objectives keeps the weight"
    assert "\nunused      objective.contrastive_weight has no effect on objective.name = clip\n" in out


def test_on_one_machine_the_command_is_the_one_that_was_given(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = dry_run(capsys, "--processes", "4", *tiny)
    assert " -m megatron_lcl train --model.vision.image_size 16 " in out
    assert "--processes 4\n" in out
    monkeypatch.setenv("MEGATRON_LCL_LAUNCH", "srun --nodes=2 ")
    _, out, _ = dry_run(capsys, "--nodes", "2", "--processes", "4", *tiny)
    assert "\ncommand     srun --nodes=2\n" in out, "the script's own"
    assert "each node" not in out
    assert "network " not in out
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0,ib1")
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "a b")
    _, out, _ = dry_run(capsys, "--nodes", "2", "--processes", "4", *tiny)
    assert "\nnetwork     NCCL_SOCKET_IFNAME=ib0,ib1 'TORCH_NCCL_BLOCKING_WAIT=a b'\n" in out


@pytest.mark.parametrize(
    ("cores", "settings", "processes"),
    [
        (2, {}, 2),
        (2, {"train.global_batch": "3"}, 1),
        (2, {"train.global_batch": "3", "parallel.tensor": "2"}, 2),
        (2, {"train.global_batch": "3", "parallel.pipeline": "2"}, 2),
        (4, {"train.global_batch": "3", "parallel.tensor": "2"}, 2),
        (2, {"train.micro_batch": "8"}, 1),
        (2, {"schedule.phases": "[{steps: 1, global_batch: 3}]"}, 1),
        (2, {"schedule.phases": "[{steps: 1, global_batch: 3}]", "parallel.tensor": "2"}, 2),
    ],
)
def test_as_many_processes_start_as_the_layout_and_the_batches_divide_among(
    cores: int,
    settings: dict[str, str],
    processes: int,
    capsys: pytest.CaptureFixture[str],
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "processes_at_hand", lambda: cores)
    code, out, err = dry_run(capsys, *tiny, *(word for k, v in settings.items() for word in (f"--{k}", v)))
    assert (code, err) == (0, "")
    assert f"processes   {processes}: {processes} on each of 1 node\n" in out


def test_processes_among_which_the_batch_does_not_divide_are_not_started(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "start_local", None)
    assert main(["train", *tiny, "--processes", "3"]) == 2
    assert "8 packs do not divide into 3 data-parallel" in capsys.readouterr().err


def test_where_no_number_of_processes_goes_it_is_said_why(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "processes_at_hand", lambda: 1)
    code, _, err = dry_run(capsys, *tiny, "--parallel.tensor", "2")
    assert code == 2
    assert "1 process cannot be divided into replicas of parallel.tensor = 2 " in err
    assert "; the nearest number that can is 2" in err
    for at_hand in (1, 2):  # of four processes on two machines none would divide a batch of 3
        monkeypatch.setattr(launch, "processes_at_hand", lambda number=at_hand: number)
        code, out, _ = dry_run(capsys, "--nodes", "2", *tiny, "--parallel.tensor", "2", "--train.global_batch", "3")
        assert code == 0
        assert "processes   2: 1 on each of 2 nodes" in out


def test_what_is_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*arguments: str) -> str:
        code, out, err = dry_run(capsys, *tiny, *arguments)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    assert "8 packs do not divide into 6 data-parallel" in fault("--nodes", "2", "--processes", "3")
    assert "set data.cache to another folder" in fault("--data.cache", "/dev/null/cache")
    assert "/nowhere is not a corpus" in fault("--data.corpora", "/nowhere")
    assert "--nodes goes with --dry-run" in _not_dry(capsys, tiny)
    assert "optimizer.min_lr = 0.1 is above optimizer.lr = 0.01" in fault("--optimizer.min_lr", "0.1")
    with monkeypatch.context() as patch:
        patch.setenv("MASTER_ADDR", "a.name.that.is.invalid")
        assert "MASTER_ADDR = a.name.that.is.invalid does not resolve" in fault("--processes", "2")
    with monkeypatch.context() as patch:
        patch.setattr(dryrun, "_requirements", lambda: ["numpy>=1", "torch>=99", 'absent; extra == "gpu"'])
        assert f"torch {metadata.version('torch')} is installed for " in fault("--processes", "2")
        patch.setattr(dryrun, "_requirements", lambda: ["a-package-nobody-has>=2"])
        assert "a-package-nobody-has>=2 is not installed for " in fault("--processes", "2")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        for given, said in (("1", "1 GPU"), ("8", "8 GPUs")):
            patch.setenv("SLURM_GPUS_ON_NODE", given)
            assert f"Slurm gives this node {said}, but torch " in fault("--processes", given)
        patch.setattr(torch.cuda, "device_count", lambda: 4)
        assert "8 processes on a node where torch sees 4 GPUs" in fault("--processes", "8")
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        assert "2 processes on a node where torch sees 1 GPU; start one a GPU" in fault("--processes", "2")


def test_a_node_whose_cuda_does_not_start_fails_the_check(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its GPUs are counted all the same, and with this variable torch says that they are available."""

    def init() -> None:
        raise RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized\nat …")

    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "init", init)
    code, out, err = dry_run(capsys, *tiny, "--processes", "8")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "torch sees 8 GPUs, but CUDA does not start on this node (Unexpected error from " in err
    assert "Error 802: system not yet initialized); see what nvidia-smi says, " in err


def test_a_gpu_older_than_all_that_torch_was_built_for_fails_the_check(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed on it; what is built as PTX runs on newer ones."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU-{device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((8, 0), (7, 0))[device])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
    said = " is built for compute capability 7.5 and newer, and GPU 1 (GPU-1) has 7.0; use a newer one, "
    code, out, err = dry_run(capsys, *tiny, "--processes", "2")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    dryrun.check_cuda_starts(1)  # by a run that does not use it
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=re.escape(said)):
        init_processes(Case().config())
    for built_for in (["sm_50", "sm_90"], ["compute_70"], ["gfx90a"], []):
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda built_for=built_for: built_for)
        check_built_for(1)


@pytest.mark.parametrize("sweep", [[], ["--sweep", "train.seed=1,2"]], ids=["a run", "a sweep"])
def test_a_run_of_more_processes_than_gpus_does_not_start(
    capsys: pytest.CaptureFixture[str],
    tiny: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    sweep: list[str],
) -> None:
    """One of them would fail when it takes its GPU, and the others wait for it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(launch, "start_local", lambda *_: pytest.fail("processes are started"))
    assert main(["train", *tiny, *sweep, "--train.output", str(tmp_path), "--processes", "8"]) == 2
    assert "8 processes on a node where torch sees 4 GPUs; start one a GPU" in capsys.readouterr().err


def test_a_launched_process_without_a_gpu_of_its_own_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match=r"^LOCAL_RANK = 4 on a node where torch sees 4 GPUs; start one process a GPU$"):
        init_processes(Case().config())


def test_the_memory_is_that_of_a_node_of_the_run(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of the check's own step in an sbatch script, which has one task on each node."""
    shares: list[int] = []
    for module in (checks, dryrun):
        monkeypatch.setattr(module, "available", lambda local: shares.append(local) or memory.available(local))
    for name, value in {"SLURM_JOB_ID": "1", "RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    code, _, err = dry_run(capsys, "--nodes", "2", "--processes", "4", *tiny)
    assert (code, err, shares) == (0, "", [4, 4])


def test_a_shared_memory_that_is_too_small(
    capsys: pytest.CaptureFixture[str], tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_shared_memory", lambda: 64 * 2**10)
    monkeypatch.setattr(dryrun, "is_elsewhere", lambda nodes: False)  # as a torch for CUDA says of a machine without
    started = [*tiny, "--processes", "2", "--data.workers"]
    code, _, err = dry_run(capsys, *started, "8")
    assert code == 2
    assert re.search(r"the 8 loader processes of each of 2 replicas .* in /dev/shm, .*--shm-size.*data.workers", err)
    assert dry_run(capsys, *started, "0")[0] == 0
    monkeypatch.setattr(dryrun, "is_elsewhere", lambda nodes: True)
    assert dry_run(capsys, *started, "8")[0] == 0, "the run's machines have their own"


def _not_dry(capsys: pytest.CaptureFixture[str], tiny: list[str]) -> str:
    assert main(["train", "--nodes", "2", *tiny]) == 2
    return capsys.readouterr().err


def test_a_task_of_srun_knows_its_rank() -> None:
    task = dict(TASK)
    adopt_slurm(task)
    assert {name: task[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")} == {
        "RANK": "11", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu07",
    }  # fmt: skip
    for node, count in enumerate(("3", "2", "2", "11")):
        uneven = TASK | {"SLURM_STEP_TASKS_PER_NODE": "3,2(x2),11", "SLURM_NODEID": str(node)}
        adopt_slurm(uneven)
        assert uneven["LOCAL_WORLD_SIZE"] == count
    assert 10_000 <= int(task["MASTER_PORT"]) < 30_000
    steps = [TASK | {"SLURM_STEP_ID": str(step), "SLURM_PROCID": rank} for step in range(500) for rank in ("0", "11")]
    for step in steps:
        adopt_slurm(step)
    ports = [int(step["MASTER_PORT"]) for step in steps]
    assert ports[::2] == ports[1::2]
    assert len({*ports}) == 500, "steps of one job that run at once do not meet each other"
    assert ports[0] == int(task["MASTER_PORT"])
    assert all(10_000 <= port < 30_000 for port in ports)


def test_what_is_set_from_outside_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    under_torchrun = TASK | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    alone = TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    for before in (under_torchrun, alone, {"SLURM_JOB_ID": "5", "SLURM_PROCID": "0"}, {}):
        after = dict(before)
        adopt_slurm(after)
        assert after == before
    named = TASK | {"MASTER_ADDR": "ib0.gpu07", "MASTER_PORT": "4000"}
    adopt_slurm(named)
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("ib0.gpu07", "4000")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bound = dict(TASK)
    adopt_slurm(bound)
    assert bound["LOCAL_RANK"] == "0"  # Slurm shows the task nothing but its own GPU


HOSTS = ("n1", "n1,n2", "gpu[003-005,9],login", "gpu[9,003-005]", "rack[1-2]-node[07-12]", "a-1,b[8-11]", "x[5]y")


def test_hosts_of_a_list() -> None:
    assert [hosts(nodes)[0] for nodes in HOSTS] == ["n1", "n1", "gpu003", "gpu9", "rack1-node07", "a-1", "x5y"]
    assert hosts("gpu[003-004,9],login") == ["gpu003", "gpu004", "gpu9", "login"]
    assert hosts("n[8-11]") == ["n8", "n9", "n10", "n11"]
    assert hosts("r[1-2]n[09-10]") == ["r1n09", "r1n10", "r2n09", "r2n10"]
    with pytest.raises(ValueError, match="names no node"):
        hosts("")


@pytest.mark.slow
def test_hosts_as_slurm_itself_reads_them(slurm: Slurm) -> None:
    for nodes in HOSTS:
        assert hosts(nodes) == slurm.run("scontrol", "show", "hostnames", nodes).splitlines()


def test_a_corpus_that_lost_part_of_a_file(capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:
    """Found in training and in held-out documents, whichever shard it is in, before anything starts."""
    whole = Path(tiny[tiny.index("--data.corpora") + 1])
    shutil.copytree(whole, tmp_path / "cut")
    file = tmp_path / "cut/tokens-00000.bin"
    file.write_bytes(file.read_bytes()[:-40])
    message = f"megatron-lcl train: {file} has {file.stat().st_size:,} bytes, but was written with "
    heldout = ["--evaluate.corpus", str(tmp_path / "cut"), "--train.evaluate_every", "1"]
    for more in (["--data.corpora", str(tmp_path / "cut")], heldout):
        code, _, err = dry_run(capsys, *tiny, *more)
        assert (code, err.startswith(message), err.count("\n")) == (2, True, 1), err


def test_a_contrast_without_pairs(capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:
    corpora = {}
    tokenizer = next(Path(tiny[tiny.index("--data.corpora") + 1]).glob("tokenizer.*"))
    for name, kind in (("leading", None), ("pairs", "pairs")):
        documents = [Document((Image(picture(k)), Text("a red stone")), kind=kind) for k in range(8)]
        write_jsonl(documents, tmp_path / name / "in")
        preprocess("jsonl", tmp_path / name / "in", tmp_path / name / "corpus", tokenizer=tokenizer)
        corpora[name] = str(tmp_path / name / "corpus")
    for objective, ending in (("lcl", "8 documents, no pair for the contrast"), ("generation", "8 documents")):
        blend = ["--data.corpora", json.dumps([{"path": path} for path in corpora.values()])]
        code, out, err = dry_run(capsys, *tiny, *blend, "--objective.name", objective)
        assert (code, err) == (0, "")
        lines = [line for line in out.splitlines() if line.startswith("data ")]
        assert [line.endswith(end) for line, end in zip(lines, (ending, "8 documents"), strict=True)] == [True, True]
    code, _, err = dry_run(capsys, *tiny, "--data.corpora", corpora["leading"])
    assert (code, err.count("\n")) == (2, 1)
    assert f"compares images with texts, but in {corpora['leading']} no image has a text before it" in err
    assert (
        dry_run(capsys, *tiny, "--data.corpora", corpora["leading"], "--data.contrast_leading_images", "true")[0] == 0
    )


def test_a_version_that_was_not_tested_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Private parts of both are used: pyproject.toml ends them below the first minor version that was not tested."""
    versions = {"torch": "2.16.0", "deepspeed": "0.20.0"}
    for name, version in versions.items():
        (wanted,) = (text for text in requirements_of_the_checkout() if Requirement(text).name == name)
        monkeypatch.setattr(dryrun, "_requirements", lambda wanted=wanted: [wanted])
        dryrun.check_requirements()
        message = f"{name} {version} is installed for {sys.executable}, and {Requirement(wanted)} is needed"
        with monkeypatch.context() as patch:
            patch.setattr(dryrun.metadata, "version", lambda _, version=version: version)
            with pytest.raises(ValueError, match=re.escape(message)):
                dryrun.check_requirements()


def requirements_of_the_checkout() -> list[str]:
    """What pyproject.toml asks for."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
