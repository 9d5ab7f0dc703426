"""The contrastive loss with its backward beside the plain formula, width 768.

Claims, one process on a CPU, float32: at N = 16,384 at most 250 MiB above the features and 0.8 times the plain
formula's time; at N = 65,536 at most 700 MiB. Each run is a process of its own; ours and the plain formula take turns.
Exit code 1 if a claim does not hold.

On CUDA, instead: one device as one rank of 8, N / 8 own pairs against N, for N of 32k to 256k in bfloat16 and float32:
GiB above the features and milliseconds, beside the plain formula where it fits.

    python benchmarks/contrastive_memory_and_time.py [--pairs 3] [--no-large]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from claims import exit_unless, exit_with
from loss_measure import Measured, in_a_fresh_process, measure_cpu, measure_cuda, ratios, report, row

from megatron_lcl.losses import contrastive
from megatron_lcl.losses.contrastive import contrastive_loss

WIDTH = 768
RANKS = 8


def plain(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """As the public reference and open_clip have it: both directions' logits."""
    target = torch.arange(len(image))
    per_image, per_text = log_scale.exp() * image @ text.t(), log_scale.exp() * text @ image.t()
    return (F.cross_entropy(per_image, target) + F.cross_entropy(per_text, target)) / 2


def features(n: int, **options) -> torch.Tensor:
    return F.normalize(torch.randn(n, WIDTH, **options), dim=1)


def once(which: str, N: int) -> Measured:
    loss = plain if which == "plain" else lambda *leaves: contrastive_loss(*leaves).loss
    for size in (64, N):  # the small one loads libraries
        torch.manual_seed(0)
        leaves = [features(size), features(size), torch.tensor(2.6593)]
        for leaf in leaves:
            leaf.requires_grad_()

        def run(leaves=leaves) -> torch.Tensor:
            value = loss(*leaves)
            value.backward()
            return value.detach()

        measured = measure_cpu(run)
    return measured


def on_cpu(pairs: int, large: bool) -> None:
    print(f"CPU, {torch.get_num_threads()} threads, float32, width {WIDTH}; medians of {pairs} runs")
    ours, peer = [], []
    for _ in range(pairs):
        ours.append(in_a_fresh_process(__file__, "--once", "ours", 16384))
        peer.append(in_a_fresh_process(__file__, "--once", "plain", 16384))
    print(row("N=16,384 ours", ours))
    print(row("N=16,384 plain formula", peer))
    ratio = ratios(ours, peer)
    print("ours / plain:", ratio)
    claims = {
        "N = 16,384: at most 250 MiB": all(m.mebibytes <= 250 for m in ours),
        "N = 16,384: at most 0.8 times the plain formula's time": ratio.seconds <= 0.8,
    }
    if large:
        largest = in_a_fresh_process(__file__, "--once", "ours", 65536)
        print(row("N=65,536 ours", [largest]))
        claims["N = 65,536: at most 700 MiB"] = largest.mebibytes <= 700
    exit_unless(claims)


class OneRank:
    """One rank of 8 without the others: their features, and their rows' log-sum-exps, are simply there."""

    def __init__(self, N: int, dtype: torch.dtype, device: str) -> None:
        self.image_N, self.text_N = (features(N, device=device).to(dtype) for _ in range(2))
        self.first, self.n = N // RANKS, N // RANKS
        self.own = slice(self.first, self.first + self.n)
        self.scale = torch.tensor(1 / 0.07, device=device)
        self.backend = contrastive._backend(self.image_N)
        everyone = self.backend.forward(self.image_N, self.text_N, self.image_N, self.text_N, 0, self.scale)
        self.lse = [torch.logaddexp(lse, everyone.positive) for lse in (everyone.image_lse, everyone.text_lse)]

    def ours(self) -> torch.Tensor:
        features = (self.image_N[self.own], self.text_N[self.own], self.image_N, self.text_N)
        rows = self.backend.forward(*features, self.first, self.scale)
        self.backend.backward(*features, *self.lse, self.first, self.scale, self.scale / (2 * len(self.image_N)))
        both = [torch.logaddexp(lse, rows.positive) - rows.positive for lse in (rows.image_lse, rows.text_lse)]
        return torch.cat(both).mean()

    def plain(self) -> torch.Tensor:
        """As open_clip's ClipLoss with local loss and gathered gradients: of all features, to be summed over ranks."""
        image_N, text_N = (rows.detach().requires_grad_() for rows in (self.image_N, self.text_N))
        target = torch.arange(self.first, self.first + self.n, device=image_N.device)
        per_image = self.scale * image_N[self.own] @ text_N.t()
        per_text = self.scale * text_N[self.own] @ image_N.t()
        loss = (F.cross_entropy(per_image.float(), target) + F.cross_entropy(per_text.float(), target)) / 2
        loss.backward()
        return loss.detach()


def on_cuda() -> None:
    name = torch.cuda.get_device_name()
    print(f"{name}: one rank of {RANKS}, width {WIDTH}; forward and backward, medians of 10 runs")
    print(f"{'N':>8}  {'dtype':<10}{'ours':>24}{'plain formula':>24}   loss, ours and plain")
    for dtype in (torch.bfloat16, torch.float32):
        for N in (2**15, 2**16, 2**17, 2**18):
            rank = OneRank(N, dtype, "cuda")
            both = [measure_cuda(rank.ours), measure_cuda(rank.plain)]
            cells = (
                f"{m.seconds * 1e3:>11.1f} ms{m.mebibytes / 1024:>6.2f} GiB" if m else f"{'does not fit':>24}"
                for m in both
            )
            print(f"{N:>8}  {str(dtype)[6:]:<10}" + " ".join(cells), *(f"{m.loss:.5f}" for m in both if m))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--no-large", action="store_true", help="leave N = 65,536 out (some minutes)")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        report(once(arguments.once[0], int(arguments.once[1])))
    elif torch.cuda.is_available():
        on_cuda()
    else:
        on_cpu(arguments.pairs, not arguments.no_large)


if __name__ == "__main__":
    exit_with(main)
