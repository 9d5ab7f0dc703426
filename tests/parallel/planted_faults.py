"""Faults of tensor parallelism, to see that they are found."""

from __future__ import annotations

import contextlib
import functools
from typing import Any
from unittest.mock import patch

import torch

from megatron_lcl.model import block
from megatron_lcl.model import layers as model_layers
from megatron_lcl.parallel import layers, mappings
from megatron_lcl.parallel.mesh import Axis, Pending

FAULTS = (
    "a norm's gradient is not summed",
    "a bias's gradient is not summed",
    "gradients are averaged over tensor ranks",
    "gathering rows keeps the own gradient",
    "gathering features sums whole gradients",
    "q, k and v do not sum what they owe to their input",
    "every rank adds the bias",
    "vocabulary padding counts",
    "DeepSpeed takes split parameters for replicated ones",
)


def planted(fault: str) -> contextlib.AbstractContextManager[Any]:
    """While the context lasts, the package has the fault that is named; "" is none."""
    if not fault:
        return contextlib.nullcontext()
    loss, all_reduce, reduce_scatter = model_layers.generation_loss, Axis.all_reduce, mappings.start_reduce_scatter

    class Forgetful(layers.SharedParameters):
        """Takes the parameter of this name for one that owes nothing."""

        def __init__(self, name: str, module: torch.nn.Module, axis: Axis) -> None:
            super().__init__(module, axis)
            self.names.remove(name)

    def averaged(axis: Axis, tensor: torch.Tensor) -> torch.Tensor:
        return all_reduce(axis, tensor) / axis.size

    def own(rows: torch.Tensor, axis: Axis) -> Pending:
        return reduce_scatter(rows, axis).then(lambda _: mappings.local_shard(rows, axis).contiguous())

    def biased(layer: layers.RowLinear, rows: torch.Tensor) -> torch.Tensor:
        if layer.partial_output:  # it has no bias
            return torch.nn.Linear.forward(layer, rows)
        return mappings.reduce_scatter_to_sequence_parallel(torch.nn.Linear.forward(layer, rows), layer.axis)

    gather, gather_replicated = mappings._GatherFromSequenceParallel, mappings._GatherReplicated
    return {
        FAULTS[0]: patch.object(block, "SharedParameters", functools.partial(Forgetful, "norm2.weight")),
        FAULTS[1]: patch.object(block, "SharedParameters", functools.partial(Forgetful, "mlp.down.bias")),
        FAULTS[2]: patch.object(Axis, "all_reduce", averaged),
        FAULTS[3]: patch.object(gather, "backward", gather_replicated.backward),
        FAULTS[4]: patch.object(gather_replicated, "backward", gather.backward),
        FAULTS[5]: patch.object(layers, "start_reduce_scatter", own),
        FAULTS[6]: patch.object(layers.RowLinear, "forward", biased),
        FAULTS[7]: patch.object(
            model_layers, "generation_loss", lambda *arguments, **options: loss(*arguments[:4], **options)
        ),
        FAULTS[8]: patch("deepspeed.runtime.zero.stage_1_and_2.is_model_parallel_parameter", lambda parameter: False),
    }[fault]
