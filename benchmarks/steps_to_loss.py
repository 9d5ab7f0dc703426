"""Steps that one run takes to the training losses that another ends with: Muon against AdamW, say, at the same rate.

    python benchmarks/steps_to_loss.py RUN OTHER

RUN, OTHER: run folders of the same data and number of steps, as `claim --part recipe` leaves them (DIR/runs/lcl,lr=…).
Of each loss that both have in every step: the steps of RUN, those after which OTHER is where RUN ends, and their ratio;
a dash where it never is. Losses are means of the last twentieth of a run, as in claim's own table, which compares each
row at the rate that was chosen for it.
"""

from __future__ import annotations

import argparse

from arguments import existing_folder
from claims import exit_with

from megatron_lcl.claim.run import steps_to
from megatron_lcl.train.telemetry import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=existing_folder, metavar="RUN")
    parser.add_argument("other", type=existing_folder, metavar="OTHER")
    options = parser.parse_args()
    goal, other = ([line for line in read_metrics(run) if "num_images" in line] for run in (options.run, options.other))
    for run, lines in ((options.run, goal), (options.other, other)):
        if not lines:
            parser.error(f"{run} has no metrics.jsonl with lines of steps: give the folder of a run")
    print(f"{'':<14}{'RUN':>6}{'OTHER':>7}{'ratio':>7}")
    for key in ("loss", "generation", "contrastive"):
        if any(line.get(key) is None for line in (*goal, *other)):  # clip and siglip have no generation, for one
            continue
        reached = steps_to([line[key] for line in other], [line[key] for line in goal])
        found = f"{reached:>7,}{reached / len(goal):>7.2f}" if reached else f"{'-':>7}{'-':>7}"
        print(f"{key:<14}{len(goal):>6,}{found}")


if __name__ == "__main__":
    exit_with(main)
