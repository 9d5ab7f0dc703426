"""ViT-g/14 from 8 to 4,096 GPUs, 8k to 128k pairs a step, as `plan` predicts it: nothing here is measured.

For each number of pairs and of GPUs: the fastest layout that passes the memory bound (no step is simulated), what a
step takes, and what breaks first: the largest cost beside one forward and backward, with its share of the step, or
that there is no second pack for a replica, or that nothing fits. docs/scaling.md has this program's table.

    python benchmarks/plan_sweep.py [--gpu h100] [--pairs 8 32 128]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from claims import exit_with

from megatron_lcl import config as configs
from megatron_lcl.plan.devices import DEVICES, assumed_rates
from megatron_lcl.plan.layouts import Layout, Target, survey
from megatron_lcl.plan.run import NODE, TEXT_PER_IMAGE, USABLE

GPUS = (8, 64, 512, 4096)
SPARE = 0.8
"""share of the room that the bound may fill: a simulated step needs more than its bound (25.1 GB, not 23.9, on 512
GPUs with 23 images a pack), and how much more in other layouts is not known"""
CONFIG = Path(__file__).parents[1] / "configs" / "lcl_vitg_interleaved.yaml"
IMAGES = 16
"""of a pack, so that pairs are a power of two; the interleaved documents have about 23 in as many tokens"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100", choices=[*DEVICES])
    parser.add_argument("--pairs", type=int, nargs="+", default=[8, 32, 128], help="thousands of 1,024")
    options = parser.parse_args()
    device = DEVICES[options.gpu]
    rates, room = assumed_rates(device, "bfloat16"), USABLE * device.memory
    heads = ("pairs", "GPUs", "packs a replica", "fastest layout", "GB at least", "step, s", "MFU", "features, GB")
    print("| " + " | ".join([*heads, "breaks first"]) + " |\n" + "| --- " * 9 + "|")
    for thousands in options.pairs:
        for gpus in GPUS:
            packs = thousands * 1024 // IMAGES
            changes = {"train__global_batch": packs, "train__dtype": "bfloat16", "data__images_per_pack": IMAGES}
            config = configs.replace(configs.load(CONFIG), **changes)
            target = Target(gpus, min(NODE, gpus), rates, SPARE * room, TEXT_PER_IMAGE, on_host=True)
            passed, too_large, _ = survey(config, target)
            row = f"| {thousands}k | {gpus:,} | "
            if passed:
                print(row + _row(passed[0], gpus, packs), flush=True)
            else:
                why = f"memory: {too_large[0].needs / 1e9:,.0f} GB" if too_large else "packs: fewer than replicas"
                print(row + f"| none | | | | | {why} |", flush=True)
    return 0


def _row(best: Layout, gpus: int, packs: int) -> str:
    found = best.prediction
    assert found is not None
    parallel = best.config.parallel
    replicas = gpus // (parallel.tensor * parallel.pipeline)
    cells = [
        f"{packs // replicas}",
        best.name,
        f"{best.needs / 1e9:,.0f}",
        f"{found.seconds:,.2f}",
        f"{found.mfu:.0%}",
        f"{8 * packs * IMAGES * best.config.model.language.width / 1e9:.1f}",
        _breaks(best, replicas, packs),
    ]
    return " | ".join(cells) + " |"


def _breaks(best: Layout, replicas: int, packs: int) -> str:
    """What costs most of what a larger machine would not make smaller, or what rules out a faster layout."""
    found = best.prediction
    assert found is not None
    costs = {
        "similarities of all pairs": found.loss,
        "network": found.network,
        "optimizer and sums of gradients": found.optimizer,
        "bubble": found.bubble,
        "memory: something is computed again": found.again,
    }
    if replicas >= packs:
        return "packs: one a replica"
    return max(costs, key=lambda name: costs[name]) + f" ({max(costs.values()) / found.seconds:.0%})"


if __name__ == "__main__":
    exit_with(main)
