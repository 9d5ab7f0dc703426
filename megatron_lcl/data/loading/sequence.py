"""Document → token sequences: which images stay, where they stand, where a long document is cut.

Everything random here is a hash of (seed, corpus, epoch, document), so that any process computes the same sequences.

Shape legend: K pieces of a document in stored order, M of them images ("placements"), N rows of its arrangement.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_lcl.compiled import compiled
from megatron_lcl.data.loading.hashes import mix, uniform
from megatron_lcl.data.loading.rules import Rules

SEQUENCE, PIECE, START, STOP = range(4)
"""columns of an arrangement's rows; STOP = IMAGE_ROW marks an image"""
IMAGE_ROW = -1
END = (1 << 31) - 1
"""behind the last position of any document"""
_PLACE, _TEXT = 1 << 32, 1 << 33
"""what is drawn of a document beside its selection: at _PLACE + j where image j stands, at _TEXT which of its texts"""


# --- selection ----------------------------------------------------------------------------------------------------


@compiled
def select(similarity: np.ndarray, matched: np.ndarray, key: Any, rules: Rules) -> np.ndarray:
    """Which of M placements stay, bool [M]; the number that stays does not depend on `key`.

    Documents that are not matched keep all. Otherwise, in the reference's order: similarity at least `min_similarity`;
    per text segment `images_per_segment` drawn at random; of those the first `images_per_document` by segment, then by
    position. Without a similarity an image passes; one of no segment (-1) is not drawn, and comes first.
    """
    num = len(matched)
    keep = np.ones(num, np.bool_)
    if not rules.selects:
        return keep
    for j in range(num):
        keep[j] = not similarity[j] < rules.min_similarity
    by_segment = np.argsort(matched, kind="mergesort")  # which is stable: in a segment they are by position
    by_segment = by_segment[keep[by_segment]]
    start, left = 0, rules.images_per_document
    while start < len(by_segment):
        segment, stop = matched[by_segment[start]], start + 1
        while stop < len(by_segment) and matched[by_segment[stop]] == segment:
            stop += 1
        if segment >= 0 and stop - start > rules.images_per_segment:
            draw = np.empty(stop - start, np.uint64)
            for i in range(start, stop):
                draw[i - start] = mix(key, by_segment[i])
            for i in np.argsort(draw, kind="mergesort")[rules.images_per_segment :]:
                keep[by_segment[start + i]] = False
        for i in range(start, stop):
            j = by_segment[i]
            keep[j] = keep[j] and left > 0
            left -= keep[j]
        start = stop
    return keep


@compiled
def measure(
    lengths: np.ndarray,
    modes: np.ndarray,
    offsets: np.ndarray,
    similarity: np.ndarray,
    matched: np.ndarray,
    rules: Rules,
    tokens: np.ndarray,
    images: np.ndarray,
    placements: np.ndarray,
) -> int:
    """Fill, for each document of a shard: token slots (0: skipped), images kept, first placement.

    tokens, images int32 [documents], placements int64 [documents]. Token slots are those of the document as one
    sequence; with P = 0, of all its pairs together; where texts are alternatives, with one of their mean length; at
    most END.
    Returns how many of the images kept may have a text before them.
    """
    placement, pairs = 0, 0
    for d in range(len(tokens)):
        first, text, num_texts = placement, 0, 0
        for k in range(offsets[d], offsets[d + 1]):
            if modes[k] == 0:
                text += lengths[k]
                num_texts += 1
            else:
                placement += 1
        if rules.alternatives and num_texts > 0:  # which of them is drawn anew each epoch: their mean length
            text = -(-text // num_texts)
        keep = select(similarity[first:placement], matched[first:placement], 0, rules)
        num = 0
        for j in range(len(keep)):
            num += keep[j]
        placements[d], images[d] = first, num
        if rules.num_patches == 0 and rules.alternatives:
            images[d] = num if num_texts > 0 else 0
            size = images[d] * _pair_tokens(min(text, rules.max_tokens - 2), rules)
        elif rules.num_patches == 0:
            a, b = offsets[d], offsets[d + 1]
            rows = _pairs(lengths[a:b], modes[a:b], matched[first:placement], keep, num_texts, -1, rules)
            size, images[d] = 0, len(rows) // 2
            for r in range(0, len(rows), 2):
                size += _pair_tokens(rows[r, 3] - rows[r, 2], rules)
        elif rules.reference_pairs and num == 1 and (offsets[d + 1] - offsets[d] == 2 or rules.alternatives):
            size = text + rules.num_patches + 3
        else:
            size = text + num * (rules.num_patches + 2) + 2
        tokens[d] = min(size, END)
        if (rules.selects and num < rules.min_images) or (text == 0 and num == 0):
            tokens[d] = images[d] = 0
        elif rules.num_patches == 0:
            pairs += images[d]
        else:
            pairs += _num_preceded(modes[offsets[d] : offsets[d + 1]], matched[first:placement], keep, rules)
    return pairs


@compiled
def _num_preceded(modes: np.ndarray, matched: np.ndarray, keep: np.ndarray, rules: Rules) -> int:
    """How many of a document's kept images may stand behind a text, in whatever way `arrange` places them."""
    num_texts = len(modes) - len(matched)
    count, texts, placement = 0, 0, 0
    for k in range(len(modes)):
        if modes[k] == 0:
            texts += 1
            continue
        j = placement
        placement += 1
        segment = 0 if rules.alternatives or (rules.pairs and num_texts == 1) else matched[j]
        before = segment + (rules.image_first < 1) if 0 <= segment < num_texts else texts
        count += keep[j] and before > 0
    return count


# --- arrangement -------------------------------------------------------------------------------------------------


@compiled
def arrange(
    lengths: np.ndarray,
    modes: np.ndarray,
    similarity: np.ndarray,
    matched: np.ndarray,
    key: Any,
    rules: Rules,
    begin: int = 0,
    until: int = END,
    text: int = -1,
) -> np.ndarray:
    """The sequences of one document: int32 [N, 4], rows (sequence, piece, start, stop) in order.

    Text rows hold tokens start … stop-1 of the piece; image rows have stop = IMAGE_ROW. Special tokens are implied:
    see `has_ends`.

    lengths int32 [K], modes int8 [K]; similarity float32 [M], matched int32 [M].
    A matched image (or that of a pair) stands before its segment with probability `image_first`, else after it; other
    images and all texts stand in stored order. Of texts that are alternatives number `text` is read; -1: one is drawn.
    A document over `max_tokens` or `max_images` is cut between segments, a segment and its images staying together
    where they fit one sequence; a text is cut only if it is itself too long, or (`cut_beside_images`) has images, in
    its segment, that are too many or too large for one sequence with it, or (`carry_text`) for an image after it that
    would begin a sequence.

    begin, until: of its positions in that order only these, cut as if they were all. Each token of a text and each
    image is one, with P = 0 each pair; so positions do not depend on how long a sequence may be.
    """
    keep = select(similarity, matched, key, rules)
    num_texts = 0
    for k in range(len(modes)):
        num_texts += modes[k] == 0
    drawn = -1
    if rules.alternatives:
        drawn = text if text >= 0 else int(uniform(key, _TEXT) * num_texts)
    if rules.num_patches == 0:
        rows = _pairs(lengths, modes, matched, keep, num_texts, drawn, rules)[2 * begin : 2 * until].copy()
        for r in range(len(rows)):  # of arrays, numba would compile an error text, too: a second longer
            rows[r, SEQUENCE] -= begin
        return rows
    matches = matched.copy()
    if rules.pairs and num_texts == 1:
        matches[:] = 0
    if drawn >= 0:
        matches[:] = drawn

    # order: (piece, unit), a unit being a segment with its images
    order = np.empty((len(modes), 2), np.int32)
    image_pieces = np.empty(len(matched), np.int32)
    placement = 0
    for k in range(len(modes)):
        if modes[k] == 1:
            image_pieces[placement] = k
            placement += 1
    first, following = np.full(num_texts, -1), np.empty(len(matched), np.int64)  # images of each text
    for j in range(len(matched) - 1, -1, -1):
        if keep[j] and 0 <= matches[j] < num_texts:
            following[j], first[matches[j]] = first[matches[j]], j
    count, passed, placement = 0, 0, 0
    for k in range(len(modes)):
        if modes[k] == 1:
            if keep[placement] and not 0 <= matches[placement] < num_texts:
                order[count, 0], order[count, 1] = k, k
                count += 1
            placement += 1
            continue
        if drawn >= 0 and passed != drawn:
            passed += 1
            continue
        for before in (True, False):
            j = first[passed]
            while j >= 0:
                if (uniform(key, _PLACE + j) < rules.image_first) == before:
                    order[count, 0], order[count, 1] = image_pieces[j], k
                    count += 1
                j = following[j]
            if before:
                order[count, 0], order[count, 1] = k, k
                count += 1
        passed += 1
    # what is in the range of each
    parts, position, num = np.empty((count, 4), np.int32), 0, 0
    for i in range(count):
        piece = order[i, 0]
        length = lengths[piece] if modes[piece] == 0 else 1
        start, stop = max(0, begin - position), min(length, until - position)
        position += length
        if start < stop:
            num = _put(parts, num, order[i, 1], piece, start, stop)
    return _cut(modes, parts[:num], rules)


@compiled
def in_turn(key: Any, num_texts: int, epoch: int) -> int:
    """Which of a document's alternative texts an epoch reads; -1 where there is none.

    In each round of num_texts epochs every text once, in an order drawn from the key, which is the document's in all
    epochs, and the round's number.
    """
    if num_texts == 0:
        return -1
    of_round = mix(key, epoch // num_texts)
    draw = np.empty(num_texts, np.uint64)
    for t in range(num_texts):
        draw[t] = mix(of_round, t)
    return np.argsort(draw, kind="mergesort")[epoch % num_texts]


@compiled
def texts_in_turn(keys: np.ndarray, modes: np.ndarray, offsets: np.ndarray, epoch: int) -> np.ndarray:
    """`in_turn` of each of some documents, int64 [documents], from the modes of their pieces and where those begin."""
    out = np.empty(len(keys), np.int64)
    for i in range(len(keys)):
        num_texts = 0
        for k in range(offsets[i], offsets[i + 1]):
            num_texts += modes[k] == 0
        out[i] = in_turn(keys[i], num_texts, epoch)
    return out


@compiled
def _put(rows: np.ndarray, count: int, sequence: int, piece: Any, start: int, stop: int) -> int:
    rows[count, 0], rows[count, 1], rows[count, 2], rows[count, 3] = sequence, piece, start, stop
    return count + 1


@compiled
def _cut(modes: np.ndarray, order: np.ndarray, rules: Rules) -> np.ndarray:
    """order: rows (unit, piece, start, stop), not empty ones, as they stand; an image has one position."""
    one_ended = rules.reference_pairs and len(order) == 2 and modes[order[0, 1]] != modes[order[1, 1]]
    one_ended = one_ended and (len(modes) == 2 or rules.alternatives)
    capacity = rules.max_tokens - 2
    image_tokens = rules.num_patches + 2
    total = 0
    for i in range(len(order)):
        total += order[i, 3] - order[i, 2] if modes[order[i, 1]] == 0 else image_tokens
    if one_ended and total <= capacity + 1:
        capacity += 1
    rows = np.empty((len(order) + total // capacity + 1 + len(order), 4), np.int32)
    count, sequence, room, slots, i = 0, 0, capacity, rules.max_images, 0
    for i in range(len(order)):
        unit, piece = order[i, 0], order[i, 1]
        if i == 0 or order[i - 1, 0] != unit:  # keep a segment and its images together if one sequence can hold them
            tokens, images, end = 0, 0, i
            while end < len(order) and order[end, 0] == unit:
                if modes[order[end, 1]] == 0:
                    tokens += order[end, 3] - order[end, 2]
                else:
                    tokens += image_tokens
                    images += 1
                end += 1
            fits = tokens <= capacity and images <= rules.max_images
            too_long = tokens > capacity and rules.cut_beside_images
            if (too_long and modes[piece] == 1 and room < capacity) or (fits and (tokens > room or images > slots)):
                sequence, room, slots = sequence + 1, capacity, rules.max_images
        if modes[piece] == 1:
            if image_tokens > room or slots == 0:
                sequence, room, slots = sequence + 1, capacity, rules.max_images
            if rules.carry_text and count > 0 and rows[count - 1, 0] != sequence and rows[count - 1, 3] != IMAGE_ROW:
                text, stop = rows[count - 1, 1], rows[count - 1, 3]
                start = max(rows[count - 1, 2], stop - (capacity - image_tokens))
                if start == rows[count - 1, 2]:  # all of it
                    count -= 1
                    if count == 0 or rows[count - 1, 0] != sequence - 1:  # it stood alone: there is no cut
                        sequence -= 1
                else:
                    rows[count - 1, 3] = start
                count = _put(rows, count, sequence, text, start, stop)
                room -= stop - start
            count = _put(rows, count, sequence, piece, 0, IMAGE_ROW)
            room, slots = room - image_tokens, slots - 1
            continue
        start, last = order[i, 2], order[i, 3]
        behind_image = rules.cut_beside_images and _is_image_of(unit, i - 1, order, modes)
        cut = last
        if rules.cut_beside_images and _is_image_of(unit, i + 1, order, modes):
            if last - start + image_tokens > room or slots == 0:  # the image begins a sequence, behind what fits there
                cut = max(start, last - (capacity - image_tokens))
                if behind_image:  # half of it, as far as that fits, stays with the image before
                    cut = max(cut, start + min(room, (last - start) // 2))
        elif not behind_image and last - start > room and last - start <= capacity:
            cut = start
        while start < last:
            if room == 0 or start == cut:
                sequence, room, slots = sequence + 1, capacity, rules.max_images
            stop = min(last if start >= cut else cut, start + room)
            count = _put(rows, count, sequence, piece, start, stop)
            room, start = room - (stop - start), stop
    return rows[:count].copy()


@compiled
def _is_image_of(unit: Any, i: int, order: np.ndarray, modes: np.ndarray) -> bool:
    """Whether row i of an order is there, an image, and of this unit."""
    return 0 <= i < len(order) and order[i, 0] == unit and modes[order[i, 1]] == 1


@compiled
def _pairs(
    lengths: np.ndarray,
    modes: np.ndarray,
    matched: np.ndarray,
    keep: np.ndarray,
    num_texts: int,
    drawn: int,
    rules: Rules,
) -> np.ndarray:
    """A sequence per kept image, cut to fit: with text number `drawn`; where that is -1, with its matched segment, else
    the nearest text (the earlier of two). Of a text too long its first tokens stay, but (`last_of_text`) the last ones
    where it stands before the image."""
    rows = np.empty((2 * len(matched), 4), np.int32)
    texts = np.empty(num_texts, np.int32)
    count = 0
    for k in range(len(modes)):
        if modes[k] == 0:
            texts[count] = k
            count += 1
    count, sequence, placement = 0, 0, 0
    before, following = -1, 0  # the last text before the image, and which of the texts is next: not empty ones
    for k in range(len(modes)):
        if modes[k] == 0:
            before = k if lengths[k] > 0 else before
            continue
        while following < num_texts and (texts[following] < k or lengths[texts[following]] == 0):
            following += 1
        j, best = placement, np.int32(-1)
        placement += 1
        if not keep[j]:
            continue
        if 0 <= drawn < num_texts:
            best = texts[drawn]
        elif 0 <= matched[j] < num_texts and lengths[texts[matched[j]]] > 0:
            best = texts[matched[j]]
        else:
            best = np.int32(before)
            if following < num_texts and (before < 0 or texts[following] - k < k - before):
                best = texts[following]
        if best >= 0:
            kept = min(lengths[best], rules.max_tokens - 2)
            start = lengths[best] - kept if rules.last_of_text and best < k else 0
            count = _put(rows, count, sequence, best, start, start + kept)
            count = _put(rows, count, sequence, k, 0, IMAGE_ROW)
            sequence += 1
    return rows[:count].copy()


@compiled
def _pair_tokens(text: int, rules: Rules) -> int:
    """Token slots of a pair with so many tokens of text: `<sot> text <soi>`, and its caption, if it has one."""
    alone = 0 if rules.captions_alone else text + 2
    return alone + (text + rules.caption_patches + 4 if rules.caption_patches > 0 else 0)


@compiled
def has_ends(rows: np.ndarray, modes: np.ndarray, rules: Rules) -> tuple[bool, bool]:
    """Whether the sequences of an arrangement begin with `<sot>` and end with `<eot>`.

    Always both, but for the reference's pairs: `<soi>… <eoi> text <eot>` or `<sot> text <soi>… <eoi>`. (Where
    pairs are sequences of their own, one is `<sot> text <soi>`, as the model encodes a lone text; a caption has both.)
    """
    if rules.num_patches == 0:
        return True, False
    if rules.reference_pairs and (len(modes) == 2 or rules.alternatives) and len(rows) == 2 and rows[1, 0] == 0:
        image_last, image_first = rows[1, 3] == IMAGE_ROW, rows[0, 3] == IMAGE_ROW
        if image_last != image_first:
            return image_last, image_first
    return True, True


@compiled
def arranged_sizes(
    lengths: np.ndarray,
    modes: np.ndarray,
    offsets: np.ndarray,
    similarity: np.ndarray,
    matched: np.ndarray,
    placements: np.ndarray,
    documents: np.ndarray,
    keys: np.ndarray,
    ranges: np.ndarray,
    rules: Rules,
    texts: np.ndarray,
) -> np.ndarray:
    """Sizes of the sequences of some documents of a shard, int32 [N, 3]: rows (i, tokens, images) for documents[i].

    ranges: int64 [documents, 2], of each the positions that `arrange` takes as begin and until; texts: int64
    [documents], of each its text (`arrange`).
    """
    out = np.empty((max(16, 2 * len(documents)), 3), np.int32)
    count = 0
    for i in range(len(documents)):
        d = documents[i]
        a, b, first = offsets[d], offsets[d + 1], placements[d]
        last = first
        for k in range(a, b):
            last += modes[k] == 1
        rows = arrange(
            lengths[a:b],
            modes[a:b],
            similarity[first:last],
            matched[first:last],
            keys[i],
            rules,
            ranges[i, 0],
            ranges[i, 1],
            texts[i],
        )
        begins, ends = has_ends(rows, modes[a:b], rules)
        previous, text = -1, 0
        for r in range(len(rows)):
            if rows[r, 0] != previous:
                previous = rows[r, 0]
                if count == len(out):
                    larger = np.empty((2 * count, 3), np.int32)
                    for j in range(count):
                        larger[j, 0], larger[j, 1], larger[j, 2] = out[j, 0], out[j, 1], out[j, 2]
                    out = larger
                out[count, 0], out[count, 1], out[count, 2] = i, begins + ends, 0
                count += 1
            if rows[r, 3] != IMAGE_ROW:
                text = rows[r, 3] - rows[r, 2]
                out[count - 1, 1] += text
                continue
            out[count - 1, 2] += 1
            if rules.num_patches > 0:
                out[count - 1, 1] += rules.num_patches + 2
            else:  # the pair's text is in the row before
                out[count - 1, 1] = _pair_tokens(text, rules)
    return out[:count].copy()
