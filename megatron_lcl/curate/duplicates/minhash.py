"""MinHash signatures of texts, and how they are cut into bands.

Broder, "On the resemblance and containment of documents" (1997): the least hash over a set agrees for two sets with
the probability of their Jaccard similarity. Bands of rows: Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets",
section 3.4. Shingles of words, 112 hash functions and 0.75 are FineWeb's (Penedo et al., 2024, appendix E).
"""

from __future__ import annotations

import functools

import numpy as np

from megatron_lcl.compiled import compiled
from megatron_lcl.data.corpus.words import split_words
from megatron_lcl.data.loading.hashes import mix

_EMPTY = np.uint32(0xFFFFFFFF)
_SEED = 0
"""of the hash functions; signatures of other seeds cannot be compared"""
_U = np.uint64
_SHIFT = _U(32)
_FNV_START, _FNV_FACTOR = _U(0xCBF29CE484222325), _U(0x100000001B3)
_MISSED, _WASTED = 0.9, 0.1
"""weights of a near-duplicate that is no candidate, and of a candidate that is none, which costs a comparison only"""
_STEPS = 200
"""of the integrals over the similarity"""


def word_hashes(text: str) -> np.ndarray:
    """uint64 [W]: a hash of each word of a text, in order (`split_words`); case does not count."""
    found = split_words(text.casefold())
    return _hashes(np.frombuffer(" ".join(found).encode(errors="surrogatepass"), np.uint8), len(found))


@compiled
def _hashes(text: np.ndarray, num: int) -> np.ndarray:
    """FNV-1a of `num` words with a space between them."""
    out = np.full(num, _FNV_START)
    k = 0
    for byte in text:
        if byte == 32:
            k += 1
        else:
            out[k] = (out[k] ^ _U(byte)) * _FNV_FACTOR
    return out


@compiled
def shingle_hashes(words: np.ndarray, size: int) -> np.ndarray:
    """uint64 [S]: a hash of every `size` consecutive words, uint64 [W]; of all words where there are fewer."""
    num = max(1, len(words) - size + 1) if len(words) else 0
    out = np.empty(num, np.uint64)
    for k in range(num):
        key = _U(0)
        for word in words[k : k + size]:
            key = mix(key, word)
        out[k] = key
    return out


@functools.cache
def hash_functions(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and summands, uint64 [num] each, of x → the upper 32 bits of (factor · x + summand).

    Multiply-shift (Dietzfelbinger et al., "A reliable randomized algorithm for the closest-pair problem", 1997, lemma
    2.5), of shingle hashes that are random already.
    """
    rng = np.random.default_rng(_SEED)
    factors, summands = rng.integers(0, 2**64, (2, num), np.uint64)
    return factors | _U(1), summands


@compiled
def _least(shingles: np.ndarray, factors: np.ndarray, summands: np.ndarray, out: np.ndarray) -> None:
    for x in shingles:
        for p in range(len(factors)):
            value = np.uint32((factors[p] * x + summands[p]) >> _SHIFT)
            out[p] = min(out[p], value)


def signature(shingles: np.ndarray, permutations: int) -> np.ndarray:
    """uint32 [permutations]: the least value of each hash function over the shingles, uint64 [S]."""
    out = np.full(permutations, _EMPTY)
    _least(shingles, *hash_functions(permutations), out)
    return out


def candidate_probability(similarity: np.ndarray | float, bands: int, rows: int) -> np.ndarray:
    """Probability that two sets of that Jaccard similarity agree in all rows of some band."""
    return 1 - (1 - np.asarray(similarity, np.float64) ** rows) ** bands


@functools.cache
def choose_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """(bands, rows) with the least weighted sum of the probabilities, integrated over the similarity, of a candidate
    below the threshold and of none above it (Zhu et al., "LSH Ensemble", 2016, section 5.3)."""

    def error(bands: int, rows: int) -> float:
        below = np.linspace(0, threshold, _STEPS)
        above = np.linspace(threshold, 1, _STEPS)
        wrong = np.trapezoid(candidate_probability(below, bands, rows), below)
        missed = np.trapezoid(1 - candidate_probability(above, bands, rows), above)
        return float(_WASTED * wrong + _MISSED * missed)

    options = [(b, r) for r in range(1, permutations + 1) for b in range(1, permutations // r + 1)]
    return min(options, key=lambda option: error(*option))
