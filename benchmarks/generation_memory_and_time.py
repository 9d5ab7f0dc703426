"""The generation loss with its backward beside the plain formula: 8,192 rows, 49,411 tokens, width 768.

Claims, one process on a CPU, float32: at most 1/8 of the plain formula's memory above the inputs, and at most 1.05
times its time; exit code 1 if a claim does not hold. Each run is a process of its own; ours and the plain formula take
turns, as does torch's own linear cross-entropy (if this torch has it).

On CUDA, instead: float32 and bfloat16, beside these and liger-kernel's fused linear cross-entropy (if installed).

    python benchmarks/generation_memory_and_time.py [--pairs 3]
    python benchmarks/generation_memory_and_time.py --chunks [22 23 …] [--width 512] [--pairs 3]

--chunks, on a CPU, instead: ours alone, one thread, by how many logits exist at once, as powers of two (default 22 to
28), and those that the loss chooses at this width. Claim: these take at most 1.05 times the CPU time of each of the
others.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from unittest import mock

import torch
from claims import exit_unless, exit_with
from generation_peers import peers
from loss_measure import Measured, in_a_fresh_process, measure_cpu, measure_cuda, ratios, report, row

from megatron_lcl.losses import generation
from megatron_lcl.losses.generation import generation_loss

ROWS, VOCABULARY, WIDTH = 8192, 49411, 768


def problem(
    rows: int, vocabulary: int, dtype: torch.dtype, device: str, width: int = WIDTH
) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=device)).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, vocabulary, (rows,), device=device)


def step(loss_of: Callable, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    hidden.grad = weight.grad = None
    loss = loss_of(hidden, weight, targets) / len(targets)
    loss.backward()
    return loss.detach()


def once(which: str, width: int = WIDTH) -> Measured:
    """which: the name of a peer, or so many rows at once."""
    if which.isdigit():
        torch.set_num_threads(1)
        mock.patch.object(generation, "rows_of_chunk", return_value=int(which)).start()
    loss_of = generation_loss if which.isdigit() else peers()[which]
    for rows, vocabulary in ((64, 100), (ROWS, VOCABULARY)):  # the small one loads libraries
        arguments = problem(rows, vocabulary, torch.float32, "cpu", width)
        measured = measure_cpu(functools.partial(step, loss_of, *arguments))
    return measured


def on_cpu(pairs: int) -> None:
    print(f"CPU, {torch.get_num_threads()} threads, float32: {ROWS} rows, {VOCABULARY} tokens, width {WIDTH}")
    print(f"medians of {pairs} runs")
    names = [name for name in peers() if name != "liger-kernel"]  # it needs a device
    runs: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(pairs):
        for name in names:
            runs[name].append(in_a_fresh_process(__file__, "--once", name))
    for name in names:
        print(row(name, runs[name]))
    for name in names[1:]:
        print(f"ours / {name}:", ratios(runs["ours"], runs[name]))
    ratio = ratios(runs["ours"], runs["plain formula"])
    exit_unless(
        {
            "at most 1/8 of the plain formula's memory": ratio.mebibytes <= 1 / 8,
            "at most 1.05 times its time": ratio.seconds <= 1.05,
        }
    )


def by_chunk(powers: list[int], width: int, pairs: int) -> None:
    """The chosen chunk among those of the powers of two; sizes are in rows."""
    chosen = generation.rows_of_chunk(VOCABULARY, width)
    sizes = sorted({chosen, *(max(1, 2**power // VOCABULARY) for power in powers)})
    print(f"CPU, one thread, float32: {ROWS} rows, {VOCABULARY} tokens, width {width}; medians of {pairs} runs")
    runs: dict[int, list[Measured]] = {size: [] for size in sizes}
    for _ in range(pairs):
        for size in sizes:
            runs[size].append(in_a_fresh_process(__file__, "--once", str(size), "--width", str(width)))
    for size in sizes:
        print(row(f"{size} rows, 2^{math.log2(size * VOCABULARY):.1f} logits", runs[size]), flush=True)
    seconds = {size: statistics.median(run.cpu_seconds for run in own) for size, own in runs.items()}
    fastest = min(seconds.values())
    exit_unless({f"{chosen} rows take at most 1.05 of the fastest": seconds[chosen] <= 1.05 * fastest})


def on_cuda() -> None:
    print(f"{torch.cuda.get_device_name()}: {ROWS} rows, {VOCABULARY} tokens, width {WIDTH}; medians of 10 runs")
    ways = peers()
    for dtype in (torch.bfloat16, torch.float32):
        arguments = problem(ROWS, VOCABULARY, dtype, "cuda")
        hidden, weight, targets = arguments
        exact = generation_loss(hidden.detach().double(), weight.detach().double(), targets).item() / ROWS
        for name, loss_of in ways.items():
            m = measure_cuda(functools.partial(step, loss_of, *arguments))
            values = f"{m.seconds * 1e3:>9.2f} ms{m.mebibytes:>9.0f} MiB" if m else f"{'does not fit':>24}"
            error = f"   loss off by {abs(m.loss - exact) / exact:.1e}" if m else ""
            print(f"{str(dtype)[6:]:<10}{name:<16}{values}{error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--chunks", type=int, nargs="*", metavar="POWER", help="ours by logits that exist at once")
    parser.add_argument("--width", type=int, default=512, help="of hidden states, with --chunks (%(default)s)")
    parser.add_argument("--once", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        report(once(arguments.once, arguments.width if arguments.once.isdigit() else WIDTH))
    elif arguments.chunks is not None:
        by_chunk(arguments.chunks or list(range(22, 29)), arguments.width, arguments.pairs)
    elif torch.cuda.is_available():
        on_cuda()
    else:
        on_cpu(arguments.pairs)


if __name__ == "__main__":
    exit_with(main)
