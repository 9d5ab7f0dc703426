"""Putting sequences into packs of T tokens and I images, and drawing documents from a blend. Compiled, no files here.

Shape legend: N sequences, B packs, C corpora, T token slots, I image slots, S sequences a pack may hold.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from megatron_lcl.compiled import compiled

_U = np.uint64
_ONE, _ALL = _U(1), _U(0xFFFFFFFFFFFFFFFF)
_CANDIDATES, _REACH = 12, 512  # of `best_fit`: sequences tried, and how far to look for them


def max_sequences(tokens_per_pack: int, captions: bool = False) -> int:
    """S: how many sequences a pack of T tokens may hold, so that lists of their starts have a fixed length.

    captions: how many pairs, each of which is two sequences.
    """
    return max(1, tokens_per_pack // (32 if captions else 16))


def choose_images_per_pack(
    images_per_token: float, tokens_per_pack: int, sequences_per_token: float = 0.0, captions: bool = False
) -> int:
    """I such that tokens and images fill up together as well as an integer allows: the fuller of the two neighbors.

    With r images to T tokens in the corpus, I >= r leaves image slots empty (r/I used), I < r token slots (I/r used).
    Where S sequences of the mean length are fewer than T tokens, r is of as many tokens as they have.
    captions: see `max_sequences`.
    """
    tokens = float(tokens_per_pack)
    if sequences_per_token > 0:
        tokens = min(tokens, max_sequences(tokens_per_pack, captions) / sequences_per_token)
    wanted = images_per_token * tokens
    low = max(1, math.floor(wanted))
    return low if low >= wanted or low / wanted >= wanted / (low + 1) else low + 1


@compiled
def blend(tokens: np.ndarray, starts: np.ndarray, weights: np.ndarray, served: np.ndarray) -> np.ndarray:
    """From which corpus each next document comes, int32, until one corpus's list is at its end.

    tokens: the corpora's next documents' tokens, one list after the other, that of corpus c at starts[c]:starts[c+1].
    weights float64 [C] sum to 1; served float64 [C], tokens taken so far, is brought up to date.

    WF2Q (Bennett & Zhang, "WF²Q: worst-case fair weighted fair queueing", 1996): among the corpora not ahead of their
    share, the one whose next document would be due first. At every prefix each corpus is within one document of it.
    """
    out = np.empty(starts[-1], np.int32)
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


@compiled
def _highest(bits: Any) -> int:
    """Position of the highest set bit."""
    n = 0
    for shift in (32, 16, 8, 4, 2, 1):
        if bits >> _U(shift):
            bits >>= _U(shift)
            n += shift
    return n


@compiled
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


@compiled
def _take(stock: Any, m: int, t: int) -> None:
    """Take one sequence of m images and t tokens out of the stock."""
    words, summary, count = stock
    count[m, t] -= 1
    if count[m, t] == 0:
        words[m, t >> 6] &= ~(_ONE << _U(t & 63))
        if not words[m, t >> 6]:
            summary[m, t >> 12] &= ~(_ONE << _U((t >> 6) & 63))


@compiled
def _give(stock: Any, m: int, t: int) -> None:
    """Put one back."""
    words, summary, count = stock
    count[m, t] += 1
    words[m, t >> 6] |= _ONE << _U(t & 63)
    summary[m, t >> 12] |= _ONE << _U((t >> 6) & 63)


@compiled
def _best_last(stock: Any, room: int, slots: int, price_t: float, price_m: float) -> tuple[float, int, int]:
    """The sequence that wastes least of `room` tokens and `slots` images: (cost of the waste, images, tokens or -1)."""
    words, summary, _ = stock
    best, best_m, best_t = room * price_t + slots * price_m, 0, -1
    for m in range(min(slots + 1, len(words))):
        t = _largest(words[m], summary[m], room)
        if t >= 0 and (room - t) * price_t + (slots - m) * price_m < best:
            best, best_m, best_t = (room - t) * price_t + (slots - m) * price_m, m, t
    return best, best_m, best_t


@compiled
def _large(tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int, max_count: int) -> np.ndarray:
    """Which sequences begin packs of their own, bool [N]: those over half a pack or twice the mean, whichever is less.

    No two of the former share a pack, and beside a long one the images have to be chosen. No more than there are packs,
    the longest.
    """
    packs = max(tokens.sum() / max_tokens, images.sum() / max_images, len(tokens) / max_count)
    of_length = np.bincount(tokens, minlength=max_tokens + 1)
    longest, found = max_tokens, 0
    least = min(max_tokens / 2, 2 * tokens.mean())
    while longest > least and found + of_length[longest] <= packs:
        found += of_length[longest]
        longest -= 1
    return tokens > longest


@compiled
def best_fit(
    tokens: np.ndarray, images: np.ndarray, max_tokens: int, max_images: int, max_count: int, spread: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Pack N sequences: order int32 [N] and offsets int64 [B+1]; pack b holds sequences order[offsets[b]:offsets[b+1]].

    tokens int32 [N] in 1 … T, images int32 [N] in 0 … I. Deterministic, O(N·I). spread: see below; False: as versions
    1 and 2 packed (`source.VERSION`).

    Minimum bin slack (Gupta & Ho, "A new heuristic algorithm for the one-dimensional bin-packing problem", 1999) for
    two constraints: a pack takes sequences as they come until a few more will fill it; the last three are searched, the
    third among all that are left. Large ones (`_large`) begin packs, evenly spread over them. Of the others there are
    two kinds, those with more images to a token than all of these have and those with fewer, and a pack takes the next
    one of the kind that brings what it lacks nearer to their mixture. So none is passed over for long, each pack can be
    full of both, and a stock of about the same mixture is left to the end. Without `spread` one that spoils the
    proportion of what a pack lacks is passed over: long texts with few images gather in front, until packs are full of
    nothing else.
    """
    num = len(tokens)
    num_words = (max_tokens >> 6) + 1
    words = np.zeros((max_images + 1, num_words), np.uint64)
    summary = np.zeros((max_images + 1, (num_words >> 6) + 1), np.uint64)
    stock = words, summary, np.zeros((max_images + 1, max_tokens + 1), np.int32)
    head = np.full((max_images + 1, max_tokens + 1), -1, np.int32)
    following = np.empty(num, np.int32)
    used = np.zeros(num, np.bool_)  # and the large ones, which are taken in a way of their own
    if spread and num:
        used = _large(tokens, images, max_tokens, max_images, max_count)
    large = np.flatnonzero(used)
    tokens_left, images_left = 0, 0
    for i in range(num - 1, -1, -1):
        if not used[i]:
            m, t = images[i], tokens[i]
            following[i] = head[m, t]
            head[m, t] = i
            _give(stock, m, t)
            tokens_left += t
            images_left += m
    mean, mixture = tokens_left / max(1, num - len(large)), images_left / max(1, tokens_left)
    tokens_left += tokens[large].sum()
    images_left += images[large].sum()
    total = tokens_left

    order = np.empty(num, np.int32)
    offsets = np.zeros(num + 1, np.int64)
    chosen = np.empty((max_count + 1, 2), np.int32)  # images and tokens of the pack's sequences
    candidates = np.empty(_CANDIDATES, np.int32)
    upcoming = np.empty(2, np.int64)  # of the two kinds
    count, packs, oldest, begun = 0, 0, 0, 0
    while count < num:
        room, slots, places = max_tokens, max_images, 0
        load_t, load_m = tokens_left / max_tokens, images_left / max_images  # packs that each would fill
        load = max(load_t, load_m)
        scarce_images = load_m > load_t
        good = 0.0005 + 0.5 * (1 - min(load_t, load_m) / load)  # waste that need not be improved on
        price_t = (1.0 if scarce_images else 3.0) / max_tokens
        price_m = (3.0 if scarce_images else 1.0) / max_images
        while oldest < num and used[oldest]:
            oldest += 1
        stop = min(num, oldest + _REACH)
        begin = 0
        if begun < len(large) and (oldest == num or begun * total <= len(large) * (total - tokens_left)):
            i = large[begun]
            order[count] = i
            count, begun, begin, places = count + 1, begun + 1, 1, 1
            room, slots = room - tokens[i], slots - images[i]
        # as they come
        upcoming[0], upcoming[1] = oldest, oldest if spread else stop
        lacks = images_left / load - mixture * tokens_left / load  # images, beside those that its tokens bring along
        while places < max_count and (places == 0 or room >= 3.2 * mean):
            kind = int(spread and lacks - (max_images - slots) + mixture * (max_tokens - room) > 0)
            if upcoming[kind] == stop:
                kind = 1 - kind
            j = upcoming[kind]
            if j == stop:
                break
            upcoming[kind] += 1
            m, t = images[j], tokens[j]
            fits = not used[j] and stock[2][m, t] > 0 and m <= slots and t + 1.6 * mean <= room
            if spread:
                suits = (m > t * mixture) == (kind == 1)
            else:
                suits = abs((slots - m) - (room - t) * images_left / tokens_left) <= 2.0
            if (fits and suits) or places == 0:
                _take(stock, m, t)
                chosen[places, 0], chosen[places, 1] = m, t
                room, slots, places = room - t, slots - m, places + 1
        # the last three
        found = 0
        j = oldest
        while j < stop and found < _CANDIDATES:
            if not used[j] and tokens[j] <= room and images[j] <= slots:
                candidates[found] = j
                found += 1
            j += 1
        last = _best_last(stock, room, slots, price_t, price_m)
        best, first, second = last[0], -1, -1
        for x in range(found if places + 2 <= max_count else 0):
            if best <= good:
                break
            m1, t1 = images[candidates[x]], tokens[candidates[x]]
            if stock[2][m1, t1] == 0:
                continue
            _take(stock, m1, t1)
            trial = _best_last(stock, room - t1, slots - m1, price_t, price_m)
            if trial[0] < best:
                best, first, second, last = trial[0], x, -1, trial
            for y in range(x if places + 3 <= max_count else 0):
                if best <= good:
                    break
                m2, t2 = images[candidates[y]], tokens[candidates[y]]
                if t1 + t2 > room or m1 + m2 > slots or stock[2][m2, t2] == 0:
                    continue
                _take(stock, m2, t2)
                trial = _best_last(stock, room - t1 - t2, slots - m1 - m2, price_t, price_m)
                if trial[0] < best:
                    best, first, second, last = trial[0], x, y, trial
                _give(stock, m2, t2)
            _give(stock, m1, t1)
        for x in (first, second):
            if x >= 0:
                m, t = images[candidates[x]], tokens[candidates[x]]
                _take(stock, m, t)
                chosen[places, 0], chosen[places, 1] = m, t
                room, slots, places = room - t, slots - m, places + 1
        # and what still fits
        while places < max_count and last[2] >= 0:
            m, t = last[1], last[2]
            _take(stock, m, t)
            chosen[places, 0], chosen[places, 1] = m, t
            room, slots, places = room - t, slots - m, places + 1
            last = _best_last(stock, room, slots, price_t, price_m)
        if begin:
            tokens_left -= tokens[order[count - 1]]
            images_left -= images[order[count - 1]]
        for k in range(begin, places):
            m, t = chosen[k, 0], chosen[k, 1]
            i = head[m, t]
            head[m, t] = following[i]
            order[count] = i
            used[i] = True
            count += 1
            tokens_left -= t
            images_left -= m
        packs += 1
        offsets[packs] = count
    return order, offsets[: packs + 1].copy()


@compiled
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
