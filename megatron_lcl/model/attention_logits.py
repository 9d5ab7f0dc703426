"""How large attention logits q·k/√K become: where they grow without bound, training diverges.

Zhai et al. 2023 (arXiv 2303.06296), Dehghani et al. 2023 (arXiv 2302.05442, section 3.1.2: ViT-22B), Wortsman et al.
2023 (arXiv 2309.14322, section 3.1). Kernels of attention do not give their logits, so those of some queries are
computed once more, beside attention and without a gradient: nothing that is trained changes, and blocks stay compiled.

Shape legend: N images or packs, H heads of this rank, Q queries, L keys, R rows of all of them, K features of a head.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_lcl.parallel.mesh import Axis

OF_IMAGE, OF_PACK = 16, 64
"""queries of an image and of a pack that are looked at, or all where there are fewer: so few that a look takes only a
part of attention's time; which ones does not depend on the layout"""


class AttentionLogits:
    """The largest logits in the forwards of a step, of this process's layers and heads."""

    def __init__(self) -> None:
        self.largest: dict[str, torch.Tensor] = {}
        """by part of the model, float32 scalars"""

    def of_images(self, q_RHK: torch.Tensor, k_RHK: torch.Tensor, length: int, used_N: torch.Tensor) -> None:
        """Of a block in which each of the `length` rows of an image sees every other; used_N: images that count."""
        q, k = (rows.unflatten(0, (-1, length)).transpose(1, 2) for rows in (q_RHK, k_RHK))
        self._add("vision", q[:, :, _spread(length, OF_IMAGE, q.device)], k, used_N)

    def of_pool(self, q_NHQK: torch.Tensor, k_NHLK: torch.Tensor, used_N: torch.Tensor) -> None:
        """Of the attention pool, all of them."""
        self._add("pool", q_NHQK, k_NHLK, used_N)

    def of_packs(self, q_RHK: torch.Tensor, k_RHK: torch.Tensor, num_packs: int, positions_R: torch.Tensor) -> None:
        """Of a causal block, inside each sequence; positions_R: of each row in its sequence.

        A sequence's first row does not count, nor does what fills a pack up, whose positions are 0 too: it sees itself
        alone, whatever its logit.
        """
        q, k = (rows.unflatten(0, (num_packs, -1)).transpose(1, 2) for rows in (q_RHK, k_RHK))
        keys = torch.arange(k.shape[2], device=k.device)
        rows = _spread(len(keys), OF_PACK, q.device)
        before = positions_R.view(num_packs, -1)[:, rows, None]
        distance = rows[:, None] - keys
        seen = (distance >= 0) & (distance <= before) & (before > 0)
        self._add("language", q[:, :, rows], k, seen=seen[:, None])

    def _add(
        self,
        part: str,
        q: torch.Tensor,
        k: torch.Tensor,
        used_N: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
    ) -> None:
        """seen: [N, 1, Q, L] which logits count; None, as of used_N: all."""
        if not torch.is_grad_enabled() or not q.numel():
            return
        with torch.no_grad():
            logits = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            if seen is not None:
                logits = torch.where(seen, logits, -math.inf)
            largest_N = logits.amax((1, 2, 3)).float()
            largest = (largest_N if used_N is None else torch.where(used_N, largest_N, -math.inf)).amax()
            self.largest[part] = torch.maximum(largest, self.largest.get(part, largest))

    def over_all_processes(self, world: Axis, parts: Sequence[str], device: torch.device) -> torch.Tensor:
        """[parts] the largest of all, infinite where one was not a number, NaN where there was none; every process
        calls it."""
        nothing = torch.full((), -math.inf, device=device)
        own = torch.stack([self.largest.get(part, nothing) for part in parts])
        found = world.all_reduce(own.masked_fill(own.isnan(), math.inf), dist.ReduceOp.MAX)
        return found.masked_fill(found == -math.inf, math.nan)


def _spread(number: int, most: int, device: torch.device) -> torch.Tensor:
    """At most `most` of `number` rows, from the first to the last at equal distances."""
    taken = min(number, most)
    return torch.arange(taken, device=device) * (number - 1) // max(taken - 1, 1)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[AttentionLogits]:
    """Forwards inside that keep a graph are looked at, those that recompute among them."""
    logits = AttentionLogits()
    layers: list[Any] = [layer for layer in model.modules() if hasattr(type(layer), "attention_logits")]
    for layer in layers:
        layer.attention_logits = logits
    try:
        yield logits
    finally:
        for layer in layers:
            layer.attention_logits = None
