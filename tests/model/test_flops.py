"""Protects the count of operations: equal to what torch counts while a step runs, part by part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from megatron_lcl import attention
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.losses import contrastive_tiles, sigmoid_tiles
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.flops import Sizes, forward, of_step
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.objectives.base import without_targets

MODELS = {
    "wide language": Model(
        Vision(image_size=32, patch_size=8, width=24, layers=2, heads=2, mlp_width=56),
        Language(context_length=80, vocab_size=203, width=32, layers=3, heads=4, mlp_width=72),
        pool_heads=2,
    ),
    "wide vision": Model(
        Vision(image_size=28, patch_size=14, width=48, layers=3, heads=3, mlp_width=100),
        Language(context_length=40, vocab_size=97, width=16, layers=1, heads=2, mlp_width=40),
        pool_heads=4,
    ),
    "all options": Model(
        Vision(
            image_size=32,
            patch_size=8,
            width=24,
            layers=2,
            heads=2,
            mlp_width=56,
            registers=3,
            qk_norm=True,
            layer_scale=0.1,
        ),
        Language(context_length=80, vocab_size=203, width=32, layers=1, heads=4, mlp_width=72, qk_norm=True),
        pool_heads=2,
    ),
}


def batch_of(model: Model) -> Any:
    """Three sequences of different lengths, one of them with two images, one without."""
    special = SpecialTokens.of(model.language.vocab_size)
    image = [special.soi, *[special.placeholder] * model.vision.num_patches, special.eoi]
    texts = [[5, 6, *image, 7, *image, 8, 9], [5, 6, 7, 8], [9, *image, 5]]
    rows = [[special.sot, *text, special.eot] for text in texts]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    pixels = torch.randint(0, 256, (3, 3, *[model.vision.image_size] * 2), dtype=torch.uint8)
    return pack_padded(padded, torch.tensor([len(row) for row in rows]), pixels, model)


def counter() -> FlopCounterMode:
    """In place a product with a sum is not in torch's table."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flop.__wrapped__})


def with_fewer_patches(batch: Any, num_kept: int) -> Any:
    """The batch as patch dropout gives it, all places kept."""
    kept = torch.arange(num_kept, dtype=torch.int32).repeat(len(batch.image_soi))
    return replace(batch, kept_patches=kept, num_patches=num_kept)


@pytest.fixture(autouse=True)
def no_sequence_is_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for those that share a call: `Sizes` counts their own rows."""
    monkeypatch.setattr(attention, "SHORT", 0)


@pytest.mark.parametrize("num_kept", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_what_torch_counts(name: str, num_kept: int) -> None:
    model = MODELS[name]
    layers = nn.Sequential(*build_layers(model, 1.0))
    initialize(dict(enumerate(layers)), model, 0)
    batch = batch_of(model)
    batch = with_fewer_patches(batch, num_kept) if num_kept else batch
    with counter() as counted, sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention is not in the table either
        out = layers(Activations.of(batch))
        pairs = torch.nonzero(batch.image_soi >= 0)[:, 0]
        contrast = contrastive_loss(out.image_features[pairs], out.text_features[pairs], out.log_scale).loss
        (out.generation + contrast).backward()
    sizes = Sizes.of([batch])
    assert (sizes.images, sizes.targets, sizes.pairs) == (3, 17, 3)
    step = of_step(model, sizes)
    assert counted.get_total_flops() == step.total
    of_layers = {k: sum(v.values()) for k, v in counted.get_flop_counts().items()}
    vision, language = model.vision.layers, model.language.layers
    parts = {"vision": range(1 + vision), "pool": [1 + vision], "language": range(2 + vision, 2 + vision + language)}
    for part, numbers in parts.items():
        assert sum(of_layers[f"Sequential.{k}"] for k in numbers) == getattr(step, part), part


def test_images_of_another_size_count_for_their_own_patches() -> None:
    model = MODELS["wide vision"]
    larger = replace(model, vision=replace(model.vision, image_size=42))
    layers = nn.Sequential(*build_layers(model, 1.0))
    initialize(dict(enumerate(layers)), model, 0)
    batch = batch_of(larger)
    with counter() as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        layers(Activations.of(batch))
    interpolation = 2 * (1 + 9) * (1 + 4) * model.vision.width
    assert counted.get_total_flops() == forward(model, Sizes.of([batch])).total + interpolation


def test_forwards_for_the_features_alone_have_no_logits() -> None:
    model = MODELS["wide language"]
    layers = nn.Sequential(*build_layers(model, 1.0))
    initialize(dict(enumerate(layers)), model, 0)
    batch = batch_of(model)
    with counter() as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        layers(Activations.of(without_targets(batch)))
    sizes = Sizes.of([batch])
    assert counted.get_total_flops() == forward(model, replace(sizes, targets=0)).total
    assert of_step(model, sizes, contrast=False).total == of_step(model, sizes).total - of_step(model, sizes).loss


def test_similarities_with_other_ranks() -> None:
    model, own, every = MODELS["wide language"], 5, 13
    image, text = (torch.randn(every, model.language.width) for _ in range(2))
    mine, scale = slice(4, 4 + own), torch.tensor(2.0)
    lse = torch.zeros(every)
    with counter() as counted:
        contrastive_tiles.forward(image[mine], text[mine], image, text, 4, scale)
        contrastive_tiles.backward(image[mine], text[mine], image, text, lse, lse, lse[mine], 4, scale, scale)
    sizes = Sizes(0, 0, 0, 0, own, 0, 0)
    assert counted.get_total_flops() == of_step(model, sizes, every).loss


def test_similarities_of_the_sigmoid_loss() -> None:
    model, own, every = replace(MODELS["wide language"], logit_bias=-10.0), 5, 13
    image, text = (torch.randn(every, model.language.width) for _ in range(2))
    mine, scale = slice(4, 4 + own), torch.tensor(2.0)
    with counter() as counted:
        sigmoid_tiles.loss_and_gradients(image[mine], text[mine], image, text, 4, scale, -scale)
    assert counted.get_total_flops() == of_step(model, Sizes(0, 0, 0, 0, own, 0, 0), every).loss


def test_batches_add_up() -> None:
    batch = batch_of(MODELS["wide vision"])
    one, two = Sizes.of([batch]), Sizes.of([batch, batch])
    assert two == one + one
    assert forward(MODELS["wide vision"], two).vision == 2 * forward(MODELS["wide vision"], one).vision
