"""What is said of a run's packs before it begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from corpora import MakeCorpus, jpeg, random_documents

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.ledger import open_ledger
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS
from megatron_lcl.data.loading.summary import PACKS, Summary, summarize_config
from megatron_lcl.objectives import objective_class


def config_of(path: Path, **overrides: Any) -> Config:
    fields = {
        "data.corpora": str(path),
        "data.tokens_per_pack": "64",
        "data.workers": "0",
        "model.vision.image_size": "16",
        "model.vision.patch_size": "8",
        "model.language.context_length": "64",
    }
    return configs.load(overrides=fields | overrides)


def test_images_that_a_small_pack_cuts_off_from_their_text_are_said(make_corpus: MakeCorpus) -> None:
    images = [(jpeg(i), None, None) for i in range(3)]
    corpus = make_corpus("c", [[[d, d], *images] for d in range(40)])
    enough = summarize_config(config_of(corpus.path, **{"data.images_per_pack": "3"}), INTERLEAVED, None, 0)
    assert enough == Summary(3, False, PACKS, images=64 * 3, pairs=64 * 3, documents=64, cut=0, cut_for_images=0)
    small = summarize_config(config_of(corpus.path, **{"data.images_per_pack": "1"}), INTERLEAVED, None, 0)
    assert small.pairs == pytest.approx(small.images / 3, abs=6)  # the first one of three has a text before it
    assert small.cut == small.documents == small.cut_for_images
    assert small.numbers()["contrast_share"] == small.pairs / small.images
    assert small.numbers()["cut_share"] == 1, "of the documents"
    assert "1 image slot a pack (given); in 64 packs " in str(small)
    assert " are cut, " in str(small)
    assert str(small).endswith(" as they have over 1 image")
    chosen = summarize_config(config_of(corpus.path), INTERLEAVED, None, 0)
    assert chosen.chosen
    assert str(chosen).startswith(f"{chosen.images_per_pack} image slots a pack (chosen); in 64 packs ")
    generation = summarize_config(
        config_of(corpus.path, **{"objective.name": "generation"}), objective_class("generation").sequences, None, 0
    )
    assert generation.pairs == 0 < generation.images
    clip = summarize_config(config_of(corpus.path, **{"objective.name": "clip"}), PAIRS, None, 0)
    assert (clip.pairs, clip.cut) == (clip.images, 0)


def test_what_pairs_do_not_read_of_long_texts_is_said(make_corpus: MakeCorpus) -> None:
    """No other sequence has it, unlike that of documents as they stand; of a text between two images less is lost."""
    image = (jpeg(0), None, None)
    texts = [[1] * n for n in (8, 30, 60, 150)]
    documents: list[Any] = [[image, texts[d % 4]] for d in range(40)]
    corpus = make_corpus("c", documents, source="webdataset")
    settings = {"data.images_per_pack": "8", "data.tokens_per_pack": "512", "model.language.context_length": "77"}
    config = config_of(corpus.path, **settings)
    for name in ("clip", "siglip", "coca", "genlip", "lcl", "emu", "generation"):
        summary = summarize_config(config, objective_class(name).sequences, None, 0)
        room = {"clip": 75, "siglip": 75, "coca": 77 - 4 - 4, "genlip": 77 - 4 - 4}.get(name, 150)
        share = sum(max(0, len(text) - room) for text in texts) / sum(map(len, texts))
        assert summary.numbers()["cut_share"] == pytest.approx(0.25, abs=0.05), name
        assert summary.numbers()["unread_share"] == pytest.approx(share, abs=0.05), name
        said = "do not fit and are never read: raise model.language.context_length = 77"
        assert str(summary).endswith(said) == (share > 0)
    short = config_of(corpus.path, **settings | {"data.tokens_per_pack": "60"})
    summary = summarize_config(short, objective_class("coca").sequences, None, 0)
    assert str(summary).endswith("raise data.tokens_per_pack = 60"), "both sequences of a pair, of 4 + 6 + 2 n tokens"
    assert summary.cut == pytest.approx(0.75 * summary.documents, rel=0.1)
    both = summarize_config(config_of(corpus.path, **settings | {"data.tokens_per_pack": "77"}), PAIRS, None, 0)
    assert str(both).endswith("raise model.language.context_length = 77 and data.tokens_per_pack = 77"), "neither helps"
    early = {"schedule.phases": '[{"steps": 2, "context_length": 40}]', "train.steps": "4"}
    phase = summarize_config(config_of(corpus.path, **settings | early), PAIRS, None, 0)
    assert str(phase).endswith("raise schedule.phases[0].context_length = 40")

    between = make_corpus("between", [[image, list(range(100)), image]] * 20)
    summary = summarize_config(config_of(between.path, **settings), PAIRS, None, 0)
    assert (summary.cut, summary.unread) == (0, 0), "the first half stands behind an image, the rest before the other"
    long = make_corpus("long", [[image, list(range(200)), image]] * 20)
    summary = summarize_config(config_of(long.path, **settings), PAIRS, None, 0)
    assert summary.numbers()["unread_share"] == 50 / 200


@pytest.mark.parametrize("consumed", [0, 30])
def test_it_counts_what_the_batches_hold(make_corpus: MakeCorpus, consumed: int) -> None:
    corpus = make_corpus("c", random_documents(60, 3, mean_text=10))
    config = config_of(corpus.path, **{"data.images_per_pack": "2", "train.global_batch": "1"})
    ledger = open_ledger(config.data, 4, 64).skip(consumed + 10, 7)
    summary = summarize_config(config, INTERLEAVED, ledger, consumed, step=consumed)
    loader = PackedLoader(config.data, 4, 16, 64, global_batch=PACKS, steps=1, first_pack=consumed, ledger=ledger)
    batches = list(loader)
    assert summary.images == sum(batch.num_images for batch in batches)
    assert summary.pairs == sum(batch.num_pairs for batch in batches)
    origins = [origin for batch in batches for pack in batch.packs for origin in loader.provenance(pack)]
    assert summary.documents == sum(origin.part == 0 for origin in origins)
    seen: dict[tuple[int, int], int] = {}
    for number in range(250):  # all parts of the documents that the sample begins
        for o in loader.provenance(number):
            seen[o.epoch, o.document] = max(o.part, seen.get((o.epoch, o.document), 0))
    assert summary.cut == sum(seen[o.epoch, o.document] > 0 for o in origins if o.part == 0)


def test_what_is_drawn_of_each_corpus(make_corpus: MakeCorpus) -> None:
    """A blend counts tokens: of a corpus of longer documents fewer are read, and of one with a small weight."""
    short, long = (make_corpus(str(mean), random_documents(300, mean, mean_text=mean)) for mean in (8, 40))
    blend = f"[{{path: {short.path}, weight: 3}}, {{path: {long.path}, weight: 1}}]"
    config = config_of(
        short.path, **{"data.corpora": blend, "data.tokens_per_pack": "256", "data.images_per_pack": "8"}
    )
    drawn = summarize_config(config, INTERLEAVED, None, 0).drawn
    ledger = open_ledger(config.data, 4, 64)
    index, packs, seen = PackIndex(config.data, ledger), 400, {short.fingerprint: 0, long.fingerprint: 0}
    for pack in map(index.__getitem__, range(packs)):
        for entry in pack.entries[pack.entries["part"] == 0]:
            seen[pack.sources[entry["corpus"]].corpus.fingerprint] += 1
    index.close()
    assert drawn == pytest.approx([number / packs for number in seen.values()], rel=0.15)


def test_documents_that_are_skipped_are_drawn_too(make_corpus: MakeCorpus) -> None:
    """The epochs of a corpus are over the sooner for those whose images are all too dissimilar."""
    half = [[[d] * 10, (jpeg(d), 0.3 if d % 2 else 0.1, 0)] for d in range(200)]
    skipping, whole = make_corpus("half", half), make_corpus("whole", random_documents(200, 1, mean_text=10))
    blend = f"[{{path: {skipping.path}, weight: 1}}, {{path: {whole.path}, weight: 2}}]"
    settings = {"data.min_similarity": "0.2", "data.min_images": "1", "data.images_per_pack": "4"}
    config = config_of(skipping.path, **{"data.corpora": blend, **settings})
    drawn = summarize_config(config, INTERLEAVED, None, 0).drawn
    index = PackIndex(config.data, open_ledger(config.data, 4, 64))
    index.prepare(200)
    end = index.chunks[-1].end
    index.close()
    positions = (end["positions"][corpus.fingerprint] for corpus in (skipping, whole))
    assert drawn == pytest.approx([(200 * epoch + n) / end["pack"] for epoch, n in positions], rel=0.1)
