"""Tests of the Triton kernels under Triton's interpreter; test_loss_kernels.py runs them in a process of their own.

The interpreter is chosen when triton is imported, for the whole process.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.nn.functional as F

from megatron_lcl.losses import (
    contrastive,
    contrastive_tiles,
    contrastive_triton,
    generation,
    softmax_torch,
    softmax_triton,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "else the kernels look for a GPU"

# rows, all rows, width, first row: smaller than a tile, a tile, and what does not divide it
SHAPES = [(1, 1, 16, 0), (5, 9, 20, 3), (64, 128, 64, 64), (70, 150, 40, 30), (130, 301, 100, 171)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[0, 1], ids=["large tile", "small tile"])
def tile(request, monkeypatch):
    for name in ("SINGLE_TILES", "HALF_TILES"):
        monkeypatch.setattr(contrastive_triton, name, (getattr(contrastive_triton, name)[request.param],))


def features(N: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(N)
    image, text = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(dtype) for _ in range(2))
    return image, text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "N", "D", "first"), SHAPES)
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_own_rows_against_all(n, N, D, first, dtype, scale, tile):
    """Against the torch tiles in float64, with features as they arrive from other ranks: columns of a wider matrix."""
    both = torch.cat([*features(N, D, dtype), torch.full((N, 16), math.nan, dtype=dtype)], 1)
    image_N, text_N = both[:, :D], both[:, D : 2 * D]
    image_n, text_n = (rows[first : first + n].contiguous() for rows in (image_N, text_N))
    scale = torch.tensor(scale)
    actual = contrastive_triton.forward(image_n, text_n, image_N, text_N, first, scale)

    exact = [rows.double() for rows in (image_n, text_n, image_N, text_N)]
    expected = contrastive_tiles.forward(*exact, first, scale.double())
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        if N > 1 or name == "positive":
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5, msg=name)

    everyone = contrastive_tiles.forward(exact[2], exact[3], exact[2], exact[3], 0, scale.double())
    lse = [torch.logaddexp(negatives, everyone.positive) for negatives in (everyone.image_lse, everyone.text_lse)]
    factor = scale / (2 * N)
    single = [values.float() for values in lse]
    actual = contrastive_triton.backward(image_n, text_n, image_N, text_N, *single, first, scale, factor)
    expected = contrastive_tiles.backward(*exact, *lse, first, scale.double(), factor.double())
    # bfloat16: the weights are rounded before they meet the features
    tolerance = 4e-3 if dtype == torch.bfloat16 else 2e-5
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= tolerance * max(1.0, factor.item(), e.norm().item())


def test_no_rows_of_its_own():
    image, text = features(5, 16)
    statistics = contrastive_triton.forward(image[:0], text[:0], image, text, 0, torch.tensor(1.0))
    assert all(len(values) == 0 for values in statistics)


@pytest.mark.parametrize("n", [0, 1, 67, 200])
def test_the_loss(n, monkeypatch):
    monkeypatch.setattr(contrastive, "_backend", lambda _: contrastive_triton)
    leaves = [*features(n, 24), torch.tensor([3.0])]
    for leaf in leaves:
        leaf.requires_grad_()
    output = contrastive.contrastive_loss(*leaves)
    output.loss.backward()
    monkeypatch.undo()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = contrastive.contrastive_loss(*exact)
    expected.loss.backward()
    torch.testing.assert_close([v.double() for v in output], list(expected), rtol=1e-5, atol=1e-5)
    for leaf, e in zip(leaves, exact, strict=True):
        assert (leaf.grad - e.grad).norm() <= 1e-5 * max(1.0, e.grad.norm().item())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features(value, monkeypatch):
    monkeypatch.setattr(contrastive, "_backend", lambda _: contrastive_triton)
    image, text = features(70, 24)
    text[66, 3] = value
    assert not math.isfinite(contrastive.contrastive_loss(image, text, torch.tensor(2.0)).loss)


@pytest.mark.parametrize("V", [1, 100, 4096, 9000])
def test_softmax_pieces(V):
    generator = torch.Generator().manual_seed(V)
    logits = 20 * torch.randn(6, V, generator=generator)
    targets = torch.randint(0, V, (6,), generator=generator)
    targets[0], targets[1] = -3, V  # other ranks'
    used = logits.clone()
    actual, expected = softmax_triton.statistics(used, targets), softmax_torch.statistics(logits, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    max_c, sum_c, _ = expected
    lse_c = max_c + sum_c.log() + 0.1  # others have some of the vocabulary
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a = softmax_triton.error(used.clone(), targets, max_c, lse_c, dtype)
        e = softmax_torch.error(logits.clone(), targets, max_c, lse_c, dtype)
        assert a.dtype == dtype
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_a_row_that_is_all_padding():
    logits, targets = torch.full((3, 1), -math.inf), torch.tensor([5, 0, -1])
    actual = softmax_triton.statistics(logits.clone(), targets)
    torch.testing.assert_close(actual, softmax_torch.statistics(logits, targets))


def test_generation_loss(monkeypatch):
    monkeypatch.setattr(generation, "CHUNK_LOGITS", 20_000)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 12, generator=generator).requires_grad_() for rows in (7, 5000))
    targets = torch.randint(0, 4500, (7,), generator=generator)
    expected = F.cross_entropy(hidden @ weight[:4500].t(), targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    monkeypatch.setattr(generation, "_softmax", lambda _: softmax_triton)
    loss = generation.generation_loss(hidden, weight, targets, vocab_size=4500)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert (a - e).norm() <= 1e-5 * e.norm()
