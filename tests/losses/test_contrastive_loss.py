"""The contrastive loss against the plain formula, in one process and over gloo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_pool import assert_told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import Recorder

from megatron_lcl.losses import contrastive_tiles
from megatron_lcl.losses.contrastive import contrastive_loss, finish_contrastive_loss, start_gather

WIDTH = 9


def features(n: int, seed: int = 0, duplicates: int = 0, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, width] images and texts, float64, unit norm; of each modality `duplicates` rows repeat the row before."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(2):
        rows = F.normalize(torch.randn(n, width, dtype=torch.float64, generator=generator), dim=1)
        for k in torch.randperm(n, generator=generator)[:duplicates].tolist():
            rows[k] = rows[k - 1]
        result.append(rows)
    return result[0], result[1]


def plain(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """As in CLIP's paper, figure 3."""
    logits = log_scale.exp() * (image @ text.t())
    target = torch.arange(len(image))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def with_gradients(function, image, text, log_scale, incoming: float = 1.0):
    """Loss, and its gradients for image, text and log_scale."""
    leaves = [value.detach().clone().requires_grad_() for value in (image, text, log_scale)]
    loss = function(*leaves)
    gradients = torch.autograd.grad(incoming * loss, leaves)
    return [loss.detach(), *gradients]


def ours(*arguments, **options):
    return contrastive_loss(*arguments, **options).loss


def assert_close(actual, expected, tolerance: float, floor: float | None = None) -> None:
    """Every tensor within `tolerance` of the expected one's norm, plus `floor` (by default: the tolerance)."""
    for a, e in zip(actual, expected, strict=True):
        difference = (a.double() - e.double().reshape(a.shape)).norm()
        bound = tolerance * e.double().norm() + (tolerance if floor is None else floor)
        assert difference <= bound, (difference.item(), bound.item())


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(contrastive_tiles, "TILE_ROWS", 7)
    monkeypatch.setattr(contrastive_tiles, "TILE_COLUMNS", 5)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
@pytest.mark.parametrize("n", [1, 2, 7, 35, 40])
def test_equals_the_plain_formula(n, scale, small_tiles):
    image, text = features(n)
    log_scale = torch.tensor([math.log(scale)], dtype=torch.float64)
    expected = with_gradients(plain, image, text, log_scale, 0.3)
    assert_close(with_gradients(ours, image, text, log_scale, 0.3), expected, 1e-10)


@pytest.mark.parametrize("scale", [1.0, 14.0, 100.0])
def test_equals_the_plain_formula_in_float32(scale):
    arguments = [value.float() for value in (*features(1500, width=64), torch.tensor([math.log(scale)]))]
    actual = with_gradients(ours, *arguments)
    expected = with_gradients(plain, *(value.double() for value in arguments))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() <= 1e-5 * e.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [14.0, 100.0])
def test_half_precision_features_cost_no_more_than_their_own_rounding(dtype, scale, small_tiles):
    image, text = (rows.to(dtype) for rows in features(50, duplicates=5))
    log_scale = torch.tensor([math.log(scale)])
    loss, *gradients = with_gradients(ours, image, text, log_scale)
    expected, *exact = with_gradients(plain, image.double(), text.double(), log_scale.double())
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 1e-5 * expected
    assert [g.dtype for g in gradients] == [dtype, dtype, torch.float32]
    for g, e in zip(gradients[:2], exact[:2], strict=True):  # exact up to the rounding of the result
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert abs(gradients[2] - exact[2]) <= 1e-5 * abs(exact[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_log_scale_in_half_precision_is_raised_to_e_in_float32(dtype):
    image, text = (rows.float() for rows in features(50))
    log_scale = torch.tensor([2.7]).to(dtype)
    expected = float(plain(image.double(), text.double(), log_scale.double()))
    assert float(ours(image, text, log_scale)) == pytest.approx(expected, rel=2e-6)


def test_gradcheck(small_tiles):
    image, text = (rows.requires_grad_() for rows in features(8, width=4))
    log_scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours, (image, text, log_scale))


@pytest.mark.parametrize("shape", [[], [1]])
def test_log_scale_keeps_its_shape(shape):
    log_scale = torch.full(shape, 2.0, requires_grad=True)
    ours(*(rows.float() for rows in features(3)), log_scale).backward()
    assert log_scale.grad.shape == torch.Size(shape)


@pytest.mark.parametrize("n", [0, 1])
def test_without_negatives_the_loss_and_its_gradients_are_zero(n):
    image, text = (rows.float().requires_grad_() for rows in features(n))
    log_scale = torch.tensor([2.0], requires_grad=True)
    output = contrastive_loss(image, text, log_scale)
    output.loss.backward()
    assert output.loss == 0
    assert output.mutual_information == 0
    assert output.hardest_negative_similarity == -1
    for leaf in (image, text, log_scale):
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad.abs() < 1e-6).all()


def test_a_tiny_loss_is_exact():
    image = torch.eye(6)
    loss = ours(image, image, torch.tensor(math.log(30.0)))
    torch.testing.assert_close(loss.double(), torch.tensor(5 * math.exp(-30.0), dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("noise", "largest"), [(0.18, 1e-2), (0.16, 1e-5), (0.14, 1e-8)])
def test_gradients_of_a_small_loss_are_exact(noise, largest, small_tiles):
    """At the largest scale, where an own pair's two softmaxes are 1 but for what float32 rounds away."""
    image, _ = features(40, width=64)
    text = F.normalize(image + noise * torch.randn(40, 64, dtype=torch.float64, generator=torch.manual_seed(1)), dim=1)
    arguments = [value.float() for value in (image, text, torch.tensor([math.log(100)]))]
    expected = with_gradients(plain, *(value.double() for value in arguments))
    assert largest / 10 < expected[0] < largest
    assert_close(with_gradients(ours, *arguments), expected, 2e-4, 0.0)


def test_statistics(small_tiles):
    n = 23
    image, text = features(n)
    text = F.normalize(text + 0.8 * image, dim=1)
    output = contrastive_loss(image, text, torch.tensor([2.0], dtype=torch.float64))
    similarity = image @ text.t()
    others = similarity.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf)
    target = torch.arange(n)
    assert 0 < output.image_accuracy != output.text_accuracy < 1
    expected = (
        plain(image, text, torch.tensor(2.0, dtype=torch.float64)),
        (similarity.argmax(1) == target).double().mean(),
        (similarity.argmax(0) == target).double().mean(),
        similarity.diagonal().mean(),
        (others.amax(1).mean() + others.amax(0).mean()) / 2,
    )
    torch.testing.assert_close(tuple(output[:5]), expected)
    torch.testing.assert_close(output.mutual_information, math.log(n) - expected[0])
    assert not any(value.requires_grad for value in output[1:])


def test_a_tie_counts_as_a_miss(small_tiles):
    rows = torch.eye(4)[[2] * 8]
    output = contrastive_loss(rows, rows, torch.tensor(2.0))
    assert (output.image_accuracy, output.text_accuracy) == (0, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("modality", [0, 1])
def test_non_finite_features_give_a_non_finite_loss(value, modality):
    rows = [r.float() for r in features(6)]
    rows[modality][4, 2] = value
    assert not math.isfinite(ours(*rows, torch.tensor(2.0)))


def test_an_infinite_positive_among_minus_infinite_negatives_is_not_a_loss_of_zero():
    image, text = (rows.float() for rows in features(6))
    image[4, 2], text[:, 2], text[4, 2] = math.inf, -0.1, 0.1
    assert not math.isfinite(ours(image, text, torch.tensor(2.0)))


def test_autocast_does_not_reach_the_arithmetic():
    image, text = (rows.float() for rows in features(30))
    log_scale = torch.tensor([math.log(100.0)])
    expected = with_gradients(ours, image, text, log_scale)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(ours, image, text, log_scale)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_no_matrix_of_logits_exists(monkeypatch):
    monkeypatch.setattr(contrastive_tiles, "TILE_ROWS", 16)
    monkeypatch.setattr(contrastive_tiles, "TILE_COLUMNS", 16)
    n = 200
    image, text = (rows.requires_grad_() for rows in features(n))
    with Recorder() as recorder:
        ours(image, text, torch.tensor(2.0, dtype=torch.float64)).backward()
    assert recorder.largest <= n * WIDTH < n * n
    assert recorder.matrix_products == 4 * math.ceil(n / 16) ** 2  # of six: a tile serves both directions


def test_layout_of_features_does_not_matter():
    image, text = features(12)
    log_scale = torch.tensor(1.0, dtype=torch.float64)
    expected = with_gradients(ours, image, text, log_scale)
    image, text = image.t().contiguous().t(), torch.cat([text, text], 1)[:, :WIDTH]
    assert_close(with_gradients(ours, image, text, log_scale), expected, 1e-14)


@pytest.mark.parametrize(
    ("image", "text", "counts", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(2, 4), None, r"\[3, 4\] and \[2, 4\]"),
        (torch.zeros(3, 4), torch.zeros(3, 5), None, r"\[3, 4\] and \[3, 5\]"),
        (torch.zeros(3), torch.zeros(3), None, r"\[pairs, width\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4).half(), None, "dtype"),
        (torch.zeros(3, 4).long(), torch.zeros(3, 4).long(), None, "floating-point"),
        (torch.zeros(3, 4), torch.zeros(3, 4), [2], r"must be \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4), [3, 0], r"must be \[3\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4), [3.0], r"integers, one per rank, not \[3.0\]"),
        (torch.zeros(3, 4), torch.zeros(3, 4), 3, "integers, one per rank, not 3"),
        (torch.zeros(3, 4), torch.zeros(3, 4, device="meta"), None, "one device"),
        ([[0.0] * 4] * 3, torch.zeros(3, 4), None, "image features must be a tensor, not list"),
        (torch.zeros(3, 4), torch.zeros(3, 4).numpy(), None, "text features must be a tensor, not ndarray"),
    ],
)
def test_what_does_not_fit_is_refused(image, text, counts, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(image, text, torch.tensor(1.0), counts=counts)


@pytest.mark.parametrize("log_scale", [torch.zeros(2), torch.tensor(1), torch.tensor(1.0, device="meta"), 2.66])
def test_a_log_scale_that_is_not_one_number_is_refused(log_scale):
    with pytest.raises(ValueError, match="log_scale"):
        contrastive_loss(torch.zeros(3, 4), torch.zeros(3, 4), log_scale)


def test_equals_open_clip():
    loss = pytest.importorskip("open_clip.loss").ClipLoss()
    image, text = features(20)
    log_scale = torch.tensor([3.0], dtype=torch.float64)
    expected = with_gradients(lambda x, t, s: loss(x, t, s.exp()), image, text, log_scale)
    assert_close(with_gradients(ours, image, text, log_scale), expected, 1e-12)


# Over several processes. Functions of the form f(group, ...) run in the pool's processes.


def own_part(group, image, text, log_scale, counts, incoming):
    contrastive_tiles.TILE_ROWS, contrastive_tiles.TILE_COLUMNS = 4, 3
    output, gradients = None, None
    leaves = [value.detach().clone().requires_grad_() for value in (image, text, log_scale)]
    output = contrastive_loss(*leaves, group=group, counts=counts)
    gradients = torch.autograd.grad(incoming * output.loss, leaves)
    return [value.detach() for value in output], gradients


def split(pool, image, text, log_scale, counts, incoming=1.0, tell_counts=True):
    """Each rank's output, and gradients put together: rows concatenated, shares of the scale added."""
    arguments = [
        (x, t, log_scale, list(counts) if tell_counts else None, incoming)
        for x, t in zip(image.split(counts), text.split(counts), strict=True)
    ]
    results = pool.run(own_part, arguments)
    for result in results:
        if isinstance(result, Exception):
            raise result
    gradients = [part for _, part in results]
    return (
        [output for output, _ in results],
        [torch.cat([g[0] for g in gradients]), torch.cat([g[1] for g in gradients]), sum(g[2] for g in gradients)],
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 1, 2, 3, 5, 8, 13]), min_size=1, max_size=4),
    scale=st.sampled_from([0.01, 1.0, 14.3, 50.0, 100.0]),
    duplicates=st.integers(0, 6),
    double=st.booleans(),
    tell_counts=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_split_equals_one_process(pool, counts, scale, duplicates, double, tell_counts, seed):
    N = sum(counts)
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    image, text = (rows.to(dtype) for rows in features(N, seed, duplicates))
    log_scale = torch.tensor([math.log(scale)], dtype=dtype)
    outputs, gradients = split(pool, image, text, log_scale, counts, 0.5, tell_counts)
    for output in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(output, outputs[0], strict=True)), "ranks differ"
    one = [value.double() for value in (image, text, log_scale)]
    if N == 0:
        expected = [torch.zeros(()), *(torch.zeros_like(value) for value in one)]
    else:
        expected = with_gradients(plain, *one, 0.5)
    # what rounding the logits, of size `scale`, costs the N terms that may cancel, each of size scale / N
    rounding = 2 * torch.finfo(dtype).eps * max(scale, 1) ** 2 / math.sqrt(max(N, 1))
    assert_close([outputs[0][0], *gradients], expected, tolerance, rounding)
    if double and not duplicates:  # rounding decides between duplicates, and they are or are not a tile apart
        statistics = contrastive_loss(*one)[1:]
        torch.testing.assert_close(torch.stack(outputs[0][1:]), torch.stack(statistics), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_over_three_processes(pool, dtype):
    counts = [5, 0, 9]
    image, text = (rows.to(dtype) for rows in features(14))
    log_scale = torch.tensor(math.log(30.0))
    outputs, gradients = split(pool, image, text, log_scale, counts)
    expected, *exact = with_gradients(plain, image.double(), text.double(), log_scale.double())
    assert abs(outputs[0][0] - expected) <= 1e-5 * expected
    for g, e in zip(gradients[:2], exact[:2], strict=True):
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-6)


def messages_of(group, image, text, counts):
    log_scale = torch.tensor(1.0, requires_grad=True)
    with Recorder() as forward:
        loss = ours(image.requires_grad_(), text.requires_grad_(), log_scale, group=group, counts=counts)
    with Recorder() as backward:
        loss.backward()
    return sum(forward.messages.values()), sum(backward.messages.values())


@pytest.mark.parametrize("counts", [None, [2, 4]])
def test_header_features_and_sums_forward_nothing_backward(pool, counts):
    image, text = (rows.float() for rows in features(6))
    arguments = [(x, t, counts) for x, t in zip(image.split([2, 4]), text.split([2, 4]), strict=True)]
    assert pool.run(messages_of, arguments) == [(3, 0), (3, 0)]


def in_two_parts(group, image, text, log_scale, counts):
    gather = start_gather(image, text, log_scale, group, counts)
    dist.all_reduce(torch.zeros(3), group=group)  # other traffic meanwhile
    first, second = (finish_contrastive_loss(gather).loss for _ in range(2))  # as a recomputed segment does
    return first, second


def test_gather_first_finish_later(pool):
    counts = [3, 0, 2]
    image, text = features(5)
    log_scale = torch.tensor(1.0, dtype=torch.float64)
    arguments = [(x, t, log_scale, counts) for x, t in zip(image.split(counts), text.split(counts), strict=True)]
    for losses in pool.run(in_two_parts, arguments):
        torch.testing.assert_close(losses, (plain(image, text, log_scale),) * 2)


def alone_among_others(group, image, text):
    return ours(image, text, torch.tensor(1.0))  # no group: no rank waits for another


def test_without_a_group_each_process_is_alone(pool):
    image, text = (rows.float() for rows in features(4))
    results = pool.run(alone_among_others, [(image[:n], text[:n]) for n in (4, 2, 3)])
    torch.testing.assert_close(results, [plain(image[:n], text[:n], torch.tensor(1.0)) for n in (4, 2, 3)])


def attempt(group, image, text, counts, log_scale=None):
    try:
        contrastive_loss(image, text, torch.tensor(1.0) if log_scale is None else log_scale, group, counts)
    except ValueError as error:
        return str(error)
    return "no error"


GOOD = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("second", "counts", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(3, 4)), [2, 2, 2], r"not \[2, 4\] and \[3, 4\]"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), None, r"not \[2, 4\] and \[3, 4\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 3)), [2, 2, 2], r"not \[2, 4\] and \[2, 3\]"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), None, r"not \[2, 3\] and \[2, 4\]"),
        ((torch.zeros(2), torch.zeros(2, 4)), [2, 2, 2], r"not \[2\] and \[2, 4\]"),
        ((torch.zeros(2, 4).long(), torch.zeros(2, 4).long()), [2, 2, 2], "one floating-point dtype"),
        ((torch.zeros(2, 4), torch.zeros(2, 4).half()), None, "one floating-point dtype"),
        ((torch.zeros(3, 4), torch.zeros(3, 4)), [2, 2, 2], r"counts must be \[2, 3, 2\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), [2, 3, 2], r"counts must be \[2, 2, 2\]"),
        ((torch.zeros(2, 5), torch.zeros(2, 5)), None, "one width and dtype on every rank"),
        ((torch.zeros(2, 5), torch.zeros(2, 5)), [2, 2, 2], "one width and dtype on every rank"),
        ((torch.zeros(2, 4).half(), torch.zeros(2, 4).half()), None, "one width and dtype on every rank"),
        ((torch.zeros(2, 4).half(), torch.zeros(2, 4).half()), [2, 2, 2], "one width and dtype on every rank"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), [2, 2], r"counts must be \[2, 2, 2\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), [2, -2, 2], r"counts must be \[2, 2, 2\]"),
    ],
)
def test_one_bad_rank_is_an_error_on_all_and_nobody_waits(pool, second, counts, message):
    bad_alone(pool, (*second, counts), (GOOD, GOOD, counts), message)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ((GOOD, GOOD, [2, None, 2]), "counts must be integers"),
        ((GOOD, GOOD, [2, 2.0, 2]), "counts must be integers"),
        ((GOOD, GOOD, 6), "counts must be integers"),
        ((GOOD, GOOD, None, torch.zeros(2)), r"log_scale must be one .* of shape \[2\]"),
        ((GOOD, GOOD, None, 2.66), "log_scale must be a tensor, not float"),
        ((GOOD.tolist(), GOOD, None), "image features must be a tensor, not list"),
        ((GOOD, GOOD, None, torch.tensor(1)), "log_scale must be one floating-point number, not torch.int64"),
        ((GOOD.to("meta"), GOOD, None), "must be on one device, not meta, cpu and cpu"),
        ((GOOD.to("meta"), GOOD.to("meta"), None, torch.zeros(1, device="meta")), "on meta, but the process group"),
    ],
)
def test_one_bad_count_or_scale_or_device_is_an_error_on_all(pool, second, message):
    bad_alone(pool, second, (GOOD, GOOD, None), message)


def bad_alone(pool, second, others, message):
    assert_told(pool.run(attempt, [others, second, others]), message)
    # and the group is still in step
    assert pool.run(attempt, [(GOOD, GOOD, [2, 2, 2])] * 3) == ["no error"] * 3


@pytest.mark.parametrize(
    "counts", [([2, 2, 1], [2, 2, 1], [1, 2, 1]), ([2, 2, 1], [2, 2, 9], [2, 2, 1]), ([2, 2, 1], [2, 2], None)]
)
def test_counts_that_differ_between_ranks_are_seen(pool, counts):
    parts = (GOOD, GOOD, GOOD[:1])
    errors = pool.run(attempt, [(part, part, given) for part, given in zip(parts, counts, strict=True)])
    assert all("counts must be [2, 2, 1]" in error for error in errors), errors
    assert pool.run(attempt, [(part, part, [2, 2, 1]) for part in parts]) == ["no error"] * 3


def outsider(group, _):
    pair = dist.new_group([0, 1])
    return attempt(pair, GOOD, GOOD, None)


def test_a_process_outside_the_group_is_told_so(pool):
    errors = pool.run(outsider, [(None,)] * 4)
    assert errors[:2] == ["no error"] * 2
    assert all("not in the given process group" in error for error in errors[2:])


def broken(group, image, text):
    return ours(image, text, torch.tensor(1.0), group=group)


def test_non_finite_features_on_one_rank_reach_all(pool):
    bad = GOOD.clone()
    bad[0, 0] = math.nan
    assert not any(math.isfinite(loss) for loss in pool.run(broken, [(GOOD, GOOD), (bad, GOOD), (GOOD, GOOD)]))


def test_every_small_split_of_five_pairs(pool):
    """Exhaustive where it is cheap: every way to put five pairs on three ranks."""
    image, text = features(5, seed=3)
    log_scale = torch.tensor([1.7], dtype=torch.float64)
    expected = with_gradients(plain, image, text, log_scale)
    for a, b in itertools.combinations_with_replacement(range(6), 2):
        outputs, gradients = split(pool, image, text, log_scale, [a, b - a, 5 - b])
        assert_close([outputs[0][0], *gradients], expected, 1e-12)
