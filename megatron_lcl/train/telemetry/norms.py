"""Norms of the gradient and of the update by part of the model, over all processes.

They are taken where DeepSpeed's ZeRO optimizers hand their flat float32 partitions to the base optimizer: there each
number of the model has one owner among the data ranks, whatever the ZeRO stage, and gradients are sums over the global
batch. The hooks are there only in a step that is measured; a copy of one partition, too, as long as it is stepped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from megatron_lcl.config import Config
from megatron_lcl.model.layers import PARTS
from megatron_lcl.model.transfer import from_host
from megatron_lcl.parallel.layers import is_split
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.optimizers.pieces import ELSEWHERE, Piece, partitions_of
from megatron_lcl.train.parts import called
from megatron_lcl.train.settings import zero_options


class PartNorms:
    """Of the steps of one engine."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self._mesh, self._clip_norm, self._device = mesh, config.optimizer.clip_norm, engine.device
        self._base = engine.optimizer.optimizer
        self._known = not zero_options(config).get(ELSEWHERE)
        parameters = dict(engine.module.named_parameters())
        self._pieces: dict[torch.Tensor, tuple[list[Piece], torch.Tensor]] = {}
        """by partition: its pieces that count on this process, and the number of each one's part"""
        for partition in partitions_of(engine.optimizer, mesh) if self._known else ():
            # what every tensor rank holds is counted once
            counted = [
                piece
                for piece in partition.pieces
                if piece.length and (mesh.tensor.rank == 0 or is_split(parameters[piece.name]))
            ]
            parts = [PARTS.index(called(piece.name, config.model).partition(".")[0]) for piece in counted]
            self._pieces[partition.flat] = counted, from_host(parts, partition.flat.device, torch.int64)
        self._squares = torch.zeros(2, len(PARTS), device=self._device)
        self._before: dict[torch.Tensor, torch.Tensor] = {}

    @contextlib.contextmanager
    def measured(self) -> Iterator[PartNorms]:
        """The optimizer's step inside is measured."""
        self._squares = torch.zeros(2, len(PARTS), device=self._device)
        hooks: list[Any] = []
        if self._known:
            hooks.append(self._base.register_step_pre_hook(self._before_step))
            hooks.append(self._base.register_step_post_hook(self._after_step))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            self._before.clear()

    def over_all_processes(self, grad_norm: torch.Tensor) -> torch.Tensor:
        """[2, parts] the norms of gradient and update, NaN where they are not known; every process calls it after the
        step.

        grad_norm: of the whole gradient before it was clipped; by it the gradients were divided by
        max(1, (grad_norm + 1e-6) / clip_norm) when they were measured, which is undone.
        """
        if not self._known:
            return torch.full_like(self._squares, torch.nan)
        norms = self._mesh.world.all_reduce(self._squares).sqrt()
        if self._clip_norm:
            norms[0] *= ((grad_norm + 1e-6) / self._clip_norm).clamp(min=1)
        return norms

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in self._stepped(optimizer):
            assert flat.grad is not None
            self._add(0, flat, flat.grad)
            self._before[flat] = flat.detach().clone()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for flat in self._stepped(optimizer):
            self._add(1, flat, self._before.pop(flat).sub_(flat))

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
        for group in optimizer.param_groups:
            yield from (flat for flat in group["params"] if flat.grad is not None)

    def _add(self, row: int, flat: torch.Tensor, values: torch.Tensor) -> None:
        pieces, parts = self._pieces[flat]
        if pieces:
            norms = torch.stack(torch._foreach_norm([piece.of(values) for piece in pieces]))
            squares = torch.zeros(len(PARTS), device=norms.device).index_add_(0, parts, norms.square())
            self._squares[row] += squares.to(self._device)
