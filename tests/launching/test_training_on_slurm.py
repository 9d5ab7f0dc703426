"""Training on a real Slurm: a job over two nodes that is put back into the queue ends like a run that never stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from data_corpus.writers import picture, write_jsonl
from local_slurm import Slurm

from megatron_lcl.data.document import Document, Image, Text
from megatron_lcl.data.preprocess import preprocess

SCRIPT = Path(__file__).parents[2] / "launch" / "lcl_vitg.sh"
STEPS = 60
WORDS = "a red round stone lies under the green tree while water runs past an old mill".split()  # noqa: SIM905
TINY = f"""
--model.vision.image_size 16 --model.vision.patch_size 8 --model.vision.width 32 --model.vision.layers 2
--model.vision.heads 2 --model.vision.mlp_width 64 --model.language.width 32 --model.language.layers 1
--model.language.heads 2 --model.language.mlp_width 64 --model.language.context_length 64 --model.pool_heads 2
--data.tokens_per_pack 96 --data.images_per_pack 4 --data.workers 1 --optimizer.lr 1e-2 --optimizer.warmup 1
--parallel.tensor 1 --train.global_batch 8 --train.steps {STEPS} --train.log_every 1 --checkpoint.every 25
""".split()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model on a tiny corpus, whose path has a space."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    words = [" ".join(WORDS[i % 9 : i % 9 + 6]) for i in range(40)]
    write_jsonl([Document((Text(text), Image(picture(i)), Text(text))) for i, text in enumerate(words)], folder / "in")
    vocab_size = preprocess("jsonl", folder / "in", folder / "corpus", vocab_size=400).vocab_size
    places = ["--data.corpora", str(folder / "corpus"), "--data.cache", str(folder / "cache")]
    return [*TINY, *places, "--model.language.vocab_size", str(vocab_size)]


def losses(run: Path) -> list[tuple[int, float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["contrastive"], line["grad_norm"]) for line in lines if "loss" in line]


def sbatch(slurm: Slurm, folder: Path, *arguments: str) -> str:
    environment = {**slurm.environment, "VENV": str(Path(sys.executable).parents[1]), "MASTER_ADDR": "127.0.0.1"}
    options = ["--parsable", "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1"]
    return slurm.run("sbatch", *options, SCRIPT, *arguments, cwd=folder, env=environment)


@pytest.mark.slow
def test_requeued_over_two_nodes_it_ends_like_an_undisturbed_run(
    slurm: Slurm, arguments: list[str], tmp_path: Path
) -> None:
    folder, run = tmp_path / "sub mit", tmp_path / "sub mit" / "a run"
    folder.mkdir()
    job = sbatch(slurm, folder, *arguments, "--train.output", "a run")
    metrics, log = run / "metrics.jsonl", folder / f"lcl_vitg-{job}.log"
    slurm.wait(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, "six steps", 200)
    slurm.run("scontrol", "requeue", job)
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", "the job has ended", 200)
    assert slurm.field(job, "Restarts") == "1"
    first = (folder / f"lcl_vitg-{job}" / "rank-0000.log").read_text()
    stopped = re.search(r"SIGTERM: ended after step (\d+)", first)
    assert stopped is not None, first
    assert 5 < int(stopped[1]) < STEPS
    assert f"step-{int(stopped[1]):08d}" in first  # going on from there
    assert log.read_text().count("processes   2: 1 on each of 2 nodes, meeting at 127.0.0.1:") == 2

    undisturbed = tmp_path / "undisturbed"
    config = SCRIPT.parents[1] / "configs" / "lcl_vitg_interleaved.yaml"
    command = [sys.executable, "-m", "megatron_lcl", "train", "--processes", "2", "--config", str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--train.output", str(undisturbed)], check=True, timeout=200, env=environment)
    assert losses(run) == losses(undisturbed)
    assert [step for step, *_ in losses(run)] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_what_is_wrong_is_one_line_before_anything_starts(slurm: Slurm, arguments: list[str], tmp_path: Path) -> None:
    job = sbatch(slurm, tmp_path, *arguments, "--data.corpora", "/nowhere")
    slurm.wait(lambda: slurm.state(job) == "FAILED", "the job fails")
    lines = (tmp_path / f"lcl_vitg-{job}.log").read_text().splitlines()
    assert lines[1:] == [
        "megatron-lcl train: /nowhere is not a corpus: it has no corpus.json; write one with `megatron-lcl preprocess` "
        "(on n1 n2)"
    ]
    assert not list((tmp_path / f"lcl_vitg-{job}").glob("rank-*"))
