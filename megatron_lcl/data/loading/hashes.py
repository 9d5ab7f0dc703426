"""What is random in a batch: hashes, so that any process, at any time, draws the same."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_lcl.compiled import compiled

_U = np.uint64
_GOLDEN, _MIX1, _MIX2 = _U(0x9E3779B97F4A7C15), _U(0xBF58476D1CE4E5B9), _U(0x94D049BB133111EB)


@compiled
def mix(key: Any, value: Any) -> Any:
    """A 64-bit hash of (key, value): SplitMix64's finalizer (Steele, Lea & Flood 2014), twice."""
    x = _U(key) + _GOLDEN * (_U(value) + _U(1))
    for _ in range(2):
        x = (x ^ (x >> _U(30))) * _MIX1
        x = (x ^ (x >> _U(27))) * _MIX2
        x ^= x >> _U(31)
    return x


@compiled
def mix_each(key: Any, values: np.ndarray) -> np.ndarray:
    """`mix` of a key and each of some integers, uint64 [N]."""
    out = np.empty(len(values), np.uint64)
    for i in range(len(values)):
        out[i] = mix(key, _U(values[i]))
    return out


@compiled
def uniform(key: Any, value: Any) -> float:
    """A number in [0, 1) from the hash of (key, value)."""
    return float(mix(key, value) >> _U(11)) * 2.0**-53


@compiled
def shuffled(key: Any, size: int, start: int, stop: int) -> np.ndarray:
    """Elements start … stop-1 of a pseudorandom permutation of range(size), int64; any part of it costs only itself.

    A Feistel network on the smallest even number of bits, walked until it falls into the range (Black & Rogaway,
    "Ciphers with arbitrary finite domains", 2002).
    """
    half = _U(4)  # smaller networks are not random enough
    while (1 << (2 * int(half))) < size:
        half += _U(1)
    mask = (_U(1) << half) - _U(1)
    out = np.empty(stop - start, np.int64)
    for i in range(start, stop):
        x = _U(i)
        while True:
            left, right = x >> half, x & mask
            for turn in range(6):
                left, right = right, left ^ (mix(_U(key) + _U(turn), right) & mask)
            x = (left << half) | right
            if x < _U(size):
                break
        out[i - start] = np.int64(x)
    return out


@compiled
def places_of(key: Any, size: int, elements: np.ndarray) -> np.ndarray:
    """Where elements stand in the permutation of `shuffled`, int64 [N]: its network and its walk, backwards."""
    half = _U(4)
    while (1 << (2 * int(half))) < size:
        half += _U(1)
    mask = (_U(1) << half) - _U(1)
    out = np.empty(len(elements), np.int64)
    for i in range(len(elements)):
        x = _U(elements[i])
        while True:
            left, right = x >> half, x & mask
            for turn in range(5, -1, -1):
                left, right = right ^ (mix(_U(key) + _U(turn), left) & mask), left
            x = (left << half) | right
            if x < _U(size):
                break
        out[i] = np.int64(x)
    return out
