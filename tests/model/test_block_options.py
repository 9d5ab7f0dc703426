"""Drop path, LayerScale, QK-norm, registers, epsilons, a missing embedding norm: what they are, and that off is off."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_lcl import config as configs
from megatron_lcl.config import Model
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.hashes import mix
from megatron_lcl.data.loading.hashes import uniform as numba_uniform
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.drop_path import BRANCHES, LANGUAGE, DropPath, rate_of, uniform
from megatron_lcl.model.drop_path import _mix as torch_mix
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LCL, LayerList
from megatron_lcl.selftest.cases import Case, make_batches

OPTIONS = {"layer_scale": 0.5, "qk_norm": True}
VISION = {"image_size": 16, "patch_size": 8, "width": 40, "layers": 3, "heads": 4, "mlp_width": 64}
LANGUAGE_MODEL = {"context_length": 40, "vocab_size": 103, "width": 32, "layers": 3, "heads": 4, "mlp_width": 48}


def model_of(vision: dict[str, Any] | None = None, language: dict[str, Any] | None = None) -> Model:
    own = {"vision": {**VISION, **(vision or {})}, "language": {**LANGUAGE_MODEL, **(language or {})}, "pool_heads": 4}
    return configs.from_dict({"model": own}).model


def batches(num: int = 2) -> list[PackedBatch]:
    return make_batches(Case().config(), 0)[:num]


def test_without_options_the_parameters_are_what_they_were() -> None:
    names = {name.partition(".")[2] for name, _ in LCL(model_of(), seed=None).layers.named_parameters()}
    block = {f"{x}.{y}" for x in ("norm1", "norm2", "mlp.up", "mlp.down") for y in ("weight", "bias")}
    block |= {f"attention.{x}.{y}" for x in ("q", "k", "v", "out") for y in ("weight", "bias")}
    patches = {"projection.weight", "class_embedding", "positions", "norm.weight", "norm.bias"}
    pool = {"query", "embedding.weight", "positions", "norm.weight", "norm.bias", "out.weight"}
    pool |= {f"{x}.{y}" for x in ("norm_q", "norm_k", "norm_v", "q", "k", "v") for y in ("weight", "bias")}
    head = {"log_scale", "projection.weight", "vocabulary", "vocabulary_norm.weight", "vocabulary_norm.bias"}
    assert names == block | patches | pool | head | {"norm.weight", "norm.bias"}


def test_a_block_with_layer_scale_and_qk_norm_is_its_formula() -> None:
    model = LCL(model_of({**OPTIONS, "norm_eps": 1e-3, "registers": 2, "embedding_norm": False}), seed=0).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    block = model.vision_blocks[1]
    assert model.patches.norm is None
    x = torch.randn(2, 1 + 2 + 4, 40, generator=generator, dtype=torch.float64)

    def norm(values: torch.Tensor, module: Any) -> torch.Tensor:
        mean, variance = values.mean(-1, keepdim=True), values.var(-1, correction=0, keepdim=True)
        return (values - mean) / (variance + 1e-3).sqrt() * module.weight + module.bias

    attention = block.attention
    q, k, v = (
        F.linear(norm(x, block.norm1), layer.weight, layer.bias).view(2, 7, 4, 10)
        for layer in (attention.q, attention.k, attention.v)
    )
    q, k = norm(q, attention.norm_q), norm(k, attention.norm_k)
    weights = (torch.einsum("nqhd,nkhd->nhqk", q, k) / 10**0.5).softmax(-1)
    attended = torch.einsum("nhqk,nkhd->nqhd", weights, v).flatten(2)
    attended = block.scale1 * F.linear(attended, attention.out.weight, attention.out.bias)

    def formula(factor1: torch.Tensor | float, factor2: torch.Tensor | float) -> torch.Tensor:
        y = x + factor1 * attended
        hidden = F.gelu(F.linear(norm(y, block.norm2), block.mlp.up.weight, block.mlp.up.bias))
        return y + factor2 * block.scale2 * F.linear(hidden, block.mlp.down.weight, block.mlp.down.bias)

    torch.testing.assert_close(block.encode(x), formula(1, 1))
    factors = torch.rand(2, 14, 1, generator=generator, dtype=torch.float64)
    block.drop = SimpleNamespace(factors=lambda *_: list(factors))
    batch = dataclasses.replace(batches()[0], image_start=torch.tensor([0, 7]), packs=(0,))
    dropped = block(Activations.of(batch)._replace(hidden=x.flatten(0, 1), num_patches=4)).hidden
    torch.testing.assert_close(dropped, formula(*factors.view(2, 2, 7, 1)).flatten(0, 1))
    images = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    rows = model.patches.encode(images)
    assert rows.shape == (2, 7, 40)
    assert torch.equal(rows[0, 1:3], model.patches.registers)
    plain = LCL(model_of({"embedding_norm": False}), seed=0).double()
    plain.patches.load_state_dict({n: p for n, p in model.patches.state_dict().items() if n != "registers"})
    assert torch.equal(plain.patches.encode(images)[:, [0, 1, 2, 3, 4]], rows[:, [0, 3, 4, 5, 6]])


def test_registers_are_in_no_patch_s_place() -> None:
    model = LCL(model_of({"registers": 3}), seed=0)
    hidden = torch.randn(2, 8, 40)
    assert torch.equal(model.pool.patch_features(hidden), model.pool.norm(hidden[:, 4:]))
    z, patches = model.pool.pool(hidden)
    other = hidden.clone()
    other[:, :4] += 1
    assert torch.equal(model.pool.pool(other)[0], z)
    assert patches.shape == (2, 4, 32)


def test_layer_scale_begins_as_the_config_says() -> None:
    model = LCL(model_of({"layer_scale": 1e-5}, {"layer_scale": 0.1}), seed=0)
    assert {float(p) for b in model.vision_blocks for p in (*b.scale1, *b.scale2)} == {float(torch.tensor(1e-5))}
    assert {float(p) for b in model.language_blocks for p in (*b.scale1, *b.scale2)} == {float(torch.tensor(0.1))}


# --- drop path ----------------------------------------------------------------------------------------------------


def test_the_hash_is_the_loader_s() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 64, 50, dtype=np.uint64)
    for value in (0, 7, (1 << 40) + 3):
        ours = torch_mix(torch.from_numpy(keys.view(np.int64).copy()), value)
        expected = np.array([mix(key, np.uint64(value)) for key in keys], np.uint64)
        assert np.array_equal(ours.numpy().view(np.uint64), expected)
        drawn = [numba_uniform(key, np.uint64(value)) for key in keys]
        assert uniform(ours).tolist() == drawn


def test_no_block_is_left_out_by_what_crops_its_image() -> None:
    """The loader draws crops by the same key where its seed is the model's."""
    model = LCL(model_of({"drop_path": 0.5}, {"drop_path": 0.5}), seed=0)
    turns = {BRANCHES * b.drop.layer + k for b in model.vision_blocks[1:] for k in range(BRANCHES)}
    others = {BRANCHES * b.drop.layer + k for b in model.language_blocks[1:] for k in range(BRANCHES)}
    assert min(turns | others) > 10 * 4, "draws of a crop"
    assert max(turns | others) < 1 << 40, "draws of patches that are kept"
    assert not turns & others


def test_rates_and_means() -> None:
    assert [rate_of(i, 5, 0.4) for i in range(5)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert rate_of(0, 1, 0.4) == 0
    packs, units = torch.arange(20_000) // 4, torch.arange(20_000) % 4
    first, second = DropPath(0.3, 5, 2).factors(packs, units, torch.float64)
    for factors in (first, second):
        assert {round(x, 9) for x in factors.flatten().tolist()} == {0.0, round(1 / 0.7, 9)}
        assert float(factors.mean()) == pytest.approx(1, abs=4 * (0.3 / 0.7 / 20_000) ** 0.5)
    agree = float(((first == 0) == (second == 0)).double().mean())
    assert agree == pytest.approx(0.58, abs=0.02), "branches are drawn apart"
    for other in (DropPath(0.3, 6, 2), DropPath(0.3, 5, 3), DropPath(0.3, 5, LANGUAGE + 2)):
        assert not torch.equal(other.factors(packs, units, torch.float64)[0], first)


def drawn(model: Model, batch: PackedBatch, seed: int = 3) -> list[torch.Tensor]:
    """What each block of both encoders draws for the rows of a batch: [rows, 2] each; nothing: empty."""
    layers = build_layers(model, 1.0, seed=seed)
    x = Activations.of(batch)._replace(hidden=torch.zeros(len(batch.images) * model.vision.num_rows, 1))
    vision = [layer._factors(x) for layer in layers[1 : 1 + model.vision.layers]]  # type: ignore[operator]
    language = [layer._factors(x, len(x.tokens)) for layer in layers[2 + model.vision.layers : -1]]  # type: ignore[operator]
    return [torch.cat([*f], 1) if f else torch.empty(0) for f in (*vision, *language)]


def test_what_is_left_out_is_of_pack_and_slot_or_sequence() -> None:
    """Two packs together draw what each draws alone, whichever is first; all rows of an image, or sequence, alike."""
    model = model_of({"drop_path": 0.7}, {"drop_path": 0.7})
    one, two = batches()
    apart = [drawn(model, batch) for batch in (one, two)]
    assert [len(d) for d in apart[0]] == [0, 20, 20, 0, 60, 60], "the first block of each encoder drops nothing"
    assert not any(torch.equal(*slots) for slots in zip(apart[0][1:3], apart[1][1:3], strict=True)), "the pack counts"
    for order in ((0, 1), (1, 0)):
        both = [(one, two)[k] for k in order]
        offset = len(one.tokens)
        joined = dataclasses.replace(
            one,
            **{name: torch.cat([getattr(b, name) for b in both]) for name in ("images", "image_start", "tokens")},
            cu_seqlens=torch.cat([both[0].cu_seqlens, both[1].cu_seqlens[1:] + offset]),
            packs=both[0].packs + both[1].packs,
        )
        for together, *single in zip(drawn(model, joined), *(apart[k] for k in order), strict=True):
            assert torch.equal(together, torch.cat(single))
    for rows in apart[0][1:3]:
        assert all(len(image.unique(dim=0)) == 1 for image in rows.split(5))
    starts = one.cu_seqlens.unique().tolist()
    for rows in apart[0][4:]:
        assert all(len(rows[a:b].unique(dim=0)) == 1 for a, b in itertools.pairwise(starts))
    assert any(len(rows.unique(dim=0)) > 1 for rows in apart[0][1:])


def test_it_is_in_training_only_and_the_same_when_recomputed() -> None:
    model, batch = model_of({"drop_path": 0.7}, {"drop_path": 0.7}), batches(1)[0]

    def outputs(recompute: Any = "none", training: bool = True, packs: bool = True) -> tuple[Any, list[torch.Tensor]]:
        layers = build_layers(model, 1.0, recompute=recompute, seed=3)
        initialize(dict(enumerate(layers)), model, 0)
        whole = LayerList(*layers).train(training)
        out = whole(batch if packs else dataclasses.replace(batch, packs=()))
        loss = out.generation + (out.image_features * out.text_features).sum()
        return loss.detach(), list(torch.autograd.grad(loss, list(whole.parameters()), allow_unused=True))

    trained, gradients = outputs()
    for recompute in ("full", "attention"):
        again, others = outputs(recompute)
        assert torch.equal(again, trained)
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    evaluated = outputs(training=False)[0]
    assert torch.equal(evaluated, outputs(packs=False)[0])
    assert not torch.equal(evaluated, trained)
    with torch.no_grad():
        layers = build_layers(model_of(), 1.0)
        initialize(dict(enumerate(layers)), model_of(), 0)
        out = LayerList(*layers)(batch)
    assert torch.equal(evaluated, out.generation + (out.image_features * out.text_features).sum())
