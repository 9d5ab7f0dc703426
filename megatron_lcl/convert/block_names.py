"""The modules of a block under other libraries' names, by ours: for exports, and for encoders that a run begins with.

The order is that of an export's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import attrgetter

from torch import nn

HF_CLIP = {
    "norm1": "layer_norm1",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
HF_DINOV2 = {
    "norm1": "norm1",
    "attention.q": "attention.attention.query",
    "attention.k": "attention.attention.key",
    "attention.v": "attention.attention.value",
    "attention.out": "attention.output.dense",
    "norm2": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
"""of the published checkpoints"""
TIMM = {
    "attention.norm_q": "attn.q_norm",
    "attention.norm_k": "attn.k_norm",
    "norm1": "norm1",
    "attention.out": "attn.proj",
    "norm2": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
"""but for queries, keys and values, which are one module there"""


def parameters(blocks: Iterable[nn.Module], prefix: str, names: Mapping[str, str]) -> dict[str, nn.Parameter]:
    """Those of each block's modules under the names `PREFIX.NUMBER.…`; modules that a block is without are left out."""
    return {
        f"{prefix}.{i}.{theirs}.{kind}": parameter
        for i, block in enumerate(blocks)
        for ours, theirs in names.items()
        if (module := attrgetter(ours)(block)) is not None
        for kind, parameter in module.named_parameters()
    }
