"""Next-token cross-entropy from hidden states and the head's weight, without the logits ever existing at once.

Shape legend: R rows that have a target, D width, V vocabulary entries of this rank, c rows of one chunk.

The gradient is computed together with the loss while a chunk's logits are there, as in liger-kernel (arXiv 2410.10989,
section 3.2): three matrix products, like the plain formula, and neither logits nor the weight are kept for backward. So
a weight that DeepSpeed's ZeRO-3 gathers for its module's forward is needed for that long only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lcl.losses import softmax_torch
from megatron_lcl.losses.derivatives import first_derivative_only
from megatron_lcl.losses.group import exchange
from megatron_lcl.losses.kernels import triton_fault
from megatron_lcl.parallel.mesh import Axis

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK_LOGITS = 2**25
"""logits of a chunk, at least: 128 MiB of float32, 679 rows of CLIP's vocabulary"""
ALIGNED = 64
"""on a GPU a chunk has a multiple of so many columns: 128 bytes of half-precision numbers"""


def rows_of_chunk(vocabulary: int, width: int) -> int:
    """Rows whose logits exist at once: those of CHUNK_LOGITS, or as many as the model is wide, if that is more.

    Then their logits take as much memory as the head's gradient in float32, which is held anyway. On a GPU each chunk
    reads and writes that gradient, which with few rows would take more than half as long as the products.
    """
    return max(1, CHUNK_LOGITS // vocabulary, width)


def generation_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    agreed: bool = False,
    kernels: ModuleType | None = None,
) -> torch.Tensor:
    """Sum over rows of -log p(target), in nats: a float32 scalar, the same on every rank of the group.

    hidden: [R, D], only the rows that have a target, after the final norm; the same on every rank of the group. R may
        be 0 (on all of them).
    weight: [V, D], this rank's rows of the head; the vocabulary is split in rank order into equal parts.
    targets: [R] int32 or int64 in [0, vocab_size); one outside makes the loss infinite (no check, so no host sync).
    group: the tensor-parallel ranks that share the vocabulary; None: all of it is here.
    vocab_size: the real size, where the last rows of the last ranks' weights are padding: those never count, and their
        gradient is zero. None: no padding.
    agreed: the caller has seen to it that R, D, the dtype, V and vocab_size are the same on every rank, as a trainer
        has that hands one batch to all of them. Then nothing is exchanged but what the loss needs, and no host waits.
    kernels: the module for the softmax, `softmax_torch` or `softmax_triton`; None: chosen by device.

    hidden and weight are of one dtype (under autocast they are converted to its dtype): float32, bfloat16 or float16
    (logits, their exponentials and sums over rows in float32), or float64 (then so is the result).

    Convention over the group: sum. weight gets the complete gradient of its rows; hidden gets this rank's part, and the
    sum over ranks is the gradient. So hidden comes through `copy_to_tensor_parallel`, whose backward all-reduces over
    the group, or `gather_from_sequence_parallel`, whose backward reduce-scatters (parallel.mappings).

    The gradient is computed in forward, if gradients are enabled and asked for, and kept until backward, as large as
    hidden and weight in float32. First derivatives only: a backward with create_graph=True is a RuntimeError. Raises
    ValueError for shapes, dtypes, devices or a vocab_size that do not fit or are not the same on every rank, on every
    rank of the group (where `agreed`: on the rank whose own do not fit), and on a caller that is not in the group.
    """
    axis = Axis.of_group(group)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if vocab_size is None:
        vocab_size = axis.size * weight.shape[:1].numel()
    error = _error(hidden, weight, targets, axis.size, vocab_size)
    if not agreed:
        _compare(hidden, weight, vocab_size, error, axis)
    elif error is not None:
        raise ValueError(error)
    if len(hidden) == 0:  # zeros in backward, none kept until then
        return (hidden.sum() + weight[:0].sum()).to(_arithmetic(hidden.dtype))
    first = axis.rank * len(weight)
    num_real = min(max(vocab_size - first, 0), len(weight))
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _GenerationFunction.apply(hidden, weight, targets, axis, first, num_real, with_gradient, kernels)


def _compare(hidden: torch.Tensor, weight: torch.Tensor, vocab_size: int, error: str | None, axis: Axis) -> None:
    """Whatever is wrong on any rank raises here, on every rank; error: what is wrong on this one."""
    facts = (0,) * 5
    if error is None:
        facts = (len(hidden), hidden.shape[1], DTYPES.index(hidden.dtype), len(weight), vocab_size)
    ranks = exchange(facts, error, hidden.device, axis)
    if len(set(ranks)) > 1:
        described = [(rows, width, DTYPES[dtype], *vocabulary) for rows, width, dtype, *vocabulary in ranks]
        raise ValueError(
            "hidden's rows, width and dtype, the weight's rows and vocab_size must be the same on every rank, "
            f"not {described} (in rank order)"
        )


def _error(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int, vocab_size: int) -> str | None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        return f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [rows, D], [vocabulary, D]"
    if targets.shape != hidden.shape[:1] or targets.dtype not in (torch.int32, torch.int64):
        return (
            f"targets must be {len(hidden)} int32 or int64 numbers, one per row of hidden, "
            f"not {targets.dtype} of shape {list(targets.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        return f"hidden and weight must be of one floating-point dtype, not {hidden.dtype}, {weight.dtype}"
    if not hidden.device == weight.device == targets.device:
        devices = f"{hidden.device}, {weight.device} and {targets.device}"
        return f"hidden, weight and targets must be on one device, not {devices}"
    num_entries = size * len(weight)
    if not 0 < vocab_size <= num_entries:
        return f"vocab_size {vocab_size} must be 1 to {num_entries}, the weight's rows on all {size} rank(s)"
    return None


@contextlib.contextmanager
def _products_of(hidden: torch.Tensor) -> Iterator[None]:
    """On a CPU products of float32 numbers that are bfloat16 ones are made by units for bfloat16, where there are some.

    Their sums are float32 all the same, so the logits are as they were. The gradients of logits are rounded, as on a
    GPU.
    """
    if hidden.device.type != "cpu" or hidden.dtype != torch.bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # an object that torch puts there
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _GenerationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_RD, weight_VD, targets_R, axis, first, num_real, with_gradient, kernels):
        of_hidden, of_weight = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        with torch.autocast(hidden_RD.device.type, enabled=False), _products_of(hidden_RD):
            # Kept beside, not among, the saved tensors: a checkpointed segment that ends here and is recomputed has
            # nothing to fetch from this function and stops short of it.
            loss, *ctx.gradients = _chunked(
                hidden_RD, weight_VD, targets_R - first, axis, num_real, of_hidden, of_weight, kernels
            )
        ctx.dtype = hidden_RD.dtype
        return loss

    @staticmethod
    @first_derivative_only("generation_loss")
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("a second backward through generation_loss needs retain_graph=True in the first")
        gradients = ctx.gradients
        if torch._C._autograd._get_current_graph_task_keep_graph():
            scaled = [None if g is None else g * grad for g in gradients]
        else:
            ctx.gradients = None  # handed over, not copied: as large as the weight
            scaled = [None if g is None else g.mul_(grad) for g in gradients]
        # rounded last: sums over all rows may be too large for float16 until `grad`, a mean's, makes them smaller
        return *(None if g is None else g.to(ctx.dtype) for g in scaled), *[None] * 6


def _chunked(
    hidden_RD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_R: torch.Tensor,
    axis: Axis,
    num_real: int,
    hidden_wanted: bool,
    weight_wanted: bool,
    kernels: ModuleType | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss and the wanted gradients, float32 or float64; targets_R count from this rank's first vocabulary entry."""
    dtype, device = _arithmetic(hidden_RD.dtype), hidden_RD.device
    loss = torch.zeros((), dtype=dtype, device=device)
    hidden_grad = torch.zeros(hidden_RD.shape, dtype=dtype, device=device) if hidden_wanted else None
    if device.type == "cpu":  # has no matrix product of half-precision numbers with a float32 result
        hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)

    num_rows = len(weight_VD)
    step = rows_of_chunk(*weight_VD.shape)  # before the cut, which differs between ranks
    weight_VD = _columns(weight_VD[: max(1, num_real)])
    V = len(weight_VD)
    weight_grad = (
        torch.zeros(max(V, num_rows), hidden_RD.shape[1], dtype=dtype, device=device) if weight_wanted else None
    )
    memory = torch.empty(min(step, len(hidden_RD)), V, dtype=dtype, device=device)  # fresh memory costs page faults
    softmax = kernels or _softmax(memory)
    for rows in (slice(start, start + step) for start in range(0, len(hidden_RD), step)):
        hidden_cD, targets_c = hidden_RD[rows], targets_R[rows].long()
        logits_cV = _matmul(hidden_cD, weight_VD.t(), memory[: len(hidden_cD)])
        logits_cV[:, num_real:] = -torch.inf  # padding, also the one entry of a rank that has nothing else
        max_c, sum_c, target_c = softmax.statistics(logits_cV, targets_c)
        all_max_c, all_sum_c, target_c = _over_vocabulary(max_c, sum_c, target_c, axis)
        # never max + log(sum) in one number: beside a large maximum a sum near 1 would be rounded away
        loss += (all_max_c - target_c + all_sum_c.log()).sum()
        if hidden_grad is None and weight_grad is None:
            continue
        error_cV = softmax.error(logits_cV, targets_c, max_c, all_max_c, all_sum_c, hidden_cD.dtype)
        if hidden_grad is not None:
            _matmul(error_cV, weight_VD, hidden_grad[rows])
        if weight_grad is not None:
            _add_matmul(weight_grad[:V], error_cV.t(), hidden_cD)
    return loss, hidden_grad, None if weight_grad is None else weight_grad[:num_rows]


def _columns(weight_VD: torch.Tensor) -> torch.Tensor:
    """The rows of the weight, each a column of logits; on a GPU to a multiple of ALIGNED of them.

    CLIP's vocabulary with three tokens is odd, and so would be the distance of rows of logits: matrix products of half
    precision then take kernels that read two bytes at a time.
    """
    return F.pad(weight_VD, (0, 0, 0, -len(weight_VD) % ALIGNED)) if _is_aligned(weight_VD.device) else weight_VD


def _is_aligned(device: torch.device) -> bool:
    return device.type == "cuda"


def _softmax(logits: torch.Tensor) -> ModuleType:
    if logits.is_cuda and logits.dtype == torch.float32 and triton_fault() is None:
        from megatron_lcl.losses import softmax_triton

        return softmax_triton
    return softmax_torch


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _over_vocabulary(
    max_c: torch.Tensor, sum_c: torch.Tensor, target_c: torch.Tensor, axis: Axis
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest logit, the sum of exponentials relative to it, and the target's logit, over the whole vocabulary."""
    if axis.group is None:
        return max_c, sum_c, target_c
    of_ranks = axis.all_gather(torch.stack([max_c, sum_c, target_c]))
    all_max_c = of_ranks[:, 0].amax(0)
    return all_max_c, (of_ranks[:, 1] * (of_ranks[:, 0] - all_max_c).exp()).sum(0), of_ranks[:, 2].amax(0)
