"""What training does faster on a CPU than torch by itself: attention over short sequences, the generation loss in
bfloat16.

Attention, forward and backward, float32: ours (sequences of nearly the same length share a call) beside a call of torch
for each sequence and beside one call with a block-diagonal mask. The generation loss with its backward: bfloat16 beside
float32. All ways of a line take turns in one process; medians, with ratios to the first.

    python benchmarks/cpu_kernels.py [--rounds 9] [--threads N]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from claims import exit_with

from megatron_lcl.attention import choose_attention
from megatron_lcl.losses.generation import generation_loss

SEQUENCES = ((64, 35, 4, 32), (60, 75, 3, 64), (13, 600, 3, 64))
"""number, mean length (each within a tenth of it), heads, features of a head"""
ROWS, VOCABULARY, WIDTH = 2000, 49411, 512


def medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if turn:  # the first one loads and allocates
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(own) for name, own in seconds.items()}


def say(what: str, found: dict[str, float]) -> None:
    first, *others = found.items()
    print(f"{what:<58}{first[0]} {1e3 * first[1]:.1f} ms" + "".join(
        f"; {name} {1e3 * seconds:.1f} ms ({seconds / first[1]:.2f} times)" for name, seconds in others
    ), flush=True)  # fmt: skip


def attention(number: int, mean: int, heads: int, width: int, rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(round(0.9 * mean), round(1.1 * mean) + 1, (number,), generator=generator)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (torch.randn(int(starts[-1]), heads, width, generator=generator).requires_grad_() for _ in range(3))
    ours, masked = (choose_attention(q.device, q.dtype, name).attend for name in ("per_sequence", "dense"))

    def one_by_one() -> torch.Tensor:
        parts = []
        for a, b in itertools.pairwise(starts.tolist()):
            one_q, one_k, one_v = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            parts.append(F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True)[0].transpose(0, 1))
        return torch.cat(parts)

    def step(way: Callable[[], torch.Tensor]) -> object:
        return torch.autograd.grad(way().sum(), (q, k, v))

    ways = {
        "ours": lambda: ours(q, k, v, starts, int(lengths.max())),
        "a call each": one_by_one,
        "a mask": lambda: masked(q, k, v, starts, int(lengths.max())),
    }
    torch.testing.assert_close(ways["ours"](), one_by_one())
    torch.testing.assert_close(ways["a mask"](), one_by_one())
    steps = {name: functools.partial(step, way) for name, way in ways.items()}
    say(f"attention, {number} of {mean} tokens, {heads} heads of {width}:", medians(steps, rounds))


def generation(rounds: int) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, VOCABULARY, (ROWS,))

    def step(hidden: torch.Tensor, weight: torch.Tensor) -> object:
        return torch.autograd.grad(generation_loss(hidden, weight, targets), (hidden, weight))

    ways: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(ROWS, WIDTH).to(dtype).requires_grad_()
        weight = (0.02 * torch.randn(VOCABULARY, WIDTH)).to(dtype).requires_grad_()
        ways[str(dtype)[6:]] = functools.partial(step, hidden, weight)
    say(f"generation loss, {ROWS} rows, {VOCABULARY} tokens, width {WIDTH}:", medians(ways, rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: torch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {options.rounds}")
    for sequences in SEQUENCES:
        attention(*sequences, options.rounds)
    generation(min(options.rounds, 3))


if __name__ == "__main__":
    exit_with(main)
