"""Whole runs through the command line on a small corpus: processes, metrics, checkpoints, going on."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apex_stand_in
import pytest
import torch
from processes import run_processes
from small_corpus import make_corpus
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl import load_model
from megatron_lcl.cli import main
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text, read_manifest
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.report.page import write_report
from megatron_lcl.train import fastest
from megatron_lcl.train import kernels as kernel_choice
from megatron_lcl.train.checkpoint import folder as checkpoint

CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  language: {{context_length: 64, vocab_size: {vocab_size}, width: 32, layers: 2, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {corpus}, cache: {cache}, tokens_per_pack: 96, images_per_pack: 4, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 4, global_batch: 4, log_every: 1, progress: false}}
checkpoint: {{every: 2}}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run on 24 documents, some without images, through the generic importer."""
    folder = tmp_path_factory.mktemp("documents")
    corpus, file = make_corpus(folder, seed=0), folder / "config.yaml"
    vocab_size = open_corpus(corpus).tokenizer.vocab_size
    file.write_text(CONFIG.format(vocab_size=vocab_size, corpus=corpus, cache=folder / "cache"))
    return file


def train(config: Path, output: Path, *arguments: str, processes: int = 2, **options: Any) -> str:
    """Processes as a launcher would start them; fast, see `fleet`."""
    return fleet.train(output, "--config", str(config), *arguments, size=processes, **options)


def launch(config: Path, output: Path, *arguments: str) -> str:
    """The command itself, with its launcher: each process imports torch and DeepSpeed, and says what."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    command = [sys.executable, "-m", "megatron_lcl", "train", "--config", str(config), "--train.output", str(output)]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=240, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stderr + result.stdout


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["contrastive"], line["grad_norm"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two processes."""
    run = tmp_path_factory.mktemp("runs") / "two"
    said = launch(config_file, run, "--processes", "2")
    run.with_name("said.txt").write_text(said)
    return run


@pytest.mark.slow
def test_a_run_leaves_metrics_and_checkpoints(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    (kernels,) = (line for line in lines if "attention" in line)
    expected = {"attention": "per_sequence", "loss_kernels": "torch", "blocks": "eager", "kernels_passed_over": []}
    assert kernels.items() >= {"step": 0, **expected}.items()
    saves = [line for line in lines if "checkpoint_bytes" in line]
    assert [line["step"] for line in saves] == [2, 4]
    assert all(0 < line["checkpoint_stall_seconds"] < 60 for line in saves)
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["generation"] < lines[0]["generation"]
    assert all(line["num_pairs"] > 0 and line["images_per_second"] > 0 for line in lines)
    assert list((finished / "tensorboard").glob("events*"))
    folders = checkpoint.list_checkpoints(finished)
    assert [f.name for f in folders] == ["step-00000002", "step-00000004"]
    assert all(checkpoint.verify(f) == [] for f in folders)
    assert not list((finished / "checkpoints").glob(".*"))
    model = load_model(finished)
    assert model.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 32)


@pytest.mark.slow
def test_a_frozen_tower_stays_in_a_pipeline(finished: Path, config_file: Path, tmp_path: Path) -> None:
    """Every stage has something to train, though layers that take as long would leave the first one nothing."""
    frozen = ["vision.*", "pool.*", "language.embedding.*", "language.positions"]
    given = ["--train.freeze", json.dumps(frozen), "--train.init_from", str(finished), "--train.steps", "2"]
    train(config_file, tmp_path / "run", "--parallel.pipeline", "2", *given)
    progress = checkpoint.last_progress(tmp_path / "run")
    assert progress is not None
    assert progress.layout.partition > (0, 3)  # the patches, one block, the pool
    before, after = (load_model(run).layers.state_dict() for run in (finished, tmp_path / "run"))
    same = {name for name, value in before.items() if torch.equal(value, after[name])}
    assert {int(name.partition(".")[0]) for name in same} >= {0, 1, 2}
    assert not any(name.startswith(("0.", "1.", "2.")) for name in before.keys() - same)
    assert any(name.startswith("3.") for name in before.keys() - same)


@pytest.mark.slow
def test_a_run_imports_what_it_needs(finished: Path) -> None:
    imported = re.findall(r"^import time:.*\| +([\w.]+)$", finished.with_name("said.txt").read_text(), re.MULTILINE)
    assert imported.count("megatron_lcl.cli") == 3, "the two processes and the one that starts them"
    for name in ("torch", "numpy", "numba", "deepspeed.runtime.zero.muon.original_muon"):
        assert imported.count(name) == 2, name
    spared = {"torch._dynamo", "torch._inductor", "sympy", "mlflow.version"} & {*imported}
    assert not spared, "seconds of each process's start"


@pytest.mark.slow
def test_a_tensor_parallel_run_is_the_same_run(finished: Path, config_file: Path, tmp_path: Path) -> None:
    """Two replicas, in each of which one process reads for two that share every layer, in place of two processes that
    read and have all layers each."""
    recomputing = ["--train.activation_checkpointing", "full", "--train.activation_checkpointing_every", "2"]
    train(config_file, tmp_path / "run", "--parallel.tensor", "2", *recomputing, processes=4)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_pipeline_is_the_same_run_and_keeps_its_partition(finished: Path, config_file: Path, tmp_path: Path) -> None:
    """Of two replicas."""
    run, layout = tmp_path / "run", ["--parallel.pipeline", "2", "--contrast.strategy", "recompute"]
    train(config_file, run, *layout, processes=4)
    before, (middle, last) = losses(run), checkpoint.list_checkpoints(run)
    assert_same_run(run, finished)
    partition = checkpoint.read_progress(last).layout.partition
    assert partition[0] == 0 < partition[1] < 6  # measured
    checkpoint.delete(last)
    as_before_partition_was_called_so(middle)
    said = train(config_file, run, *layout, processes=4)
    assert str(middle) in said
    assert "from 2 pipeline" not in said  # nothing had to be converted
    assert losses(run) == before
    assert checkpoint.read_progress(last).layout.partition == partition


def assert_same_run(run: Path, other: Path) -> None:
    """The same but for rounding, which shows most in the norm of a gradient."""
    ours, theirs = losses(run), losses(other)
    assert [row[:3] for row in ours] == [pytest.approx(row[:3], rel=1e-5) for row in theirs]
    assert [row[3] for row in ours] == pytest.approx([row[3] for row in theirs], rel=5e-5)
    assert (flat(run) - flat(other)).norm() < 1e-5 * flat(other).norm()


def as_before_partition_was_called_so(folder: Path) -> None:
    """The checkpoint as earlier versions wrote it: `cuts`, and `in_a_row` for consecutive bad steps."""
    file = folder / "progress.json"
    progress = json.loads(file.read_text())
    progress["layout"]["cuts"] = progress["layout"].pop("partition")
    progress["guard"]["in_a_row"] = progress["guard"].pop("consecutive")
    file.write_text(json.dumps(progress))
    files = read_manifest(folder)
    (folder / MANIFEST).write_text(manifest_text({**files, file.name: fingerprint(file)}))


def flat(run: Path) -> torch.Tensor:
    """All parameters but key biases: their gradients are rounding, which Adam turns into steps of full size."""
    named = load_model(run).layers.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if not name.endswith("k.bias")])


@pytest.mark.slow
def test_resuming_is_bitwise_and_rejects_damage(finished: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    shutil.copytree(finished, run)
    before = losses(run)
    newest = run / "checkpoints" / "step-00000004" / "model.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5] ^= 1
    newest.write_bytes(bytes(damaged))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "cut off')
    said = train(config_file, run)
    assert "rejected" in said
    assert "model.safetensors" in said
    assert "going on from" in said
    assert losses(run) == before
    ours, theirs = (r / "checkpoints" / "step-00000004" for r in (run, finished))
    assert checkpoint.verify(ours) == []
    before, after = read_manifest(theirs), read_manifest(ours)
    assert {name for name in before | after if before.get(name) != after.get(name)} == {"config.yaml"}, (
        "its train.output"
    )


@pytest.mark.slow
def test_going_on_at_another_layout(finished: Path, config_file: Path, tmp_path: Path) -> None:
    """From step 2 of the run of two processes: one process, ZeRO-2."""
    run = tmp_path / "one"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    said = train(config_file, run, "--zero.stage", "2", processes=1)
    assert "from 2 data, ZeRO-1, float32 to 1 process, ZeRO-2, float32" in said
    assert "MPU" not in said
    ours, theirs = (torch.tensor(losses(r), dtype=torch.float64) for r in (run, finished))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_another(
    finished: Path, config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a run of two processes, at other layouts: step 0, a new optimizer; then on from its own checkpoints."""
    weights, one, two = (tmp_path / name for name in ("weights", "one", "two"))
    shutil.copytree(finished, weights)
    asked = ["--train.init_from", str(weights), "--train.seed", "7"]
    said = train(config_file, one, *asked, processes=1)
    assert f"beginning with the weights of {weights}/checkpoints/step-00000004\n" in said
    train(config_file, two, *asked, "--parallel.tensor", "2", "--train.steps", "1")
    before = losses(one)
    assert [step for step, *_ in before] == [1, 2, 3, 4]
    assert before[0] == pytest.approx(losses(two)[0], rel=1e-5)
    assert before[0][1] < losses(finished)[1][1] < losses(finished)[0][1], "better than what is drawn"
    event = json.loads((one / "audit.jsonl").read_text().splitlines()[0])
    assert (event["event"], event["step"], event["missing"], event["unused"]) == ("initial weights", 0, [], [])
    assert configs.load(one / "config.yaml").train.init_from == str(weights)

    shutil.rmtree(weights)  # the run needs it no more
    shutil.rmtree(one / "checkpoints" / "step-00000004")
    said = train(config_file, one, *asked, processes=1)
    assert "going on from" in said
    assert "beginning with" not in said
    assert losses(one) == before
    fault, new = f"train.init_from = {weights} does not exist", tmp_path / "new"
    assert fault in train(config_file, new, *asked, code=2)
    assert main(["train", "--dry-run", "--config", str(config_file), "--train.output", str(new), *asked]) == 2
    assert fault in capfd.readouterr().err


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(finished: Path, config_file: Path) -> None:
    before = losses(finished)
    train(config_file, finished)
    assert losses(finished) == before


@pytest.mark.slow
def test_the_report_shows_the_packs_that_were_read(finished: Path, tmp_path: Path) -> None:
    """Also after the blend has changed; the newest checkpoint's ledger may be damaged."""
    run, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(finished, run)
    config = configs.load(run / "config.yaml")
    before = Path(config.data.corpora[0].path)
    shutil.copytree(before, other)
    manifest = other / "corpus.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "source": {"name": "another"}}))
    blend = [{"path": str(before), "weight": 1.0}, {"path": str(other), "weight": 9.0}]
    (run / "config.yaml").write_text(configs.to_yaml(configs.replace(config, data__corpora=blend)))
    (run / "checkpoints" / "step-00000004" / "progress.json").write_text("{")
    page = write_report(run).read_text()
    assert page.count('<details class="pack"') == config.train.global_batch
    sources = re.findall(r"<header><b>Document \d+</b>.*? of (\S+), epoch", page)
    assert len(sources) > 8
    assert set(sources) == {str(before)}
    assert "Plan and measured" not in page, "of a CPU"
    metrics = (run / "metrics.jsonl").read_text()
    assert '"hardware": {"device": "cpu", "processes": 2, "nodes": 1}' in metrics
    (run / "metrics.jsonl").write_text(metrics.replace('"device": "cpu"', '"device": "NVIDIA H100 80GB HBM3"'))
    page = write_report(run).read_text()
    assert "Planned for tensor 1, pipeline 1, ZeRO-1," in page
    assert "on 2 processes (h100, by its data sheet), with full packs" in page
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td><td>([\d.]+)</td></tr>", page)
    measured = json.loads([line for line in metrics.splitlines() if '"loss"' in line][-1])
    assert ("a step", f"{measured['step_seconds']:,.4g} s") in [(title, value) for title, _, value, _ in rows]
    assert {"images a second", "tokens a second", "peak memory of a process"} <= {title for title, *_ in rows}


@pytest.mark.slow
def test_one_process_gives_the_same_losses(finished: Path, config_file: Path, tmp_path: Path) -> None:
    train(config_file, tmp_path / "one", processes=1)
    ours, theirs = (torch.tensor(losses(run), dtype=torch.float64) for run in (tmp_path / "one", finished))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_a_run_of_another_model_is_not_overwritten(finished: Path, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = losses(run)
    for change, words in (
        (["--model.language.layers", "1"], "model.language.layers 2 → 1"),
        (["--model.language.vocab_size", "500"], "set model.language.vocab_size to"),
    ):
        assert words in train(config_file, run, *change, code=2)
    assert losses(run) == before


def small_disk(rank: int) -> None:
    """A limit on the size of files stands in for the disk: the checkpoint's write fails in the middle."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_saving(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    said = fleet.train(run, "--config", str(config_file), size=1, code=2, plant=small_disk)
    assert said.strip().splitlines()[-1].startswith("megatron-lcl train: process 0 could not write the checkpoint")
    assert "Traceback" not in said
    assert not any((run / "checkpoints").iterdir())


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_cuda_device(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL, with the losses of a CPU: in float32 to rounding; in bfloat16, which `auto` takes, by selftest's bound."""
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        launch(config_file, tmp_path / "cpu", "--processes", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    launch(config_file, tmp_path / "float32", "--processes", "1", "--train.dtype", "float32")
    launch(config_file, tmp_path / "auto", "--processes", "1")
    runs = [tmp_path / name for name in ("cpu", "float32", "auto")]
    layouts = [checkpoint.read_progress(checkpoint.list_checkpoints(run)[-1]).layout for run in runs]
    assert [layout.dtype for layout in layouts] == ["float32", "float32", "bfloat16"]
    theirs, ours, rounded = (torch.tensor(losses(run), dtype=torch.float64) for run in runs)
    assert len(ours) == 4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    # Adam's first steps are as large for a small gradient as for a large one: later ones differ by more
    torch.testing.assert_close(rounded[0], theirs[0], rtol=5e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_deterministic_runs_on_cuda_are_equal_to_the_last_bit(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, and one that goes on from step 2, on the device's own kernels in bfloat16."""
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    runs = [tmp_path / name for name in ("one", "two", "resumed")]
    for run in runs[:2]:
        launch(config_file, run, "--processes", "1", "--train.deterministic", "true")
    shutil.copytree(runs[0], runs[2])
    checkpoint.delete(checkpoint.list_checkpoints(runs[2])[-1])
    assert "going on from" in launch(config_file, runs[2], "--processes", "1", "--train.deterministic", "true")
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    weights = [(checkpoint.list_checkpoints(run)[-1] / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1] == weights[2]


APEX = {  # what the config asks of it; its own kernels need a GPU
    "optimizers": Path(apex_stand_in.__file__).read_text(encoding="utf-8"),
    "normalization": """
import torch
class FusedLayerNorm(torch.nn.LayerNorm):
    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        print("FusedLayerNorm()")
""",
}


def import_from(_rank: int, folder: str) -> None:
    sys.path.insert(0, folder)


@pytest.mark.slow
def test_apex_is_used_where_it_is_asked_for(
    finished: Path,
    config_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    asked = ["--optimizer.name", "apex_fused_adam", "--train.apex_layer_norm"]
    run = tmp_path / "run"
    for words, message in ((asked[:2], "optimizer.name is apex_fused_adam"), (asked[2:], "train.apex_layer_norm is")):
        dry = ["train", "--dry-run", "--processes", "2", "--config", str(config_file), "--train.output", str(run)]
        assert main([*dry, *words]) == 2
        train(config_file, run, *words, code=2)
        logs = "".join(log.read_text() for log in tmp_path.glob("run.*.log"))
        for said in (capfd.readouterr().err, logs):
            line = fleet.line_of(said)
            assert line.startswith(f"megatron-lcl train: {message}")
            assert "NVIDIA's apex is not installed" in line
    assert not run.exists()
    for name, text in APEX.items():
        (tmp_path / "apex" / name).mkdir(parents=True)
        (tmp_path / "apex" / name / "__init__.py").write_text(text)
    (tmp_path / "apex" / "__init__.py").write_text("")
    said = train(config_file, run, *asked, processes=1, plant=import_from, planted=(str(tmp_path),))
    assert said.count("FusedAdam.step") == 4 * 2  # ZeRO steps group by group
    norms = [m for m in load_model(finished).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert said.count("FusedLayerNorm()") == len(norms)
    ours, theirs = (torch.tensor(losses(r), dtype=torch.float64) for r in (run, finished))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


def plant_costs(_rank: int, compiled: float) -> None:
    """Compiled blocks take so many times as long. Nothing is made of their graphs: `test_compile.py` does, in C++."""
    kernel_choice.has_compiler = lambda: True
    torch.compile = functools.partial(torch.compile, backend="eager")
    torch._inductor.config.compile_threads = 1  # else processes start that would compile for it
    agree = fastest.agree_on_costs

    def said(times: Sequence[Any], *more: Any) -> list[float]:
        costs = agree(times, *more)
        said.calls += 1  # type: ignore[attr-defined]
        return [1.0 if said.calls % 2 else compiled for _ in costs]  # type: ignore[attr-defined]

    said.calls = 0  # type: ignore[attr-defined]
    fastest.agree_on_costs = said


@pytest.mark.slow
@pytest.mark.skipif(not kernel_choice.has_compiler(), reason="torch.compile needs a C++ compiler here")
def test_a_run_measures_its_own_layers_and_keeps_its_kernels(config_file: Path, tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = ["--config", str(config_file), "--data.cache", str(cache), "--train.measure_kernels", "true"]
    words += ["--checkpoint.every", "1", "--model.language.layers", "1"]
    said = fleet.train(run, *words, "--train.steps", "1", size=1, plant=plant_costs, planted=(2.0,))
    assert "kernels measured: per_sequence (a micro-batch through all layers: per_sequence " in said
    train = configs.load(run / "config.yaml").train
    assert (train.attention, train.compile, train.measure_kernels) == ("per_sequence", False, True)
    (kept,) = cache.glob("kernels-*.json")
    kept.unlink()
    said = fleet.train(run, *words, "--train.steps", "2", size=1, plant=plant_costs, planted=(0.5,))
    assert "going on from" in said
    assert "kernels measured" not in said
    assert "setting changed: train.compile" not in said
    assert not list(cache.glob("kernels-*.json"))
    train = configs.load(run / "config.yaml").train
    assert (train.attention, train.compile) == ("per_sequence", False)
    run = tmp_path / "compiled"
    fleet.train(run, *words, "--train.steps", "1", size=1, plant=plant_costs, planted=(0.5,))
    said = fleet.train(run, *words, "--train.steps", "2", size=1, plant=plant_costs, planted=(2.0,))
    assert "kernels measured" not in said
    assert "kernels: attention per_sequence, losses torch, blocks compiled\n" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["blocks"] for line in lines if "loss_kernels" in line] == ["compiled"] * 2


@pytest.mark.slow
def test_processes_of_a_launcher_are_checked_too(config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["--config", str(config_file), "--model.language.vocab_size", "500"]
    said = fleet.train(run, *words, size=1, code=2)
    assert said.strip().splitlines()[-1].startswith("megatron-lcl train: model.language.vocab_size is 500")
    assert not run.exists()


def train_twice(rank: int, file: str, folder: str) -> list[str]:
    """As a loop over learning rates in a script; the final checkpoints."""
    from megatron_lcl.train.run import train as train_here

    if os.environ["WORLD_SIZE"] == "1":
        os.environ["MASTER_PORT"] = "0"  # as without a launcher
    given = {"data.workers": "0", "train.steps": "1", "train.dtype": "float32"}
    runs = {rate: {**given, "optimizer.lr": rate, "train.output": f"{folder}/{rate}"} for rate in ("1e-2", "1e-3")}
    return [str(train_here(configs.load(file, run))) for run in runs.values()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_may_train_more_than_once(processes: int, config_file: Path, tmp_path: Path) -> None:
    made = run_processes(train_twice, processes, str(config_file), str(tmp_path))
    assert made == [[str(checkpoint.step_folder(tmp_path / rate, 1)) for rate in ("1e-2", "1e-3")]] * processes
    assert [step for rate in ("1e-2", "1e-3") for step, *_ in losses(tmp_path / rate)] == [1, 1]
