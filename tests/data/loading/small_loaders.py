"""Loaders of small corpora, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading.loader import PackedLoader

P, SIZE, CONTEXT, T = 4, 16, 96, 256


def loader_of(path: Path, *, data: dict[str, Any] | None = None, **options: Any) -> PackedLoader:
    fields = {"tokens_per_pack": T, "workers": 0, **(data or {})}
    return PackedLoader(Data(corpora=(Corpus(str(path)),), **fields), P, SIZE, CONTEXT, **options)
