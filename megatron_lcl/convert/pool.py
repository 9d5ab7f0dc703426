"""The attention pool's files beside an export."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.convert import attention_pool
from megatron_lcl.convert.libraries import usual_defaults
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.model.lcl import LCL

POOL = "lcl/attention_pool.safetensors"
"""in a folder of its own: timm before 1.0.26 fails on a second .safetensors file beside the weights"""

_PARTS = ("query", "norm_q.", "norm_k.", "norm_v.", "q.", "k.", "v.", "out.")


def save_pool(model: LCL, folder: Path, dtype: torch.dtype) -> None:
    """`lcl/attention_pool.safetensors`: query, norm_{q,k,v}, q, k, v, out; the number of heads in its metadata.

    And `lcl/attention_pool.py`, which reads and applies it.
    """
    tensors = {name: p for name, p in model.pool.named_parameters() if name.startswith(_PARTS)}
    (folder / POOL).parent.mkdir(exist_ok=True)
    save_parts(tensors, folder / POOL, dtype, {"heads": str(model.config.pool_heads)})
    shutil.copyfile(attention_pool.__file__, (folder / POOL).with_suffix(".py"))


def load_encoder(folder: Path, weights: Path, vision: Vision, tensors_of: Callable[[LCL], Mapping[str, Any]]) -> LCL:
    """The vision encoder and the pool that an export's files hold, in float32 on the CPU.

    tensors_of: the model's parameters under the other library's names, as the export writes them: views, or lists of
    parts that are concatenated there.
    """
    with usual_defaults():  # of the device also for tensors that are read, before safetensors 0.8
        pool, heads = attention_pool.read_pool(folder / POOL)
        given = load_file(weights)
        # of the language model only its width says something; the rest is as small as a config may be
        language = Language(
            context_length=1, vocab_size=5, width=len(pool["out.weight"]), layers=1, heads=1, mlp_width=1
        )
        model = LCL(Model(vision, language, heads), seed=None, whole=False)
    wanted = {name: parts if isinstance(parts, list) else [parts] for name, parts in tensors_of(model).items()}
    wanted |= {name: [p] for name, p in model.pool.named_parameters() if name.startswith(_PARTS)}
    with torch.no_grad():
        for unused in (*model.pool.embedding.parameters(), model.pool.positions):  # in no file, and never read
            unused.zero_()
        for name, parts in wanted.items():
            value = pool[name] if name in pool else given[name]
            for part, own in zip(parts, value.float().split([len(part) for part in parts]), strict=True):
                part.copy_(own)
    return model
