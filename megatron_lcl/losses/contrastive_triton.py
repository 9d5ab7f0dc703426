"""The contrastive loss's arithmetic for own rows against all rows, as one pair of Triton kernels.

Same functions, arguments and results as `contrastive_tiles.py`, for features of up to 32 bits. For CUDA devices; on CPU
tensors only under Triton's interpreter (TRITON_INTERPRET=1 before triton is imported).

One program owns a block of rows in one direction (own images against all texts, or own texts against all images), walks
over the columns and needs no other program: no atomics, the same result every time. A tile of logits gives the weights
of both directions' softmax at once. The block's gradient, too large for registers at usual widths, is summed up in
memory (in practice in the L2 cache).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from megatron_lcl.losses.contrastive_tiles import RowStatistics

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
OF_A_STEP = ["n", "N", "offset"]
"""change from step to step: kernels that were made for 1, or for a multiple of 16, would be compiled during a run"""


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int


# The larger ones fill 96 KiB of shared memory (num_stages blocks of queries and keys, less elsewhere).
HALF_TILES = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3))
SINGLE_TILES = (Tile(128, 64, 32, 8, 2), Tile(64, 64, 32, 4, 2))


@triton.jit
def _similarities(
    queries, keys, rows, columns, n, N, D, query_stride, key_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """queries[rows] @ keys[columns].T, float32; rows and columns past the end give 0."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, D, WIDTH):
        dims = start + tl.arange(0, WIDTH)
        query = tl.load(
            queries + rows[:, None] * query_stride + dims[None, :],
            mask=(rows < n)[:, None] & (dims < D)[None, :], other=0.0,
        )  # fmt: skip
        key = tl.load(
            keys + columns[None, :] * key_stride + dims[:, None],
            mask=(columns < N)[None, :] & (dims < D)[:, None], other=0.0,
        )  # fmt: skip
        tile = tl.dot(query.to(DTYPE), key.to(DTYPE), tile, input_precision=PRECISION)
    return tile


@triton.jit(do_not_specialize=OF_A_STEP)
def _forward_kernel(
    image_n, text_n, image_N, text_N, scale_ptr, positive_ptr, lse_ptr, hardest_ptr,
    n, N, D, offset, image_stride, text_stride, image_all_stride, text_all_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """positive [n] (written by the image direction), lse and hardest [2, n]."""
    direction = tl.program_id(1)
    if direction == 0:
        queries, keys, query_stride, key_stride = image_n, text_N, image_stride, text_all_stride
    else:
        queries, keys, query_stride, key_stride = text_n, image_N, text_stride, image_all_stride
    scale = tl.load(scale_ptr)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    max_ = tl.full((ROWS,), LOWEST, tl.float32)
    sum_ = tl.zeros((ROWS,), tl.float32)
    positive = tl.zeros((ROWS,), tl.float32)
    for start in range(0, N, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = scale * _similarities(
            queries, keys, rows, columns, n, N, D, query_stride, key_stride, ROWS, COLUMNS, WIDTH, DTYPE, PRECISION
        )
        own = rows[:, None] + offset == columns[None, :]
        positive += tl.sum(tl.where(own, logits, 0.0), 1)
        logits = tl.where(own | (columns >= N)[None, :], -float("inf"), logits)
        new = tl.maximum(max_, tl.max(logits, 1))
        sum_ = sum_ * tl.exp(max_ - new) + tl.sum(tl.exp(logits - new[:, None]), 1)
        max_ = new
    here = rows < n
    tl.store(lse_ptr + direction * n + rows, max_ + tl.log(sum_), mask=here)
    tl.store(hardest_ptr + direction * n + rows, max_, mask=here)
    if direction == 0:
        tl.store(positive_ptr + rows, positive, mask=here)


@triton.jit(do_not_specialize=OF_A_STEP)
def _backward_kernel(
    image_n, text_n, image_N, text_N, scale_ptr, image_lse, text_lse, shortfall_ptr, grad_ptr,
    n, N, D, offset, image_stride, text_stride, image_all_stride, text_all_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """grad [2, n, D], zero at the start: sums of the keys, weighted by both softmaxes (the own: by -shortfall)."""
    direction = tl.program_id(1)
    if direction == 0:
        queries, keys, query_stride, key_stride = image_n, text_N, image_stride, text_all_stride
        query_lse, key_lse = image_lse, text_lse
    else:
        queries, keys, query_stride, key_stride = text_n, image_N, text_stride, image_all_stride
        query_lse, key_lse = text_lse, image_lse
    scale = tl.load(scale_ptr)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    row_lse = tl.load(query_lse + offset + rows, mask=rows < n, other=0.0)
    grads = grad_ptr + (direction.to(tl.int64) * n + rows[:, None]) * D
    for start in range(0, N, COLUMNS):
        columns = (start + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = scale * _similarities(
            queries, keys, rows, columns, n, N, D, query_stride, key_stride, ROWS, COLUMNS, WIDTH, DTYPE, PRECISION
        )
        column_lse = tl.load(key_lse + columns, mask=columns < N, other=0.0)
        weight = tl.exp(logits - row_lse[:, None]) + tl.exp(logits - column_lse[None, :])
        # where there is no row or column it may be infinite, and the key, 0, would make NaN of that
        others = (rows < n)[:, None] & (columns < N)[None, :] & (rows[:, None] + offset != columns[None, :])
        weight = tl.where(others, weight, 0.0)
        weight = weight.to(WEIGHT_DTYPE).to(GRAD_DTYPE)
        # num_stages=1: a load of sums must not be moved ahead of an earlier store of them
        for width_start in tl.range(0, D, WIDTH, num_stages=1):
            dims = width_start + tl.arange(0, WIDTH)
            key = tl.load(
                keys + columns[:, None] * key_stride + dims[None, :],
                mask=(columns < N)[:, None] & (dims < D)[None, :], other=0.0,
            )  # fmt: skip
            here = (rows < n)[:, None] & (dims < D)[None, :]
            total = tl.load(grads + dims[None, :], mask=here, other=0.0)
            total = tl.dot(weight, key.to(GRAD_DTYPE), total, input_precision=GRAD_PRECISION)
            tl.store(grads + dims[None, :], total, mask=here)
        tl.debug_barrier()  # sums go to the next round through memory, and it may be another thread that loads them
    # the own pairs by themselves: above, their weights would take registers that fp16 lacks
    shortfall = tl.load(shortfall_ptr + rows, mask=rows < n, other=0.0)
    for width_start in tl.range(0, D, WIDTH, num_stages=1):
        dims = width_start + tl.arange(0, WIDTH)
        here = (rows < n)[:, None] & (dims < D)[None, :]
        key = tl.load(keys + (rows + offset)[:, None] * key_stride + dims[None, :], mask=here, other=0.0)
        total = tl.load(grads + dims[None, :], mask=here, other=0.0)
        tl.store(grads + dims[None, :], total - shortfall[:, None] * key.to(tl.float32), mask=here)


def forward(
    image_nD: torch.Tensor,
    text_nD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    offset: int,
    scale: torch.Tensor,
) -> RowStatistics:
    """As `contrastive_tiles.forward`; `scale` is a float32 scalar, read on the device."""
    n = len(image_nD)
    positive_n = scale.new_empty(n)
    lse_2n, hardest_2n = scale.new_empty(2, n), scale.new_empty(2, n)
    sizes = _sizes(image_nD, text_nD, image_ND, text_ND, offset)
    _launch(
        _forward_kernel, image_nD, (image_nD, text_nD, image_ND, text_ND, scale, positive_n, lse_2n, hardest_2n, *sizes)
    )
    return RowStatistics(positive_n, lse_2n[0], lse_2n[1], hardest_2n[0], hardest_2n[1])


def backward(
    image_nD: torch.Tensor,
    text_nD: torch.Tensor,
    image_ND: torch.Tensor,
    text_ND: torch.Tensor,
    image_lse_N: torch.Tensor,
    text_lse_N: torch.Tensor,
    shortfall_n: torch.Tensor,
    offset: int,
    scale: torch.Tensor,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `contrastive_tiles.backward`."""
    grad_2nD = scale.new_zeros(2, *image_nD.shape)
    sizes = _sizes(image_nD, text_nD, image_ND, text_ND, offset)
    # weights of a large batch, down to 1e-6 and less, are too small for float16: there the features are widened instead
    weight_dtype = tl.bfloat16 if image_nD.dtype == torch.bfloat16 else tl.float32
    _launch(
        _backward_kernel,
        image_nD,
        (image_nD, text_nD, image_ND, text_ND, scale, image_lse_N, text_lse_N, shortfall_n, grad_2nD, *sizes),
        WEIGHT_DTYPE=weight_dtype,
        GRAD_DTYPE=weight_dtype if image_nD.is_cuda else tl.float32,
        GRAD_PRECISION="tf32" if image_nD.dtype == torch.float16 and image_nD.is_cuda else _precision(image_nD),
    )
    grad_2nD *= factor
    return grad_2nD[0], grad_2nD[1], torch.linalg.vecdot(image_nD.float(), grad_2nD[0]).sum()


def _sizes(
    image_nD: torch.Tensor, text_nD: torch.Tensor, image_ND: torch.Tensor, text_ND: torch.Tensor, offset: int
) -> tuple[int, ...]:
    features = (image_nD, text_nD, image_ND, text_ND)
    assert all(f.stride(1) == 1 for f in features), "kernels read rows as contiguous"
    return len(image_nD), len(image_ND), image_nD.shape[1], offset, *(f.stride(0) for f in features)


def _precision(features: torch.Tensor) -> str:
    """How tensor cores multiply float32: three products of two halves each, where there is such a thing."""
    return "tf32x3" if features.is_cuda and torch.version.hip is None else "ieee"


def _launch(kernel: triton.JITFunction, features: torch.Tensor, arguments: tuple, **constants: object) -> None:
    n = len(features)
    if n == 0:
        return
    tiles = SINGLE_TILES if features.dtype == torch.float32 else HALF_TILES
    # the larger tile reads less, but only if its programs, two directions of n / rows, fill the device
    processors = torch.cuda.get_device_properties(features.device).multi_processor_count if features.is_cuda else 1
    tile = next((t for t in tiles if 2 * triton.cdiv(n, t.rows) >= processors), tiles[-1])
    with torch.cuda.device_of(features):
        kernel[(triton.cdiv(n, tile.rows), 2)](
            *arguments, ROWS=tile.rows, COLUMNS=tile.columns, WIDTH=tile.width,
            DTYPE=DTYPES[features.dtype] if features.is_cuda else tl.float32, PRECISION=_precision(features),
            num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
        )  # fmt: skip
