"""Protects that replay shows, and `read_step` reads, the packs of a step where phases or the blend have changed, and
none of other settings."""

from __future__ import annotations

import dataclasses
import multiprocessing

import pytest
import torch
from corpora import MakeCorpus, random_documents
from phases_of_tests import SHORT, batches_of, blend_of, config_of

from megatron_lcl.data.loading.ledger import open_run_ledger
from megatron_lcl.data.loading.loader import read_step
from megatron_lcl.data.loading.rules import CAPTIONED_PAIRS, INTERLEAVED, PAIRS
from megatron_lcl.data.pages.replay import replay_html
from megatron_lcl.errors import UserError


def test_replay_shows_documents_of_a_corpus_that_the_blend_has_lost(make_corpus: MakeCorpus) -> None:
    a, b = (make_corpus(name, random_documents(60, seed, **SHORT)) for name, seed in (("a", 14), ("b", 15)))
    both = config_of(blend_of((a.path, 1), (b.path, 1)), phases=[])
    one = config_of(a.path, phases=[])
    ledger = open_run_ledger(one, INTERLEAVED, open_run_ledger(both), 5, 20)
    page = replay_html(one, INTERLEAVED, 0, ledger=ledger)
    assert page == replay_html(both, INTERLEAVED, 0)
    assert all(f" of {corpus.path}, epoch 0" in page for corpus in (a, b))


def test_replay_refuses_a_config_that_says_other_packs(make_corpus: MakeCorpus) -> None:
    """A file whose `train.output` is a run that began with other settings."""
    config = config_of(make_corpus("c", random_documents(60, 8, **SHORT)).path, phases=[])
    ledger = open_run_ledger(config)
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=7))
    with pytest.raises(UserError, match="seed is 7, but this run began with 0"):
        replay_html(other, INTERLEAVED, 0, ledger=ledger)
    said = r"^objective\.name reads other sequences .* go back to that one or start a new run"
    with pytest.raises(UserError, match=said):
        replay_html(config, PAIRS, 0, ledger=ledger)
    of_pairs = dataclasses.replace(ledger, settings={**ledger.settings, "contrast_only": True})
    of_pairs.check(config, PAIRS)
    with pytest.raises(UserError, match=said):
        of_pairs.check(config, CAPTIONED_PAIRS)


def test_replay_knows_the_phase_of_a_step(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(150, 10, **SHORT))
    config = config_of(corpus.path)
    ledger = open_run_ledger(config)
    for step, patches, packs in ((5, 4, [18, 19]), (8, 8, [28, 29, 30, 31]), (20, 16, [76, 77, 78, 79])):
        for known in (ledger, None):
            page = replay_html(config, INTERLEAVED, step, ledger=known)
            assert f"{patches} patches" in page
            assert all(f"Pack {number}" in page for number in packs)
            assert f"Pack {packs[-1] + 1}" not in page


def test_a_step_is_read_as_the_run_reads_it(make_corpus: MakeCorpus) -> None:
    config = config_of(make_corpus("c", random_documents(150, 10, **SHORT)).path)
    workers = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=3))
    begun = open_run_ledger(config)
    skipped = begun.skip(8, 4)
    for ledger, step, packs in ((None, 0, range(4)), (begun, 5, [18, 19]), (skipped, 1, range(4, 8)),
                                (skipped, 2, range(12, 16)), (skipped, 8, range(32, 36))):  # fmt: skip
        (whole,) = batches_of(config, ledger or begun, range(step, step + 1))
        loader, children = read_step(workers, INTERLEAVED, step, ledger), multiprocessing.active_children()
        for _ in range(2):
            batches = []
            for batch in loader:
                assert multiprocessing.active_children() == children
                batches.append(batch)
            assert [batch.packs for batch in batches] == [(number,) for number in packs]
            for name in ("tokens", "positions", "targets", "images", "image_valid", "kept_patches"):
                assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), getattr(whole, name)), name
        tokens = [loader.provenance(number)[-1].stop for number in packs]
        assert tokens == [batch.num_tokens for batch in batches]
    own = [read_step(config, INTERLEAVED, 0, rank=rank, world_size=2, micro_batch=2) for rank in range(2)]
    assert [[batch.packs for batch in loader] for loader in own] == [[(0, 1)], [(2, 3)]]
    assert [batch.packs for batch in read_step(config, INTERLEAVED, 2, packs=1)] == [(8,)]
    seeded = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=7))
    for wrong, sequences, step, ledger, layout, said in (
        (config, INTERLEAVED, -1, None, {}, "step -1; steps count from 0"),
        (seeded, INTERLEAVED, 0, begun, {}, "seed is 7, but this run began with 0"),
        (config, PAIRS, 0, begun, {}, "reads other sequences"),
        (config, INTERLEAVED, 0, None, {"world_size": 3}, "not a multiple of 3 data-parallel processes"),
        (config, INTERLEAVED, 0, None, {"rank": -1}, "rank -1 of 1 processes"),
    ):
        with pytest.raises(UserError, match=said):
            read_step(wrong, sequences, step, ledger, **layout)
