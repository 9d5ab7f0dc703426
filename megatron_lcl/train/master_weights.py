"""The float32 master weights that DeepSpeed keeps beside half-precision parameters, and its optimizer's states."""

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

    _link_states(engine.optimizer)
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


def clear_moments(engine: Any, which: Callable[[str, torch.Size], bool]) -> None:
    """Zeros for Adam's moments of some parameters that are trained, and for Muon's momentum.

    which: whether of this one, by its name and its shape, with tensor parallelism that of the shard.
    """
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    _link_states(engine.optimizer)
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and which(name, getattr(parameter, "ds_shape", parameter.shape)):
            for moment in ("exp_avg", "exp_avg_sq"):
                if hasattr(parameter, "ds_tensor"):  # ZeRO-3: each process its shard
                    safe_set_local_optimizer_state(parameter, torch.zeros_like(parameter.ds_tensor), moment)
                else:
                    safe_set_full_optimizer_state(parameter, torch.zeros_like(parameter), moment)


def _link_states(optimizer: Any) -> None:
    """Let DeepSpeed know where the states of each parameter are now."""
    link = getattr(optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # it links them once, when the first parameter group has some and the others none
        optimizer._hp_optimizer_states_linked = False
        link()
