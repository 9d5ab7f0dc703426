"""Steps that one run takes to the training losses of another: Muon against AdamW, say.

    python benchmarks/steps_to_loss.py RUN OTHER [--average 30]

RUN, OTHER: run folders of the same data and number of steps, as `claim --part recipe` leaves them (DIR/runs/lcl,lr=…).
At a quarter, a half, three quarters and all of RUN's steps: its loss, the mean of the last steps up to there, and the
first step at which the same mean of OTHER is as low; a dash where it never is.
"""

from __future__ import annotations

import argparse
from itertools import accumulate
from pathlib import Path

from megatron_lcl.train.telemetry import read_metrics

LOSSES = ("loss", "generation", "contrastive")


def means(run: Path, key: str, over: int) -> list[float]:
    """The loss's mean over the steps up to each step, the last `over` of them at most."""
    values = [line[key] for line in read_metrics(run) if key in line and "num_images" in line]
    if not values:
        raise SystemExit(f"{run} has no steps with {key}")
    sums = [0.0, *accumulate(values)]
    return [(sums[i] - sums[max(0, i - over)]) / min(i, over) for i in range(1, len(sums))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("other", type=Path, metavar="OTHER")
    parser.add_argument("--average", type=int, default=30, metavar="STEPS", help="default: %(default)s")
    options = parser.parse_args()
    print(f"{'':<14}{'step of RUN':>12}{'loss':>8}{'step of OTHER':>15}{'ratio':>7}")
    for key in LOSSES:
        ours, other = (means(run, key, options.average) for run in (options.run, options.other))
        for quarter in (1, 2, 3, 4):
            step = len(ours) * quarter // 4
            # the mean of fewer steps than asked for says little
            reached = next((n for n, x in enumerate(other, 1) if n >= options.average and x <= ours[step - 1]), None)
            found = f"{reached:>15,}{reached / step:>7.2f}" if reached else f"{'-':>15}{'-':>7}"
            print(f"{key:<14}{step:>12,}{ours[step - 1]:>8.2f}{found}")


if __name__ == "__main__":
    main()
