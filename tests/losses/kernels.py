"""Tests of the Triton kernels, and of the losses on them: under Triton's interpreter, or on a CUDA device.

test_loss_kernels.py runs them both ways, each in a process of its own: the interpreter is chosen when triton is
imported, for the whole process.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lcl.losses import (
    contrastive,
    contrastive_tiles,
    contrastive_triton,
    generation,
    softmax_torch,
    softmax_triton,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# rows, all rows, width, first row: smaller than a tile, a tile, and what does not divide it
SHAPES = [(1, 1, 16, 0), (5, 9, 20, 3), (64, 128, 64, 64), (70, 150, 40, 30), (130, 301, 100, 171)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# of gradients. bfloat16: weights are rounded before they meet the features; on a device, float16: both to tf32, and
# float32: products of three tf32 parts each, up to 8.5e-6 off where tensor cores' sums were emulated
TOLERANCE = {
    torch.float32: 1e-5 if INTERPRETED else 3e-5,
    torch.bfloat16: 4e-3,
    torch.float16: 1e-5 if INTERPRETED else 1e-3,
}


def test_devices_are_not_hidden():
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "", "by tests/conftest.py"


@pytest.fixture(params=[0, 1], ids=["large tile", "small tile"])
def tile(request, monkeypatch):
    for name in ("SINGLE_TILES", "HALF_TILES"):
        monkeypatch.setattr(contrastive_triton, name, (getattr(contrastive_triton, name)[request.param],))


def features(N: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(N)
    image, text = (F.normalize(torch.randn(N, D, generator=generator), dim=1).to(DEVICE, dtype) for _ in range(2))
    return image, text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "N", "D", "first"), SHAPES)
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_own_rows_against_all(n, N, D, first, dtype, scale, tile):
    """Against the torch tiles in float64, with features as they arrive from other ranks: columns of a wider matrix."""
    both = torch.cat([*features(N, D, dtype), torch.full((N, 16), math.nan, dtype=dtype, device=DEVICE)], 1)
    image_N, text_N = both[:, :D], both[:, D : 2 * D]
    image_n, text_n = (rows[first : first + n].contiguous() for rows in (image_N, text_N))
    scale = torch.tensor(scale, device=DEVICE)
    actual = contrastive_triton.forward(image_n, text_n, image_N, text_N, first, scale)

    exact = [rows.double() for rows in (image_n, text_n, image_N, text_N)]
    expected = contrastive_tiles.forward(*exact, first, scale.double())
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        if N > 1 or name == "positive":
            torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5, msg=name)

    everyone = contrastive_tiles.forward(exact[2], exact[3], exact[2], exact[3], 0, scale.double())
    lse = [torch.logaddexp(negatives, everyone.positive) for negatives in (everyone.image_lse, everyone.text_lse)]
    factor = scale / (2 * N)
    own = slice(first, first + n)
    negatives = torch.stack([everyone.image_lse[own], everyone.text_lse[own]])
    lse.append(torch.sigmoid(negatives - everyone.positive[own]).sum(0))
    single = [values.float() for values in lse]
    actual = contrastive_triton.backward(image_n, text_n, image_N, text_N, *single, first, scale, factor)
    expected = contrastive_tiles.backward(*exact, *lse, first, scale.double(), factor.double())
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).norm() <= TOLERANCE[dtype] * e.norm()


def rounding(scale: float, n: int) -> float:
    """What rounding logits of size `scale` leaves of n gradients in which like keys cancel: weights are 0 in sum."""
    return torch.finfo(torch.float32).eps * scale * scale / math.sqrt(n) if n > 1 else 0.0


def test_no_rows_of_its_own():
    image, text = features(5, 16)
    statistics = contrastive_triton.forward(image[:0], text[:0], image, text, 0, torch.tensor(1.0, device=DEVICE))
    assert all(len(values) == 0 for values in statistics)


def assert_the_loss(image: torch.Tensor, text: torch.Tensor, scale: float, tolerance: float, monkeypatch) -> None:
    """The loss on the kernels against itself in torch and float64 (that against the plain formula: another file)."""
    monkeypatch.setattr(contrastive, "_backend", lambda _: contrastive_triton)
    leaves = [image, text, torch.tensor([math.log(scale)], device=DEVICE)]
    for leaf in leaves:
        leaf.requires_grad_()
    output = contrastive.contrastive_loss(*leaves)
    output.loss.backward()
    monkeypatch.undo()
    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    expected = contrastive.contrastive_loss(*exact)
    expected.loss.backward()
    torch.testing.assert_close([v.double().cpu() for v in output], list(expected), rtol=1e-5, atol=1e-5)
    floor = rounding(scale, len(image))
    for leaf, e in zip(leaves, exact, strict=True):
        assert (leaf.grad.double().cpu() - e.grad).norm() <= tolerance * e.grad.norm() + floor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 67, 200])
def test_the_loss(n, dtype, monkeypatch):
    # half-precision gradients are rounded at the end
    assert_the_loss(*features(n, 24, dtype), 20.0, TOLERANCE[dtype] + torch.finfo(dtype).eps, monkeypatch)


@pytest.mark.parametrize("n", [1, 5, 64, 70])
def test_the_loss_of_opposite_features(n, tile, monkeypatch):
    """Every logit is below -88, so that where a tile has no row or column its logit of 0 is exp(88) too large."""
    noise = features(n, 16)
    image, text = (F.normalize(torch.eye(16, device=DEVICE)[0] + 0.1 * rows, dim=1) for rows in noise)
    assert_the_loss(image, -text, 100.0, TOLERANCE[torch.float32], monkeypatch)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features(value, monkeypatch):
    monkeypatch.setattr(contrastive, "_backend", lambda _: contrastive_triton)
    image, text = features(70, 24)
    text[66, 3] = value
    assert not math.isfinite(contrastive.contrastive_loss(image, text, torch.tensor(2.0, device=DEVICE)).loss)


@pytest.mark.parametrize("V", [1, 100, 4096, 9000])
def test_softmax_pieces(V):
    generator = torch.Generator().manual_seed(V)
    logits = (20 * torch.randn(6, V, generator=generator)).to(DEVICE)
    targets = torch.randint(0, V, (6,), generator=generator).to(DEVICE)
    targets[0], targets[1] = -3, V  # other ranks'
    used = logits.clone()
    actual, expected = softmax_triton.statistics(used, targets), softmax_torch.statistics(logits.clone(), targets)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    max_c, sum_c, _ = expected
    everywhere = (max_c + 0.1, 1.1 * sum_c)  # others have some of the vocabulary
    for dtype in DTYPES:
        spent = logits.clone()
        softmax_torch.statistics(spent, targets)
        a = softmax_triton.error(logits.clone(), targets, max_c, *everywhere, dtype)
        e = softmax_torch.error(spent, targets, max_c, *everywhere, dtype)
        assert a.dtype == dtype
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_a_row_that_is_all_padding():
    logits, targets = torch.full((3, 1), -math.inf, device=DEVICE), torch.tensor([5, 0, -1], device=DEVICE)
    actual = softmax_triton.statistics(logits.clone(), targets)
    torch.testing.assert_close(actual, softmax_torch.statistics(logits, targets))


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else DTYPES)  # on a CPU all are multiplied in float32
def test_generation_loss(dtype, monkeypatch):
    monkeypatch.setattr(generation, "rows_of_chunk", lambda *_: 4)
    monkeypatch.setattr(generation, "_is_aligned", lambda _: True)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 16, generator=generator).to(DEVICE, dtype).requires_grad_() for rows in (7, 5000)
    )
    targets = torch.randint(0, 4500, (7,), generator=generator)
    exact = [value.detach().double().cpu().requires_grad_() for value in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1][:4500].t(), targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected, exact)
    monkeypatch.setattr(generation, "_softmax", lambda _: softmax_triton)
    loss = generation.generation_loss(hidden, weight, targets.to(DEVICE), vocab_size=4500)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
    for a, e in zip(gradients, expected_gradients, strict=True):
        assert (a.double().cpu() - e).norm() <= max(1e-5, torch.finfo(dtype).eps) * e.norm()


@pytest.mark.skipif(INTERPRETED, reason="NCCL needs a device")
def test_over_nccl():
    """A group of one: what travels, and the header in its own stream, take the way they take among many."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        image, text = features(70, 24)
        log_scale = torch.tensor(2.0, device=DEVICE)
        alone = contrastive.contrastive_loss(image, text, log_scale)
        for counts in (None, [70]):
            for a, b in zip(
                contrastive.contrastive_loss(image, text, log_scale, dist.group.WORLD, counts), alone, strict=True
            ):
                torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="sends from cuda"):
            contrastive.contrastive_loss(image.cpu(), text.cpu(), log_scale.cpu(), dist.group.WORLD)
        hidden, weight, targets = image, text, torch.arange(70, device=DEVICE)
        loss = generation.generation_loss(hidden, weight, targets, dist.group.WORLD)
        torch.testing.assert_close(loss, generation.generation_loss(hidden, weight, targets))
    finally:
        dist.destroy_process_group()
