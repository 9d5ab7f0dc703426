"""Time of an optimizer's step on one flat partition, as DeepSpeed hands it over, against torch's AdamW unfused.

Prints seconds, the ratio, and how far parameters are from AdamW's in float64 after ten steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

SETTINGS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
WAYS: dict[str, dict[str, Any]] = {
    "a tensor for each term": {"fused": False, "foreach": False},
    "foreach": {"fused": False, "foreach": True},
    "fused (ours)": {"fused": True},
}


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


def main() -> None:
    """Interleaved, so that a busy machine slows all of them alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numbers", type=int, default=20_000_000, help="parameters of the partition (%(default)s)")
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each (%(default)s)")
    options = parser.parse_args()
    optimizers = {}
    for name, chosen in WAYS.items():
        flat = torch.randn(options.numbers, requires_grad=True)
        flat.grad = torch.randn(options.numbers)
        optimizers[name] = torch.optim.AdamW([flat], **SETTINGS, **chosen)
        optimizers[name].step()
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(options.steps):
        for name, optimizer in optimizers.items():
            started = time.perf_counter()
            optimizer.step()
            seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["a tensor for each term"])
    print(f"{options.numbers / 1e6:g} million parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'AdamW':<24}  seconds  ratio  from float64")
    for name, chosen in WAYS.items():
        median = statistics.median(seconds[name])
        print(f"{name:<24}  {median:7.4f}  {base / median:5.2f}  {difference(chosen):.1e}")


if __name__ == "__main__":
    main()
