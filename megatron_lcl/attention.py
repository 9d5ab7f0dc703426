"""Attention over packed sequences: one function, several back-ends.

The back-ends, and where each is chosen unless `train.attention` names one:

    flash_attn_3   CUDA, half precision, compute capability 9.x (Hopper), FlashAttention-3 installed and loading
    flash_attn     CUDA, half precision, compute capability 8.0 (Ampere) or newer, flash-attn installed and loading
    torch_varlen   the same without flash-attn: torch's variable-length attention, by its FlashAttention kernel
    flex           nowhere by itself: torch's FlexAttention, CUDA, any precision; where it is asked for or measured
    dense          CUDA in float32, which these lack, or on older GPUs: attention under a block-diagonal mask
    per_sequence   CPU: one call per sequence, or for all short ones of nearly the same length

`choose_attention` chooses once, for a device and a dtype; what it returns is handed to the model's layers. `Adaptive`
serves models whose device and dtype may change (those of the library): it chooses when it is called.

Shape legend: R rows of all sequences one after another, H heads, K features of a head, C sequences.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.weak import WeakTensorKeyDictionary

from megatron_lcl.config import AttentionName
from megatron_lcl.errors import UserError
from megatron_lcl.losses.derivatives import first_derivative_only
from megatron_lcl.losses.kernels import triton_fault

PackedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(q, k, v [R, H, K], cu_seqlens, max_seqlen) → [R, H, K]: causal attention inside each sequence, softmax(q·k/√K) v.

`cu_seqlens` [C+1] int32: row where each sequence starts, then the end of the last; equal neighbors are empty
sequences, and no row lies outside. `max_seqlen` bounds the longest.
"""

NAMES: tuple[AttentionName, ...] = get_args(AttentionName)
AUTOMATIC: tuple[AttentionName, ...] = ("flash_attn_3", "flash_attn", "torch_varlen", "dense")
"""in the order in which they are tried on CUDA in half precision"""
VARLEN: tuple[AttentionName, ...] = ("flash_attn_3", "flash_attn", "torch_varlen", "flex")
"""those that are made for sequences of any length one after another"""
HALF = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
"""oldest CUDA compute capability for which flash-attn and torch's variable-length kernel are built"""
TRITON_CAPABILITY = (7, 0)
"""oldest CUDA compute capability for which Triton compiles, and FlexAttention with it; torch itself, in its builds for
CUDA 13, begins with 7.5"""


@dataclass(frozen=True)
class Attention:
    """A back-end that can be used here."""

    name: AttentionName
    attend: PackedAttention
    passed_over: tuple[str, ...] = ()
    """why each installed back-end that comes before it is not used; one line each"""


def choose_attention(
    device: torch.device,
    dtype: torch.dtype,
    wanted: AttentionName | Literal["auto"] = "auto",
    *,
    capability: tuple[int, int] | None = None,
    head_width: int | None = None,
    deterministic: bool = False,
) -> Attention:
    """The back-end to use on a device in a dtype. UserError where `wanted` names one that cannot be used, and why.

    capability: the device's, as `torch.cuda.get_device_capability` gives it; None: it is asked for. head_width:
    features of a head, where known. deterministic: of flash-attn, the slower backward that gives the same bits every
    time (the others follow torch.use_deterministic_algorithms).
    """
    if capability is None and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    faults = functools.partial(find_fault, device=device, dtype=dtype, capability=capability, head_width=head_width)
    if wanted != "auto":
        if fault := faults(wanted):
            raise UserError(f"train.attention = {wanted}, but {fault}; set train.attention to auto")
        return Attention(wanted, _function(wanted, deterministic))
    if device.type != "cuda" or dtype not in HALF:
        name: AttentionName = "dense" if device.type == "cuda" else "per_sequence"
        return Attention(name, _function(name, deterministic))
    passed_over: list[str] = []
    for name in AUTOMATIC:
        if not (fault := faults(name)):
            return Attention(name, _function(name, deterministic), tuple(passed_over))
        if is_installed(name):
            passed_over.append(fault)
    raise AssertionError("dense attention runs everywhere")


def find_fault(
    name: AttentionName,
    device: torch.device,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    head_width: int | None = None,
) -> str | None:
    """Why a back-end cannot be used; None if it can. Imports it if all else is right."""
    if name in ("dense", "per_sequence"):
        return None
    if device.type != "cuda":
        return f"{name} needs a CUDA device, not {device.type}"
    assert capability is not None
    if name == "flex":
        return _flex_fault(capability, head_width)
    if dtype not in HALF:
        return f"{name} needs train.dtype bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if capability < CAPABILITY:
        return f"{name} needs compute capability 8.0 (Ampere) or newer, and the GPU has {capability[0]}.{capability[1]}"
    if name == "flash_attn_3" and capability[0] != 9:
        return f"{name} needs compute capability 9.x (Hopper), and the GPU has {capability[0]}.{capability[1]}"
    if head_width is not None and (head_width > 256 or (name != "flash_attn" and head_width % 8)):
        limit = "at most 256" if head_width > 256 else "a multiple of 8"
        return f"{name} needs heads of {limit} features, and the model's have {head_width}"
    return load_fault(name)


def _flex_fault(capability: tuple[int, int], head_width: int | None) -> str | None:
    if capability < TRITON_CAPABILITY:
        return f"flex needs compute capability 7.0 (Volta) or newer, and the GPU has {capability[0]}.{capability[1]}"
    if head_width is not None and head_width < 16:
        return f"flex needs heads of at least 16 features, and the model's have {head_width}"
    if fault := triton_fault():  # it is compiled when it is first called
        return f"flex is compiled by Triton, and {fault}"
    return None


def is_installed(name: AttentionName) -> bool:
    """Whether there is something to import, whether it loads or not."""
    return name not in _SOURCES or importlib.util.find_spec(_SOURCES[name][0]) is not None


def load_fault(name: AttentionName) -> str | None:
    """Why a back-end's package cannot be imported here, whatever the device; None if it can, or there is none.

    A package built for another torch is there, but its library lacks symbols: only importing it shows that.
    """
    if name not in _SOURCES:
        return None
    if not is_installed(name):
        return f"{name} is not installed"
    module, attribute = _SOURCES[name]
    try:
        getattr(importlib.import_module(module), attribute)
    except Exception as error:  # noqa: BLE001 - whatever importing somebody's library raises
        return f"{name} is installed but does not load ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


_SOURCES: dict[str, tuple[str, str]] = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "flash_attn": ("flash_attn", "flash_attn_varlen_func"),
    "torch_varlen": ("torch.nn.attention.varlen", "varlen_attn"),
}


def _function(name: AttentionName, deterministic: bool) -> PackedAttention:
    if name in ("flash_attn", "flash_attn_3"):
        return functools.partial(_flash_attn, module=_SOURCES[name][0], deterministic=deterministic)
    if name == "flex":
        return PerBatch(flex_mask, _flex)
    if name == "per_sequence":
        return PerBatch(_Calls.of, _by_sequence)
    if name == "dense":
        return PerBatch(_Mask, _dense)
    assert name == "torch_varlen", name
    return _torch_varlen


class Adaptive:
    """A `PackedAttention` that chooses by the device and dtype it is called with, once for each."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[torch.device, torch.dtype], PackedAttention] = {}

    def __call__(
        self, q_RHK: torch.Tensor, k_RHK: torch.Tensor, v_RHK: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        key = (q_RHK.device, q_RHK.dtype)
        if key not in self._chosen:
            self._chosen[key] = choose_attention(*key, head_width=q_RHK.shape[-1]).attend
        return self._chosen[key](q_RHK, k_RHK, v_RHK, cu_seqlens, max_seqlen)


def full_attention(q_NHLK: torch.Tensor, k_NHLK: torch.Tensor, v_NHLK: torch.Tensor) -> torch.Tensor:
    """Attention without a mask inside each of N equally long sequences: [N, H, L, K] each; queries may be fewer."""
    return F.scaled_dot_product_attention(q_NHLK, k_NHLK, v_NHLK)


# --- the back-ends -----------------------------------------------------------------------------------------------


def _flash_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    *,
    module: str,
    deterministic: bool,
) -> torch.Tensor:
    attend = importlib.import_module(module).flash_attn_varlen_func
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    out = attend(q, k, v, *lengths, causal=True, deterministic=deterministic)
    return out[0] if isinstance(out, tuple) else out  # FlashAttention-3 gave the log-sum-exps too, until 2025


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.15 would choose cuDNN's kernel on 9.x and 10.x: of that it has no deterministic backward, and before
    # cuDNN 9.25 an empty sequence gives NaN there. Backward takes the kernel that forward has taken
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return out


class PerBatch:
    """A back-end that computes with what it makes of a batch's lengths: a batch's first layer makes it for all others.

    It is kept as long as the tensor `cu_seqlens` is, for each batch there is.
    """

    def __init__(self, prepare: Callable[[torch.Tensor, int], Any], attend: Callable[..., torch.Tensor]) -> None:
        """prepare: what is made of `cu_seqlens` and R; attend: attention over q, k, v, and this."""
        self._prepare, self._attend = prepare, attend
        self._prepared = WeakTensorKeyDictionary()

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
    ) -> torch.Tensor:
        if not len(q):
            return q + k + v  # every process must have the same graph
        prepared = self._prepared.get(cu_seqlens)
        if prepared is None:
            prepared = self._prepared[cu_seqlens] = self._prepare(cu_seqlens, len(q))
        return self._attend(q, k, v, prepared)

    def __reduce__(self) -> Any:
        return PerBatch, (self._prepare, self._attend)  # a copy of the model, or one in another process, begins anew


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """torch's FlexAttention (arXiv 2412.05496), compiled."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return _compiled_flex()(q, k, v, block_mask=mask)[0].transpose(0, 1)


@functools.cache
def _compiled_flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex_mask(cu_seqlens: torch.Tensor, rows: int) -> Any:
    """FlexAttention's `BlockMask` of sequences one after another, each causal: blocks of 128 queries and keys.

    The blocks that a block of queries reads begin with the one where the sequence of its first row begins, and end with
    its own; those between are read without a mask where its last row's sequence begins before them. So the mask takes
    (rows / 128)² numbers, where torch's `create_block_mask` looks at rows² of them; nothing waits for the device.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block, row = 128, torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens.to(row.dtype), row, right=True)
    starts = cu_seqlens.long()[sequence - 1]
    own = torch.arange(-(-rows // block), device=row.device)
    first, last = own * block, own * block + block - 1
    reads = (own >= starts[first][:, None] // block) & (own <= own[:, None])
    whole = reads & (first >= starts[last.clamp(max=rows - 1)][:, None]) & (own < own[:, None])
    whole &= last[:, None] < rows  # as torch has it: a block that is not full has a mask
    masked = reads & ~whole

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks of keys each block of queries reads, and which: those first, in ascending order."""
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    def same_and_not_later(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (sequence[query] == sequence[key]) & (query >= key)

    return BlockMask.from_kv_blocks(
        *listed(masked), *listed(whole), BLOCK_SIZE=block, mask_mod=same_and_not_later, seq_lengths=(rows, rows)
    )


def _by_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: _Calls) -> torch.Tensor:
    groups, order = calls.groups, calls.order
    if order is not None:
        q, k, v = (_Gather.apply(x, order.row_P, order.place_R) for x in (q, k, v))
    lengths, parts = [group.number * group.length for group in groups], []
    for group, *rows in zip(groups, q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        one_q, one_k, one_v = (x.view(group.number, group.length, *x.shape[1:]).transpose(1, 2) for x in rows)
        parts.append(F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True).transpose(1, 2).flatten(0, 1))
    out = torch.cat(parts)
    return out if order is None else _Gather.apply(out, order.place_R, order.row_P, order.is_row_P)


SHORT, STEP = 128, 16
"""rows of the longest sequence that shares a call with others, and those to a multiple of which they are filled up"""


@dataclass(frozen=True)
class Group:
    """Sequences that are one call: as many rows of each, the first ones its own."""

    sequences: tuple[tuple[int, int], ...]
    """first row and length of each"""
    length: int

    @property
    def number(self) -> int:
        """Of sequences."""
        return len(self.sequences)


def group_by_length(sequences: Sequence[tuple[int, int]]) -> list[Group]:
    """Short sequences by length, to the next multiple of STEP; each long one alone, as it is; so a lone short one.

    sequences: first row and length of each, in order. Without any short ones in a common group the order is kept.
    """
    of_length: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for start, length in sequences:
        alone = length > SHORT
        of_length.setdefault((length, start) if alone else (-(-length // STEP) * STEP, -1), []).append((start, length))
    return [Group(tuple(own), key[0] if len(own) > 1 else own[0][1]) for key, own in of_length.items()]


@dataclass(frozen=True)
class _Order:
    """Rows of groups one after another: P places for R rows. A place past a sequence's end holds its last row.

    No row of the sequence attends to it, as attention is causal.
    """

    row_P: torch.Tensor
    place_R: torch.Tensor
    is_row_P: torch.Tensor
    """whether a place is the row's own"""

    @classmethod
    def of(cls, groups: Sequence[Group], rows: int, device: torch.device) -> _Order:
        row, own = [], []
        for group in groups:
            start, length = np.array(group.sequences).T
            place = np.arange(group.length)
            row.append((start[:, None] + np.minimum(place, length[:, None] - 1)).ravel())
            own.append((place < length[:, None]).ravel())
        row_P, own_P = np.concatenate(row), np.concatenate(own)
        place_R = np.empty(rows, np.int64)
        place_R[row_P[own_P]] = np.flatnonzero(own_P)
        return cls(*(torch.from_numpy(x).to(device) for x in (row_P, place_R, own_P)))


@dataclass(frozen=True)
class _Calls:
    """What is one call, of the sequences of a batch."""

    groups: Sequence[Group]
    order: _Order | None
    """None: the rows are in the order of the groups"""

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, rows: int) -> _Calls:
        bounds = cu_seqlens.tolist()
        assert bounds[-1] == rows, f"sequences end at row {bounds[-1]} of {rows}"
        groups = group_by_length([(start, end - start) for start, end in itertools.pairwise(bounds) if end > start])
        in_order = all(group.number == 1 for group in groups)
        return cls(groups, None if in_order else _Order.of(groups, rows, cu_seqlens.device))


class _Gather(torch.autograd.Function):
    """x[index]. Backward only copies: grad[back], and 0 where `is_own` is not set (None: it is everywhere)."""

    @staticmethod
    def forward(ctx, x, index, back, is_own=None):
        ctx.back, ctx.is_own = back, is_own
        return x.index_select(0, index)

    @staticmethod
    @first_derivative_only("per_sequence attention")
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.back)
        return grad if ctx.is_own is None else grad.mul_(ctx.is_own[:, None, None]), None, None, None


class _Mask:
    """What a row attends to, [R, R]: 0 and -inf, in the dtype that asks for it.

    Of a mask of bools torch makes such a one in every layer, and keeps each for backward.
    """

    def __init__(self, cu_seqlens: torch.Tensor, rows: int) -> None:
        self._row = torch.arange(rows, device=cu_seqlens.device)
        self._sequence = torch.searchsorted(cu_seqlens.to(self._row.dtype), self._row, right=True)
        self._of_dtype: dict[torch.dtype, torch.Tensor] = {}

    def of(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype not in self._of_dtype:
            row, sequence = self._row, self._sequence
            hidden = (sequence[:, None] != sequence) | (row[:, None] < row)
            zeros = torch.zeros(hidden.shape, dtype=dtype, device=row.device)
            self._of_dtype[dtype] = zeros.masked_fill_(hidden, -torch.inf)
        return self._of_dtype[dtype]


MASKED = 1 << 31
"""numbers of a mask for one call, at most: torch's kernel counts them in 32 bits, and reads other rows' ones beyond
(pytorch issue 187227)"""


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: _Mask) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    whole = mask.of(q.dtype)
    rows = max(1, MASKED // (len(whole) + 16))  # torch fills a row up to a multiple of 16
    calls = zip(q.split(rows, dim=2), whole.split(rows), strict=True)
    parts = [F.scaled_dot_product_attention(some, k, v, attn_mask=own) for some, own in calls]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2))[0].transpose(0, 1)
