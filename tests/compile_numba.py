"""Compiles what numba compiles, once: the tests' processes, which begin at the same time, would each do it.

Run by `launch/test.sh`. numba keeps the results beside the code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from small_corpus import make_corpus

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.sequence import INTERLEAVED, PAIRS

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        one = make_corpus(Path(folder) / "one", seed=0)
        two = make_corpus(Path(folder) / "two", seed=1, tokenizer=one)
        sizes = {"tokens_per_pack": 128, "workers": 0, "cache": f"{folder}/cache"}
        blend, alone = (
            Data(corpora=tuple(Corpus(str(c)) for c in corpora), **sizes) for corpora in ((one, two), (one,))
        )
        for sequences in (INTERLEAVED, PAIRS):
            next(iter(PackedLoader(blend, 4, 16, 128, sequences=sequences)))
        next(iter(PackedLoader(alone, 4, 16, 128, train=False)))
