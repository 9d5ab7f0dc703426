"""Mistakes that a pipeline could have, each put into a running engine."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch


@contextlib.contextmanager
def planted(name: str, engine: Any, mesh: Any) -> Iterator[None]:
    """The engine with the fault of this name; nothing where the name is empty."""
    if not name:
        yield
        return
    with globals()[name](engine, mesh):
        yield


@contextlib.contextmanager
def mean_taken_again(engine: Any, mesh: Any) -> Iterator[None]:
    """A stage divides by the number of micro-batches what it receives, which has been done."""
    receive = engine._exec_recv_grads

    def receiving(buffer_id: int) -> None:
        receive(buffer_id)
        engine.pipe_buffers["gradients"][buffer_id] /= engine.micro_batches

    with instruction("RecvGrad", engine, lambda self, buffer_id: receiving(buffer_id)):
        yield


@contextlib.contextmanager
def negatives_of_one_micro_batch(engine: Any, mesh: Any) -> Iterator[None]:
    """Every micro-batch is contrasted within itself; the loss that is reported is right."""
    from megatron_lcl.objectives import contrast

    start = contrast.start_contrast

    def narrow(features: Any, scale: Any, weight: float, counts: Any, mesh: Any, bias: Any) -> Any:
        assert bias is None
        found, separate = start(features, scale, weight, counts, mesh)(), []
        for own in features:
            pairs = mesh.data.gather_objects(len(own.image))
            share = weight * sum(pairs) / sum(counts.pairs)
            separate.append(start([own], scale, share, dataclasses.replace(counts, pairs=pairs), mesh)())
        image, text = [own.image[0] for own in separate], [own.text[0] for own in separate]
        numbers = torch.stack([own.numbers for own in separate]).sum(0)
        return lambda: dataclasses.replace(found, image=image, text=text, numbers=numbers)

    with patch.object(contrast, "start_contrast", narrow):
        yield


@contextlib.contextmanager
def averaged_twice(engine: Any, mesh: Any) -> Iterator[None]:
    """The first stage averages its gradients over replicas once more."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    def reduce(self: Any) -> None:
        PipelineEngine._exec_reduce_grads(self)
        if mesh.pipeline.rank == 0:
            for gradient in itertools.chain.from_iterable(self.optimizer.averaged_gradients.values()):
                gradient /= mesh.data.size

    with instruction("ReduceGrads", engine, reduce):
        yield


@contextlib.contextmanager
def overflow_in_the_first_stage(engine: Any, mesh: Any) -> Iterator[None]:
    """In the second step a gradient of the first stage is infinite, on its first tensor rank."""
    backwards = itertools.count()
    parameter = next(engine.module.parameters())

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        is_second_step = engine.micro_batches <= next(backwards) < 2 * engine.micro_batches
        return torch.full_like(gradient, torch.inf) if is_second_step else gradient

    handle = parameter.register_hook(spoil) if mesh.pipeline.rank == mesh.tensor.rank == 0 else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


@contextlib.contextmanager
def instruction(name: str, engine: Any, function: Any) -> Iterator[None]:
    """The engine with another function for one of its instructions."""
    from deepspeed.runtime.pipe import schedule

    with patch.dict(engine._INSTRUCTION_MAP, {getattr(schedule, name): function}):
        yield
