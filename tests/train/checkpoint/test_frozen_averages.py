"""Averages of what is frozen at a resume, and later trained again, are sums over the weights that were saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from small_corpus import make_corpus
from train.resilience import fleet
from train.test_averages import write_config

from megatron_lcl.cli import main
from megatron_lcl.convert.find import find_average
from megatron_lcl.run_folder import WEIGHTS
from megatron_lcl.train.checkpoint.folder import list_checkpoints, read_progress

DECAY, RATE = 0.9, 0.05
FREEZE = ("--train.freeze", '["language.*"]')
FROZEN, FREE = ("2.embedding.weight", "2.positions", "3.mlp"), ("0.", "5.")
"""some of what is frozen and of what never is, by our names"""
ZERO3 = ("--zero.stage", "3", "--contrast.strategy", "recompute")
HALF = ("--parallel.tensor", "2", "--train.dtype", "bfloat16")
STARTS = {
    "ZeRO-3, pipeline": [
        (2, 1, ()),
        (3, 2, (*FREEZE, *ZERO3)),
        (4, 2, (*FREEZE, *ZERO3)),  # the same layout
        (5, 2, ("--parallel.pipeline", "2")),
    ],
    "tensor ranks, ZeRO-2": [
        (2, 2, HALF),
        (3, 2, (*FREEZE, *HALF)),
        (4, 2, (*FREEZE, "--zero.stage", "2")),
        (5, 2, ZERO3),
    ],
}
"""of each start the last step, the processes and the arguments"""


@pytest.mark.slow
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_averages_of_what_is_frozen_and_trained_again(
    starts: list[tuple[int, int, tuple[str, ...]]], tmp_path: Path
) -> None:
    corpus, run = make_corpus(tmp_path, seed=0), tmp_path / "run"
    words = ["--config", str(write_config(tmp_path, corpus)), "--checkpoint.every", "1", "--checkpoint.keep_last", "99"]
    words += ["--average.ema", f"[{DECAY}]", "--average.tail", "[]", "--evaluate.average", f"ema_{DECAY}"]
    words += ["--optimizer.lr", str(RATE), "--optimizer.min_lr", str(RATE), "--data.workers", "0"]
    words += ["--evaluate.corpus", str(corpus), "--train.evaluate_every", "1"]
    for steps, size, arguments in starts:
        fleet.train(run, *words, "--train.steps", str(steps), *arguments, size=size)
        if steps == 4:  # what was evaluated while it is frozen is what the folder says
            average, results = ["--average", f"ema_{DECAY}"], tmp_path / "results"
            assert main(["evaluate", str(run), "--corpus", str(corpus), "--output", str(results), *average]) == 0
            of_run, of_folder = (json.loads((place / "heldout.json").read_text()) for place in (run, results))
            assert of_folder["bits_per_token"] == pytest.approx(of_run["bits_per_token"], rel=1e-5)
    folders = list_checkpoints(run)
    weights = [load_file(folder / WEIGHTS) for folder in folders]
    assert len(weights) == 5
    for number, folder in enumerate(folders, 1):
        assert read_progress(folder).averaged == {f"ema_{DECAY}": number}
        found = load_file(find_average(folder, f"ema_{DECAY}") / WEIGHTS)
        shares = [DECAY ** (number - i) for i in range(1, number + 1)]
        for name, average in found.items():
            pairs = zip(shares, weights, strict=False)
            expected = sum(share * w[name].astype(np.float64) for share, w in pairs) / sum(shares)
            # what is frozen in bfloat16 begins with its rounded value, which the weights that were saved have as well
            np.testing.assert_allclose(average, expected, rtol=2e-5, atol=2e-6, err_msg=f"{name} after step {number}")
    for name in weights[0]:
        stays = [np.array_equal(weights[i][name], weights[i + 1][name]) for i in range(4)]
        if name.startswith(FROZEN):
            assert stays[2], name
            assert not stays[0], name
            assert not stays[3], name
        elif name.startswith(FREE):
            assert not stays[2], name


@pytest.mark.slow
def test_one_process_alone_has_an_average_of_what_is_frozen(tmp_path: Path) -> None:
    """With copies in groups (hpZ): of a parameter of one element, which one of four processes holds."""
    corpus, run = make_corpus(tmp_path, seed=0), tmp_path / "run"
    words = ["--config", str(write_config(tmp_path, corpus)), "--evaluate.corpus", str(corpus)]
    words += ["--data.workers", "0", "--optimizer.lr", str(RATE), "--optimizer.min_lr", str(RATE)]
    words += ["--average.ema", "[0.9]", "--average.tail", "[]", "--evaluate.average", "ema_0.9"]
    fleet.train(run, *words, "--train.steps", "2", size=1)
    groups = {"zero_hpz_partition_size": 2, "stage3_param_persistence_threshold": 0}
    words += ["--deepspeed", json.dumps({"zero_optimization": groups}), "--train.freeze", '["head.log_scale"]']
    said = fleet.train(run, *words, *ZERO3, "--train.steps", "4", "--train.evaluate_every", "1", size=4)
    assert "held out of ema_0.9, after step 4: " in said
