"""Protects what a plan predicts: operations against torch's count, seconds against formulas worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.flops import Sizes, forward, of_step
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers, num_layers, num_parameters, parameter_shapes
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.objectives import create
from megatron_lcl.plan.describe import days_and_hours
from megatron_lcl.plan.devices import Rates
from megatron_lcl.plan.network import bandwidth
from megatron_lcl.plan.predict import (
    ADAM_BYTES,
    GRADIENT_PASSES,
    HIDDEN,
    SUM_BYTES,
    TENSOR_SHOWS,
    predict,
    seconds_of_run,
)
from megatron_lcl.plan.work import LOGIT_PASSES
from megatron_lcl.train.optimizer import rules_of
from megatron_lcl.train.optimizers.muon import matrix_update
from megatron_lcl.train.optimizers.pieces import Tensor
from megatron_lcl.train.parts import freeze, frozen_parameters, trained_kinds
from megatron_lcl.train.simulate import sizes_of

IMAGES, CONTEXT = 2, 80
FAST = 1e30


def config_of(**changes: Any) -> Config:
    """A tiny model whose packs are one sequence; changes: as in `configs.replace`."""
    tree = {
        "model": {
            "vision": {"image_size": 32, "patch_size": 8, "width": 24, "layers": 2, "heads": 4, "mlp_width": 56},
            "language": {"vocab_size": 103, "width": 32, "layers": 3, "heads": 4, "mlp_width": 72},
            "pool_heads": 4,
        },
        "data": {"tokens_per_pack": CONTEXT},
        "train": {"global_batch": 8, "dtype": "float32"},
    }
    return configs.replace(configs.from_dict(tree), **{"model__language__context_length": CONTEXT, **changes})


def rates_of(**changes: Any) -> Rates:
    """A device that takes no time but for what `changes` says."""
    parts = ("vision", "language", "vocabulary")
    matmul, attention = (dict.fromkeys(parts, changes.pop(name, FAST)) for name in ("matmul", "attention"))
    others = {"elements": FAST, "memory": FAST, "intra": FAST, "inter": FAST, "collective": 0.0, "kernel": 0.0}
    return Rates(matmul, attention, **{**others, "waits": False, "peak": 1e9, **changes})


def full_batch(config: Config) -> Any:
    special = SpecialTokens.of(config.model.language.vocab_size)
    image = [special.soi, *[special.placeholder] * config.model.vision.num_patches, special.eoi]
    head = [special.sot, *([5, 6, *image] * IMAGES)]
    row = torch.tensor([[*head, *[7] * (CONTEXT - len(head) - 1), special.eot]])
    pixels = torch.randint(0, 256, (IMAGES, 3, *[config.model.vision.image_size] * 2), dtype=torch.uint8)
    return pack_padded(row, torch.tensor([CONTEXT]), pixels, config.model)


FROZEN = {
    "nothing": (),
    "the vision tower": ("vision.*",),
    "the lowest language blocks": ("language.blocks.[01].*",),
    "feed-forward networks of vision": ("vision.blocks.*.mlp.*",),
    "vision below its first feed-forward network": ("vision.patches.*", "vision.blocks.*.[na]*"),
    "all but the last block and the vocabulary": ("vision.*", "pool.*", "language.[ep]*", "*.[01].*", "head.[np]*"),
}


def counted_step(config: Config, batch: Any, partition: Sequence[int] = ()) -> float:
    """Operations of a real forward and backward, as torch counts them. partition: layers whose rows come from another
    process."""
    recompute = (config.train.activation_checkpointing, config.train.activation_checkpointing_every)
    layers = build_layers(config.model, 1.0, recompute=recompute[0], recompute_every=recompute[1])
    initialize(dict(enumerate(layers)), config.model, 0)
    freeze(dict(nn.Sequential(*layers).named_parameters()), frozen_parameters(config))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop.__wrapped__})
    with counter, sdpa_kernel(SDPBackend.MATH):
        out: Any = Activations.of(batch)
        for index, layer in enumerate(layers):
            if index in partition:
                out.hidden.requires_grad_()
            out = layer(out)
        loss = contrastive_loss(out.image_features, out.text_features, out.log_scale).loss
        (out.generation + loss).backward()
    return counter.get_total_flops()


def as_counted() -> Rates:
    """A device on which seconds of layers are operations as torch counts them, those that a mask hides included."""
    return replace(rates_of(matmul=1.0, attention=1.0), attention={"vision": 1.0, "language": 0.5})


@pytest.mark.parametrize("frozen", FROZEN)
def test_operations_of_a_step_are_what_torch_counts(frozen: str) -> None:
    """The plan knows no documents: its packs are full, and it counts the few tokens that have no target."""
    config = config_of(train__global_batch=1, train__freeze=FROZEN[frozen])
    batch, sizes = full_batch(config), sizes_of(config, IMAGES, 1)
    assert replace(sizes, targets=batch.num_targets) == Sizes.of([batch])
    counted = counted_step(config, batch)
    assert of_step(config.model, Sizes.of([batch]), frozen=frozen_parameters(config)).total == counted
    found = predict(config, 1, 1, as_counted(), IMAGES)
    assert found.flops.loss > 0
    assert found.flops.total == pytest.approx(counted, rel=0.01)
    assert found.compute + found.flops.loss == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("kind", "every", "frozen", "scale"),
    [
        ("full", 1, "nothing", None),
        ("full", 2, "nothing", None),
        ("full", 1, "all but the last block and the vocabulary", None),
        ("full", 1, "the vision tower", 0.1),
        ("attention", 1, "all but the last block and the vocabulary", None),
    ],
)
def test_only_what_a_backward_reads_is_computed_again(kind: str, every: int, frozen: str, scale: float | None) -> None:
    """In every block, or in the first and third of three and the first of two."""
    changes = {"train__freeze": FROZEN[frozen], "model__language__layer_scale": scale}
    changes |= {"train__activation_checkpointing": kind, "train__activation_checkpointing_every": every}
    config = config_of(train__global_batch=1, **changes)
    found = predict(config, 1, 1, as_counted(), IMAGES)
    assert found.again > 0
    assert found.compute + found.flops.loss == pytest.approx(counted_step(config, full_batch(config)), rel=0.01)


def test_a_stage_computes_the_gradient_of_what_it_receives(monkeypatch: pytest.MonkeyPatch) -> None:
    """And layers are divided by that, of the ways in which each stage has matrices and vectors to train: more of them
    into the first stage, which computes none."""
    frozen = FROZEN["all but the last block and the vocabulary"]
    config = config_of(train__global_batch=1, parallel__pipeline=2, train__freeze=frozen)
    found, batch = predict(config, 2, 2, as_counted(), IMAGES), full_batch(config)
    slowest, more, kinds = {}, 0, trained_kinds(config.model, frozen_parameters(config))
    for second in range(1, config.model.vision.layers + config.model.language.layers + 3):
        with monkeypatch.context() as patch:
            patch.setattr("megatron_lcl.plan.predict._partition", lambda *_, second=second: (0, second))
            divided = predict(config, 2, 2, as_counted(), IMAGES)
        counted = counted_step(config, batch, (second,))
        assert sum(divided.stages) + divided.flops.loss == pytest.approx(counted, rel=0.01)
        more += divided.flops.total < 0.99 * counted  # the model needs no such gradient
        if all(frozenset().union(*kinds[a:b]) == {True, False} for a, b in ((0, second), (second, len(kinds)))):
            slowest[second] = max(divided.stages)
    assert more > 2
    assert max(found.stages) == min(slowest.values()) == slowest[found.partition[1]]
    thawed = predict(configs.replace(config, train__freeze=()), 2, 2, as_counted(), IMAGES)
    assert found.partition > thawed.partition


@pytest.mark.parametrize("changes", [{}, {"parallel__tensor": 2}, {"parallel__tensor": 4, "train__micro_batch": 2}])
def test_products_and_attention_take_their_operations(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    processes, language = 4, config.model.language
    found = predict(config, processes, processes, rates_of(matmul=1e9, attention=1e9), IMAGES)
    whole = of_step(config.model, sizes_of(config, IMAGES, 8), 8 * IMAGES)
    masked = 3 * language.layers * 4 * (8 * CONTEXT**2) / 2 * language.width
    shared = whole.total - whole.loss - masked
    # of the loss each replica makes own tiles; the pool projects its query once a micro-batch, and not once a step
    loss = found.flops.loss / 1e9 / processes
    assert found.loss == pytest.approx(loss)
    assert found.seconds == pytest.approx(shared / 1e9 / processes + loss, rel=1e-3)
    assert found.mfu == pytest.approx(found.flops.total / (found.seconds * processes * 1e9))
    assert found.images == 8 * IMAGES


def test_what_is_computed_again() -> None:
    rates = rates_of(matmul=1e9, attention=1e9)
    once = predict(config_of(), 1, 1, rates, IMAGES)
    twice = predict(config_of(contrast__strategy="recompute"), 1, 1, rates, IMAGES)
    assert once.again == 0
    model, sizes = config_of().model, sizes_of(config_of(), IMAGES, 8)
    masked = model.language.layers * 4 * (8 * CONTEXT**2) / 2 * model.language.width
    second = forward(model, replace(sizes, targets=0)).total - masked
    assert twice.seconds - once.seconds == pytest.approx(second / 1e9, rel=1e-3)
    assert twice.again == pytest.approx(second / 1e9, rel=1e-3)
    full, half = (
        predict(config_of(train__activation_checkpointing=kind), 1, 1, rates, IMAGES) for kind in ("full", "attention")
    )
    assert once.seconds < half.seconds < full.seconds < once.seconds * 4 / 3
    assert full.flops == half.flops == twice.flops == once.flops, "what the model needs"


@pytest.mark.parametrize("strategy", ["retain", "recompute"])
def test_a_pipeline_takes_what_its_schedule_says(strategy: str) -> None:
    config = config_of(parallel__pipeline=2, contrast__strategy=strategy)
    found = predict(config, 2, 2, rates_of(matmul=1e9, attention=1e9), IMAGES)
    alone = predict(config_of(contrast__strategy=strategy), 1, 1, rates_of(matmul=1e9, attention=1e9), IMAGES)
    assert found.micro_batches == 8
    assert sum(found.stages) == pytest.approx((alone.seconds - alone.loss) / 8, rel=1e-3)
    slowest = max(found.stages)
    plain = (found.again / 8) if strategy == "recompute" else 0.0
    assert found.bubble == pytest.approx(slowest - plain)
    assert found.seconds == pytest.approx(8 * slowest + found.bubble + found.loss)
    assert found.balance == pytest.approx(sum(found.stages) / 2 / slowest)


def test_the_network_and_the_optimizer_take_their_bytes() -> None:
    found = predict(config_of(parallel__tensor=2), 2, 2, rates_of(intra=1e6), IMAGES)
    sent = found.sending
    assert sent.data == sent.pipeline == 0 < sent.contrast < sent.tensor
    assert found.network == pytest.approx((TENSOR_SHOWS * sent.tensor + sent.contrast + sent.reading) / 1e6)
    again = predict(
        config_of(parallel__tensor=2, train__activation_checkpointing="full"), 2, 2, rates_of(intra=1e6), IMAGES
    )
    assert again.network - found.network == pytest.approx(TENSOR_SHOWS * sent.tensor * 3 / 10 / 1e6)
    data = predict(config_of(), 4, 2, rates_of(intra=1e6, inter=2e5), IMAGES)
    assert data.network == pytest.approx((data.sending.data + data.sending.contrast) / 4e5), "two adapters a node"
    each = ADAM_BYTES + 8 * (GRADIENT_PASSES * 4 + SUM_BYTES)
    for frozen in (FROZEN["nothing"], FROZEN["the vision tower"]):
        config = config_of(train__freeze=frozen)
        alone = predict(config, 1, 1, rates_of(memory=1e6), IMAGES)
        stepped = num_parameters(config.model, frozen_parameters(config))
        assert alone.optimizer == alone.seconds == pytest.approx(stepped * each / 1e6)
        # each of four replicas steps its quarter, and adds two micro-batches instead of eight to all
        shared = ADAM_BYTES / 4 + 2 * (GRADIENT_PASSES * 4 + SUM_BYTES)
        assert predict(config, 4, 4, rates_of(memory=1e6), IMAGES).optimizer == pytest.approx(stepped * shared / 1e6)


@pytest.mark.parametrize("tensor", [1, 2])
def test_passes_over_logits_take_their_bytes(tensor: int) -> None:
    """And those over the vocabulary's weights, two in forward and four in backward; each rank has its part of both."""
    few, many = (
        predict(
            config_of(parallel__tensor=tensor, model__language__vocab_size=size),
            tensor,
            tensor,
            rates_of(elements=1e6),
            IMAGES,
        )
        for size in (100, 1100)
    )
    passes = sum(LOGIT_PASSES) * sizes_of(config_of(), IMAGES, 8).targets + 8 * 6 * config_of().model.language.width
    assert many.seconds - few.seconds == pytest.approx(1000 * 4 * passes / tensor / 1e6)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "the vision tower"])
def test_muon_takes_the_products_and_the_bytes_of_what_a_run_steps_by_it(frozen: str, per_head: bool) -> None:
    """And of nothing else: neither embeddings nor the pool's query."""
    config = config_of(optimizer__name="muon", optimizer__muon={"per_head": per_head}, train__freeze=FROZEN[frozen])
    shapes, without = parameter_shapes(config.model), frozen_parameters(config)
    rules = rules_of({name: Tensor(shape, None) for name, shape in shapes.items() if name not in without}, config)
    assert rules is not None
    stepped = [rule for rule in rules.values() if rule.algorithm == "muon"]
    assert len(stepped) == 6 * (2 * (frozen == "nothing") + 3) + 4
    assert any(rule.heads > 1 for rule in stepped) == per_head
    with FlopCounterMode(display=False) as counter:
        for rule in stepped:
            matrix_update(torch.randn(rule.tensor.shape), config.optimizer.muon.newton_schulz_steps, rule.heads)
    adamw = configs.replace(config, optimizer__name="adamw")
    one, plain = (predict(c, 1, 1, rates_of(matmul=1e9), IMAGES) for c in (config, adamw))
    assert one.optimizer - plain.optimizer == pytest.approx(counter.get_total_flops() / 1e9)
    assert one.sending.muon == 0
    numbers = sum(rule.tensor.shape.numel() for rule in stepped)
    sent = predict(config, 4, 4, rates_of(), IMAGES).sending.muon
    assert sent == pytest.approx(2 * 2 * numbers / 4 * 3 / 4), "there and back, in bfloat16"


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"train__dtype": "bfloat16"}, 1),  # summed behind the last backward
        ({}, 4 / (4 + 8)),  # the parameters; float32 gradients' sums travel beside the backward
        ({"train__dtype": "bfloat16", "zero__stage": 2}, 2 / (2 + 8 * 4)),  # sums of four micro-batches do
        ({"zero__stage": 3, "contrast__strategy": "recompute"}, 0),
    ],
)
def test_what_travels_beside_a_long_computation_is_not_waited_for(changes: dict[str, Any], shown: float) -> None:
    found = predict(config_of(**changes), 2, 2, rates_of(matmul=1e3, intra=1e9), IMAGES)
    waited = found.network - found.sending.contrast / 1e9
    assert waited * 1e9 == pytest.approx(shown * found.sending.data, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"zero__stage": 2}, {"zero__stage": 3, "contrast__strategy": "recompute"}])
def test_a_host_that_computes_itself_waits_for_all_that_travels(changes: dict[str, Any]) -> None:
    """Its cores move the bytes, and begin each of six collectives in a layer's backward."""
    found = predict(config_of(**changes), 2, 2, rates_of(matmul=1e3, intra=1e9, waits=True), IMAGES)
    assert found.network * 1e9 == pytest.approx(found.sending.data + found.sending.contrast)
    found = predict(config_of(parallel__tensor=2), 2, 2, rates_of(matmul=1e3, intra=1e9, waits=True), IMAGES)
    assert found.network * 1e9 == pytest.approx(found.sending.tensor + found.sending.contrast + found.sending.reading)
    begun = predict(config_of(parallel__tensor=2), 2, 2, rates_of(collective=1.0, waits=True), IMAGES).network
    layers = num_layers(config_of().model)
    passes = create(config_of()).num_forwards
    assert begun == pytest.approx(found.micro_batches * (4 * passes + 6) * layers, rel=1e-6)


def test_a_short_computation_hides_little() -> None:
    found = predict(config_of(), 2, 2, rates_of(matmul=1e9, attention=1e9, intra=1e3), IMAGES)
    backward = 2 / 3 * found.compute
    sent = (found.sending.data + found.sending.contrast) / 1e3
    assert found.network == pytest.approx(sent - HIDDEN * backward, rel=0.01)


def test_a_group_over_nodes_shares_their_adapters() -> None:
    rates = rates_of(intra=100.0, inter=20.0)
    assert bandwidth(range(8), 8, rates) == 100
    assert bandwidth(range(16), 8, rates) == 100, "eight adapters are faster than the links inside"
    assert bandwidth(range(0, 16, 2), 8, rates) == 80
    assert bandwidth(range(0, 64, 8), 8, rates) == 20
    assert bandwidth((0, 1, 2, 8), 8, rates) == 20, "the second node has one process of the group"


def test_kernels_are_started_ahead_of_a_device() -> None:
    waits, ahead = (
        predict(config_of(), 1, 1, rates_of(matmul=1e9, attention=1e9, kernel=1e-9, waits=w), IMAGES).seconds
        for w in (True, False)
    )
    alone = predict(config_of(), 1, 1, rates_of(matmul=1e9, attention=1e9), IMAGES).seconds
    assert alone == pytest.approx(ahead)
    assert waits > alone


def test_days_and_hours() -> None:
    one = predict(config_of(), 1, 1, rates_of(matmul=1e9), IMAGES)
    short, long = replace(one, seconds=0.5, images=100), replace(one, seconds=2.0, images=400)
    assert seconds_of_run([(1000, short), (4070, long)], None) == (500 + 8140, 100_000 + 1_628_000)
    seconds, images = seconds_of_run([(4320, long)], 864_000)
    assert (seconds, images) == (4320, 864_000)
    assert days_and_hours(8640, 512, "GPU-hours") == "0.10 days, 1,229 GPU-hours"
    assert math.isclose(long.images_per_second, 200)
