"""SIGKILL at random moments of training and of saving: nothing is lost and nothing goes on silently wrong."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from fleet import Fleet, last_step, lines, losses, train

from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.checkpoint import folder as checkpoint

LONG = [pytest.mark.soak, pytest.mark.timeout(7200)]


@pytest.mark.slow
@pytest.mark.parametrize(("rounds", "steps"), [(25, 60), pytest.param(250, 1000, marks=LONG)])
def test_killed_again_and_again(rounds: int, steps: int, config_file: str, tmp_path: Path) -> None:
    """Every step is saved in the background, so that most moments are moments of saving."""
    words = ["--config", config_file, "--train.steps", str(steps), "--train.global_batch", "2"]
    words += ["--checkpoint.every", "1"]
    started = time.time()
    train(tmp_path / "undisturbed", *words, timeout=600)
    times = [line["time"] for line in lines(tmp_path / "undisturbed") if "loss" in line]
    start, two_steps = times[0] - started, 2 * (times[-1] - times[0]) / steps
    run, draw, at = tmp_path / "killed", random.Random(7), 0
    for number in range(rounds):
        # a start may be quicker than the first one was, and so may steps: no round comes to the end of the run
        most = max(at + 1, min(at + 5, steps * (number + 1) // (rounds + 5)))
        with Fleet(run, *words) as fleet:
            if number % 5:
                fleet.wait_for_step(min(at + draw.randrange(1, 3), most))
            end = time.monotonic() + draw.uniform(0, two_steps if number % 5 else start)
            while time.monotonic() < end and last_step(run) < most:
                time.sleep(0.01)
            assert fleet.is_alive(), f"round {number}: all had ended"
            fleet.kill()
        at = last_step(run)
        complete = checkpoint.list_checkpoints(run)
        assert [f for f in complete if checkpoint.verify(f)] == [], f"round {number}"
        if complete:
            assert checkpoint.step_of(complete[-1]) >= at - 2, "more than the save in writing was lost"
    said = train(run, *words, timeout=600)
    assert "going on from" in said
    assert "rejected" not in said
    assert losses(run) == losses(tmp_path / "undisturbed")
    assert not list((run / CHECKPOINTS).glob(".*"))
