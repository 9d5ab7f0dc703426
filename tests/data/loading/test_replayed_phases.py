"""Protects that replay shows the packs of a step where phases or the blend have changed, and none of other settings."""

from __future__ import annotations

import dataclasses

import pytest
from corpora import MakeCorpus, random_documents
from phases_of_tests import SHORT, blend_of, config_of

from megatron_lcl.data.loading.ledger import open_run_ledger
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
