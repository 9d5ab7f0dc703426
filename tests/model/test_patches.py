"""Patches that are left out, and images of another size, against the whole model written out plainly."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert.resolution import at_image_size
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.lcl import LayerList, pack_padded
from megatron_lcl.model.positions import interpolate_positions, positions_for

LANGUAGE = Language(context_length=64, vocab_size=99, width=24, layers=1, heads=2, mlp_width=32)
N, P, K = 3, 16, 5


def model_of(places: str = "kept", image_size: int = 32) -> LCL:
    vision = Vision(image_size, 8, width=16, layers=2, heads=2, mlp_width=32, patch_dropout_places=places)
    return LCL(Model(vision, LANGUAGE, pool_heads=2), seed=1).double()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def kept() -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(P, generator=draw)[:K].sort().values for _ in range(N)])


def whole_model(model: LCL, images: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [N, D] and embeddings of all patches [N, P, D] where no row sees a patch that is left out.

    All rows are computed; what is left out is hidden by a mask.
    """
    seen = torch.zeros(len(images), P).scatter(1, kept, 1.0).bool()
    rows_seen = F.pad(seen, (1, 0), value=True)[:, None, None]  # the class token too

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    patches = model.patches
    weight = patches.projection.weight.view(-1, 3, 8, 8)
    x = F.conv2d(images, weight, stride=8).flatten(2).mT
    x = torch.cat([patches.class_embedding.expand(len(x), 1, -1), x], 1) + patches.positions
    x = patches.norm(x)
    for block in model.vision_blocks:
        a, y = block.attention, block.norm1(x)
        x = x + F.linear(attend(a.q(y), a.k(y), a.v(y), 2, rows_seen), a.out.weight, a.out.bias)
        m, y = block.mlp, block.norm2(x)
        x = x + F.linear(F.gelu(m.up(y)), m.down.weight, m.down.bias)
    pool = model.pool
    y = pool.norm(x)[:, 1:]
    q = pool.q(pool.norm_q(pool.query)).expand(len(y), 1, -1)
    v = pool.v(pool.norm_v(y))
    pooled = attend(q, pool.k(pool.norm_k(y)), v, 2, seen[:, None, None])[:, 0]
    return pooled @ pool.out.weight.mT, v @ pool.out.weight.mT


def batch_of(images: torch.Tensor, kept: torch.Tensor | None, placeholders: int, model: LCL) -> PackedBatch:
    """A sequence an image: three words, the image, a word."""
    special = model.special
    image = [special.soi, *[special.placeholder] * placeholders, special.eoi]
    tokens = torch.tensor([[7 + n, 8, 9, *image, 10] for n in range(len(images))])
    grid = dataclasses.replace(model.config.vision, image_size=8 * math.isqrt(placeholders))
    config = dataclasses.replace(model.config, vision=grid)
    batch = pack_padded(tokens, torch.full((len(images),), tokens.shape[1]), images, config)
    integers = {name: value.int() for name, value in batch.integers().items()}  # as the loader gives them
    batch = dataclasses.replace(batch, **integers)
    if kept is None:
        return batch
    return dataclasses.replace(batch, kept_patches=kept.int().flatten(), num_patches=kept.shape[1])


def through_the_pool(model: LCL, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Token rows [R, D] and latents [N, D] behind the pool and interleaving."""
    layers = list(model.layers)[: 2 + model.config.vision.layers]
    x = LayerList(*layers)(batch)
    return x.hidden[: len(batch.tokens)], x.hidden[len(batch.tokens) :]


@pytest.mark.parametrize("places", ["kept", "all"])
def test_patches_left_out_are_as_if_hidden(places: str, images: torch.Tensor) -> None:
    model = model_of(places)
    kept = torch.stack([torch.tensor(rows) for rows in ([0, 3, 7, 15], [1, 2, 4, 8], [5, 6, 12, 14])])
    latents, embeddings = whole_model(model, images, kept)
    batch = batch_of(images, kept, 4 if places == "kept" else P, model)
    rows, found = through_the_pool(model, batch)
    assert torch.allclose(found, latents, rtol=1e-12, atol=1e-12)
    token = model.pool.embedding.weight[model.special.placeholder]
    for n, start in enumerate(batch.image_start.tolist()):
        for place in range(4 if places == "kept" else P):
            here = rows[start + place] - model.pool.positions[4 + place]
            if places == "kept":
                expected = embeddings[n, kept[n, place]]
            else:
                expected = embeddings[n, place] if place in kept[n] else token
            assert torch.allclose(here, expected, rtol=1e-12, atol=1e-12)
    soi = rows[batch.image_start - 1] - model.pool.positions[3]
    assert torch.allclose(soi, model.pool.embedding.weight[model.special.soi].expand(N, -1))


def test_only_patches_that_are_kept_have_gradients(images: torch.Tensor, kept: torch.Tensor) -> None:
    model = model_of()
    images.requires_grad_()
    hidden = model.patches.encode(images, kept)
    assert hidden.shape == (N, 1 + K, 16)
    (hidden * torch.randn(hidden.shape, dtype=hidden.dtype)).sum().backward()
    pixels = F.unfold(images.grad, 8, stride=8).abs().sum(1)  # type: ignore[arg-type]  # [N, P]
    assert torch.equal(pixels.nonzero()[:, 1].view(N, K), kept)
    used = torch.zeros(P).index_fill(0, kept.flatten().unique(), 1.0).bool()
    grads = model.patches.positions.grad[1:].abs().sum(1) > 0  # type: ignore[index]
    assert torch.equal(grads, used)


def test_all_patches_in_order_are_the_whole_image(images: torch.Tensor) -> None:
    model = model_of()
    everything = torch.arange(P).expand(N, P)
    assert torch.equal(model.patches.encode(images, everything), model.patches.encode(images))


@pytest.mark.parametrize("size", [16, 24, 48])
def test_an_image_of_another_size_is_read_as_an_export_would(size: int) -> None:
    model = model_of()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    exported = at_image_size(model, size)
    ours, theirs = model.patches.encode(images), exported.patches.encode(images)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    batch = batch_of(images.clone(), None, (size // 8) ** 2, model)
    out, expected = model.layers(batch), exported.layers(batch)
    assert out.logit_bias is expected.logit_bias is None
    for a, b in zip(out[:4], expected[:4], strict=True):
        assert torch.allclose(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_interpolated_positions_is_that_of_torchs_interpolation() -> None:
    positions = torch.randn(1 + 49, 12, requires_grad=True)
    weights = torch.randn(1 + 16, 12)
    (ours,) = torch.autograd.grad((positions_for(positions, 16) * weights).sum(), positions)
    (theirs,) = torch.autograd.grad((interpolate_positions(positions, 16) * weights).sum(), positions)
    assert torch.allclose(positions_for(positions, 16), interpolate_positions(positions, 16), rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert positions_for(positions, 49) is positions
    assert positions_for(positions.bfloat16(), 16).dtype == torch.bfloat16


def test_a_matrix_made_in_inference_mode_serves_training() -> None:
    positions = nn.Parameter(torch.randn(1 + 25, 4))
    with torch.inference_mode():
        positions_for(positions, 9)
    positions_for(positions, 9).sum().backward()
    assert positions.grad is not None
