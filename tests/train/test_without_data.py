"""Forwards, losses and backwards on a device whose tensors have no data.

What a GPU would have to be waited for (a number read, a shape that depends on data), or what is left on the host, is an
error there. What waits once a step, the exchange of counts and the numbers of the result, is outside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch

from megatron_lcl import objectives
from megatron_lcl.attention import choose_attention
from megatron_lcl.config import AttentionName
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.layers import layer_specs
from megatron_lcl.model.lcl import LayerList
from megatron_lcl.objectives.base import COUNTS, GlobalCounts, StepInputs, without_targets
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train.step import StepLoss

META = torch.device("meta")
OBJECTIVES = ("lcl", "clip", "siglip", "coca", "genlip", "generation", "emu")


@pytest.fixture(autouse=True)
def _autocast_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not defined for this device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device=None: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def without_data(batch: PackedBatch) -> PackedBatch:
    values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{k: value.to(META) for k, value in values.items() if torch.is_tensor(value)})


def step(case: Case, attention: AttentionName = "dense") -> dict[str, torch.Tensor]:
    """All of a step but the engine's part; the gradients."""
    config = case.config()
    attend = choose_attention(torch.device("cpu"), torch.float32, attention).attend
    layers = layer_specs(config.model, config.initial_log_scale, attention=attend)
    with META:
        model = LayerList(*(make() for make in layers))
    batches = [without_data(batch) for batch in make_batches(config, 0)]
    own = {name: sum(getattr(batch, name) for batch in batches) for name in COUNTS}
    counts = GlobalCounts(own, [own["num_pairs"]])
    objective, outputs = objectives.create(config), []
    if objective.all_features_first:
        retain = objective.keeps_graphs
        with torch.set_grad_enabled(retain):
            outputs = [model(batch if retain else without_targets(batch)) for batch in batches]
    mesh = Mesh(*[ALONE] * len(dataclasses.fields(Mesh)))
    numbers = {name: parameter.detach().clone() for name, parameter in model[-1].numbers.items()}
    loss = StepLoss(objective, StepInputs(batches, outputs, counts=counts, mesh=mesh, **numbers), math.inf)
    for m, batch in enumerate(batches):
        loss.of(m, outputs[m] if objective.keeps_graphs else model(batch)).backward()
    assert loss.mean().device == META
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("strategy", ["retain", "recompute"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_reads_nothing_from_its_device(objective: str, strategy: str) -> None:
    gradients = step(Case(objective=objective, strategy=strategy, options=strategy == "recompute"))
    assert {gradient.device for gradient in gradients.values()} == {META}
    assert len(gradients) > 40


def test_what_reads_is_seen() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(Case(), attention="per_sequence")  # asks for the lengths
