"""The layout of a run: which process does what, and what does not go together, checked before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import torch.distributed as dist

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.model.layers import num_layers
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.parts import check_stages
from megatron_lcl.units import counted


def check_layout(config: Config, processes: int) -> int:
    """The number of data-parallel replicas. UserError where the layout does not divide or does not go together."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for name, value in _split_by_tensor(config):
        if value % tensor:
            common = math.gcd(*(split for _, split in _split_by_tensor(config)))
            divisors = [d for d in range(1, common + 1) if common % d == 0]
            nearest = _nearest(tensor, divisors, lambda t: check_layout(_with(config, tensor=t), processes))
            raise UserError(
                f"parallel.tensor = {tensor} does not divide {name} = {value}; the nearest that divides all that it "
                f"splits is {nearest}"
            )
    layers = num_layers(config.model)
    if pipeline > layers:
        up_to = range(1, layers + 1)
        nearest = _nearest(pipeline, up_to, lambda p: check_layout(_with(config, pipeline=p), processes))
        raise UserError(
            f"parallel.pipeline = {pipeline}, but the model has {layers} layers; the nearest that goes is {nearest}"
        )
    if pipeline > 1:
        check_stages(config)
    if config.zero.stage > 1 and pipeline > 1:
        raise UserError(
            f"zero.stage = {config.zero.stage} does not go with parallel.pipeline = {pipeline}: gradients stay whole "
            "until the last micro-batch has passed all stages; set zero.stage to 1"
        )
    if config.zero.stage == 3 and tensor > 1:
        raise UserError(
            f"zero.stage = 3 does not go with parallel.tensor = {tensor}: both split the parameters; "
            "set zero.stage to 1 or 2, or parallel.tensor to 1"
        )
    if config.zero.stage == 3 and objectives.create(config).keeps_graphs:
        raise UserError(
            "zero.stage = 3 with contrast.strategy = retain: the graphs of several micro-batches at once give wrong "
            "gradients under ZeRO-3; set contrast.strategy to recompute, or to auto"
        )
    if processes % (tensor * pipeline):
        replica = tensor * pipeline
        multiples = range(replica, 2 * processes + replica + 1, replica)
        nearest = _nearest(processes, multiples, lambda n: check_layout(config, n))
        raise UserError(
            f"{counted(processes, 'process')} cannot be divided into replicas of parallel.tensor = {tensor} times "
            f"parallel.pipeline = {pipeline}; the nearest number that can is {nearest}"
        )
    data = processes // (tensor * pipeline)
    num_micro_batches(config, data)
    return data


def _with(config: Config, **parallel: int) -> Config:
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))


def _nearest(value: int, fitting: Iterable[int], check: Callable[[int], object]) -> int:
    """The nearest to `value` that passes the whole check; where none does, the nearest that fits here."""

    def passes(candidate: int) -> bool:
        try:
            check(candidate)
        except UserError:
            return False
        return True

    by_distance = sorted(fitting, key=lambda candidate: (abs(candidate - value), candidate))
    return next(filter(passes, by_distance), by_distance[0])


def _split_by_tensor(config: Config) -> Iterator[tuple[str, int]]:
    model = config.model
    yield "model.vision.heads", model.vision.heads
    yield "model.vision.mlp_width", model.vision.mlp_width
    yield "model.language.heads", model.language.heads
    yield "model.language.mlp_width", model.language.mlp_width
    yield "model.pool_heads", model.pool_heads


def num_micro_batches(config: Config, data_parallel: int) -> int:
    """Micro-batches of one replica in a step. UserError where the global batch does not divide."""
    train, unit = config.train, config.train.micro_batch * data_parallel
    if train.global_batch % unit:
        nearest = max(unit, round(train.global_batch / unit) * unit)
        raise UserError(
            f"train.global_batch = {train.global_batch} packs do not divide into {data_parallel} data-parallel "
            f"replicas with train.micro_batch = {train.micro_batch}; the nearest that does is {nearest}"
        )
    return train.global_batch // unit


def build_mesh(config: Config) -> Mesh:
    """The mesh of all processes, in the order of DeepSpeed's topology: pipeline, data, tensor, the last one fastest.

    UserError where the config's layout does not fit the number of processes.
    """
    data = check_layout(config, dist.get_world_size())
    topology = build_topology(config, data)
    lists = {
        "data": topology.get_axis_comm_lists("data"),
        "pipeline": topology.get_axis_comm_lists("pipe"),
        "tensor": topology.get_axis_comm_lists("model"),
        "model_parallel": [sorted(topology.filter_match(data=i)) for i in range(data)],
        "data_tensor": [sorted(topology.filter_match(pipe=i)) for i in range(config.parallel.pipeline)],
    }
    assert all(math.prod([len(of_axis), len(of_axis[0])]) == dist.get_world_size() for of_axis in lists.values())
    return Mesh.of_lists(lists)


def build_topology(config: Config, data: int):  # type: ignore[no-untyped-def]
    """DeepSpeed's `PipeModelDataParallelTopology` of the layout."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=config.parallel.pipeline, num_mp=config.parallel.tensor, num_dp=data)
