"""What has a first derivative alone says so when a second one is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_derivative_only(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Of the `backward` of an autograd.Function: a RuntimeError where its result is to be differentiated, by `name`.

    torch enables gradients in a backward with create_graph=True, and in no other, also inside a checkpointed segment
    that is computed again. Its own `once_differentiable` raises only where the incoming gradient requires a gradient:
    that of a loss is a constant 1, and so would the loss's gradients silently be.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> Any:
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name} has no second derivative: differentiate it without create_graph=True, or write the "
                    "formula in plain torch where a gradient is itself part of a loss"
                )
            return backward(ctx, *gradients)

        return checked

    return decorate
