"""Counts what a stage of a pipeline sends, and how many micro-batches' graphs it keeps at once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import nn


@contextlib.contextmanager
def count_bytes() -> Iterator[list[int]]:
    """Bytes of each message that leaves this process by way of DeepSpeed's point-to-point calls."""
    from deepspeed import comm

    sent: list[int] = []
    send = comm.send

    def counting(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return send(tensor, *arguments, **named)

    with patch.object(comm, "send", counting):
        yield sent


class Graphs:
    """Tokens that live as long as the graphs they were put in."""

    def __init__(self) -> None:
        self.alive: weakref.WeakSet[Token] = weakref.WeakSet()
        self.most = 0

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        token = Token()
        self.alive.add(token)
        self.most = max(self.most, len(self.alive))
        return _Carry.apply(tensor, token)


class Token:
    """Something that can be referred to weakly."""


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, token: Token) -> torch.Tensor:
        ctx.token = token
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        del ctx.token  # what the graph kept is freed as the walk passes
        return gradient, None


@contextlib.contextmanager
def count_graphs(module: nn.Module) -> Iterator[Graphs]:
    """Graphs of the module's forwards that wait for their backward."""
    graphs = Graphs()

    def hook(_module: nn.Module, _inputs: Any, out: Any) -> Any:
        name = "hidden" if hasattr(out, "hidden") else "generation"
        return out._replace(**{name: graphs.put(getattr(out, name))})

    handle = module.register_forward_hook(hook)
    try:
        yield graphs
    finally:
        handle.remove()
