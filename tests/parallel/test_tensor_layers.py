"""Collectives with gradients and split layers on real processes against the same in one; shards; initial parameters."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from processes import run_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_lcl import config as configs
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers, layer_specs
from megatron_lcl.model.lcl import LayerList, pack_padded
from megatron_lcl.parallel import layers as layers_module
from megatron_lcl.parallel import mappings
from megatron_lcl.parallel.layers import (
    ColumnLinear,
    RowLinear,
    SharedParameters,
    VocabularyEmbedding,
    full_shape,
    full_tensor,
    gathered_linear,
    is_split,
    mark_split,
    rows_of,
    shard,
)
from megatron_lcl.parallel.mesh import ALONE, Axis, Pending

SIZE = 3
ROWS = (0, 1, 2, 6, 7)


def everything(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    axis = Axis(dist.group.WORLD, rank, SIZE, tuple(range(SIZE)))
    for num_rows in ROWS:
        check_collectives(axis, num_rows)
        check_layers(axis, num_rows)
    check_two_sources(axis)
    check_order(axis)
    check_frozen(axis)
    check_embedding(axis)
    for dtype in (torch.float32, torch.bfloat16):
        check_sums(axis, dtype)
    dist.destroy_process_group()


def draw(*shape: int, seed: int) -> torch.Tensor:
    """The same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(ours: torch.Tensor | None, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def check_collectives(axis: Axis, num_rows: int) -> None:
    whole = draw(num_rows, 4, seed=0)
    of_ranks = [draw(num_rows, 4, seed=1 + rank) for rank in range(SIZE)]  # what each rank does with the rows
    summed = torch.stack(of_ranks).sum(0)

    local = mappings.local_shard(whole, axis).requires_grad_()
    assert len(local) == -(-num_rows // SIZE)
    gathered = mappings.gather_from_sequence_parallel(local, axis, num_rows)
    same(gathered, whole)
    (gathered * of_ranks[axis.rank]).sum().backward()
    same(local.grad, mappings.local_shard(summed, axis))

    local = mappings.local_shard(whole, axis).requires_grad_()
    gathered = mappings.gather_replicated(local, axis, num_rows)
    same(gathered, whole)
    (gathered * of_ranks[0]).sum().backward()
    same(local.grad, mappings.local_shard(of_ranks[0], axis))

    parts = of_ranks[axis.rank].clone().requires_grad_()
    local = mappings.reduce_scatter_to_sequence_parallel(parts, axis)
    same(local, mappings.local_shard(summed, axis))
    (local * mappings.local_shard(whole, axis)).sum().backward()
    same(parts.grad, whole)


def check_layers(axis: Axis, num_rows: int) -> None:
    """Two column-split layers on one input, their product through a row-split one, as in a block."""
    full = [nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 5)]
    split: list[Any] = [ColumnLinear(4, 6, axis), ColumnLinear(4, 6, axis), RowLinear(6, 5, axis)]
    for number, (one, ours) in enumerate(zip(full, split, strict=True)):
        for name, parameter in one.named_parameters():
            parameter.data.copy_(draw(*parameter.shape, seed=10 + number))
            own = getattr(ours, name)
            assert full_shape(own) == parameter.shape
            own.data.copy_(shard(parameter.data, own, axis))
            same(full_tensor(own.data, own, axis), parameter.data)
    together = nn.ModuleList(split)
    shared = SharedParameters(together, axis)
    whole, weights = draw(num_rows, 4, seed=0).requires_grad_(), draw(num_rows, 5, seed=1)
    expected = full[2](F.gelu(full[0](whole)) * full[1](whole))
    (expected * weights).sum().backward()

    local = mappings.local_shard(whole.detach(), axis).requires_grad_()
    with shared.summing(together):
        a, b = gathered_linear([local, local], split[:2], axis, num_rows)
        assert len(a) == num_rows
        out = split[2](F.gelu(a) * b)
    same(mappings.gather_replicated(out, axis, num_rows), expected)
    (out * mappings.local_shard(weights, axis)).sum().backward()
    same(local.grad, mappings.local_shard(whole.grad, axis))  # type: ignore[arg-type]
    for one, ours in zip(full, split, strict=True):
        for name, parameter in one.named_parameters():
            own = getattr(ours, name)
            same(full_tensor(own.grad, own, axis), parameter.grad)  # type: ignore[arg-type]


def check_two_sources(axis: Axis) -> None:
    """Layers of which each has rows of its own, and one that has those of another."""
    layers = [ColumnLinear(4, 6, axis) for _ in range(3)]
    for number, layer in enumerate(layers):
        layer.weight.data.copy_(shard(draw(6, 4, seed=20 + number), layer.weight, axis))
        layer.bias.data.zero_()
    full = [draw(6, 4, seed=20 + number).requires_grad_() for number in range(3)]
    wholes = [draw(7, 4, seed=30 + number).requires_grad_() for number in range(2)]
    weights = [draw(7, 6, seed=40 + number) for number in range(3)]
    expected = [wholes[i] @ weight.t() for i, weight in zip((0, 1, 0), full, strict=True)]
    sum((out * w).sum() for out, w in zip(expected, weights, strict=True)).backward()  # type: ignore[union-attr]
    inputs = [mappings.local_shard(whole.detach(), axis).requires_grad_() for whole in wholes]
    outputs = gathered_linear([inputs[0], inputs[1], inputs[0]], layers, axis, 7)
    own = slice(axis.rank * 2, axis.rank * 2 + 2)
    for ours, theirs in zip(outputs, expected, strict=True):
        same(ours, theirs[:, own])
    sum((out * w[:, own]).sum() for out, w in zip(outputs, weights, strict=True)).backward()  # type: ignore[union-attr]
    for local, whole in zip(inputs, wholes, strict=True):
        same(local.grad, mappings.local_shard(whole.grad, axis))  # type: ignore[arg-type]
    for layer, weight in zip(layers, full, strict=True):
        same(layer.weight.grad, weight.grad[own])  # type: ignore[index]


class Order(TorchDispatchMode):
    """What starts, is multiplied, and is waited for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "aten" and function._opname in ("mm", "addmm", "addmm_"):
            self.events.append("multiply")
        return function(*args, **(kwargs or {}))

    def of(self, name: str, start: Any) -> Any:
        def waiting(result: torch.Tensor) -> torch.Tensor:
            self.events.append(f"wait {name}")
            return result

        def starting(*arguments: Any) -> Pending:
            self.events.append(f"start {name}")
            return start(*arguments).then(waiting)

        return starting


def check_order(axis: Axis) -> None:
    """Something is multiplied while rows, or their gradients, are under way."""
    layers = [ColumnLinear(4, 6, axis) for _ in range(2)]
    order, gather, scatter = Order(), layers_module.start_gather, layers_module.start_reduce_scatter
    with (
        patch.object(layers_module, "start_gather", order.of("gather", gather)),
        patch.object(layers_module, "start_reduce_scatter", order.of("sum", scatter)),
        order,
    ):
        inputs = [draw(2, 4, seed=number).requires_grad_() for number in range(2)]
        outputs = gathered_linear(inputs, layers, axis, 6)
        forward, order.events = order.events, []
        (outputs[0].sum() + outputs[1].sum()).backward()
    assert forward == ["start gather"] * 2 + ["wait gather", "multiply"] * 2
    of_rows, of_weights = ["multiply", "start sum"] * 2, ["multiply"] * 2
    expected = ["start gather"] * 2 + of_rows + ["wait gather"] * 2 + of_weights + ["wait sum"] * 2
    assert order.events == expected, order.events


def check_frozen(axis: Axis) -> None:
    """Of a layer whose bias or weight is not trained, the other one is."""
    for frozen, trained in (("bias", "weight"), ("weight", "bias")):
        layers = [ColumnLinear(4, 6, axis) for _ in range(2)]
        getattr(layers[1], frozen).requires_grad_(False)
        local = draw(2, 4, seed=axis.rank).requires_grad_()
        outputs = gathered_linear([local, local], layers, axis, 6)
        (outputs[0].sum() + outputs[1].sum()).backward()
        names = [{name for name, p in layer.named_parameters() if p.grad is not None} for layer in layers]
        assert names == [{"weight", "bias"}, {trained}]


def check_embedding(axis: Axis) -> None:
    one, ours = nn.Embedding(7, 4), VocabularyEmbedding(7, 4, axis)
    one.weight.data.copy_(draw(7, 4, seed=3))
    ours.weight.data.copy_(shard(one.weight.data, ours.weight, axis))
    ids, weights = torch.tensor([6, 0, 3, 3, 2, 5, 1], dtype=torch.int32), draw(7, 4, seed=4)
    expected = one(ids)
    (expected * weights).sum().backward()
    out = mappings.reduce_scatter_to_sequence_parallel(ours(ids), axis)
    same(out, mappings.local_shard(expected, axis))
    (out * mappings.local_shard(weights, axis)).sum().backward()
    same(full_tensor(ours.weight.grad, ours.weight, axis), one.weight.grad)  # type: ignore[arg-type]


def check_sums(axis: Axis, dtype: torch.dtype) -> None:
    """A parameter that is used twice, in two micro-batches, after a cast of its module."""
    norm = nn.LayerNorm(4)
    shared = SharedParameters(norm, axis)
    norm.to(dtype)
    calls = []
    norm.bias.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.grad.clone()))
    losses = []
    for _ in range(2):  # both forwards before the first backward
        with shared.summing(norm):
            losses.append((norm.bias * (1 + axis.rank) + norm.bias).sum())
    assert isinstance(norm.bias, nn.Parameter)
    for loss in losses:
        loss.backward()
    assert [call[0] for call in calls] == [9, 18], "summed before it is accumulated, once in a backward"
    assert not norm.weight.grad.any(), "one all-reduce for all"  # type: ignore[union-attr]


def test_collectives_and_layers_equal_one_process() -> None:
    run_processes(everything, SIZE)


def test_at_size_one_everything_is_itself() -> None:
    rows = torch.randn(5, 4, requires_grad=True)
    assert mappings.local_shard(rows, ALONE) is rows
    assert mappings.gather_from_sequence_parallel(rows, ALONE, 5) is rows
    assert mappings.gather_replicated(rows, ALONE, 5) is rows
    assert mappings.reduce_scatter_to_sequence_parallel(rows, ALONE) is rows
    assert full_tensor(rows, rows, ALONE) is rows
    layer = nn.Linear(2, 2)
    weight = layer.weight
    with SharedParameters(layer, ALONE).summing(layer):
        assert layer.weight is weight


def test_functions_of_what_is_awaited_are_called_once_in_order() -> None:
    pending = Pending(torch.tensor(1.0)).then(lambda result: result + 1).then(lambda result: result * 3)
    assert [float(pending.wait()) for _ in range(2)] == [6, 6]


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    full_size=st.integers(1, 20),
    size=st.integers(1, 6),
    data=st.data(),
)
def test_shards_make_up_the_full_tensor(shape: list[int], full_size: int, size: int, data: Any) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] = full_size
    full = torch.randn(shape)
    mark_split(full, dim, full_size)
    parts = [shard(full, full, Axis(None, rank, size)) for rank in range(size)]
    assert len({part.shape for part in parts}) == 1
    together = torch.cat(parts, dim)
    assert torch.equal(together.narrow(dim, 0, full_size), full)
    assert not together.narrow(dim, full_size, together.shape[dim] - full_size).any()


MODEL = configs.from_dict(
    {
        "model": {
            "vision": {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "heads": 4, "mlp_width": 8},
            "language": {
                "context_length": 20,
                "vocab_size": 37,
                "width": 16,
                "layers": 1,
                "heads": 4,
                "mlp_width": 12,
            },
            "pool_heads": 4,
        }
    }
).model


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_seed_gives_the_same_full_parameters(size: int) -> None:
    whole = dict(enumerate(build_layers(MODEL, 2.0)))
    initialize(whole, MODEL, seed=5)
    ranks = []
    for rank in range(size):
        axis = Axis(None, rank, size)
        # a pipeline rank holds some of the layers only
        layers = {i: make() for i, make in enumerate(layer_specs(MODEL, 2.0, axis=axis)) if i in (0, 2, 4)}
        initialize(layers, MODEL, seed=5, axis=axis)
        ranks.append({f"{i}.{n}": p for i, layer in layers.items() for n, p in layer.named_parameters()})
    expected = {f"{i}.{n}": p for i in (0, 2, 4) for n, p in whole[i].named_parameters()}
    assert all(parts.keys() == expected.keys() for parts in ranks)
    for name, parameter in expected.items():
        parts = [of_rank[name] for of_rank in ranks]
        if not is_split(parameter):
            assert all(torch.equal(part, parameter) for part in parts), name
            continue
        dim = parts[0].partition_dim  # type: ignore[attr-defined]
        together = torch.cat(parts, dim)
        assert torch.equal(together.narrow(dim, 0, parameter.shape[dim]), parameter), name
        assert not together.narrow(dim, parameter.shape[dim], together.shape[dim] - parameter.shape[dim]).any()


class Sent(TorchDispatchMode):
    """The dtypes of all tensors that are handed to the network, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.dtypes += [leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        return function(*args, **(kwargs or {}))


def a_micro_batch(rank: int) -> tuple[list[torch.dtype], list[torch.dtype], float]:
    """What a tensor rank sends for a micro-batch's forward and backward, and for a generation loss alone; the loss."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    axis = Axis(dist.group.WORLD, rank, 2, (0, 1))
    layers = [make() for make in layer_specs(MODEL, 2.0, axis=axis)]
    initialize(dict(enumerate(layers)), MODEL, seed=5, axis=axis)
    with Sent() as sent:
        out = LayerList(*layers)(batch_of_two_texts())
        out.generation.backward()
    hidden, targets = torch.ones(3, MODEL.language.width), torch.tensor([1, 2, 30])
    with Sent() as alone:
        generation_loss(hidden, layers[-1].vocabulary, targets, axis.group, MODEL.language.vocab_size)
    dist.destroy_process_group()
    return sent.dtypes, alone.dtypes, float(out.generation.detach())


def batch_of_two_texts() -> PackedBatch:
    texts = torch.tensor([[32, 5, 6, 7, 33], [32, 9, 8, 33, 0]])
    return pack_padded(texts, torch.tensor([5, 4]), torch.empty(0, 3, 16, 16, dtype=torch.uint8), MODEL)


def test_in_a_micro_batch_no_host_waits_for_integers() -> None:
    """What tensor ranks compare before a generation loss that stands alone, the trainer knows: they have one batch."""
    layers = build_layers(MODEL, 2.0)
    initialize(dict(enumerate(layers)), MODEL, seed=5)
    expected = float(LayerList(*layers)(batch_of_two_texts()).generation.detach())
    for sent, alone, loss in run_processes(a_micro_batch, 2):
        assert sent
        assert all(dtype.is_floating_point for dtype in sent)
        assert torch.int64 in alone
        assert loss == pytest.approx(expected, rel=1e-5)


def assert_summed_in_float32(gradient: torch.Tensor | None, ids: torch.Tensor, rows: torch.Tensor) -> None:
    """The bfloat16 gradient of a table whose rows `ids` have the gradients `rows`, but for its own rounding."""
    assert gradient is not None
    assert gradient.dtype == torch.bfloat16
    exact = torch.zeros(gradient.shape, dtype=torch.float64).index_add_(0, ids, rows.double())
    assert (gradient.double() - exact).norm() <= 0.005 * exact.norm()


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_looked_up_rows_are_summed_in_float32(deterministic: bool) -> None:
    """Of which each of a table is read 4,096 times, as a position is by the sequences of a micro-batch."""
    vision = configs.Vision(image_size=32, patch_size=16, width=16, layers=1, heads=1, embedding_norm=False)
    language = configs.Language(vocab_size=12, context_length=4, width=16, layers=1, heads=1)
    model = configs.Model(vision=vision, language=language, pool_heads=1)
    built: list[Any] = build_layers(model, 1.0)
    initialize(dict(enumerate(built)), model, 0)
    patches, pool = (layer.bfloat16() for layer in (built[0], built[2]))
    tokens, positions = (torch.arange(4 * 4096) % size for size in (12, 4))
    kept = torch.tensor([[0, 2], [1, 3]]).repeat(4096, 1)
    none = torch.empty(0, dtype=torch.long)
    absent = torch.tensor([-1])  # no image: its latent's gradient is left out
    hidden = draw(5, 16, seed=0).bfloat16()
    inputs = Activations(hidden, tokens, positions, none, none, none, absent, absent, none, max_seqlen=0, num_patches=4)
    torch.use_deterministic_algorithms(deterministic)
    try:
        out = pool(inputs).hidden[: len(tokens)]
        rows = (1 + draw(*out.shape, seed=1)).bfloat16()
        out.backward(rows)
        embedded = patches.encode(torch.zeros(len(kept), 3, 32, 32), kept)[:, 1:]
        of_patches = (1 + draw(*embedded.shape, seed=2)).bfloat16()
        embedded.backward(of_patches)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_summed_in_float32(pool.positions.grad, positions, rows)
    assert_summed_in_float32(pool.embedding.weight.grad, tokens, rows)
    assert_summed_in_float32(patches.positions.grad, 1 + kept.flatten(), of_patches.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_looked_up_rows_are_those_of_indexing(dtype: torch.dtype) -> None:
    """And so are their gradients; also without any."""
    for ids in (torch.tensor([[3, 0, 3], [1, 3, 0]], dtype=torch.int32), torch.empty(0, 2, dtype=torch.long)):
        table, weights = draw(5, 4, seed=0).to(dtype).requires_grad_(), draw(*ids.shape, 4, seed=1).to(dtype)
        ours, theirs = rows_of(table, ids), table[ids]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        expected = torch.autograd.grad((theirs * weights).sum(), table)[0]
        torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), table)[0], expected, rtol=0, atol=0)
