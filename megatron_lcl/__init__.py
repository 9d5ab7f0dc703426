"""Latent Compression Learning: pre-training of vision encoders and language models on interleaved documents.

`load_model`, `from_open_clip`, `LCL` and `open_corpus` are the library's public interface; each is imported on first
use, so that `import megatron_lcl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lcl.convert.load import from_open_clip, load_model
    from megatron_lcl.data.corpus.store import open_corpus
    from megatron_lcl.model.lcl import LCL

__version__ = "0.1.0"
__all__ = ["LCL", "from_open_clip", "load_model", "open_corpus"]

_HOME = {
    "LCL": "model.lcl",
    "from_open_clip": "convert.load",
    "load_model": "convert.load",
    "open_corpus": "data.corpus.store",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_lcl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"megatron_lcl.{_HOME[name]}"), name)
