"""Attention over packed sequences: one function, its back-ends chosen by device and dtype.

On CUDA in half precision: flash-attn where it is installed, else torch's own variable-length kernel. On CUDA in
float32, which they lack: dense attention under a block-diagonal mask. On CPU: one call per sequence.

Shape legend: R rows of all sequences one after another, H heads, K features of a head, C sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools

import torch
import torch.nn.functional as F


def packed_causal_attention(
    q_RHK: torch.Tensor, k_RHK: torch.Tensor, v_RHK: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Causal attention inside each sequence, softmax(q·k/√K) v.

    `cu_seqlens` [C+1] int32: row where each sequence starts, then the end of the last; equal neighbours are empty
    sequences, and no row lies outside. `max_seqlen` bounds the longest. Returns [R, H, K].
    """
    if q_RHK.is_cuda and q_RHK.dtype in (torch.float16, torch.bfloat16):
        if _has_flash_attn():
            from flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func(
                q_RHK, k_RHK, v_RHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
            )
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q_RHK, k_RHK, v_RHK, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out
    if q_RHK.device.type == "cpu":
        return _by_sequence(q_RHK, k_RHK, v_RHK, cu_seqlens)
    return _block_diagonal(q_RHK, k_RHK, v_RHK, cu_seqlens)


def full_attention(q_NHLK: torch.Tensor, k_NHLK: torch.Tensor, v_NHLK: torch.Tensor) -> torch.Tensor:
    """Attention without a mask inside each of N equally long sequences: [N, H, L, K] each; queries may be fewer."""
    return F.scaled_dot_product_attention(q_NHLK, k_NHLK, v_NHLK)


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _by_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    assert bounds[-1] == len(q), f"sequences end at row {bounds[-1]} of {len(q)}"
    parts = []
    for sequence in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        if len(sequence[0]):
            one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in sequence)
            parts.append(F.scaled_dot_product_attention(one_q, one_k, one_v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q + k + v  # no rows, but every process must have the same graph


def _block_diagonal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    row = torch.arange(len(q), device=q.device)
    sequence = torch.searchsorted(cu_seqlens.to(row.dtype), row, right=True)
    mask = (sequence[:, None] == sequence) & (row[:, None] >= row)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)
