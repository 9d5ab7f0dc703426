"""Linear layers in float8: torchao's, emulated here, against the formula; training with them; what is refused."""

from __future__ import annotations

import copy
import functools
import importlib.util
from typing import Any
from unittest import mock

import pytest
import torch
from processes import run_processes
from torch import nn

from megatron_lcl import config as configs
from megatron_lcl.config import Config, Language
from megatron_lcl.errors import UserError
from megatron_lcl.model.block import Block
from megatron_lcl.model.float8 import use_float8
from megatron_lcl.parallel.mesh import ALONE
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train import engine
from megatron_lcl.train.kernels import check_kernels, choose_kernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
LARGEST = 448.0
"""number of e4m3"""


def rounded(values: torch.Tensor, dim: int) -> torch.Tensor:
    """float32, what e4m3 holds of it with a scale for all numbers along `dim`."""
    largest = values.float().abs().amax(dim, keepdim=True).clamp_min(1e-12)
    scale = torch.exp2(torch.floor(torch.log2(LARGEST / largest)))
    return (values.float() * scale).to(torch.float8_e4m3fn).float() / scale


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("num_rows", [1, 21, 32])
def test_products_are_those_of_rounded_numbers(num_rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32).bfloat16()
    # rows and features of very different size: one scale for all would round the small ones to nothing
    sizes = torch.logspace(4, -4, num_rows)[:, None]
    rows = (torch.randn(num_rows, 48) * sizes).bfloat16().requires_grad_()
    gradient = (torch.randn(num_rows, 32) * torch.logspace(-3, 3, 32)).bfloat16()
    model = nn.Sequential(layer)
    use_float8(model)
    assert model[0].weight is layer.weight
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    out = model(rows)
    out.backward(gradient)

    weight, bias = layer.weight.detach(), layer.bias.detach()
    found = (out, rows.grad, layer.weight.grad, layer.bias.grad)
    data = rows.detach()
    expected = (
        rounded(data, 1) @ rounded(weight, 1).t() + bias,
        rounded(gradient, 1) @ rounded(weight, 0),
        rounded(gradient, 0).t() @ rounded(data, 0),
        gradient.float().sum(0),
    )
    whole = data.float(), weight.float(), gradient.float()
    exact = (whole[0] @ whole[1].t() + bias, whole[2] @ whole[1], whole[2].t() @ whole[0])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None
        assert distance(ours, theirs) < 6e-3  # of bfloat16
    for ours, plain in zip(found, exact, strict=False):
        assert 8e-3 < distance(ours, plain) < 6e-2, "e4m3 has three bits of mantissa"  # type: ignore[arg-type]


def test_it_is_emulated_by_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by whether the machine has a GPU: layers on its CPU have no other way, and those made there may move."""
    for has_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has=has_gpu: has)
        for device, emulated in ((None, True), (torch.device("cpu"), True), (torch.device("cuda", 0), False)):
            model = nn.Sequential(nn.Linear(32, 16).bfloat16())
            use_float8(model, device)
            config = model[0].linear_mm_config
            assert {kind.emulate for kind in (config.output, config.grad_input, config.grad_weight)} == {emulated}


def test_layers_of_a_run_are_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made on the CPU, and moved to the device afterwards."""
    asked = list[Any]()
    monkeypatch.setattr(Block, "compile_parts", lambda _self, float8, device: asked.append((float8, device)))
    specs = engine.specs_of(config_of(float8=True), ALONE)
    monkeypatch.setattr(engine, "local_device", lambda: torch.device("cuda", 3))
    layers = [make() for make in specs]
    assert asked == [(True, torch.device("cuda", 3))] * sum(isinstance(layer, Block) for layer in layers)


def test_a_copy_has_its_own_weights() -> None:
    model = nn.Sequential(nn.Linear(32, 16).bfloat16())
    use_float8(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin[0].weight)
    rows = torch.ones(16, 32, dtype=torch.bfloat16)
    assert torch.equal(twin(rows), twin[0].bias.expand(16, -1))
    assert not torch.equal(model(rows), twin(rows))


def test_no_rows_at_all() -> None:
    """A micro-batch without images; gradients of zero, which the other processes wait for."""
    model = nn.Sequential(nn.Linear(32, 16).bfloat16())
    use_float8(model)
    rows = torch.zeros(0, 32, dtype=torch.bfloat16, requires_grad=True)
    out = model(rows)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert rows.grad is not None
    assert model[0].weight.grad.abs().max() == 0


def uncompiled() -> Any:
    """While inside, what is to be compiled stays as it is written."""
    return mock.patch.object(torch, "compile", lambda function, **_: function)


def config_of(float8: bool) -> Config:
    """The selftest's, with widths that float8 can have."""
    config = configs.replace(Case(dtype="bfloat16").config(), model__vision__width=48)
    return configs.replace(config, train__compile=float8, train__float8=float8)


def block() -> Block:
    torch.manual_seed(0)
    language = Language(width=32, heads=2, mlp_width=48, layers=1, vocab_size=99, context_length=32)
    made = Block(language, nn.LayerNorm, ALONE, "none", None)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.bfloat16()


def run_block(made: Block, num_rows: int) -> list[torch.Tensor]:
    """Output and gradients."""
    draw = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(num_rows, 32, generator=draw).bfloat16().requires_grad_()
    out = made.residual(rows, num_rows, lambda q, k, v: q * k + v)
    made.zero_grad()
    (out.float() ** 2).sum().backward()
    assert rows.grad is not None
    return [out.detach(), rows.grad, *(p.grad for p in made.parameters() if p.grad is not None)]


def test_a_block_is_one_graph_for_any_number_of_rows() -> None:
    """As torch.compile sees it, but run by torch's own functions: inductor would compile for a minute."""
    compiled, eager, plain = block(), block(), block()
    torch._dynamo.reset()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager", dynamic=True)):
        compiled.compile_parts(float8=True)
    with uncompiled():
        eager.compile_parts(float8=True)
    graphs = []
    for num_rows in (40, 23, 17, 64):
        results = [run_block(made, num_rows) for made in (compiled, eager, plain)]
        for ours, theirs, exact in zip(*results, strict=True):
            assert distance(ours, theirs) < 1e-2
            assert distance(ours, exact) < 0.15
        assert distance(results[1][0], results[2][0]) > 5e-3
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 4


def losses_of(_rank: int, float8: bool) -> list[float]:
    """Of each of 16 steps, over and over two global batches."""
    import torch.distributed as dist

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    config = config_of(float8)
    mesh = init_processes(config)
    with uncompiled():  # the same numbers, in a fraction of time
        engine = build_engine(build_module(config, mesh), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    losses = [stepper.run(make_batches(config, step % 2), 3e-3).loss for step in range(16)]
    dist.destroy_process_group()
    return losses


@pytest.mark.slow
def test_training_converges_as_in_bfloat16() -> None:
    of_float8, of_bfloat16 = (run_processes(losses_of, 1, float8)[0] for float8 in (True, False))
    assert of_float8 != of_bfloat16
    assert of_bfloat16[-1] < 0.8 * of_bfloat16[0]
    for first in range(0, 16, 4):
        ours, theirs = (sum(losses[first : first + 4]) for losses in (of_float8, of_bfloat16))
        assert ours == pytest.approx(theirs, rel=0.03), first


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train__compile": False}, "train.compile is not"),
        ({"train__compile": False, "parallel__tensor": 2}, "parallel.tensor is 2"),
        ({"train__dtype": "float16"}, "the run is in float16; set train.dtype to bfloat16"),
        ({"model__vision__mlp_width": 72}, "model.vision.mlp_width is 72; float8 needs multiples of 16"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str) -> None:
    config = config_of(float8=True)
    check_kernels(config, elsewhere=True)
    with pytest.raises(UserError, match=rf"^train.float8 is set, but {said}.*leave train.float8 unset$"):
        check_kernels(configs.replace(config, **changes), elsewhere=True)


def test_where_it_runs_is_checked_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(float8=True)
    assert choose_kernels(config).lines()[0].endswith("losses torch, blocks compiled in float8 (emulated)")
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        with pytest.raises(
            UserError,
            match=r"torchao, .* is not installed; `pip install 'megatron-lcl\[float8\]'`;",
        ):
            check_kernels(config, elsewhere=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    check_kernels(config, elsewhere=True)
    with pytest.raises(UserError, match=r"this GPU has compute capability 8\.0; float8 needs 8\.9"):
        check_kernels(config, elsewhere=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_kernels(config, elsewhere=False)
