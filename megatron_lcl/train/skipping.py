"""Bad steps that are skipped on the device: DeepSpeed's ZeRO optimizers, without their question on the host.

Before every step they ask on the host whether the norm of the gradient is finite, for which the host waits until the
device has computed it. Here the answer stays on the device: torch's fused kernels take it as `found_inf`, as they do
from torch.amp.GradScaler, and where it is 1 they write nothing and count no step. The rest of DeepSpeed's step goes on
as after a good one; it copies masters, which have not changed, into the model.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.train.settings import offloaded


def skips_on_device(config: Config) -> bool:
    """Whether the host need not know of a step whether it was skipped.

    float16 needs it for the loss scale of the next step; an offloaded optimizer has its gradients on the host; and
    apex's optimizer takes no `found_inf`.
    """
    return resolve_dtype(config) != "float16" and config.optimizer.name != "apex_fused_adam" and not offloaded(config)


_SHARED = "deepspeed.runtime.utils"
"""module of functions that the optimizers' own modules import"""
_QUESTION = "is_invalid_grad_norm"
"""that by which they ask whether to step"""


def skip_on_device(optimizer: Any) -> None:
    """Let a step of DeepSpeed's optimizer whose gradient is not finite change nothing, without asking on the host.

    optimizer: one of its ZeRO optimizers, around a base optimizer that takes `found_inf`, where the answer is found.
    UserError where DeepSpeed does not ask as it has since 0.19.8: what stands in for its question would not be called,
    and numbers that are not finite would go into the weights.
    """
    plain, base = optimizer.step, optimizer.optimizer

    def go_on(norm: torch.Tensor) -> bool:
        """In place of is_invalid_grad_norm: what that one returns goes to the kernels."""
        base.found_inf = (~torch.isfinite(norm) | (norm < 0)).any().float()
        return False

    modules = [importlib.import_module(name) for name in (_SHARED, type(optimizer).__module__)]
    if not all(hasattr(module, _QUESTION) for module in modules):
        raise UserError(
            f"DeepSpeed {version('deepspeed')} is too old or too new; pip install 'deepspeed>=0.19.8,<0.20'"
        )
    replaced = {
        _QUESTION: go_on,
        "mask_nan_or_inf_with_val_inplace": _mask,
        "clip_tensors_by_global_norm": _clip,
    }

    def step(closure: Any = None) -> None:
        with contextlib.ExitStack() as stack:
            for module in modules:
                for name, function in replaced.items():
                    if hasattr(module, name):
                        stack.enter_context(mock.patch.object(module, name, function))
            plain(closure)

    optimizer.step = step
    optimizer.check_overflow = _no_check  # the norm is not finite either where a gradient is not


def forget_skipped_gradients(optimizer: Any) -> None:
    """Let the sum of a step that DeepSpeed skips not go into the next one's.

    optimizer: that of ZeRO-1 or 2. Where it is on the CPU and gradients are summed in float32 but not computed in it,
    DeepSpeed 0.19.8 keeps the sum after such a step and adds to it: all later steps would be skipped as well.
    """
    plain = optimizer.step

    def step(closure: Any = None) -> None:
        plain(closure)
        if optimizer.overflow:
            optimizer.averaged_gradients.update(dict.fromkeys(optimizer.averaged_gradients))

    optimizer.step = step


def _no_check(*_: Any, **__: Any) -> None:
    """In place of ZeRO-1's and 2's search for numbers that are not finite, which they make beside the norm."""


def _mask(norm: torch.Tensor, device: Any = None, val: float = -1.0) -> None:
    """In place of mask_nan_or_inf_with_val_inplace, which sends the value to the device and waits for that."""
    norm.masked_fill_(~torch.isfinite(norm), val)


def _clip(
    input_tensors: Iterable[torch.Tensor], max_norm: float, global_norm: torch.Tensor, mpu: Any = None
) -> torch.Tensor:
    """In place of clip_tensors_by_global_norm, which asks on the host whether there is something to clip; times 1
    changes no bit."""
    factor = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(factor)
    return global_norm
