"""What has no second derivative says so; its first ones are the same wherever backward runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megatron_lcl.attention import choose_attention
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.losses.sigmoid import sigmoid_loss

ROWS, WIDTH = 9, 6
SCALE, BIAS = torch.tensor([1.3]), torch.tensor([-2.0])
TARGETS = torch.arange(ROWS) % 7
BOUNDS = torch.tensor([0, 2, 5, ROWS], dtype=torch.int32)  # sequences that share a call, so that rows change places


def pairs(rows: torch.Tensor) -> list[torch.Tensor]:
    """Two modalities' features, of unit norm: of that alone the penalty would be another one."""
    return [F.normalize(rows, dim=1), F.normalize(rows.flip(0) * 2 - 1, dim=1)]


def attention(rows: torch.Tensor) -> torch.Tensor:
    attend = choose_attention(rows.device, rows.dtype, "per_sequence").attend
    return attend(*[rows[:, None]] * 3, BOUNDS, ROWS).square().sum()


CASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contrastive_loss": lambda rows: contrastive_loss(*pairs(rows), SCALE).loss,
    "sigmoid_loss": lambda rows: sigmoid_loss(*pairs(rows), SCALE, BIAS).loss,
    "generation_loss": lambda rows: generation_loss(rows, torch.eye(7, WIDTH), TARGETS),
    "per_sequence attention": attention,
}


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_refused_and_the_first_is_the_same_in_a_checkpointed_segment(name: str) -> None:
    """A checkpointed segment is computed again with gradients enabled, in the midst of a backward."""
    rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    segment = lambda rows: CASES[name](torch.tanh(rows)) * 2  # noqa: E731
    (expected,) = torch.autograd.grad(segment(rows), rows)
    for reentrant in (True, False):
        (found,) = _gradient(lambda rows, way=reentrant: checkpoint(segment, rows, use_reentrant=way), rows)
        assert torch.equal(found, expected), reentrant
    with pytest.raises(RuntimeError, match=f"^{name} has no second derivative: .* without create_graph=True"):
        torch.autograd.grad(segment(rows), rows, create_graph=True)


def _gradient(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """By `backward`, as a reentrant segment has it."""
    leaf = rows.detach().clone().requires_grad_()
    function(leaf).backward()
    assert leaf.grad is not None
    return [leaf.grad]
