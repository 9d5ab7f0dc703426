"""Packing and blending: limits, counts, and how full packs of real length statistics are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl.data.corpus.tokenizer import load
from megatron_lcl.data.loading.packing import best_fit, blend, choose_images_per_pack, max_sequences, next_fit

sizes_of = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 5)), min_size=1, max_size=80)


@settings(max_examples=300)
@given(sizes_of, st.integers(1, 9))
def test_each_sequence_once_and_no_limit_broken(sizes: list[tuple[int, int]], most: int) -> None:
    tokens, images = (np.array(x, np.int32) for x in zip(*sizes, strict=True))
    for spread in (True, False):
        order, offsets = best_fit(tokens, images, 100, 5, most, spread)
        assert sorted(order) == list(range(len(sizes)))
        assert np.add.reduceat(tokens[order], offsets[:-1]).max() <= 100
        assert np.add.reduceat(images[order], offsets[:-1]).max() <= 5
        assert np.diff(offsets).min() >= 1
        assert np.diff(offsets).max() <= most
    in_order = next_fit(tokens, images, 100, 5, most)
    assert in_order[-1] == len(sizes)
    assert np.add.reduceat(tokens, in_order[:-1]).max() <= 100
    assert np.add.reduceat(images, in_order[:-1]).max() <= 5
    assert np.diff(in_order).max() <= most


@settings(max_examples=200)
@given(st.lists(st.tuples(st.floats(0.01, 10), st.integers(1, 300)), min_size=1, max_size=6), st.integers(0, 2**31 - 1))
def test_blend_is_exact_to_one_document_at_every_prefix(corpora: list[tuple[float, int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = np.array([w for w, _ in corpora])
    weights /= weights.sum()
    lists = [rng.integers(0, longest + 1, 400).astype(np.int32) for _, longest in corpora]
    starts = np.arange(len(lists) + 1, dtype=np.int64) * 400
    served = np.zeros(len(lists))
    turns = blend(np.concatenate(lists), starts, weights, served)
    assert len(turns) >= 400
    taken, tokens, longest = [0] * len(lists), np.zeros(len(lists)), max(x.max() for x in lists)
    for c in turns:
        tokens[c] += lists[c][taken[c]]
        taken[c] += 1
        assert np.abs(tokens - weights * tokens.sum()).max() <= longest + 1e-6
    assert (served == tokens).all()


def test_images_per_pack_fill_best() -> None:
    assert choose_images_per_pack(11.2 / 2048, 2048) == 11
    assert choose_images_per_pack(11.8 / 2048, 2048) == 12
    assert choose_images_per_pack(0.0, 2048) == 1


@pytest.mark.parametrize(("mean", "captions"), [(5, False), (11, False), (20, True)])
def test_image_slots_fill_where_sequences_are_short(mean: int, captions: bool) -> None:
    """A pack holds so many sequences at most; of short ones it has as many image slots as these have images."""
    sizes = np.random.default_rng(0).integers(2, 2 * mean - 1, 10_000).astype(np.int32)
    images = np.ones_like(sizes)
    slots = choose_images_per_pack(len(sizes) / sizes.sum(), 1024, len(sizes) / sizes.sum(), captions)
    _, offsets = best_fit(sizes, images, 1024, slots, max_sequences(1024, captions))
    assert len(sizes) / ((len(offsets) - 1) * slots) >= 0.95


def heavy_tailed(num: int) -> tuple[np.ndarray, np.ndarray]:
    """Texts of log-normal lengths, with one to six images whatever their length."""
    rng = np.random.default_rng(0)
    images = np.clip(rng.poisson(2.4, num) + 1, 1, 6).astype(np.int32)
    return np.clip(rng.lognormal(np.log(400), 0.9, num) + images * 51 + 2, 60, 8192).astype(np.int32), images


def proportional(num: int) -> tuple[np.ndarray, np.ndarray]:
    """As many images as the text is long."""
    text = np.clip(np.random.default_rng(0).lognormal(np.log(400), 0.9, num), 20, 4000)
    images = np.clip(np.round(text / 130), 1, 40).astype(np.int32)
    return (text + images * 51 + 2).astype(np.int32), images


def of_two_lengths(num: int) -> tuple[np.ndarray, np.ndarray]:
    """One in ten fills over half a pack and has one image; so each pack has to have one of these."""
    rng = np.random.default_rng(0)
    long = rng.random(num) < 0.1
    images = np.where(long, 1, np.clip(rng.poisson(2, num) + 1, 1, 6)).astype(np.int32)
    text = np.where(long, rng.normal(5000, 600, num), rng.normal(200, 40, num))
    return (text + images * 51 + 2).astype(np.int32), images


def fewest_packs(tokens: np.ndarray, images: np.ndarray, capacity: int, slots: int) -> float:
    """No packing has fewer packs than tokens or images fill, nor than images and the slots beside long sequences do.

    No two that are over half a pack share one, and beside each are no more images than what has most to a token has.
    """
    long = tokens > capacity / 2
    beside = (capacity - tokens[long]) * (images / tokens).max()
    empty = np.maximum(0, slots - images[long] - beside).sum()
    return max(float(tokens.sum()) / capacity, (float(images.sum()) + empty) / slots)


@pytest.mark.parametrize(
    ("sizes", "least", "before"), [(heavy_tailed, 0.99, 0.97), (proportional, 0.995, 1), (of_two_lengths, 0.98, 0.96)]
)
def test_packs_are_full_whatever_the_lengths(sizes: Any, least: float, before: float) -> None:
    """As near to the bound as is said, and `before`, at most so near without `spread`."""
    tokens, images = sizes(20_000)
    slots = choose_images_per_pack(images.sum() / tokens.sum(), 8192)
    bound = fewest_packs(tokens, images, 8192, slots)
    packs, earlier = (
        len(best_fit(tokens, images, 8192, slots, max_sequences(8192), spread)[1]) - 1 for spread in (True, False)
    )
    assert least <= bound / packs <= 1
    assert bound / earlier <= before


def test_packs_of_earlier_versions_stay_as_they_are() -> None:
    """And those of this one: runs find the packs again with which they began."""
    tokens, images = heavy_tailed(3000)
    found = [best_fit(tokens, images, 8192, 35, max_sequences(8192), spread) for spread in (False, True)]
    digests = [
        hashlib.sha256(order.astype("<i4").tobytes() + offsets.astype("<i8").tobytes()).hexdigest()[:16]
        for order, offsets in found
    ]
    assert digests == ["50ab7e39e6f9b945", "910ca57f053ffce1"]


@pytest.fixture(scope="session")
def mmc4_sizes(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (CLIP, 49 patches an image) and images of real MMC4 documents after selection."""
    try:
        tokenizer = load("clip")
    except ValueError:
        pytest.skip("CLIP's vocabulary is not installed")
    sizes = []
    for line in (shared / "samples/mmc4/docs_no_face_shard_151_v3.jsonl").read_text().splitlines():
        record = json.loads(line)
        matched = {i["matched_text_index"] for i in record["image_info"] if i["matched_sim"] >= 0.24}
        num, text = min(6, len(matched)), sum(map(len, tokenizer.encode_batch(record["text_list"])))
        if num:
            sizes.append((text + num * 51 + 2, num))
    tokens, images = np.array(sizes, np.int32).T
    return np.ascontiguousarray(tokens), np.ascontiguousarray(images)


@pytest.mark.slow
@pytest.mark.parametrize(("capacity", "least_tokens", "least_images"), [(8192, 0.985, 0.98), (2048, 0.96, 0.96)])
def test_packs_of_real_documents_are_full(
    mmc4_sizes: tuple[np.ndarray, np.ndarray], capacity: int, least_tokens: float, least_images: float
) -> None:
    draw = np.random.default_rng(0).integers(0, len(mmc4_sizes[0]), 100_000)
    tokens, images = (x[draw] for x in mmc4_sizes)
    slots = choose_images_per_pack(images.sum() / tokens.sum(), capacity)
    _, offsets = best_fit(tokens, images, capacity, slots, max_sequences(capacity))
    num_packs = len(offsets) - 1
    assert tokens.sum() / (num_packs * capacity) >= least_tokens
    assert images.sum() / (num_packs * slots) >= least_images


def test_a_blend_of_more_corpora_than_int16_counts() -> None:
    num = (1 << 15) + 1
    weights = np.full(num, 0.1 / num)
    weights[-1] += 0.9
    turns = blend(np.full(num, 100, np.int32), np.arange(num + 1), weights, np.zeros(num))
    assert turns.tolist() == [num - 1]
