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
