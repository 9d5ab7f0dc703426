"""Row-wise pieces of the softmax over a vocabulary that several ranks may share, as two Triton kernels.

Same functions, arguments and results as `softmax_torch.py`, for float32 logits. Each reads the logits once: at a width
of some hundreds the products with the weight are so fast that more passes over the logits would take as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
BLOCK = 4096


@triton.jit(do_not_specialize=["c"])  # it changes from step to step
def _statistics_kernel(logits, stride, targets, statistics, c, V, BLOCK: tl.constexpr):
    """statistics [3, c]: one program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    max_ = tl.full((BLOCK,), LOWEST, tl.float32)  # not -inf, so that lanes without a logit give no inf - inf
    sum_ = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + columns, mask=columns < V, other=-float("inf"))
        new = tl.maximum(max_, logit)
        sum_ = sum_ * tl.exp(max_ - new) + tl.exp(logit - new)
        max_ = new
    top = tl.max(max_, 0)
    total = tl.sum(sum_ * tl.exp(max_ - top), 0)
    target = tl.load(targets + row)
    target_logit = tl.load(logits + target, mask=(target >= 0) & (target < V), other=-float("inf"))
    tl.store(statistics + row, top)
    tl.store(statistics + c + row, total)
    tl.store(statistics + 2 * c + row, target_logit)


@triton.jit
def _error_kernel(logits, stride, targets, all_max, all_sum, error, error_stride, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = columns < V
    logit = tl.load(logits + row * stride + columns, mask=here)
    probability = tl.exp(logit - tl.load(all_max + row)) / tl.load(all_sum + row)
    value = tl.where(columns == tl.load(targets + row), probability - 1.0, probability)
    tl.store(error + row * error_stride + columns, value.to(error.dtype.element_ty), mask=here)


def statistics(logits_cV: torch.Tensor, targets_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `softmax_torch.statistics`."""
    c, V = logits_cV.shape
    statistics_3c = logits_cV.new_empty(3, c)
    with torch.cuda.device_of(logits_cV):
        _statistics_kernel[(c,)](
            logits_cV, logits_cV.stride(0), targets_c, statistics_3c, c, V, BLOCK=BLOCK, num_warps=8
        )
    return statistics_3c[0], statistics_3c[1], statistics_3c[2]


def error(
    used_cV: torch.Tensor,
    targets_c: torch.Tensor,
    max_c: torch.Tensor,
    all_max_c: torch.Tensor,
    all_sum_c: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `softmax_torch.error`; `statistics` leaves the logits as they are."""
    c, V = used_cV.shape
    error_cV = used_cV if dtype == used_cV.dtype else used_cV.new_empty(c, V, dtype=dtype)
    with torch.cuda.device_of(used_cV):
        _error_kernel[(c, triton.cdiv(V, BLOCK))](
            used_cV, used_cV.stride(0), targets_c, all_max_c, all_sum_c, error_cV, error_cV.stride(0), V,
            BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return error_cV
