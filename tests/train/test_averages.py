"""A run by the command line with Muon, a frozen part and averages: what it measures of one, `evaluate` measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_corpus import make_corpus
from train.resilience import fleet
from train.test_training_runs import CONFIG

from megatron_lcl import config as configs
from megatron_lcl import load_model
from megatron_lcl.cli import main
from megatron_lcl.convert.card import card_of
from megatron_lcl.convert.find import find_average
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import WEIGHTS
from megatron_lcl.train.averages import Averages
from megatron_lcl.train.checkpoint.folder import list_checkpoints, verify

RECIPE = """
average: {ema: [0.5], tail: [0.5]}
evaluate: {average: ema_0.5}
"""
MUON = ("--optimizer.name", "muon", "--train.freeze", "language.positions")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [("--parallel.tensor", "2"), ("--zero.stage", "3", "--contrast.strategy", "recompute")]
)
def test_what_is_measured_of_an_average(layout: tuple[str, ...], tmp_path: Path) -> None:
    corpus, run, file = make_corpus(tmp_path, seed=0), tmp_path / "run", tmp_path / "config.yaml"
    size = open_corpus(corpus).tokenizer.vocab_size
    file.write_text(CONFIG.format(vocab_size=size, corpus=corpus, cache=tmp_path / "cache") + RECIPE)
    held_out = ("--evaluate.corpus", str(corpus), "--train.evaluate_every", "2")
    said = fleet.train(run, "--config", str(file), *MUON, *held_out, *layout)
    assert "held out of ema_0.5, after step 4: " in said
    measured = json.loads((run / "heldout.json").read_text())
    results = {}
    for name, average in {"weights": [], "ema_0.5": ["--average", "ema_0.5"]}.items():
        assert main(["evaluate", str(run), "--corpus", str(corpus), "--output", str(tmp_path / name), *average]) == 0
        results[name] = json.loads((tmp_path / name / "heldout.json").read_text())
    for name in ("bits_per_token", "contrastive_loss"):
        assert results["ema_0.5"][name] == pytest.approx(measured[name], rel=1e-5)
        assert results["weights"][name] != pytest.approx(measured[name], rel=1e-3)
    assert (results["ema_0.5"]["step"], results["ema_0.5"]["average"]) == (measured["step"], measured["average"])
    # what the card of an export quotes is of what is exported
    average = find_average(run, "ema_0.5")
    assert card_of(average).metrics
    assert not card_of(run).metrics
    last = list_checkpoints(run)[-1]
    assert average == last / "averages" / "ema_0.5"
    assert verify(last) == []
    assert_exports(run, average, tmp_path)
    (average / WEIGHTS).write_bytes((last / WEIGHTS).read_bytes())
    assert verify(last) != []
    with pytest.raises(UserError, match="damaged"):
        load_model(average)


def assert_exports(run: Path, average: Path, tmp_path: Path) -> None:
    """`export --average` writes what an export of the average's own folder does."""
    assert main(["export", str(run), "--format", "hf", "--average", "ema_0.5", "--output", str(tmp_path / "hf")]) == 0
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, others, exported = (load_model(path).encode_image(images) for path in (average, run, tmp_path / "hf"))
    torch.testing.assert_close(exported, ours, rtol=0, atol=1e-5)
    assert float((ours - others).abs().max()) > 1e-3


class OneNumber(Averages):
    """Averages of one number, without an engine; the weights after a step are its number."""

    def __init__(self, steps: int, tail: float) -> None:
        config = configs.load(None, {"average.tail": f"[{tail}]", "average.ema": "[0.5]", "train.steps": str(steps)})
        super().__init__(config, None, None)  # type: ignore[arg-type]
        self.flat, self.state = torch.zeros(1), {}

    def _states(self) -> Any:
        yield self.flat, self.state

    def steps(self, first: int, last: int, averaged: dict[str, int]) -> dict[str, int]:
        for step in range(first, last + 1):
            self.flat.fill_(step)
            self.update(step, False)
            averaged = self.count(step, averaged)
        return averaged


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.8, 0.9])
def test_a_tail_is_of_as_many_steps_as_it_says(fraction: float) -> None:
    for steps in (10, 100, 1000):
        run = OneNumber(steps, fraction)
        number = round(fraction * steps)
        assert run.steps(1, steps, {})[f"tail_{fraction:g}"] == number
        torch.testing.assert_close(run.state[f"tail_{fraction:g}"].item(), steps - (number - 1) / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("steps", "count", "mean"), [(20, 10, 15.5), (6, 2, 5.5), (4, 2, 3.5)])
def test_a_tail_of_a_run_that_is_given_more_steps_begins_anew(steps: int, count: int, mean: float) -> None:
    """After 4 of 4 steps, of which it has the last two; of 6 the last three are meant, and of them two are to come."""
    before, after = OneNumber(4, 0.5), OneNumber(steps, 0.5)
    averaged = before.steps(1, 4, {})
    assert averaged == {"ema_0.5": 4, "tail_0.5": 2}
    after.state = before.state
    averaged = after.begin(averaged, 4)
    assert averaged == {"ema_0.5": 4} | ({"tail_0.5": 2} if steps == 4 else {})
    averaged = after.steps(5, steps, averaged)
    assert averaged == {"ema_0.5": steps, "tail_0.5": count}
    assert after.state["tail_0.5"].item() == mean
