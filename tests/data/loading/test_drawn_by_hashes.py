"""What is random in packs, as docs/batches.md says it, in plain Python integers."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import PIL.Image
import pytest
from corpora import MakeCorpus, jpeg, random_documents
from documented_hashes import BITS, key_of, mix
from hypothesis import given
from hypothesis import strategies as st
from small_loaders import SIZE, loader_of

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading import packing
from megatron_lcl.data.loading.crops import crop_box
from megatron_lcl.data.loading.ledger import open_ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.reader import draw_patches
from megatron_lcl.data.loading.rules import rules_for
from megatron_lcl.data.loading.sequence import IMAGE_ROW, arrange, in_turn, select
from megatron_lcl.data.loading.source import key


def uniform(k: int, v: int) -> float:
    return (mix(k, v) >> 11) * 2.0**-53


def order(k: int, size: int) -> list[int]:
    h = 4
    while 2 ** (2 * h) < size:
        h += 1

    def network(i: int) -> int:
        left, right = i >> h, i % 2**h
        for t in range(6):
            left, right = right, left ^ mix(k + t & BITS, right) % 2**h
        return left * 2**h + right

    found = []
    for i in range(size):
        result = network(i)
        while result >= size:
            result = network(result)
        found.append(result)
    return found


def test_the_order_of_documents(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_they_come(tokens: np.ndarray, images: np.ndarray, *limits: int) -> tuple[np.ndarray, np.ndarray]:
        return np.arange(len(tokens), dtype=np.int32), packing.next_fit(tokens, images, *limits[:3])

    monkeypatch.setattr(packing, "best_fit", as_they_come)
    corpus = make_corpus("c", random_documents(300, 0, mean_text=10))
    data = Data(corpora=(Corpus(str(corpus.path)),), tokens_per_pack=256, workers=0, seed=7)
    index = PackIndex(data, open_ledger(data, 4, 256, version=2))  # later ones put the packs in another order
    read: dict[int, list[int]] = {0: [], 1: []}
    number = 0
    while min(map(len, read.values())) < 300 and number < 400:
        for entry in index[number].entries:
            if entry["epoch"] in read and entry["part"] == 0:
                read[int(entry["epoch"])].append(int(entry["document"]))
        number += 1
    source = index.source(corpus.fingerprint)
    index.close()
    of_corpus = key_of(7, int(corpus.fingerprint[:16], 16))
    assert read == {epoch: order(key_of(of_corpus, 1 << 62, epoch), 300) for epoch in (0, 1)}
    assert sorted(read[0]) == list(range(300))
    assert int(source.document_key(17, 1)) == key_of(of_corpus, 1, 17)


@pytest.mark.parametrize("options", [{}, {"crop_scale": [0.2, 0.5], "crop_ratio": [0.5, 1.0], "seed": 5}])
def test_the_crops_of_images(make_corpus: MakeCorpus, options: dict[str, Any]) -> None:
    """Each slot has the crop, drawn from seed, pack and slot, of its document's own image, which is not mirrored."""
    documents = [[[d], *((jpeg(2 * d + n), None, None) for n in range(1 + d % 2))] for d in range(30)]
    corpus = make_corpus("c", documents, num_shards=2)
    loader = loader_of(corpus.path, data=options, first_pack=1, steps=3)
    shares, shapes = options.get("crop_scale", [0.9, 1.0]), options.get("crop_ratio", [3 / 4, 4 / 3])
    slots = 0
    for batch in loader:
        (pack,) = batch.packs
        for o in loader.provenance(pack):
            for n, image in enumerate(o.images):
                of_slot = key_of(options.get("seed", 0), pack, image.slot)
                draws = iter([uniform(of_slot, turn) for turn in range(40)])
                left, top, width, height = crop_box(40, 32, draws.__next__, shares, shapes)
                picture = PIL.Image.open(io.BytesIO(jpeg(2 * o.document + n)))
                crop = picture.crop((left, top, left + width, top + height))  # as torchvision's resized_crop does it
                expected = np.asarray(crop.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC), float).transpose(2, 0, 1)
                assert np.abs(batch.images[image.slot].numpy() - expected).max() <= 2, "rounded twice"
                assert np.abs(expected - expected[..., ::-1]).max() > 20
                slots += 1
    assert slots > 20


@given(st.lists(st.integers(0, BITS), min_size=1, max_size=4), st.integers(1, 300), st.data())
def test_keys_and_patches(values: list[int], patches: int, data: st.DataObject) -> None:
    assert int(key(*values)) == key_of(*values)
    kept, (seed, pack, slot) = data.draw(st.integers(1, patches)), [*values, 3, 2, 1][:3]
    expected = sorted(order(key_of(seed, pack, slot, 1 << 40), patches)[:kept])
    assert draw_patches(seed, pack, slot, patches, kept).tolist() == expected


@given(st.integers(0, BITS), st.lists(st.integers(-1, 3), min_size=1, max_size=8))
def test_which_images_stay_and_where_they_stand(of_document: int, matched: list[int]) -> None:
    """Texts 0 to 3, each with its images stored before it; those matched to none first."""
    pieces = sorted(range(len(matched)), key=lambda j: matched[j])
    segments = [matched[j] for j in pieces]
    modes: list[int] = []
    for text in range(-1, 4):
        modes += [1] * segments.count(text) + [0] * (text >= 0)
    data = Data(tokens_per_pack=512, max_images=3, image_first=0.5)
    rules = rules_for(data, 4, 512, 8, pairs=False, matched=True)
    stays = []
    for j, segment in enumerate(segments):
        rivals = [i for i, other in enumerate(segments) if other == segment]
        if segment < 0 or j == min(rivals, key=lambda i: (mix(of_document, i), i)):
            stays.append(j)
    stays = sorted(stays, key=lambda j: (segments[j], j))[:3]
    similarity = np.full(len(segments), np.nan, np.float32)  # without one an image passes
    arrays = similarity, np.array(segments, np.int32)
    assert np.flatnonzero(select(*arrays, np.uint64(of_document), rules)).tolist() == sorted(stays)

    lengths = np.where(modes, 1, 5).astype(np.int32)
    rows = arrange(lengths, np.array(modes, np.int8), *arrays, np.uint64(of_document), rules)
    images = np.flatnonzero(modes)
    texts = np.flatnonzero(np.array(modes) == 0)
    stands = [int(row[1]) for row in rows if row[3] == IMAGE_ROW or row[2] == 0]
    for j in stays:
        if segments[j] >= 0:
            before = stands.index(images[j]) < stands.index(texts[segments[j]])
            assert before == (uniform(of_document, (1 << 32) + j) < 0.5)


def test_which_caption_is_read() -> None:
    lengths, modes = np.array([1, 9, 2, 5], np.int32), np.array([1, 0, 0, 0], np.int8)
    nan, none = np.full(1, np.nan, np.float32), np.full(1, -1, np.int32)
    rules = rules_for(Data(tokens_per_pack=64), 4, 64, 4, pairs=True, alternatives=True)
    for of_document in range(50):
        rows = arrange(lengths, modes, nan, none, np.uint64(of_document), rules)
        (text,) = {int(row[1]) for row in rows if row[3] != IMAGE_ROW}
        assert text == 1 + int(uniform(of_document, 1 << 33) * 3), "by rules of versions 1 to 3"


@given(st.integers(0, BITS), st.integers(1, 9))
def test_in_which_turn_captions_are_read(of_document: int, captions: int) -> None:
    found = [in_turn(np.uint64(of_document), captions, epoch) for epoch in range(3 * captions)]
    for n in range(3):
        of_round = mix(of_document, n)
        assert found[n * captions :][:captions] == sorted(range(captions), key=lambda t: (mix(of_round, t), t))
