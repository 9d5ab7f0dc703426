"""Packing and blending: limits, counts, and how full packs of real length statistics are."""

from __future__ import annotations

import json
from pathlib import Path

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
    order, offsets = best_fit(tokens, images, 100, 5, most)
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
