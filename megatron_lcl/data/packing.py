"""Putting sequences into packs of T tokens and I images, and drawing documents from a blend. Compiled, no files here.

Shape legend: N sequences, B packs, C corpora, T token places, I image slots, S sequences a pack may hold.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_U = np.uint64
_ONE, _ALL = _U(1), _U(0xFFFFFFFFFFFFFFFF)


def max_sequences(tokens_per_pack: int) -> int:
    """S: how many sequences a pack of T tokens may hold, so that lists of their starts have a fixed length."""
    return max(1, tokens_per_pack // 16)


def choose_images_per_pack(images_per_token: float, tokens_per_pack: int) -> int:
    """I such that tokens and images fill up together as well as an integer allows: the fuller of the two neighbours.

    With r images to T tokens in the corpus, I >= r leaves image slots empty (r/I used), I < r token places (I/r used).
    """
    wanted = images_per_token * tokens_per_pack
    low = max(1, math.floor(wanted))
    return low if low >= wanted or low / wanted >= wanted / (low + 1) else low + 1


@numba.njit(cache=True, nogil=True)
def blend(tokens: np.ndarray, starts: np.ndarray, weights: np.ndarray, served: np.ndarray) -> np.ndarray:
    """From which corpus each next document comes, int16, until one corpus's list is at its end.

    tokens: the corpora's next documents' tokens, one list after the other, that of corpus c at starts[c]:starts[c+1].
    weights float64 [C] sum to 1; served float64 [C], tokens taken so far, is brought up to date.

    WF2Q (Bennett & Zhang, "WF²Q: worst-case fair weighted fair queueing", 1996): among the corpora not ahead of their
    share, the one whose next document would be due first. At every prefix each corpus is within one document of it.
    """
    out = np.empty(starts[-1], np.int16)
    position = starts[:-1].copy()
    count = 0
    total = served.sum()
    while True:
        best, best_due, ahead = -1, np.inf, True
        for c in range(len(weights)):
            if position[c] == starts[c + 1]:
                return out[:count].copy()
            due = (served[c] + tokens[position[c]]) / weights[c]
            is_ahead = served[c] > weights[c] * total
            if (ahead and not is_ahead) or (ahead == is_ahead and due < best_due):
                best, best_due, ahead = c, due, is_ahead
        out[count] = best
        count += 1
        served[best] += tokens[position[best]]
        total += tokens[position[best]]
        position[best] += 1


@numba.njit(cache=True, nogil=True)
def _highest(bits: Any) -> int:
    """Position of the highest set bit."""
    n = 0
    for shift in (32, 16, 8, 4, 2, 1):
        if bits >> _U(shift):
            bits >>= _U(shift)
            n += shift
    return n


@numba.njit(cache=True, nogil=True)
def _largest(words: np.ndarray, summary: np.ndarray, limit: int) -> int:
    """The largest member of a set of integers that is at most `limit`, or -1. `summary` has a bit per non-zero word."""
    w = limit >> 6
    bits = words[w] & (_ALL >> _U(63 - (limit & 63)))
    if bits:
        return (w << 6) + _highest(bits)
    v = w >> 6
    bits = summary[v] & ((_ONE << _U(w & 63)) - _ONE)
    while not bits:
        v -= 1
        if v < 0:
            return -1
        bits = summary[v]
    w = (v << 6) + _highest(bits)
    return (w << 6) + _highest(words[w])


@numba.njit(cache=True, nogil=True)
def best_fit(
    tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int, max_count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pack N sequences: order int32 [N] and offsets int64 [B+1]; pack b holds sequences order[offsets[b]:offsets[b+1]].

    tokens int32 [N] in 1 … T, images int32 [N] in 0 … I. Deterministic. Every choice looks at one candidate per image
    count, so the cost is O(N·I). The fullest sequence opens a pack; then always the one that leaves least room, and
    the room it leaves in the proportion T : I.
    """
    num = len(tokens)
    num_words = (max_tokens >> 6) + 1
    words = np.zeros((max_images + 1, num_words), np.uint64)
    summary = np.zeros((max_images + 1, (num_words >> 6) + 1), np.uint64)
    head = np.full((max_images + 1, max_tokens + 1), -1, np.int32)
    following = np.empty(num, np.int32)
    for i in range(num - 1, -1, -1):
        m, t = images[i], tokens[i]
        following[i] = head[m, t]
        head[m, t] = i
        words[m, t >> 6] |= _ONE << _U(t & 63)
        summary[m, t >> 12] |= _ONE << _U((t >> 6) & 63)

    order = np.empty(num, np.int32)
    offsets = np.empty(num + 1, np.int64)
    offsets[0] = 0
    count, packs = 0, 0
    while count < num:
        room, slots, places = max_tokens, max_images, max_count
        while places > 0:
            best_m, best_t, best_cost = -1, -1, np.inf
            for m in range(min(slots, max_images) + 1):
                t = _largest(words[m], summary[m], room)
                if t < 0:
                    continue
                left, free = (room - t) / max_tokens, (slots - m) / max_images
                cost = left + free + 2 * abs(left - free)
                if cost < best_cost:
                    best_m, best_t, best_cost = m, t, cost
            if best_m < 0:
                break
            m, t = best_m, best_t
            i = head[m, t]
            head[m, t] = following[i]
            if following[i] < 0:
                words[m, t >> 6] &= ~(_ONE << _U(t & 63))
                if not words[m, t >> 6]:
                    summary[m, t >> 12] &= ~(_ONE << _U((t >> 6) & 63))
            order[count] = i
            count += 1
            room, slots, places = room - t, slots - m, places - 1
        packs += 1
        offsets[packs] = count
    return order, offsets[: packs + 1].copy()


@numba.njit(cache=True, nogil=True)
def next_fit(tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int, max_count: int) -> np.ndarray:
    """Pack N sequences in their order: offsets int64 [B+1]."""
    offsets = np.zeros(len(tokens) + 1, np.int64)
    packs, room, slots, places = 0, 0, 0, 0
    for i in range(len(tokens)):
        if tokens[i] > room or images[i] > slots or places == 0:
            offsets[packs] = i
            packs, room, slots, places = packs + 1, max_tokens, max_images, max_count
        room, slots, places = room - tokens[i], slots - images[i], places - 1
    offsets[packs] = len(tokens)
    return offsets[: packs + 1].copy()
