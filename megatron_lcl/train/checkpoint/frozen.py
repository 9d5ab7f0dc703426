"""Parameters that are not trained: their values in a checkpoint, and averages that began before they were frozen.

They are in no part of the optimizer. Of one that was never trained, every average is its value, and none is kept. One
that is frozen at a resume keeps its averages, in float32, as `averages` on the parameter; `train.averages` goes on with
them, with the weights that stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_lcl.parallel.layers import shard
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.checkpoint.state import FROZEN, FROZEN_AVERAGES
from megatron_lcl.train.checkpoint.unpickle import load_mapped

Averaged = list[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]
"""parameters, each with its averages: one dimension, of as many elements as this process holds of it"""


def frozen_state(module: torch.nn.Module) -> dict[str, Any]:
    """What this process adds to its file of a checkpoint; nothing where nothing is frozen."""
    frozen = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    values = {name: (getattr(p, "ds_tensor", p).detach(), getattr(p, "ds_shape", p.shape)) for name, p in frozen}
    averages = {name: held for name, p in frozen if (held := _averages_of(p))}
    return {key: held for key, held in ((FROZEN, values), (FROZEN_AVERAGES, averages)) if held}


def frozen_averages(module: torch.nn.Module) -> Averaged:
    """The frozen parameters of this process that have averages of their own, which may be changed in place."""
    return [(p, held) for p in module.parameters() if not p.requires_grad and (held := _averages_of(p))]


def _averages_of(parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    return getattr(parameter, "averages", {})


def held_value(parameter: torch.nn.Parameter, average: torch.Tensor) -> torch.Tensor:
    """What an average is of: a view of what this process holds of a frozen parameter, without ZeRO-3's padding."""
    return getattr(parameter, "ds_tensor", parameter).detach().view(-1)[: average.numel()]


def forget_group_copies(module: torch.nn.Module) -> None:
    """Of values that have changed, hierarchical ZeRO-3 would go on with the copies in its groups; DeepSpeed itself
    forgets those of trained parameters only. All processes call it: whoever has a copy gathers in another group."""
    for parameter in module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]


def load_averages(module: torch.nn.Module, saved: Mapping[str, Any]) -> None:
    """The averages of frozen parameters, from what this process added at the same layout (`frozen_state`)."""
    of_all = saved.get(FROZEN_AVERAGES, {})
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            device = getattr(parameter, "ds_tensor", parameter).device
            averages = {key: average.to(device, copy=True) for key, average in of_all.get(name, {}).items()}
            parameter.averages = averages  # type: ignore[attr-defined]


def load_universal(module: torch.nn.Module, mesh: Mesh, states: Path, averages: Iterable[str]) -> None:
    """Frozen parameters, and their averages, from a universal checkpoint's folder of states (`reshard`)."""
    import deepspeed

    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            whole = load_mapped(states / name / "fp32.pt")["param"]
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):  # a shard of it with ZeRO-3
                parameter.data.copy_(shard(whole, parameter, mesh.tensor))
            parameter.averages = {}  # type: ignore[attr-defined]
            for key in averages:
                average = _held(load_mapped(states / name / f"{key}.pt")["param"], parameter, mesh)
                if not torch.equal(average, held_value(parameter, average).float()):
                    parameter.averages[key] = average  # type: ignore[attr-defined]


def _held(whole: torch.Tensor, parameter: torch.nn.Parameter, mesh: Mesh) -> torch.Tensor:
    """What this process holds of a whole parameter's average, float32, flattened."""
    flat, held = shard(whole, parameter, mesh.tensor).flatten(), getattr(parameter, "ds_tensor", None)
    if held is None:
        return flat.to(parameter.device, torch.float32, copy=True)
    start = mesh.data.rank * held.numel()
    return flat[start : start + held.numel()].to(held.device, torch.float32, copy=True)
