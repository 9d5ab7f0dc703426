"""The losses in CUDA graphs: nothing that their host side does depends on what lies on the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fake_cuda import CUDA, Watch, fake_cuda
from processes import run_processes

from megatron_lcl.losses import contrastive, contrastive_tiles, softmax_torch
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.losses.sigmoid import sigmoid_loss

PAIRS, WIDTH, ROWS, VOCABULARY = 70, 24, 37, 300
COUNTS = (PAIRS, 0, 3, PAIRS)
"""pairs of each process of a group"""
DTYPES = (torch.float32, torch.bfloat16)
Inputs = list[torch.Tensor]
Loss = Callable[..., torch.Tensor]
"""of what `inputs` gives"""


def contrast(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(image, text, log_scale).loss


def sigmoid(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return sigmoid_loss(image, text, log_scale, -log_scale.detach()).loss


def generation(*given: torch.Tensor) -> torch.Tensor:
    hidden, weight, targets = given[3:]
    return generation_loss(hidden, weight, targets, vocab_size=VOCABULARY - 5) / ROWS


LOSSES: dict[str, Loss] = {"contrast": contrast, "sigmoid": sigmoid, "generation": generation}


def inputs(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Features of pairs, log scale, hidden rows, the head's weight, targets."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features = [F.normalize(draw(PAIRS, WIDTH), dim=1).to(dtype) for _ in range(2)]
    rows = [draw(n, WIDTH).to(dtype) for n in (ROWS, VOCABULARY)]
    targets = torch.randint(0, VOCABULARY - 5, (ROWS,), generator=generator)
    return [tensor.to(device) for tensor in (*features, torch.tensor([2.0 + seed]), *rows, targets)]


def gradients(loss: Loss, given: Inputs) -> Inputs:
    """The loss, and of what has one the gradient."""
    wanted = [tensor for tensor in given if tensor.requires_grad]
    value = loss(*given)
    return [value.detach(), *(g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None)]


def over_a_group(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return contrastive_loss(image, text, log_scale, dist.group.WORLD, COUNTS).loss


def reads_the_scale(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return contrast(image, text, torch.full_like(log_scale, float(log_scale)))


def copies_from_the_host(*given: torch.Tensor) -> torch.Tensor:
    return contrast(*given) * torch.tensor(2.0).pin_memory().to(CUDA, non_blocking=True)


def watch_losses(rank: int) -> dict[str, tuple[list[str], list[str]]]:
    """Of each loss what a graph cannot hold, and its kernels."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=len(COUNTS), store=FakeStore())
    contrastive._sizes = lambda *arguments: tuple(arguments[-1] or [len(arguments[0])])  # what hosts tell each other
    cases: dict[str, Loss] = {**LOSSES, "over a group": over_a_group, "reads": reads_the_scale}
    cases["copies"] = copies_from_the_host
    cases["in torch"] = lambda *given: contrastive_loss(*given[:3], kernels=contrastive_tiles).loss
    cases["generation in torch"] = lambda *given: generation_loss(*given[3:], kernels=softmax_torch)
    found = {}
    with fake_cuda():
        for dtype in DTYPES:
            given = inputs(dtype, torch.device("cpu"))
            given = [tensor.to(CUDA).requires_grad_(tensor.is_floating_point()) for tensor in given]
            for name, loss in cases.items():
                with Watch() as watch:
                    of_graph = gradients(loss, given)
                assert {tensor.device for tensor in of_graph} == {CUDA}
                places = [*watch.waits, *watch.faults, *watch.copies]
                found[f"{name}, {dtype}"] = [str(place) for place in places], watch.kernels
    dist.destroy_process_group()
    return found


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="this torch asks the driver, which is not there, before it looks whether tensors are simulated",
)
def test_nothing_is_asked_or_copied_that_a_graph_cannot_hold() -> None:
    """No number or size is read, and nothing is copied between host and device: a graph would copy what was there."""
    (found,) = run_processes(watch_losses, 1)
    for name, (places, kernels) in found.items():
        if name.startswith("reads"):
            assert any("reads_the_scale: a number is read" in place for place in places), places
        elif name.startswith("copies"):
            assert any("copies_from_the_host: a copy to the device" in place for place in places), places
        else:
            assert places == [], (name, places)
            assert ("in torch" in name or "sigmoid" in name) == (not kernels), (name, kernels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_graph_gives_what_the_losses_give(name: str, dtype: torch.dtype) -> None:
    """Forward and backward, captured once and replayed with two other batches."""
    loss = LOSSES[name]
    static = inputs(dtype, CUDA)
    for tensor in static:
        tensor.requires_grad_(tensor.is_floating_point())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and memory is there before the capture
        for _ in range(3):
            gradients(loss, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(loss, static)
    for seed in (1, 2):
        batch = inputs(dtype, CUDA, seed)
        with torch.no_grad():
            for tensor, values in zip(static, batch, strict=True):
                tensor.copy_(values)
        graph.replay()
        for values in batch:
            values.requires_grad_(values.is_floating_point())
        expected = gradients(loss, batch)
        assert len(captured) == len(expected) > 2
        for actual, wanted in zip(captured, expected, strict=True):
            size = float(wanted.float().norm())
            assert math.isfinite(size)
            assert size > 0
            torch.testing.assert_close(actual, wanted)
