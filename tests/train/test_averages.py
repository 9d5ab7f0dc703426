"""A run by the command line with Muon, a frozen part and averages: what it measures of one, `evaluate` measures."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
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
from megatron_lcl.train.averages import Averages, average_names
from megatron_lcl.train.checkpoint.folder import list_checkpoints, read_progress, step_of, verify

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
    corpus, run = make_corpus(tmp_path, seed=0), tmp_path / "run"
    file = write_config(tmp_path, corpus)
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


def write_config(folder: Path, corpus: Path) -> Path:
    """Of a run of four steps with averages, which saves after every second one."""
    file, size = folder / "config.yaml", open_corpus(corpus).tokenizer.vocab_size
    file.write_text(CONFIG.format(vocab_size=size, corpus=corpus, cache=folder / "cache") + RECIPE)
    return file


@pytest.mark.slow
def test_no_checkpoint_has_a_tail_that_has_not_begun(tmp_path: Path) -> None:
    """After 4 of 4 steps the run is given 12, of which the last 6 are meant: at step 6 there is none."""
    run, words = tmp_path / "run", ["--config", str(write_config(tmp_path, make_corpus(tmp_path, seed=0)))]
    words += ["--checkpoint.keep_last", "9"]
    said = fleet.train(run, *words, size=1)
    assert "evaluate.average is not measured during the run: train.evaluate_every is 0" in said
    fleet.train(run, *words, "--train.steps", "12", size=1)
    saved = {step_of(folder): folder for folder in list_checkpoints(run)}
    counts = {step: read_progress(folder).averaged.get("tail_0.5") for step, folder in saved.items()}
    assert counts == {2: None, 4: 2, 6: None, 8: 2, 10: 4, 12: 6}
    for step, folder in saved.items():
        assert find_average(folder, "ema_0.5").is_dir()
        if counts[step]:
            assert find_average(folder, "tail_0.5").is_dir()
            continue
        with pytest.raises(UserError, match=r"has no average tail_0\.5"):
            find_average(folder, "tail_0.5")


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

    def __init__(self, steps: int, tail: float, ema: float = 0.5) -> None:
        averages = {"average.tail": f"[{tail}]", "average.ema": f"[{ema}]"}
        config = configs.load(None, averages | {"train.steps": str(steps)})
        self.flat, self.state = torch.zeros(1), {}
        base = SimpleNamespace(state={self.flat: self.state})
        engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=base), module=torch.nn.Module())
        super().__init__(config, engine)

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


def test_averages_of_different_numbers_have_different_names() -> None:
    """Those of the others are as checkpoints have them: of six digits."""
    alone, close = (0.9, 0.9999, 1 - 1 / 32_000), (0.5, 0.50000001, 0.50000002)
    config = configs.from_dict({"average": {"ema": [*alone, *close], "tail": [0.25, 1 / 3, 1, 1e-5]}})
    assert average_names(config) == {
        **{"ema_0.9": 0.9, "ema_0.9999": 0.9999, "ema_0.999969": alone[2]},
        **{f"ema_{value!r}": value for value in close},
        **{"tail_0.25": 0.25, "tail_0.333333": 1 / 3, "tail_1": 1, "tail_1e-05": 1e-5},
    }
    for kind in ("ema", "tail"):
        with pytest.raises(UserError, match=rf"average\.{kind} = \[0\.5, 0\.25, 0\.5\]: give each once$"):
            configs.from_dict({"average": {kind: [0.5, 0.25, 0.5]}})


def test_a_tail_of_a_short_run_is_of_its_last_step() -> None:
    run = OneNumber(4, 0.1)
    assert run.steps(1, 4, {}) == {"ema_0.5": 4, "tail_0.1": 1}
    assert run.state["tail_0.1"].item() == 4


@pytest.mark.parametrize(("steps", "count", "mean"), [(20, 10, 15.5), (6, 2, 5.5), (4, 2, 3.5)])
def test_a_tail_of_a_run_that_is_given_more_steps_begins_anew(steps: int, count: int, mean: float) -> None:
    """After 4 of 4 steps, of which it has the last two; of 6 the last three are meant, and of them two are to come."""
    before, after = OneNumber(4, 0.5), OneNumber(steps, 0.5)
    averaged = before.steps(1, 4, {})
    assert averaged == {"ema_0.5": 4, "tail_0.5": 2}
    after.state.update(before.state)
    averaged = after.begin(averaged, 4)
    assert averaged == {"ema_0.5": 4} | ({"tail_0.5": 2} if steps == 4 else {})
    assert after.state.keys() == averaged.keys(), "what is not gone on with is not kept"
    averaged = after.steps(5, steps, averaged)
    assert averaged == {"ema_0.5": steps, "tail_0.5": count}
    assert after.state["tail_0.5"].item() == mean


@pytest.mark.parametrize(
    ("before", "at", "now", "has"),
    [(8, 4, 6, 2), (4, 4, 6, 2), (8, 5, 7, 3), (8, 6, 8, None), (8, 3, 6, None), (4, 4, 20, None), (8, 4, 7, 3)],
)
def test_a_tail_that_will_be_too_short_is_said(before: int, at: int, now: int, has: int | None) -> None:
    """A run of so many steps goes on after so many as one of so many; of these the second half are meant."""
    first, then = OneNumber(before, 0.5), OneNumber(now, 0.5)
    averaged = first.steps(1, at, {})
    then.state.update(first.state)
    averaged = then.begin(averaged, before)
    said = list(then.short_tails(averaged, at))
    number, meant = then.steps(at + 1, now, averaged)["tail_0.5"], round(now / 2)
    assert (number < meant) == bool(said)
    if said:
        assert number == has
        what = f"tail_0.5 is the mean of {number} steps, not of the last {meant}: the weights of the others were"
        assert said == [f"{what} not kept, or their steps were skipped"]
        if at + 1 < now:  # and again, at a later start of the same run
            again = OneNumber(now, 0.5)
            again.state.update(then.state)
            assert list(again.short_tails(again.begin(then.steps(at + 1, at + 1, averaged), now), at + 1)) == said


def test_after_a_rewind_a_tail_is_said_to_be_of_as_many_steps_as_it_is() -> None:
    """Of 20 steps the last 10 are meant; the run goes on after 14 without their average, and goes back twice."""
    run = OneNumber(20, 0.5)

    def said(step: int, averaged: dict[str, int]) -> list[str]:
        return [line.partition(" of ")[2].partition(":")[0] for line in run.short_tails(averaged, step)]

    assert said(14, {}) == ["6 steps, not of the last 10"]
    assert said(14, {}) == [], "once"
    assert said(12, {}) == ["8 steps, not of the last 10"]
    assert said(16, {"tail_0.5": 4}) == []
    assert said(8, {}) == ["10 steps, all that it is meant to be of"]
    assert said(13, {"tail_0.5": 3}) == []
    assert said(13, {"tail_0.5": 2}) == ["9 steps, not of the last 10"]


def test_after_a_rewind_an_average_is_again_of_as_many_steps_as_the_checkpoint_says() -> None:
    """From step 16 back to step 12 of 20, of which the last 10 are meant."""
    run = OneNumber(20, 0.5)
    averaged = run.steps(1, 12, {})
    saved = {name: average.clone() for name, average in run.state.items()}
    run.steps(13, 16, averaged)
    run.state.update(saved)
    averaged = run.steps(13, 20, run.begin(averaged, 20))
    assert averaged == {"ema_0.5": 20, "tail_0.5": 10}
    assert run.state["tail_0.5"].item() == pytest.approx(15.5)


def test_steps_that_were_skipped_keep_no_tail_that_is_too_long() -> None:
    """Of 10 steps the last 5 are meant, and 2 of them were skipped; of 14 the last 7, and the sixth is none of them."""
    before, after = OneNumber(10, 0.5), OneNumber(14, 0.5)
    averaged = before.steps(1, 6, {})
    for step in (7, 8):
        before.update(step, True)
    averaged = before.steps(9, 10, averaged)
    assert averaged == {"ema_0.5": 8, "tail_0.5": 3}
    after.state.update(before.state)
    averaged = after.begin(averaged, 10)
    assert averaged == {"ema_0.5": 8}
    after.steps(11, 14, averaged)
    assert after.state["tail_0.5"].item() == 12.5


def test_a_change_late_in_a_long_run_is_not_lost() -> None:
    """Of a million steps the mean of the last 100,000, and an exponential average over as many: 1, and from step
    950,001 on a little more, which is less than float32 can add of one step."""
    number, more, begun, decay = 10_000, 0.01, 950_000, 0.99999
    run = OneNumber(1_000_000, 0.1, decay)
    names = {"tail_0.1": 50_000, "ema_0.99999": begun}
    run.state.update({name: torch.ones(1) for name in names})
    averaged = run.begin(names, 1_000_000)
    run.flat.fill_(1 + more)
    for step in range(begun + 1, begun + number + 1):
        run.update(step, False)
        averaged = run.count(step, averaged)
    assert averaged == {name: before + number for name, before in names.items()}
    tail = more * number / (50_000 + number)
    ema = more * (1 - decay**number) / (1 - decay ** (begun + number))
    torch.testing.assert_close(run.state["tail_0.1"].item() - 1, tail, rtol=0.1, atol=0)
    torch.testing.assert_close(run.state["ema_0.99999"].item() - 1, ema, rtol=0.1, atol=0)


def test_after_an_error_in_an_evaluation_nothing_is_exchanged_with_processes_that_had_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are at another collective; and the run ends."""
    run, exchanged = OneNumber(20, 0.5, 0.9), list[str]()
    run._config = configs.replace(run._config, evaluate__average="ema_0.9")
    monkeypatch.setattr(run, "_exchange", exchanged.append)
    with run.evaluated({"ema_0.9": 3}) as name:
        assert (name, exchanged) == ("ema_0.9", ["ema_0.9"])
    assert exchanged == ["ema_0.9"] * 2
    with pytest.raises(MemoryError), run.evaluated({"ema_0.9": 3}):
        raise MemoryError
    assert exchanged == ["ema_0.9"] * 3


def test_of_a_long_tail_and_a_slow_average_every_kth_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the device alone knows what was skipped, and resumed anywhere, to the last bit; no host waits."""
    monkeypatch.setattr("megatron_lcl.train.averages.MOST", 4)
    skipped, weights = {11, 12, 16, 19}, torch.rand(21, generator=torch.Generator().manual_seed(0))

    def go_on(run: OneNumber, first: int, last: int, averaged: dict[str, int]) -> dict[str, int]:
        for step in range(first, last + 1):
            run.flat.fill_(weights[step])
            run.update(step, torch.tensor(float(step in skipped)))
            averaged = averaged if step in skipped else run.count(step, averaged)
        return averaged

    whole = OneNumber(20, 0.5, 0.9)
    averaged = go_on(whole, 1, 20, {})
    assert averaged == {"ema_0.9": 16, "tail_0.5": 6}
    applied = [step for step in range(1, 21) if step not in skipped]
    tail = weights[[step for step in applied if step > 10][::3]]  # 10 steps, 4 of which may be taken
    torch.testing.assert_close(whole.state["tail_0.5"], tail.mean()[None])
    ema, decay = weights[applied[::3]], 0.9**3
    factors = torch.tensor([decay ** (len(ema) - 1 - number) for number in range(len(ema))])
    torch.testing.assert_close(whole.state["ema_0.9"], (ema @ factors / factors.sum())[None])
    for at in range(1, 20):
        before, after = OneNumber(20, 0.5, 0.9), OneNumber(20, 0.5, 0.9)
        averaged = go_on(before, 1, at, {})
        after.state.update({name: before.state[name].clone() for name in averaged})
        assert go_on(after, at + 1, 20, after.begin(averaged, 20)) == {"ema_0.9": 16, "tail_0.5": 6}
        assert after.state == whole.state, at


def test_every_step_of_a_run_that_is_shorter_than_its_average_counts() -> None:
    run, decay = OneNumber(100, 0.5, 0.99999), 0.99999
    run.steps(1, 100, {})
    factors = [decay ** (100 - step) for step in range(1, 101)]
    mean = sum(factor * step for step, factor in enumerate(factors, 1)) / sum(factors)
    torch.testing.assert_close(run.state["ema_0.99999"].item(), mean, rtol=1e-6, atol=0)


def test_a_tail_of_which_every_step_was_taken_goes_on_with_every_kth(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkpoint of an earlier version: six steps, and then every third, each for three."""
    before, after = OneNumber(24, 0.5), OneNumber(24, 0.5)
    averaged = before.steps(1, 18, {})
    assert averaged["tail_0.5"] == 6
    monkeypatch.setattr("megatron_lcl.train.averages.MOST", 4)
    after.state.update(before.state)
    averaged = after.steps(19, 24, after.begin(averaged, 24))
    assert averaged["tail_0.5"] == 12
    mean = (sum(range(13, 19)) + 3 * 19 + 3 * 22) / 12
    torch.testing.assert_close(after.state["tail_0.5"].item(), mean, rtol=1e-6, atol=0)
