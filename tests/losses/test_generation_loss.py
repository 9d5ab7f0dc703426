"""The generation loss against the plain formula, in one process, over gloo and under ZeRO-3."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_pool import assert_told
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import Recorder
from processes import run_processes
from torch.utils.checkpoint import checkpoint

from megatron_lcl.losses import generation, softmax_torch
from megatron_lcl.losses.generation import generation_loss

WIDTH = 9


def problem(R: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float64, width: int = WIDTH, spread: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(rows, width, dtype=torch.float64, generator=generator) for rows in (R, V))
    return hidden.to(dtype), (spread * weight).to(dtype), torch.randint(0, V, (R,), generator=generator)


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="sum")


def with_gradients(function, hidden, weight, targets, incoming: float = 1.0, **options):
    """Loss, and its gradients for hidden and weight."""
    leaves = [value.detach().clone().requires_grad_() for value in (hidden, weight)]
    loss = function(*leaves, targets, **options)
    return [loss.detach(), *torch.autograd.grad(incoming * loss, leaves)]


def assert_close(actual, expected, tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert (a.double() - e.double()).norm() <= tolerance * max(1.0, e.double().norm().item())


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(generation, "rows_of_chunk", lambda *_: 4)


@pytest.mark.parametrize("R", [0, 1, 4, 13, 40])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_equals_the_plain_formula(R, index_dtype, small_chunks):
    hidden, weight, targets = problem(R, 24)
    expected = with_gradients(plain, hidden, weight, targets, 0.3)
    assert_close(with_gradients(generation_loss, hidden, weight, targets.to(index_dtype), 0.3), expected, 1e-10)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_equals_the_plain_formula_in_float32(spread, monkeypatch):
    monkeypatch.setattr(generation, "rows_of_chunk", lambda *_: 71)
    hidden, weight, targets = problem(300, 700, dtype=torch.float32, width=64, spread=spread)
    actual = with_gradients(generation_loss, hidden, weight, targets)
    expected = with_gradients(plain, hidden.double(), weight.double(), targets)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - e).norm() <= 1e-5 * e.norm()


def test_a_sure_and_right_prediction_is_exact():
    """Beside a logit of 60, 4e-6 is the smallest step of float32; the loss is 2e-6, and so is the gradient's size."""
    hidden, weight, targets = torch.ones(1, 1), torch.tensor([[60.0], [47.0]]), torch.tensor([0])
    actual = with_gradients(generation_loss, hidden, weight, targets)
    expected = with_gradients(plain, hidden.double(), weight.double(), targets)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= 0.1 * e.norm()  # of 1 + 2e-6 float32 keeps no more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_its_own_rounding(dtype, small_chunks):
    hidden, weight, targets = problem(40, 24, dtype=dtype)
    loss, *gradients = with_gradients(generation_loss, hidden, weight, targets)
    expected, *exact = with_gradients(plain, hidden.double(), weight.double(), targets)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) <= 1e-5 * expected
    for g, e in zip(gradients, exact, strict=True):
        assert g.dtype == dtype
        torch.testing.assert_close(g.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_bfloat16_on_a_cpu_is_multiplied_as_bfloat16_and_summed_in_float32(monkeypatch):
    """Large enough for oneDNN to use its units: 300 rows of width 256, 1,000 words."""
    hidden, weight, targets = problem(300, 1000, width=256, dtype=torch.bfloat16, spread=0.2)
    matmul, asked = torch.backends.mkldnn.matmul, []

    def statistics(*arguments):
        asked.append(matmul.fp32_precision)
        return softmax_torch.statistics(*arguments)

    kernels = SimpleNamespace(statistics=statistics, error=softmax_torch.error)
    before = matmul.fp32_precision
    of = functools.partial(generation_loss, kernels=kernels)
    loss, *gradients = with_gradients(of, hidden, weight, targets)
    expected, *exact = with_gradients(plain, hidden.double(), weight.double(), targets)
    assert abs(loss - expected) <= 1e-6 * expected, "as exact as float32: what is multiplied has eight bits"
    for g, e in zip(gradients, exact, strict=True):
        assert (g.double() - e).norm() <= 1e-2 * e.norm()
    with_gradients(of, hidden.float(), weight.float(), targets)
    assert asked == ["bf16", before]
    monkeypatch.setattr(kernels, "error", None)
    with pytest.raises(TypeError):
        with_gradients(of, hidden, weight, targets)
    assert matmul.fp32_precision == before


def test_sums_too_large_for_float16_are_rounded_after_the_mean_is_taken(small_chunks):
    hidden, weight, targets = problem(300, 24, dtype=torch.float16)
    hidden, targets = hidden.abs() + 300, torch.full_like(targets, 7)  # one word, on one side: nothing cancels
    weight[7] -= 1
    actual = with_gradients(generation_loss, hidden, weight, targets, 1 / 300)
    expected = with_gradients(plain, hidden.double(), weight.double(), targets, 1 / 300)
    assert expected[2].abs().max() * 300 > torch.finfo(torch.float16).max
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == torch.float16
        torch.testing.assert_close(a.double(), e, rtol=2e-3, atol=1e-3)


def test_without_rows_nothing_is_kept_as_large_as_the_weight():
    hidden, weight, targets = (
        value.requires_grad_() if value.is_floating_point() else value for value in problem(0, 24)
    )
    with Recorder() as recorder:
        loss = generation_loss(hidden, weight, targets)
    assert recorder.largest <= 1
    loss.backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight)), "not None: optimizers and reductions wait for it"


def test_gradcheck(small_chunks):
    hidden, weight, targets = problem(11, 17)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: generation_loss(h, w, targets), (hidden, weight))


def test_autocast_gives_what_its_dtype_gives():
    hidden, weight, targets = problem(20, 30, dtype=torch.float32)
    half = with_gradients(generation_loss, hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(generation_loss, hidden, weight, targets)
    assert [value.dtype for value in actual] == [torch.float32] * 3
    for a, e in zip(actual, half, strict=True):
        assert torch.equal(a, e.float())


def test_padding_of_the_vocabulary_never_counts(small_chunks):
    hidden, weight, targets = problem(13, 24)
    targets = targets % 19
    weight[19:] = 1e6  # whatever is there
    expected = with_gradients(plain, hidden, weight[:19], targets)
    loss, hidden_grad, weight_grad = with_gradients(generation_loss, hidden, weight, targets, vocab_size=19)
    assert_close([loss, hidden_grad, weight_grad[:19]], expected, 1e-10)
    assert (weight_grad[19:] == 0).all()


def test_ranks_with_and_without_padding_of_the_vocabulary_cut_the_same_chunks(monkeypatch):
    """They exchange something for each: with other chunks they would wait for each other for ever."""
    asked = []
    monkeypatch.setattr(generation, "rows_of_chunk", lambda *shape: asked.append(shape) or 4)
    hidden, weight, targets = problem(13, 24)
    for vocab_size in (24, 19):
        generation_loss(hidden, weight, targets % 19, vocab_size=vocab_size)
    assert asked == [(24, WIDTH)] * 2


@pytest.mark.parametrize("target", [-1, 19, 24])
def test_a_target_outside_the_vocabulary_gives_an_infinite_loss(target):
    hidden, weight, targets = problem(5, 24)
    targets = targets % 19
    targets[2] = target
    assert generation_loss(hidden, weight, targets, vocab_size=19) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_input_gives_a_non_finite_loss(value):
    hidden, weight, targets = problem(5, 24)
    hidden[2, 3] = value
    assert not math.isfinite(generation_loss(hidden, weight, targets))


@pytest.mark.parametrize(
    ("hidden", "weight", "targets", "vocab_size", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(9, 5), torch.zeros(3).long(), None, r"\[3, 4\] and weight \[9, 5\]"),
        (torch.zeros(3), torch.zeros(9, 5), torch.zeros(3).long(), None, "hidden"),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(2).long(), None, "targets must be 3"),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3), None, "int32 or int64"),
        (torch.zeros(3, 4), torch.zeros(9, 4).half(), torch.zeros(3).long(), None, "one floating-point dtype"),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3).long(), 10, "vocab_size 10"),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3).long(), 0, "vocab_size 0"),
        (torch.zeros(3, 4), torch.tensor(1.0), torch.zeros(3).long(), None, r"weight \[\]"),
        (torch.zeros(3, 4), torch.zeros(9, 4), torch.zeros(3, device="meta").long(), None, "one device"),
    ],
)
def test_what_does_not_fit_is_refused(hidden, weight, targets, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        generation_loss(hidden, weight, targets, vocab_size=vocab_size)


# What it costs. R = 40 rows in chunks of 4, so 10 chunks.


def leaves():
    hidden, weight, targets = problem(40, 25)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def test_logits_never_exist_at_once(small_chunks):
    hidden, weight, targets = leaves()
    with Recorder() as recorder:
        generation_loss(hidden, weight, targets).backward()
    assert recorder.largest <= max(100, hidden.numel(), weight.numel()) < 40 * 25
    assert recorder.matrix_products == 3 * 10


def test_no_gradient_is_computed_that_nobody_wants(small_chunks):
    hidden, weight, targets = leaves()
    with torch.no_grad(), Recorder() as recorder:
        generation_loss(hidden, weight, targets)
    assert recorder.matrix_products == 10
    with Recorder() as recorder:
        generation_loss(hidden, weight.detach(), targets).backward()
    assert recorder.matrix_products == 2 * 10
    with Recorder() as recorder:
        generation_loss(hidden.detach(), weight, targets).backward()
    assert recorder.matrix_products == 2 * 10


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_a_checkpointed_segment_the_gradient_is_computed_once(reentrant, small_chunks):
    hidden, weight, targets = leaves()
    segment = lambda h: generation_loss(torch.tanh(h) * 2, weight, targets)  # noqa: E731
    expected = torch.autograd.grad(segment(hidden), (hidden, weight))
    with Recorder() as recorder:
        checkpoint(segment, hidden, use_reentrant=reentrant).backward()
    assert_close([hidden.grad, weight.grad], expected, 1e-12)
    # reentrant: a forward without gradients before the one with; else the recomputation stops short of the loss
    assert recorder.matrix_products == (4 if reentrant else 3) * 10


def test_backward_twice():
    hidden, weight, targets = leaves()
    loss = generation_loss(hidden, weight, targets)
    first = torch.autograd.grad(0.5 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    assert_close(second, [4 * gradient for gradient in first], 1e-14)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


# Over several processes. Functions of the form f(group, ...) run in the pool's processes.


def own_part(group, hidden, weight, targets, vocab_size, incoming, aligned):
    generation.rows_of_chunk = lambda *_: 4
    generation._is_aligned = lambda _: aligned
    return with_gradients(generation_loss, hidden, weight, targets, incoming, group=group, vocab_size=vocab_size)


def raising(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 4),
    R=st.sampled_from([0, 1, 3, 4, 9, 17]),
    share=st.integers(1, 6),
    padding=st.integers(0, 12),
    spread=st.sampled_from([0.1, 1.0, 10.0]),
    double=st.booleans(),
    aligned=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_split_of_the_vocabulary_equals_one_process(pool, size, R, share, padding, spread, double, aligned, seed):
    """aligned: with columns that are padding, as on a GPU."""
    dtype, tolerance = (torch.float64, 1e-10) if double else (torch.float32, 1e-5)
    vocab_size = max(1, size * share - padding)  # up to all of the last ranks' rows
    hidden, weight, targets = problem(R, size * share, seed, dtype, spread=spread)
    targets = targets % vocab_size
    arguments = [(hidden, part, targets, vocab_size, 0.5, aligned) for part in weight.split(share)]
    results = raising(pool.run(own_part, arguments))
    assert all(torch.equal(loss, results[0][0]) for loss, _, _ in results), "ranks differ"
    hidden_grad = sum(result[1] for result in results)  # shares
    weight_grad = torch.cat([result[2] for result in results])
    expected = with_gradients(plain, hidden.double(), weight[:vocab_size].double(), targets, 0.5)
    assert_close([results[0][0], hidden_grad, weight_grad[:vocab_size]], expected, tolerance)
    assert (weight_grad[vocab_size:] == 0).all()


def attempt(group, hidden, weight, targets, vocab_size):
    generation.rows_of_chunk = lambda *_: 4
    try:
        generation_loss(hidden, weight, targets, group, vocab_size)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("rows", "width", "share", "targets", "vocab_size", "dtype", "message"),
    [
        (6, 4, 5, 5, None, torch.float32, "targets must be 6"),
        (6, 4, 5, 6, 16, torch.float32, "vocab_size 16"),
        (5, 4, 5, 5, None, torch.float32, r"\(6, 4, torch.float32, 5, 15\), \(5, 4, torch.float32, 5, 15\)"),
        (0, 4, 5, 0, None, torch.float32, "the same on every rank"),
        (6, 3, 5, 6, None, torch.float32, "the same on every rank"),
        (6, 4, 4, 6, 12, torch.float32, "the same on every rank"),
        (6, 4, 5, 6, 14, torch.float32, "the same on every rank"),
        (6, 4, 5, 6, None, torch.bfloat16, "the same on every rank"),
        (6, 4, 5, 6, None, torch.int64, "one floating-point dtype"),
    ],
)
def test_one_bad_rank_is_an_error_on_all_and_nobody_waits(
    pool, rows, width, share, targets, vocab_size, dtype, message
):
    good = (torch.zeros(6, 4), torch.zeros(5, 4), torch.zeros(6).long(), None)
    bad = (torch.zeros(rows, width).to(dtype), torch.zeros(share, width).to(dtype), torch.zeros(targets).long())
    assert_told(pool.run(attempt, [good, (*bad, vocab_size), good]), message)
    # and the group is still in step
    assert pool.run(attempt, [good] * 3) == ["no error"] * 3


def outsider(group):
    first = dist.new_group([0])
    hidden, weight, targets = problem(3, 5)
    try:
        generation_loss(hidden, weight, targets, first)
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_process_outside_the_group_is_told_so(pool):
    errors = pool.run(outsider, [()] * 4)
    assert errors[0] == "no error"
    assert all("not in the given process group" in error for error in errors[1:])


class Head(torch.nn.Module):
    """A head as a model has it: its forward is called, so DeepSpeed gathers its weight for that long."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return generation_loss(hidden, self.weight, targets)


class Model(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(weight.shape[1], weight.shape[1])
        self.head = Head(weight)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(hidden)), targets)


def under_zero_3(rank: int) -> list[float]:
    import deepspeed

    from megatron_lcl.train.engine import quiet_deepspeed

    quiet_deepspeed()  # else it compiles, for most of a minute
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    generation.rows_of_chunk = lambda *_: 4
    hidden, weight, targets = problem(24, 25, dtype=torch.float32)
    model = Model(weight)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {
                "type": "AdamW",
                "params": {"lr": 1e-2, "eps": 1e-6, "weight_decay": 0.0, "torch_adam": True},
            },
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # else 1.0
            "steps_per_print": 10000,
        },
    )
    losses = []
    own = slice(12 * rank, 12 * rank + 12)
    for _ in range(4):
        loss = engine(hidden[own], targets[own]) / 12
        engine.backward(loss)
        engine.step()
        dist.all_reduce(loss)
        losses.append(loss.item() / 2)
    assert engine.module.head.weight.numel() == 0, "the weight is there only while its module's forward runs"
    dist.destroy_process_group()
    return losses


@pytest.mark.slow
def test_under_zero_3():
    pytest.importorskip("deepspeed")
    hidden, weight, targets = problem(24, 25, dtype=torch.float32)
    model = Model(weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6, weight_decay=0.0)
    expected = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = plain(torch.tanh(model.body(hidden)), model.head.weight, targets) / 24
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    for losses in run_processes(under_zero_3, 2):
        assert losses == pytest.approx(expected, rel=1e-5)
