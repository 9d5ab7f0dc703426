"""Our contrastive loss beside open_clip's ClipLoss with local loss and gathered gradients, over two processes.

Claim, two gloo processes with one thread each, 8,192 pairs in all, width 768, float32: at most open_clip's time, and
the same gradients; exit code 1 if that does not hold. Both take turns in the same processes; forward and backward
together, the slower process counts. Also printed: what the header takes with which our loss begins. With two CUDA
devices or more: over all of them with NCCL, 4,096 pairs each.

    python benchmarks/contrastive_against_open_clip.py [--pairs 7]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from arguments import positive
from claims import exit_unless, exit_with
from measuring import versions

from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.losses.group import exchange
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.train.launch import hold_port

WIDTH = 768
PER_RANK = 4096


def compare(rank: int, size: int, pairs: int, cuda: bool, result: Any) -> None:
    from open_clip.loss import ClipLoss

    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    torch.manual_seed(rank)
    image, text = (F.normalize(torch.randn(PER_RANK, WIDTH, device=device), dim=1).requires_grad_() for _ in range(2))
    log_scale = torch.tensor(2.6593, device=device, requires_grad=True)
    peer = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=size)
    ways = {
        "ours": lambda: contrastive_loss(image, text, log_scale, dist.group.WORLD, [PER_RANK] * size).loss,
        "open_clip": lambda: peer(image, text, log_scale.exp()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gradients: dict[str, torch.Tensor] = {}
    losses: dict[str, torch.Tensor] = {}
    for number in range(pairs + 1):  # the first warms up
        for name, loss_of in ways.items():
            image.grad = text.grad = log_scale.grad = None
            dist.barrier()
            start = time.perf_counter()
            loss = loss_of()
            loss.backward()
            if cuda:
                torch.cuda.synchronize()
            took = torch.tensor(time.perf_counter() - start, device=device)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if number:
                seconds[name].append(took.item())
            # open_clip's is this rank's mean; its gathered gradients are those of the sum of the ranks' means
            losses[name] = loss.detach().clone()
            assert image.grad is not None
            gradients[name] = image.grad.clone()
    headers, axis = [], Axis.of_group(dist.group.WORLD)
    for _ in range(101):
        dist.barrier()
        start = time.perf_counter()
        exchange((PER_RANK, WIDTH, 0, 0), None, device, axis)
        headers.append(time.perf_counter() - start)
    dist.all_reduce(losses["open_clip"])
    losses["open_clip"] /= size
    gradients["open_clip"] /= size
    if rank == 0:
        where = torch.cuda.get_device_name() if cuda else "CPU, one thread each"
        print(
            f"{size} processes ({where}), {PER_RANK * size} pairs in all, width {WIDTH}, float32; {pairs} pairs of runs"
        )
        print(versions("torch", "open_clip_torch"))
        for name in ways:
            print(f"{name:<12}{statistics.median(seconds[name]):>8.3f} s   loss {losses[name].item():.6f}")
        ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["open_clip"], strict=True))
        error = ((gradients["ours"] - gradients["open_clip"]).norm() / gradients["open_clip"].norm()).item()
        print(f"ours / open_clip: median of ratios x{ratio:.2f}; image gradients differ by {error:.1e} of their norm")
        print(f"of ours the header: {statistics.median(headers) * 1e6:.0f} µs")
        result.put((ratio, error))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=7)
    arguments = parser.parse_args()
    import open_clip.loss  # noqa: F401 - what is lacking is said here, before processes are started

    cuda = torch.cuda.device_count() >= 2
    size = torch.cuda.device_count() if cuda else 2
    held = hold_port()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
    result = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(compare, (size, arguments.pairs, cuda, result), nprocs=size)
    held.close()
    ratio, error = result.get()
    exit_unless({"time at most open_clip's": ratio <= 1, "the same gradients": error <= 1e-5})


if __name__ == "__main__":
    exit_with(main)
