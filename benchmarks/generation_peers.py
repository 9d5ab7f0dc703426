"""How far bfloat16 takes our generation loss, liger-kernel's and torch's own from float64. Claim: ours least far.

The reason why neither of the two is used where it could be: liger-kernel rounds the logits, and with them the
gradient's probabilities, to the inputs' dtype; torch rounds the loss, a sum over thousands of rows. Runs without a
GPU, on a small problem: liger-kernel (if installed) then runs under Triton's interpreter, ours in torch.

    python benchmarks/generation_peers.py
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F

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
        print("liger-kernel is not installed")
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = lambda h, w, t: F.linear_cross_entropy(h, w, t, reduction="sum", options=options)
    return found


def main() -> None:
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, device=device).bfloat16().requires_grad_()
    weight = (0.3 * torch.randn(VOCABULARY, WIDTH, device=device)).bfloat16().requires_grad_()
    targets = torch.randint(0, VOCABULARY, (ROWS,), device=device)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = plain(*exact, targets)
    expected.backward()

    print(f"{'relative error of':<18}{'loss':>10}{'d hidden':>10}{'d weight':>10}   dtype of the loss")
    for name, loss_of in peers().items():
        hidden.grad = weight.grad = None
        loss = loss_of(hidden, weight, targets)
        loss.backward()
        pairs = [(loss.detach(), expected.detach()), (hidden.grad, exact[0].grad), (weight.grad, exact[1].grad)]
        errors = ((actual.double() - e).norm() / e.norm() for actual, e in pairs)
        print(f"{name:<18}" + "".join(f"{error:>10.1e}" for error in errors) + f"   {str(loss.dtype)[6:]}")


if __name__ == "__main__":
    main()
