"""CPU time of an optimizer's step on a flat partition, as DeepSpeed hands it over, in one process.

Two tables: torch's AdamW in its three ways, on one tensor (a run uses the fused one), with the distance of each from
float64 after ten steps; and our optimizers, on the matrices of transformer blocks, against fused AdamW. Time is the
process's on the CPU, so that others on the machine count little; steps are interleaved, and the median counts.

    python benchmarks/optimizer_step.py --numbers 20000000 --width 384
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from arguments import positive
from claims import exit_with

from megatron_lcl.config import Optimizer, from_dict
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.train.engine import keep_freed_memory
from megatron_lcl.train.optimizers.pieces import Partition, Piece, Tensor
from megatron_lcl.train.optimizers.tensorwise import Algorithm, Rule, Tensorwise

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
WAYS: dict[str, dict[str, Any]] = {
    "a tensor for each term": {"fused": False, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "fused": {"fused": True},
}
FUSED = "adamw, fused"


def difference(options: dict[str, Any]) -> float:
    """Largest difference from float64 after ten steps, relative to the largest parameter."""
    ends = []
    for dtype, chosen in ((torch.float64, {"foreach": False}), (torch.float32, options)):
        draw = torch.Generator().manual_seed(0)
        flat = torch.randn(100_000, generator=draw).to(dtype).requires_grad_()
        optimizer = torch.optim.AdamW([flat], **SETTINGS, **chosen)
        for _ in range(10):
            flat.grad = torch.randn(100_000, generator=draw).to(dtype)
            optimizer.step()
        ends.append(flat.detach().double())
    return float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())


def flat_tensor(numbers: int) -> torch.Tensor:
    """A partition with its gradient."""
    flat = torch.randn(numbers, requires_grad=True)
    flat.grad = torch.randn(numbers)
    return flat


def ours(width: int, blocks: int, algorithm: Algorithm, **muon: Any) -> Tensorwise:
    """Over the matrices of blocks of a width, an optimizer that knows them."""
    shapes = [*[(width, width)] * 4, (4 * width, width), (width, 4 * width)] * blocks
    rules = {f"{i}": Rule(Tensor(torch.Size(shape), None), algorithm) for i, shape in enumerate(shapes)}
    config: Optimizer = from_dict({"optimizer": {"muon": muon}}).optimizer
    pieces, start = [], 0
    for name, rule in rules.items():
        pieces.append(Piece(name, start, rule.tensor.shape.numel(), 0))
        start += pieces[-1].length
    flat = flat_tensor(start)
    optimizer = Tensorwise([{"params": [flat], "weight_decay": 0.2}], config, rules)
    optimizer.attach([Partition(flat, pieces, [pieces])], Mesh(ALONE, ALONE))
    return optimizer


def medians(steps: Mapping[str, Callable[[], Any]], number: int) -> dict[str, float]:
    """CPU seconds of each step."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(number):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=positive, default=20_000_000, help="of the one tensor (%(default)s)")
    parser.add_argument("--width", type=positive, default=384, help="of the blocks (%(default)s)")
    parser.add_argument("--blocks", type=positive, default=2, help="%(default)s")
    parser.add_argument("--steps", type=positive, default=7, help="timed steps of each (%(default)s)")
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    found = medians(
        {
            name: torch.optim.AdamW([flat_tensor(options.numbers)], **SETTINGS, **chosen).step
            for name, chosen in WAYS.items()
        },
        options.steps,
    )
    print(f"\n{f'AdamW, {options.numbers / 1e6:g} million numbers':<36}  CPU s    times as fast  from float64")
    for name, seconds in found.items():
        times = found["a tensor for each term"] / seconds
        print(f"{name:<36}  {seconds:7.4f}  {times:13.2f}  {difference(WAYS[name]):.1e}")

    size = options.width, options.blocks
    numbers = 12 * options.width**2 * options.blocks
    found = medians(
        {
            FUSED: torch.optim.AdamW([flat_tensor(numbers)], **SETTINGS, fused=True).step,
            "adamw, tensor by tensor": ours(*size, "adamw").step,
            "stable_adamw": ours(*size, "stable_adamw").step,
            "muon, bfloat16": ours(*size, "muon").step,
            "muon, float32": ours(*size, "muon", dtype="float32").step,
        },
        options.steps,
    )
    print(f"\n{f'{options.blocks} blocks of width {options.width}, {numbers / 1e6:.3g} million':<36}  CPU s    times")
    for name, seconds in found.items():
        print(f"{name:<36}  {seconds:7.4f}  {seconds / found[FUSED]:5.1f}")


if __name__ == "__main__":
    exit_with(main)
