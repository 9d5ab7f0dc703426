"""The float32 master weights that DeepSpeed keeps beside half-precision parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_lcl.parallel.layers import full_tensor
from megatron_lcl.parallel.mesh import Mesh


@torch.no_grad()
def update_log_scale(parameter: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Apply an elementwise function to the log scale (or the logit bias): to the parameter, and to DeepSpeed's float32
    master.

    Changing the parameter alone would be lost at the next step.
    """
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_local_fp32_param,
        safe_set_full_fp32_param,
        safe_set_local_fp32_param,
    )

    if not parameter.requires_grad:  # no step changes it
        return
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: each process its shard
        safe_set_local_fp32_param(parameter, function(safe_get_local_fp32_param(parameter)))
        parameter.ds_tensor.copy_(function(parameter.ds_tensor))
    elif (master := safe_get_full_fp32_param(parameter)) is not None:
        safe_set_full_fp32_param(parameter, function(master))
    parameter.copy_(function(parameter))


def read_log_scale(parameter: Any) -> torch.Tensor:
    """A copy of the log scale [1] in float32: DeepSpeed's master where the parameter itself is in half precision."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter]):  # with ZeRO-3 it may be with another process
            return parameter.detach().float().clone()
    if parameter.dtype == torch.float32 and parameter.numel():
        return parameter.detach().clone()
    return safe_get_full_fp32_param(parameter).detach().clone()


def read_numbers(head: Any) -> dict[str, torch.Tensor]:
    """Copies [1] in float32 of the head's parameters that are one number, by name (`Head.numbers`)."""
    return {name: read_log_scale(parameter) for name, parameter in head.numbers.items()}


def read_parameters(engine: Any, mesh: Mesh, state: str | None = None) -> dict[str, torch.Tensor]:
    """Whole parameters, or a state of the optimizer for each that is trained, float32, by name.

    On every process, and all call it.
    """
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # DeepSpeed links states once, when the first parameter group has some and the others none
        engine.optimizer._hp_optimizer_states_linked = False
        link()
    own = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            if state is None:
                with deepspeed.zero.GatheredParameters([parameter]):
                    own[name] = full_tensor(parameter.detach(), parameter, mesh.tensor).float().cpu().clone()
            continue
        value = safe_get_full_optimizer_state(parameter, state) if state else safe_get_full_fp32_param(parameter)
        if value is None:  # float32: the parameter is its own master
            value = parameter.detach()
        own[name] = full_tensor(value, parameter, mesh.tensor).float().cpu()
    everyone = mesh.pipeline.gather_objects(own)
    return {name: value for part in everyone for name, value in part.items()}
