"""Compiles what numba compiles, once: the tests' processes, which begin at the same time, would each do it.

Run by `launch/test.sh`. numba keeps the results beside the code.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from data.loading.test_sequences import NATURAL
from small_corpus import make_corpus

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS
from megatron_lcl.data.loading.sequence import END, arrange, arranged_sizes, in_turn, select, texts_in_turn

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
    # as tests call them by themselves, with other types than the loader
    lengths, modes, zero = np.array([1, 9], np.int32), np.array([1, 0], np.int8), np.zeros(1, np.int64)
    nan, none, key = np.full(1, np.nan, np.float32), np.full(1, -1, np.int32), np.uint64(0)
    arrange(lengths, modes, nan, none, key, NATURAL)
    select(nan, none, key, NATURAL)
    document = lengths, modes, np.array([0, 2]), nan, none, zero, zero, np.array([key])
    arranged_sizes(*document, np.array([[0, END]]), NATURAL, np.array([-1]))  # type: ignore[call-arg]
    texts_in_turn(np.array([key]), modes, np.array([0, 2]), 0)
    in_turn(key, 1, 0)
