"""Selection, placement, splitting and the token sequence, against the rules written out a second time."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lcl.config import Data
from megatron_lcl.data.loading.hashes import mix, shuffled, uniform
from megatron_lcl.data.loading.rules import Rules, rules_for
from megatron_lcl.data.loading.sequence import (
    END,
    IMAGE_ROW,
    _pairs,
    arrange,
    arranged_sizes,
    has_ends,
    measure,
    select,
)

NATURAL = Rules(4, 32, 2, False, 0.24, 1, 6, 1, 0.5, False, False, False)


@st.composite
def documents(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    modes = np.array(draw(st.lists(st.integers(0, 1), min_size=1, max_size=12)), np.int8)
    lengths = np.array([1 if m else draw(st.integers(0, 70)) for m in modes], np.int32)
    num_images, num_texts = int(modes.sum()), int((modes == 0).sum())
    similarity = np.array([draw(st.sampled_from([np.nan, 0.2, 0.25, 0.3])) for _ in range(num_images)], np.float32)
    matched = np.array([draw(st.integers(-1, num_texts - 1)) for _ in range(num_images)], np.int32)
    return lengths, modes, similarity, matched


rules_of = st.builds(
    lambda selects, first, images, per_segment, pairs, reference, carry, beside: NATURAL._replace(
        selects=selects,
        image_first=first,
        max_images=images,
        images_per_segment=per_segment,
        pairs=pairs,
        reference_pairs=pairs and reference,
        carry_text=carry,
        cut_beside_images=beside and not carry,
    ),
    st.booleans(),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([np.nan, 0.2, 0.25, 0.3]), st.integers(-1, 4)), max_size=14),
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(0, 2**63),
)
def test_selection_is_by_rank_among_those_that_passed(
    placements: list[tuple[float, int]], per_segment: int, per_document: int, seed: int
) -> None:
    rules = NATURAL._replace(selects=True, images_per_segment=per_segment, images_per_document=per_document)
    key = np.uint64(seed)
    similarity = np.array([similarity for similarity, _ in placements], np.float32)
    matched = np.array([segment for _, segment in placements], np.int32)
    passed = [j for j in range(len(placements)) if not similarity[j] < rules.min_similarity]
    drawn = [
        j
        for j in passed
        if matched[j] < 0
        or sum(matched[k] == matched[j] and (mix(key, k), k) < (mix(key, j), j) for k in passed) < per_segment
    ]
    stays = [j for j in drawn if sum((matched[k], k) < (matched[j], j) for k in drawn) < per_document]
    assert np.flatnonzero(select(similarity, matched, key, rules)).tolist() == stays


def test_selection_of_many_images_takes_no_time() -> None:
    """Were each compared with all others, of 60,000 images it would take 5 seconds."""
    rules = NATURAL._replace(selects=True)
    arrays = np.ones(60_000, np.float32), np.arange(60_000, dtype=np.int32)
    select(arrays[0][:1], arrays[1][:1], np.uint64(1), rules)  # compiles
    began = time.thread_time()
    assert select(*arrays, np.uint64(1), rules).sum() == rules.images_per_document
    assert time.thread_time() - began < 1


@settings(max_examples=300)
@given(documents(), rules_of, st.integers(0, 2**63))
def test_every_token_and_selected_image_stands_in_exactly_one_place(document, rules, seed) -> None:  # type: ignore[no-untyped-def]
    lengths, modes, similarity, matched = document
    key = np.uint64(seed)
    rows = arrange(lengths, modes, similarity, matched, key, rules)
    places: Counter[tuple[int, int]] = Counter()
    for _, piece, start, stop in rows:
        places.update([(piece, -1)] if stop == IMAGE_ROW else [(piece, t) for t in range(start, stop)])
    keep = select(similarity, matched, key, rules)
    expected = {(int(k), -1) for k, kept in zip(np.flatnonzero(modes), keep, strict=True) if kept}
    expected |= {(k, t) for k in range(len(modes)) if modes[k] == 0 for t in range(lengths[k])}
    assert places == Counter(dict.fromkeys(expected, 1))

    # texts in order, no sequence over its limits, sizes as the packer is told
    texts = [(p, s) for _, p, s, e in rows if e != IMAGE_ROW]
    assert texts == sorted(texts)
    assert list(dict.fromkeys(rows[:, 0])) == list(range(len(set(rows[:, 0]))))
    begins, ends = has_ends(rows, modes, rules)
    sizes = []
    for sequence in np.unique(rows[:, 0]):
        mine = rows[rows[:, 0] == sequence]
        images = int((mine[:, 3] == IMAGE_ROW).sum())
        tokens = int((mine[:, 3] - mine[:, 2])[mine[:, 3] != IMAGE_ROW].sum()) + images * 6 + begins + ends
        assert tokens <= rules.max_tokens
        assert images <= rules.max_images
        sizes.append([0, tokens, images])
    offsets, zero = np.array([0, len(modes)], np.int64), np.zeros(1, np.int64)
    arrays = lengths, modes, offsets, similarity, matched, zero, zero, np.array([key], np.uint64)
    told = arranged_sizes(*arrays, np.array([[0, END]]), rules, np.array([-1]))
    assert told.tolist() == sizes


@settings(max_examples=200)
@given(documents(), rules_of, st.integers(0, 2**63), st.data())
def test_ranges_of_positions_make_up_the_document_however_each_is_cut(document, rules, seed, data) -> None:  # type: ignore[no-untyped-def]
    """So what one phase leaves of a document another one, with longer or shorter sequences, can go on with."""
    rules, key = rules._replace(carry_text=False), np.uint64(seed)
    whole = content_of(arrange(*document, key, rules))
    bounds = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=3))})
    found = []
    for begin, until in itertools.pairwise(bounds):
        other = rules._replace(
            max_tokens=data.draw(st.integers(9, 40)), max_images=data.draw(st.integers(1, 3)), num_patches=2
        )
        rows = arrange(*document, key, other, begin, until)
        found += content_of(rows)
        one = np.zeros(1, np.int64)
        lengths, modes, similarity, matched = document
        arrays = lengths, modes, np.array([0, len(modes)]), similarity, matched, one, one, np.array([key], np.uint64)
        sizes = arranged_sizes(*arrays, np.array([[begin, until]]), other, np.array([-1]))
        assert sizes[:, 1].max() <= other.max_tokens
        assert sizes[:, 2].max() <= other.max_images
        ends = sum(has_ends(rows, modes, other)) * len(sizes)
        texts = int((rows[:, 3] - rows[:, 2])[rows[:, 3] != IMAGE_ROW].sum())
        assert sizes[:, 1:].sum(0).tolist() == [texts + int(sizes[:, 2].sum()) * 4 + ends, len(found_images(rows))]
    assert found == whole


def content_of(rows: np.ndarray) -> list[tuple[int, int]]:
    """(piece, token) of what rows hold, in order; an image's token is -1."""
    return [
        (int(piece), t) for _, piece, start, stop in rows for t in ([-1] if stop == IMAGE_ROW else range(start, stop))
    ]


def found_images(rows: np.ndarray) -> np.ndarray:
    return rows[rows[:, 3] == IMAGE_ROW]


SIMILAR, FIRST = np.full(2, 0.3, np.float32), np.zeros(2, np.int32)
TWO_IMAGES = np.array([20, 1, 1], np.int32), np.array([0, 1, 1], np.int8), SIMILAR, FIRST
SHORT = np.array([10, 1, 1], np.int32), *TWO_IMAGES[1:]
ON_BOTH_SIDES = 2
"""a seed by which one image stands before the text and one after it"""


@example(TWO_IMAGES, NATURAL._replace(image_first=1.0, cut_beside_images=True), 0)
@example(SHORT, NATURAL._replace(max_images=1, cut_beside_images=True), ON_BOTH_SIDES)
@settings(max_examples=200)
@given(documents(), rules_of, st.integers(0, 2**63))
def test_a_text_is_cut_only_if_it_is_too_long(document, rules, seed) -> None:  # type: ignore[no-untyped-def]
    lengths, modes, similarity, matched = document
    rows = arrange(lengths, modes, similarity, matched, np.uint64(seed), rules._replace(carry_text=False))
    times = Counter(int(p) for _, p, _, e in rows if e != IMAGE_ROW)
    beside = np.zeros(len(modes), int)
    if rules.cut_beside_images:
        matches = np.zeros_like(matched) if rules.pairs and (modes == 0).sum() == 1 else matched
        np.add.at(beside, np.flatnonzero(modes == 0)[matches[matches >= 0]], 1)
    for piece, count in times.items():
        room = rules.max_tokens - 2 - rules.image_tokens * beside[piece]
        assert count == 1 or lengths[piece] > room or beside[piece] > rules.max_images


@pytest.mark.parametrize("reference", [True, False])
def test_the_image_of_a_pair_stands_beside_as_much_of_its_text_as_fits(reference: bool) -> None:
    rules = NATURAL._replace(pairs=True, reference_pairs=reference, cut_beside_images=True)
    nan, none = np.full(1, np.nan, np.float32), np.full(1, -1, np.int32)
    fits = rules.max_tokens - 2 - rules.image_tokens
    for length, modes in itertools.product(range(1, 4 * rules.max_tokens), ([0, 1], [1, 0])):
        lengths = np.array([1 if m else length for m in modes], np.int32)
        before, after = (
            arrange(lengths, np.array(modes, np.int8), nan, none, np.uint64(0), rules._replace(image_first=first))
            for first in (0.0, 1.0)
        )
        whole = fits + reference  # one end less
        text = before[(before[:, 0] == before[-1, 0]) & (before[:, 3] != IMAGE_ROW)]
        assert before[-1, 3] == IMAGE_ROW
        assert text[:, 2:].tolist() == [[0, length] if length <= whole else [length - fits, length]]
        assert after[0, 3] == IMAGE_ROW
        assert after[1].tolist() == [0, modes.index(0), 0, length if length <= whole else fits]


def test_the_images_of_a_segment_that_is_cut_stand_beside_it() -> None:
    """Matched documents: a segment of 28 tokens, longer than the 24 that an image leaves, behind one of 10."""
    lengths, modes = np.array([10, 1, 28], np.int32), np.array([0, 1, 0], np.int8)
    similarity, matched = np.array([0.3], np.float32), np.array([1], np.int32)
    rules = NATURAL._replace(selects=True, cut_beside_images=True)
    rows = [
        arrange(lengths, modes, similarity, matched, np.uint64(0), rules._replace(image_first=p)).tolist()
        for p in (0, 1)
    ]
    assert rows[0] == [[0, 0, 0, 10], [0, 2, 0, 4], [1, 2, 4, 28], [1, 1, 0, -1]]
    assert rows[1] == [[0, 0, 0, 10], [1, 1, 0, -1], [1, 2, 0, 24], [2, 2, 24, 28]]
    # an image on either side: half each, where it fits
    sides = [
        arrange(
            np.array([1, length, 1], np.int32), np.array([1, 0, 1], np.int8), np.full(2, 0.3, np.float32),
            np.zeros(2, np.int32), np.uint64(seed), rules._replace(images_per_segment=2),
        ).tolist()
        for length in (20, 60) for seed in range(32)
    ]  # fmt: skip
    assert [[0, 0, 0, -1], [0, 1, 0, 10], [1, 1, 10, 20], [1, 2, 0, -1]] in sides
    assert [[0, 0, 0, -1], [0, 1, 0, 24], [1, 1, 24, 36], [2, 1, 36, 60], [2, 2, 0, -1]] in sides
    # with no place for another image in the sequence, as with none for its tokens
    three = np.array([10, 1, 10, 1], np.int32), np.array([0, 1, 0, 1], np.int8)
    both = np.full(2, 0.3, np.float32), np.array([0, 1], np.int32)
    full = arrange(*three, *both, np.uint64(0), rules._replace(image_first=0.0, max_images=1))
    assert full.tolist() == [[0, 0, 0, 10], [0, 1, 0, -1], [1, 2, 0, 10], [1, 3, 0, -1]]


@settings(max_examples=200)
@given(documents(), rules_of, st.integers(0, 2**63))
def test_no_cut_takes_the_text_away_that_stands_before_an_image(document, rules, seed) -> None:  # type: ignore[no-untyped-def]
    lengths, modes, similarity, matched = document
    rows = arrange(lengths, modes, similarity, matched, np.uint64(seed), rules._replace(carry_text=True))
    for before, row in itertools.pairwise(rows):
        if row[3] == IMAGE_ROW and before[3] != IMAGE_ROW:
            assert row[0] == before[0]
    lengths, modes = np.array([20, 6, 1], np.int32), np.array([0, 0, 1], np.int8)  # 30 places; the image takes 6
    nan, none = np.full(1, np.nan, np.float32), np.full(1, -1, np.int32)
    rows = arrange(lengths, modes, nan, none, np.uint64(seed), NATURAL._replace(carry_text=True))
    assert rows.tolist() == [[0, 0, 0, 20], [1, 1, 0, 6], [1, 2, 0, -1]]
    rows = arrange(lengths[1:] * 9, modes[1:], nan, none, np.uint64(seed), NATURAL._replace(carry_text=True))
    assert rows.tolist() == [[0, 0, 0, 30], [1, 0, 30, 54], [1, 1, 0, -1]]
    for length in range(55, 61):  # the text that goes along with the image fills the 24 places that it leaves
        one = np.array([length, 1], np.int32), modes[1:], nan, none, np.uint64(seed)
        cut = length - 24
        expected = [[0, 0, 0, 30], [1, 0, 30, cut], [2, 0, cut, length], [2, 1, 0, -1]]
        assert arrange(*one, NATURAL._replace(carry_text=True)).tolist() == expected


def test_selection_is_the_reference_s() -> None:
    rules = NATURAL._replace(selects=True, images_per_document=3, min_similarity=float(np.float32(0.24)))
    similarity = np.array([0.3, 0.239, 0.24, 0.5, 0.9, 0.3, 0.3], np.float32)
    matched = np.array([4, 0, 1, 1, 2, 3, 5], np.int32)
    chosen = {tuple(np.flatnonzero(select(similarity, matched, np.uint64(s), rules))) for s in range(50)}
    # 1 is too dissimilar; 2 and 3 share a segment, one of them is drawn; the first three in reading order stay
    assert chosen == {(2, 4, 5), (3, 4, 5)}
    similar = np.array([0.3, 0.3, 0.3], np.float32)
    counts = Counter(
        tuple(np.flatnonzero(select(similar, np.zeros(3, np.int32), np.uint64(s), rules))) for s in range(3000)
    )
    assert set(counts) == {(0,), (1,), (2,)}
    assert min(counts.values()) > 900


def test_placement_before_or_after_the_segment() -> None:
    lengths, modes = np.array([1, 5, 5], np.int32), np.array([1, 0, 0], np.int8)
    similarity, matched = np.array([0.3], np.float32), np.array([1], np.int32)
    rules = NATURAL._replace(selects=True)
    orders = Counter(
        tuple(arrange(lengths, modes, similarity, matched, np.uint64(s), rules)[:, 1]) for s in range(2000)
    )
    assert set(orders) == {(1, 0, 2), (1, 2, 0)}  # pieces: before or after the second text
    assert 900 < orders[1, 0, 2] < 1100
    natural = arrange(lengths, modes, np.full(1, np.nan, np.float32), np.full(1, -1, np.int32), np.uint64(0), NATURAL)
    assert natural[:, 1].tolist() == [0, 1, 2]


def test_a_segment_and_its_images_stay_together() -> None:
    lengths, modes = np.array([20, 1, 10], np.int32), np.array([0, 1, 0], np.int8)
    similarity, matched = np.array([0.3], np.float32), np.array([1], np.int32)
    for seed in range(8):  # 20 tokens and the image would fit one sequence, but its segment would not
        rows = arrange(lengths, modes, similarity, matched, np.uint64(seed), NATURAL._replace(selects=True))
        assert {int(p): int(s) for s, p, _, _ in rows} == {0: 0, 1: 1, 2: 1}


def test_pairs_of_objective_clip_take_the_matched_or_nearest_text() -> None:
    lengths, modes = np.array([5, 1, 1, 40, 1], np.int32), np.array([0, 1, 1, 0, 1], np.int8)
    nan, rules = np.full(3, np.nan, np.float32), NATURAL._replace(num_patches=0)
    rows = arrange(lengths, modes, nan, np.array([-1, -1, 0], np.int32), np.uint64(0), rules)
    assert rows.tolist() == [[0, 0, 0, 5], [0, 1, 0, -1], [1, 3, 0, 30], [1, 2, 0, -1], [2, 0, 0, 5], [2, 4, 0, -1]]


@settings(max_examples=300)
@given(documents(), rules_of, st.integers(0, 2**63))
def test_images_are_found_as_if_each_text_looked_at_all_of_them(document, rules, seed) -> None:  # type: ignore[no-untyped-def]
    lengths, modes, similarity, matched = document
    key, keep = np.uint64(seed), select(similarity, matched, np.uint64(seed), rules)
    texts, images = np.flatnonzero(modes == 0).tolist(), np.flatnonzero(modes).tolist()
    of_text = np.zeros_like(matched) if rules.pairs and len(texts) == 1 else matched
    order: list[int] = []
    for k in range(len(modes)):
        if modes[k]:
            j = images.index(k)
            order += [k] if keep[j] and not 0 <= of_text[j] < len(texts) else []
            continue
        mine = [j for j in range(len(images)) if keep[j] and of_text[j] == texts.index(k)]
        before = [j for j in mine if uniform(key, (1 << 32) + j) < rules.image_first]
        order += [images[j] for j in before] + [k] * int(lengths[k] > 0) + [images[j] for j in mine if j not in before]
    rows = arrange(*document, key, rules._replace(max_tokens=10_000, max_images=100))
    assert rows[:, 1].tolist() == order

    pairs: list[int] = []
    for j, k in enumerate(images):
        own = [texts[matched[j]]] if 0 <= matched[j] < len(texts) else []
        full = [t for t in own if lengths[t]] or [t for t in texts if lengths[t]]
        if keep[j] and full:
            pairs += [min(full, key=lambda t: (abs(t - k), t)), k]
    assert arrange(*document, key, rules._replace(num_patches=0))[:, 1].tolist() == pairs


class Counted(np.ndarray):
    """An array that counts how often an element of one is read."""

    reads = 0

    def __getitem__(self, at: Any) -> Any:
        Counted.reads += 1
        return super().__getitem__(at)


@pytest.mark.parametrize("num_patches", [4, 0])
@pytest.mark.parametrize("matched", [np.full(500, -1, np.int32), np.arange(500, dtype=np.int32)[::-1].copy()])
def test_a_long_document_s_pieces_are_each_looked_at_a_few_times(num_patches: int, matched: np.ndarray) -> None:
    """Did each text look at all images, or each image at all texts, a book would take seconds, at each of its
    sequences."""
    modes, keep = np.tile(np.array([0, 1], np.int8), 500), np.ones(500, np.bool_)
    lengths, similarity = np.ones(1000, np.int32), np.full(500, np.nan, np.float32)
    Counted.reads = 0
    if num_patches:
        rows = arrange.py_func(lengths, modes, similarity, matched.view(Counted), np.uint64(1), NATURAL)
    else:
        rows = _pairs.py_func(lengths.view(Counted), modes, matched, keep, 500, -1, NATURAL)
    assert (rows[:, 3] == IMAGE_ROW).sum() == 500
    assert 500 <= Counted.reads < 10 * 500


@settings(max_examples=200)
@given(documents(), st.booleans(), st.sampled_from([0, 3]))
def test_of_a_pair_s_text_that_is_too_long_what_is_near_the_image_stays(document, last: bool, captions: int) -> None:  # type: ignore[no-untyped-def]
    """Before its image its last tokens, as when all of it is read; behind it, or by earlier rules, the first ones."""
    lengths, modes, similarity, matched = document
    rules = NATURAL._replace(num_patches=0, max_tokens=12, last_of_text=last, caption_patches=captions)
    key, one = np.uint64(0), np.zeros(1, np.int64)
    rows = arrange(*document, key, rules)
    whole = arrange(*document, key, rules._replace(max_tokens=100))
    assert rows[:, :2].tolist() == whole[:, :2].tolist()
    for (_, text, start, stop), (_, image, _, _) in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
        kept = list(range(lengths[text]))
        assert list(range(start, stop)) == (kept[-10:] if last and text < image else kept[:10])
    arrays = lengths, modes, np.array([0, len(modes)]), similarity, matched
    of_document = one, one, np.array([key]), np.array([[0, END]])
    sizes = arranged_sizes(*arrays, *of_document, rules, np.array([-1]))  # type: ignore[call-arg]
    texts = (rows[::2, 3] - rows[::2, 2]).tolist()
    assert sizes[:, 1].tolist() == [2 * n + 2 + captions + 4 if captions else n + 2 for n in texts]
    tokens, images = np.zeros(1, np.int32), np.zeros(1, np.int32)
    measure(*arrays, rules, tokens, images, one)
    assert (int(tokens[0]), int(images[0])) == (int(sizes[:, 1].sum()), len(sizes))


def test_too_short_a_sequence_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="at least 54"):
        rules_for(Data(tokens_per_pack=2048), 49, 53, 8, pairs=False)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 255, 256, 257, 5000])
def test_shuffle_is_a_permutation_and_any_part_of_it_the_same(size: int) -> None:
    whole = shuffled(np.uint64(7), size, 0, size)
    assert sorted(whole) == list(range(size))
    assert (shuffled(np.uint64(7), size, size // 3, size) == whole[size // 3 :]).all()


def test_shuffle_has_no_favorites() -> None:
    counts = np.zeros((10, 10))
    for seed in range(20000):
        counts[np.arange(10), shuffled(np.uint64(seed * 7919), 10, 0, 10)] += 1
    assert ((counts - 2000) ** 2 / 2000).sum() < 150  # chi-square, 81 degrees of freedom: p < 1e-5


@pytest.mark.parametrize(
    ("rules", "images"),
    [(NATURAL, 0), (NATURAL._replace(num_patches=1 << 30), 2), (NATURAL._replace(num_patches=0), 3)],
)
@pytest.mark.parametrize("alternatives", [False, True])
def test_sizes_of_documents_end_where_int32_does(rules: Rules, images: int, alternatives: bool) -> None:
    """A negative one would count as a document that is skipped."""
    num_texts = 1 if images else 5
    lengths = np.array([*[(1 << 30) + 5] * num_texts, *[1] * images], np.int32)
    modes = np.array([*[0] * num_texts, *[1] * images], np.int8)
    arrays = np.array([0, len(modes)]), np.full(images, np.nan, np.float32), np.full(images, -1, np.int32)
    tokens, found, first = np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int64)
    rules = rules._replace(max_tokens=1 << 31, alternatives=alternatives)
    measure(lengths, modes, *arrays, rules, tokens, found, first)
    one_text = alternatives and not images
    assert (tokens[0], found[0]) == ((1 << 30) + 7 if one_text else END, images)
