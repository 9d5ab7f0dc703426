"""Several texts of a pair: all are kept, and each epoch reads one of them, in an order drawn from seed and document."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.writers import picture

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.corpus.store import Corpus as Store
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.hashes import uniform
from megatron_lcl.data.loading.ledger import Ledger, open_ledger
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.rules import CAPTIONED_PAIRS, CAPTIONS, INTERLEAVED, PAIRS, Sequences, rules_for
from megatron_lcl.data.loading.sequence import END, arrange, arranged_sizes
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify

P, SIZE, CONTEXT, TOKENS = 4, 16, 64, 128
WORDS = ("a", "a b", "a b c", "a b c d e f g")


def captions_of(d: int) -> list[str]:
    """Of document d: one to four, of different lengths."""
    return [f"{chr(97 + d)} {words}" for words in WORDS[: 1 + d % 4]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("captions")
    lines = []
    for d in range(24):
        (folder / f"{d}.png").write_bytes(picture(d))
        texts = [{"text": text} for text in captions_of(d)]
        lines.append(json.dumps({"kind": "captions", "items": [{"image": f"{d}.png"}, *texts]}))
    (folder / "in.jsonl").write_text("\n".join(lines))
    preprocess("jsonl", folder / "in.jsonl", folder / "corpus", images=folder, tokenizer="clip")
    return open_corpus(folder / "corpus")


def test_all_texts_are_stored(corpus: Store, tmp_path: Path) -> None:
    assert corpus.kinds == ("captions",)
    assert [text.text for text in corpus[3].texts] == captions_of(3)
    assert not verify(corpus.path)
    merge([corpus.path], tmp_path / "merged")
    assert open_corpus(tmp_path / "merged").kinds == ("captions",)


def loader_of(
    corpus: Store, sequences: Sequences, steps: int = 12, ledger: Ledger | None = None, **fields: Any
) -> PackedLoader:
    data = Data(
        corpora=(Corpus(str(corpus.path)),), tokens_per_pack=TOKENS, images_per_pack=8, workers=0,
        cache=str(corpus.path / "cache"), **fields,
    )  # fmt: skip
    return PackedLoader(data, P, SIZE, CONTEXT, global_batch=2, steps=steps, sequences=sequences, ledger=ledger)


def texts_read(corpus: Store, loader: PackedLoader) -> dict[tuple[int, int], str]:
    """By epoch and document, the text that its sequence has; each sequence has the one image and is counted exactly."""
    found: dict[tuple[int, int], str] = {}
    sot = corpus.tokenizer.sot
    for batch in loader:
        for b, number in enumerate(batch.packs):
            origins = loader.provenance(number)
            assert sum(o.stop - o.start for o in origins) <= TOKENS
            for o in origins:
                ids = batch.tokens[b * TOKENS + o.start : b * TOKENS + o.stop].numpy()
                assert len(o.images) == 1
                assert (o.epoch, o.document) not in found
                found[o.epoch, o.document] = corpus.tokenizer.decode(ids[ids < sot])
    return found


@pytest.mark.parametrize("sequences", [INTERLEAVED, PAIRS, CAPTIONS], ids=["interleaved", "pairs", "captions"])
def test_each_epoch_draws_one(corpus: Store, sequences: Sequences) -> None:
    found = texts_read(corpus, loader_of(corpus, sequences, steps=40))
    assert max(epoch for epoch, _ in found) >= 4
    counts: Counter[str] = Counter()
    for (_, document), text in found.items():
        assert text.strip() in captions_of(document)
        counts[text.strip()] += document % 4 == 3
    several = {document: {t for (_, d), t in found.items() if d == document} for document in range(24)}
    assert sum(len(several[d]) > 1 for d in range(24) if d % 4) > 12, "over epochs a document's texts take turns"
    assert all(len(several[d]) == 1 for d in range(0, 24, 4))


@pytest.mark.parametrize("sequences", [INTERLEAVED, PAIRS], ids=["interleaved", "pairs"])
def test_in_as_many_epochs_as_captions_each_is_read_once(corpus: Store, sequences: Sequences) -> None:
    """In another order in the next round, by one key of the document; a run of an earlier version draws as it did."""
    found = texts_read(corpus, loader_of(corpus, sequences, steps=60))
    orders, same = set(), 0
    for d in range(3, 24, 4):
        rounds = [[found[epoch, d].strip() for epoch in range(first, first + 4)] for first in (0, 4)]
        assert [sorted(order) for order in rounds] == [sorted(captions_of(d))] * 2
        same += rounds[0] == rounds[1]
        orders.add(tuple(text[2:] for text in rounds[0]))
    assert same < 3
    assert len(orders) > 2
    loader = loader_of(corpus, sequences)
    ledger = open_ledger(loader.reader.data, P, CONTEXT, sequences=sequences, version=3)
    loader = loader_of(corpus, sequences, 20, ledger=ledger)
    (source,) = loader.reader.index[0].sources
    for (epoch, d), text in texts_read(corpus, loader).items():
        drawn = int(uniform(source.document_key(d, epoch), 1 << 33) * len(captions_of(d)))
        assert text.strip() == captions_of(d)[drawn]


def test_the_draw_is_of_seed_epoch_and_document_alone(corpus: Store) -> None:
    """Whatever the objective and the packs; another seed draws others."""
    interleaved = texts_read(corpus, loader_of(corpus, INTERLEAVED))
    pairs = texts_read(corpus, loader_of(corpus, PAIRS))
    both = interleaved.keys() & pairs.keys()
    assert len(both) > 40
    assert all(interleaved[key] == pairs[key] for key in both)
    other = texts_read(corpus, loader_of(corpus, PAIRS, seed=1))
    assert sum(other[key] != pairs[key] for key in other.keys() & pairs.keys()) > 10


def test_the_draw_is_even_and_sizes_are_of_what_is_drawn() -> None:
    lengths, modes = np.array([1, 9, 2, 5], np.int32), np.array([1, 0, 0, 0], np.int8)
    nan, none = np.full(1, np.nan, np.float32), np.full(1, -1, np.int32)
    for sequences in (INTERLEAVED, PAIRS):
        rules = rules_for(Data(tokens_per_pack=64), P, 64, 4, pairs=True, alternatives=True, sequences=sequences)
        counts: Counter[int] = Counter()
        for key in range(600):
            rows = arrange(lengths, modes, nan, none, np.uint64(key * 977), rules)
            (text,) = (r for r in rows.tolist() if r[3] != -1)
            counts[text[1]] += 1
            offsets, zero = np.array([0, 4]), np.zeros(1, np.int64)
            sizes = arranged_sizes(
                lengths,
                modes,
                offsets,
                nan,
                none,
                zero,
                zero,
                np.array([key * 977], np.uint64),
                np.array([[0, END]]),
                rules,
                np.array([-1]),
            )
            assert sizes.tolist() == [[0, int(lengths[text[1]]) + 2 + (P + 2) * sequences.interleaved, 1]]
        assert set(counts) == {1, 2, 3}
        assert min(counts.values()) > 160  # 200 ± 3.5 standard deviations


def test_what_caches_of_sizes_are_named_by_is_what_it_was() -> None:
    """Of corpora without captions, read by the objectives there were: the fields of releases that had no captions."""
    before = {
        *("num_patches", "max_tokens", "max_images", "selects", "min_similarity", "images_per_segment"),
        *("images_per_document", "min_images", "image_first", "pairs", "reference_pairs", "carry_text"),
        "caption_patches",
    }
    for sequences in (INTERLEAVED, PAIRS, CAPTIONED_PAIRS):
        assert rules_for(Data(), P, CONTEXT, 4, pairs=True, sequences=sequences).of_whole_documents().keys() == before
    assert "captions_alone" in rules_for(Data(), P, CONTEXT, 4, pairs=True, sequences=CAPTIONS).of_whole_documents()
    drawn = rules_for(Data(), P, CONTEXT, 4, pairs=True, alternatives=True).of_whole_documents()
    assert "alternatives" in drawn
    later = rules_for(Data(), P, CONTEXT, 4, pairs=True, alternatives=True, in_turn=True, last_of_text=True)
    assert later.of_whole_documents() == drawn, "which does not change what whole documents measure"


def test_pairs_with_several_texts_read_as_they_did(tmp_path: Path) -> None:
    """Documents of kind `pairs`: all texts, in their order, in every epoch."""
    (tmp_path / "0.png").write_bytes(picture(0))
    line = {"kind": "pairs", "items": [{"image": "0.png"}, {"text": "one"}, {"text": "two"}]}
    (tmp_path / "in.jsonl").write_text("\n".join([json.dumps(line)] * 24))
    preprocess("jsonl", tmp_path / "in.jsonl", tmp_path / "corpus", images=tmp_path, tokenizer="clip")
    corpus = open_corpus(tmp_path / "corpus")
    read = texts_read(corpus, loader_of(corpus, INTERLEAVED))
    assert len(read) > 4
    assert all("one" in text and "two" in text for text in read.values())


def test_webdataset_keeps_the_captions_that_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        record = {"caption": "first", "more": ["second", "first", "third"], "one": "fourth", "none": None, "bad": 3}
        for name, data in (("0.jpg", picture(0)), ("0.txt", b"first"), ("0.json", json.dumps(record).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    preprocess("webdataset", tmp_path / "0.tar", tmp_path / "one", tokenizer="clip")
    plain = open_corpus(tmp_path / "one")
    assert (plain.kinds, [t.text for t in plain[0].texts]) == (("pairs",), ["first"])
    options = {"captions": "more, one,none,bad,absent"}
    preprocess(
        "webdataset", tmp_path / "0.tar", tmp_path / "all", tokenizer="clip", options=options, max_bad_fraction=1.0
    )
    several = open_corpus(tmp_path / "all")
    assert several.kinds == ("captions",)
    assert [type(item) for item in several[0].items] == [Image, Text, Text, Text, Text]
    assert [t.text for t in several[0].texts] == ["first", "second", "third", "fourth"]
    assert several.manifest["drops"]["bad"] == {"text: not a string": 1}
