"""The sigmoid loss against SigLIP's formula in float64, in one process and over gloo."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from measured import Recorder
from test_contrastive_loss import assert_close, features

from megatron_lcl.losses import contrastive_tiles
from megatron_lcl.losses.contrastive import finish_contrastive_loss, start_gather
from megatron_lcl.losses.sigmoid import SigmoidOutput, finish_sigmoid_loss, sigmoid_loss

SCALE, BIAS = torch.tensor([2.7]), torch.tensor([-6.5])


def plain(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As in SigLIP's paper, algorithm 1."""
    logits = log_scale.exp() * image @ text.t() + bias
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / max(len(image), 1)


def with_gradients(function, *arguments, **options) -> list[torch.Tensor]:
    """Loss, and its gradients for image, text, log_scale and bias, of an incoming gradient of 0.3."""
    leaves = [value.detach().clone().requires_grad_() for value in arguments]
    loss = function(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(0.3 * loss, leaves)]


def ours(*arguments, **options) -> torch.Tensor:
    return sigmoid_loss(*arguments, **options).loss


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_tiles, "TILE_ROWS", 7)
    monkeypatch.setattr(contrastive_tiles, "TILE_COLUMNS", 5)


@pytest.mark.parametrize("bias", [-10.0, 0.0, 4.0])
@pytest.mark.parametrize("n", [1, 2, 7, 35, 40])
def test_equals_the_plain_formula(n: int, bias: float, small_tiles: None) -> None:
    arguments = [*features(n, duplicates=n // 8), SCALE.double(), torch.tensor([bias], dtype=torch.float64)]
    assert_close(with_gradients(ours, *arguments), with_gradients(plain, *arguments), 1e-12)


def test_equals_the_plain_formula_in_float32_and_bfloat16() -> None:
    image, text = features(700, width=64)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-3)):
        arguments = [image.to(dtype), text.to(dtype), SCALE, BIAS]
        expected = with_gradients(plain, *(value.double() for value in arguments))
        assert_close(with_gradients(ours, *arguments), expected, tolerance)


@pytest.mark.parametrize(("noise", "largest"), [(0.18, 10.0), (0.14, 1e-2), (0.12, 1e-5)])
def test_gradients_of_a_small_loss_are_exact(noise: float, largest: float, small_tiles: None) -> None:
    """Where an own pair's sigmoid is 1 but for what float32 rounds away, and most of the loss is of own pairs."""
    image, _ = features(40, width=64)
    text = F.normalize(image + noise * torch.randn(40, 64, dtype=torch.float64, generator=torch.manual_seed(1)), dim=1)
    arguments = [value.float() for value in (image, text, torch.tensor([math.log(100)]), torch.tensor([-50.0]))]
    expected = with_gradients(plain, *(value.double() for value in arguments))
    assert largest / 20 < expected[0] < largest
    assert_close(with_gradients(ours, *arguments), expected, 2e-5, 0.0)


def test_sums_of_many_small_terms_are_exact(small_tiles: None) -> None:
    """Of n images on the axes, with themselves as texts, every term is log(1 + e^-10), and the bias's gradient
    (n - 2) / (1 + e^10): float32 would add the tiles' terms to a thousand times as much."""
    n = 150
    rows = torch.eye(n)
    loss, _, _, _, bias = with_gradients(ours, rows, rows, torch.tensor([math.log(20)]), torch.tensor([-10.0]))
    assert float(loss) == pytest.approx(n * math.log1p(math.exp(-10)), rel=1e-6)
    assert float(bias) == pytest.approx(0.3 * (n - 2) / (1 + math.exp(10)), rel=1e-6)


def test_numbers_in_half_precision_cost_no_more_than_their_own_rounding() -> None:
    """A bfloat16 scale is raised to e in float32; a float32 bias stays it beside bfloat16 features."""
    image, text = (rows.bfloat16() for rows in features(50, width=64))
    for scale, bias in ((SCALE.bfloat16(), BIAS), (SCALE, torch.tensor([-10.03])), (SCALE, BIAS.bfloat16())):
        arguments = [image, text, scale, bias]
        actual, expected = ours(*arguments), plain(*(value.double() for value in arguments))
        assert float(actual) == pytest.approx(float(expected), rel=2e-6)


def test_statistics_and_no_pairs(small_tiles: None) -> None:
    image, text = features(30, seed=4)
    text = F.normalize(text + 0.8 * image, dim=1)
    said = sigmoid_loss(image, text, SCALE.double(), BIAS.double())
    similarity = image @ text.t()
    own, others = similarity.diagonal(), similarity.clone().fill_diagonal_(-2)
    hits = [(own > others.amax(dim)).double().mean() for dim in (1, 0)]
    assert 0 < hits[0] != hits[1] < 1
    hardest = (others.amax(1) + others.amax(0)).mean() / 2
    torch.testing.assert_close(
        said, SigmoidOutput(plain(image, text, SCALE.double(), BIAS.double()), *hits, own.mean(), hardest)
    )
    empty = torch.empty(0, 4, requires_grad=True)
    none = sigmoid_loss(empty, empty, SCALE, BIAS)
    assert float(none.loss.detach()) == 0
    assert torch.autograd.grad(none.loss, empty)[0].shape == (0, 4)
    lone = sigmoid_loss(image[:1], text[:1], SCALE.double(), BIAS.double())
    assert float(lone.hardest_negative_similarity) == pytest.approx(-1)


def test_what_is_not_finite_makes_the_loss_not_finite() -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        image, text = (rows.float() for rows in features(6))
        image[3, 0] = bad
        assert not torch.isfinite(ours(image, text, SCALE, BIAS))


def test_an_infinite_positive_among_minus_infinite_negatives_is_not_a_loss_of_zero() -> None:
    image, text = torch.tensor([[torch.inf, 1.0], [0.5, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert torch.isnan(ours(image, text, SCALE, BIAS))


def test_a_tie_counts_as_a_miss(small_tiles: None) -> None:
    rows = torch.eye(4)[[2] * 8]
    said = sigmoid_loss(rows, rows, SCALE, BIAS)
    assert (said.image_accuracy, said.text_accuracy) == (0, 0)


def in_group(group, image, text, log_scale, bias, counts):
    with Recorder() as forward:
        leaves = [value.requires_grad_() for value in (image, text, log_scale, bias)]
        out = sigmoid_loss(*leaves, group=group, counts=counts)
    with Recorder() as backward:
        gradients = torch.autograd.grad(0.3 * out.loss, leaves)
    messages = sum(forward.messages.values()), sum(backward.messages.values())
    return [value.detach() for value in out], gradients, messages


@pytest.mark.parametrize("counts", [[3, 0, 5, 2], [4, 4], [0, 0, 1]])
def test_ranks_together_equal_one_process(pool, counts: list[int]) -> None:
    numbers = SCALE.double(), BIAS.double()
    image, text = features(sum(counts), seed=len(counts))
    parts = zip(image.split(counts), text.split(counts), strict=True)
    results = pool.run(in_group, [(x, t, *(v.clone() for v in numbers), counts) for x, t in parts])
    expected = with_gradients(plain, image, text, *numbers)
    alone = sigmoid_loss(image, text, *numbers)
    for outputs, _, messages in results:
        torch.testing.assert_close(outputs, list(alone))
        assert messages == (3, 0), "a header, features and sums forward; nothing in backward"
    gathered = [torch.cat([g[k] for _, g, _ in results]) for k in (0, 1)]
    summed = [torch.stack([g[k] for _, g, _ in results]).sum(0) for k in (2, 3)]
    assert_close([results[0][0][0], *gathered, *summed], expected, 1e-12)


def test_a_wrong_bias_is_an_error_on_every_rank(pool) -> None:
    image, text = (rows.float() for rows in features(4))
    given = [(image[:2], text[:2], SCALE, BIAS, None), (image[2:], text[2:], SCALE, torch.zeros(2), None)]
    first, second = pool.run(in_group, given)
    assert "did not" not in str(first)
    assert isinstance(first, ValueError)
    assert "rank(s) [1]" in str(first)
    assert "bias must be one floating-point number" in str(second)


def test_a_gather_is_finished_by_the_loss_that_it_was_started_for() -> None:
    image, text = (rows.float() for rows in features(4))
    with_bias, without = (start_gather(image, text, SCALE, bias=bias) for bias in (BIAS, None))
    assert finish_sigmoid_loss(with_bias).loss == ours(image, text, SCALE, BIAS)
    with pytest.raises(ValueError, match="finish_sigmoid_loss"):
        finish_contrastive_loss(with_bias)
    with pytest.raises(ValueError, match="give it to start_gather, as bias="):
        finish_sigmoid_loss(without)


def said_of(group, image, text, bias):
    try:
        return float(sigmoid_loss(image, text, SCALE, bias, group).loss)
    except ValueError as error:
        return str(error)


def test_a_bias_on_some_ranks_only_is_an_error_on_all_and_nobody_waits(pool) -> None:
    image, text = (rows.float() for rows in features(4))
    said = pool.run(said_of, [(image, text, BIAS), (image, text, None)])
    assert said == ["bias must be given on every rank, for the sigmoid loss, or on none; rank(s) [1] lack it"] * 2
    assert all(isinstance(loss, float) for loss in pool.run(said_of, [(image, text, BIAS)] * 2))
