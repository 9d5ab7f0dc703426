"""How far rounding takes our generation loss, liger-kernel's and torch's own from float64, in bfloat16 and float32.

Claim, in bfloat16: none is nearer than ours by more than a twentieth, neither in the loss nor in a gradient, and each
peer is at least four times as far in one of them; exit code 1 if that does not hold. liger-kernel rounds the logits,
and with them the gradient's probabilities, to the inputs' dtype; torch rounds the loss, a sum over thousands of rows.
In float32 neither rounds anything of the kind, and all are near. Runs without a GPU, on a small problem: liger-kernel
(if installed) then runs under Triton's interpreter, ours in torch.

    python benchmarks/generation_peers.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from claims import exit_unless, exit_with
from measuring import versions

from megatron_lcl.losses.generation import generation_loss

ROWS, VOCABULARY, WIDTH = 64, 3000, 128


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")


def peers() -> dict[str, Callable]:
    """Losses f(hidden, weight, targets) to compare with."""
    found: dict[str, Callable] = {"ours": generation_loss, "plain formula": plain}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        found["liger-kernel"] = lambda h, w, t: liger(w, h, t)
    except ImportError:
        print("liger-kernel is not installed: pip install --no-deps liger-kernel")
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", options=options)
    return found


def errors(loss_of: Callable, *arguments: torch.Tensor) -> tuple[list[float], torch.dtype]:
    """Relative errors of the loss and of the gradients of hidden and weight, and the loss's dtype."""
    hidden, weight, targets = arguments
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = plain(exact[0], exact[1], targets)
    loss = loss_of(hidden, weight, targets)
    pairs = zip(
        [loss, *torch.autograd.grad(loss, (hidden, weight))],
        [expected, *torch.autograd.grad(expected, exact)],
        strict=True,
    )
    return [((actual.double() - e).norm() / e.norm()).item() for actual, e in pairs], loss.dtype


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways = peers()
    print(versions("torch", "liger-kernel"))
    print(f"{'relative error of':<28}{'loss':>10}{'d hidden':>10}{'d weight':>10}   dtype of the loss")
    claims = {}
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        hidden = torch.randn(ROWS, WIDTH, device=device).to(dtype).requires_grad_()
        weight = (0.3 * torch.randn(VOCABULARY, WIDTH, device=device)).to(dtype).requires_grad_()
        targets = torch.randint(0, VOCABULARY, (ROWS,), device=device)
        found = {}
        for name, loss_of in ways.items():
            found[name], loss_dtype = errors(loss_of, hidden, weight, targets)
            columns = "".join(f"{error:>10.1e}" for error in found[name])
            print(f"{str(dtype)[6:]:<10}{name:<18}{columns}   {str(loss_dtype)[6:]}")
        if dtype == torch.bfloat16:
            ours = found.pop("ours")
            for name, theirs in found.items():
                ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
                claims[f"ours beside {name}"] = min(ratios) >= 0.95 and max(ratios) >= 4
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
