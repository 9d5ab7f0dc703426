"""A run with phases: what each reads, that documents are neither lost nor repeated between them, patch dropout."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from corpora import MakeCorpus, random_documents
from phases_of_tests import EARLY, SHORT, STEPS, batches_of, blend_of, config_of

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading import ledger as ledger_module
from megatron_lcl.data.loading import pack_index, packing
from megatron_lcl.data.loading.chunks import range_of
from megatron_lcl.data.loading.ledger import Ledger, open_ledger, open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.reader import draw_patches
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.data.loading.source import VERSION
from megatron_lcl.data.pages.replay import replay_html
from megatron_lcl.errors import UserError

BEFORE_TURNS = "7068c13f2244242a253251fdd6cf88d47129512ca9d616c1cf422503615a5c73"
"""of what the version read that gave what a phase had left of a blend corpus by corpus"""
BEFORE_RESTS = "41a9cc58b555c02ccd150a2cbfd9b9979fcd7ae8355e4f254ae92b1c6d8e36b1"
"""of what the version read that left out the rest of documents which the end of a phase cut"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few epochs, so that phases begin and end in several."""
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 400)


def packs_of(config: Config, ledger: Ledger, consumed: range) -> list[np.ndarray]:
    """The entries of the packs that are used."""
    found = []
    for segment in ledger.segments:
        index = PackIndex(config.data, ledger, segment)
        found += [index[ledger.locate(c)].entries for c in consumed if ledger.segment_after(c) == segment]
        index.close()
    return found


def documents_of(config: Config, ledger: Ledger, consumed: range) -> list[tuple[int, int, tuple[int, int]]]:
    """(epoch, document, (part, where what it is a part of begins)) of the sequences in the packs that are used."""
    entries = (entry for pack in packs_of(config, ledger, consumed) for entry in pack)
    return [(int(e["epoch"]), int(e["document"]), (int(e["part"]), range_of(e)[0])) for e in entries]


def test_each_phase_reads_as_it_says(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(200, 1, **SHORT))
    config = config_of(corpus.path)
    ledger = open_run_ledger(config)
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    batches = batches_of(config, ledger, range(STEPS))
    sides = [8] * 6 + [16] * 18
    tokens = [4 * 128] * 4 + [2 * 128] * 2 + [4 * 256] * 18
    patches = [4] * 6 + [8] * 5 + [16] * 13
    for step, batch in enumerate(batches):
        assert (batch.images.shape[-1], len(batch.tokens)) == (sides[step], tokens[step])
        assert batch.num_patches == patches[step]
        images, places = int(batch.image_valid.sum()), int((batch.tokens == corpus.tokenizer.placeholder).sum())
        assert images > 0
        assert places == images * patches[step], "as many placeholders as patches that are kept"
        assert len(batch.kept_patches) == (len(batch.image_valid) * 8 if patches[step] == 8 else 0)
        assert int(np.diff(batch.cu_seqlens.numpy()).max()) <= (64 if step < 6 else 128)
    used = [pack for batch in batches for pack in batch.packs]
    assert used == list(range(4 * 4 + 2 * 2 + 4 * 18)), "packs are numbered through all phases"
    assert [segment.first_pack for segment in ledger.segments] == [0, 20, 40], "the second phase has the first's packs"


def test_a_run_of_an_earlier_version_goes_on_without_the_rests_of_documents(make_corpus: MakeCorpus) -> None:
    """Documents of one to four parts; of those that a phase has begun the next one reads no more, and of each something
    is read in every epoch, as that version planned it; of a corpus of then, whose manifest had no `contents`."""
    corpus = make_corpus("c", random_documents(150, 3, mean_text=40))
    manifest = json.loads((corpus.path / "corpus.json").read_text())
    del manifest["contents"]
    (corpus.path / "corpus.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    config = config_of(corpus.path, steps=60)
    ledger = open_run_ledger(config, version=2)
    entries = [{name: value for name, value in e.items() if name != "rests"} for e in ledger.entries]
    ledger = dataclasses.replace(ledger, entries=tuple(entries))
    seen = documents_of(config, ledger, range(220))
    plain = json.dumps([(epoch, document, part) for epoch, document, (part, _) in seen])
    assert hashlib.sha256(plain.encode()).hexdigest() == BEFORE_RESTS
    assert max(part for *_, (part, _) in seen) >= 2
    assert max(Counter(seen).values()) == 1
    epochs = [e for e, *_ in seen]
    assert sorted(epochs) == epochs, "an epoch ends before the next one"
    assert max(epochs) >= 2, "some are over, with phases that ended in their midst"
    for epoch in range(max(epochs)):
        assert {d for e, d, _ in seen if e == epoch} == set(range(150))
    # a document of which a part was read is not begun anew in the next phase, whose parts are others
    for boundary in (20, 40):
        before, after = (documents_of(config, ledger, r) for r in (range(boundary), range(boundary, 220)))
        assert {(e, d) for e, d, _ in before}.isdisjoint((e, d) for e, d, _ in after)


def test_a_run_of_an_earlier_version_goes_on_corpus_by_corpus(make_corpus: MakeCorpus) -> None:
    """Its entries have `rests: true`, those of what it skipped too. Today's chunks in its cache are no use to it."""
    corpora = [make_corpus(name, random_documents(60, seed, mean_text=40)) for name, seed in (("a", 3), ("b", 4))]
    config = config_of(blend_of(*((corpus.path, 1) for corpus in corpora)), steps=60)
    today = open_run_ledger(config, version=2).skip(36, 8)

    def as_then(entry: dict[str, Any]) -> dict[str, Any]:
        if "plan" in entry:
            return {**entry, "plan": {**entry["plan"], "rests": True}}
        return {**entry, "rests": True} if "phase" in entry else entry

    ledger = Ledger.from_json({**today.to_json(), "entries": [as_then(entry) for entry in today.entries]})
    assert [segment.rests for segment in ledger.segments][1:] == [1] * (len(ledger.segments) - 1)
    new = packs_of(config, today, range(80))
    for went_on in (ledger, open_run_ledger(config, INTERLEAVED, ledger, 15, 56)):
        packs = [pack.tolist() for pack in packs_of(config, went_on, range(80))]
        assert hashlib.sha256(json.dumps(packs).encode()).hexdigest() == BEFORE_TURNS
    assert packs != [pack.tolist() for pack in new]


def test_what_is_read_where_a_run_goes_on_is_known_before(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that reads a, then b, then c, its phase ending in the midst of all that: what it opens to go on."""
    monkeypatch.setattr(pack_index, "FIRST_CHUNK", 8)
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 40)
    paths = [make_corpus(name, random_documents(80, ord(name), **SHORT)).path for name in "abc"]
    ledger: Ledger | None = None
    opened = set[str]()
    open_source = pack_index.open_source

    def spy(corpus: Any, *arguments: Any, **options: Any) -> Any:
        opened.add(corpus.fingerprint)
        return open_source(corpus, *arguments, **options)

    monkeypatch.setattr(pack_index, "open_source", spy)
    seen = set()
    for path, steps in zip(paths, (range(11), range(11, 14), range(14, 40)), strict=True):
        config = config_of(path, steps=40, phases=[{**EARLY[0], "steps": 12}])
        ledger = open_run_ledger(config, INTERLEAVED, ledger, steps[0], 4 * steps[0])
        for step in steps:
            segment = ledger.segment_after(4 * step)
            before = PackIndex(config.data, ledger, segment)
            before.prepare(4 * step)
            ledger = before.ledger_at(4 * step)  # as a checkpoint has it
            opened.clear()
            PackIndex(config.data, ledger, segment).prepare(4 * step)
            said = {corpus["fingerprint"] for corpus in ledger.read_at(4 * step)}
            assert said == opened
            seen.add((len(said), segment.number))
    assert {(1, 0), (2, 1)} < seen, "also what the phase before has left"


@pytest.mark.parametrize("weights", [(1, 1), (3, 1)])
def test_what_a_phase_leaves_of_a_blend_is_read_in_its_shares(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: tuple[float, float]
) -> None:
    """The first phase ends in the first third of the window that its packs are planned from."""
    a, b = (make_corpus(name, random_documents(400, seed, mean_text=10)) for name, seed in (("a", 11), ("b", 12)))
    phase = {"steps": 25, "image_size": 8, "context_length": 64, "tokens_per_pack": 128}
    config = config_of(blend_of((a.path, weights[0]), (b.path, weights[1])), steps=400, phases=[phase])

    def left(version: int) -> tuple[float, np.ndarray, np.ndarray]:
        """A's share of the tokens that are left; how far it is ahead behind each sequence; documents' tokens."""
        ledger = open_run_ledger(config, version=version)
        reading, consumed = ledger.reading_at(25, config)
        reader = loader_of(reading, config.data, INTERLEAVED, ledger=ledger, first_pack=consumed).reader
        packs = (reader.provenance(number) for number in itertools.count(consumed))
        origins = itertools.chain.from_iterable(
            itertools.takewhile(lambda pack: not any(origin.epoch for origin in pack), packs)
        )
        rows = [(o.corpus == str(a.path), o.stop - o.start, o.document) for o in origins]
        of_a, tokens, documents = np.array(rows).T
        share = float(tokens[of_a == 1].sum() / tokens.sum())
        return share, np.cumsum(tokens * (of_a - share)), np.bincount(2 * documents + of_a, tokens)

    share, ahead, _ = left(VERSION)
    assert share == pytest.approx(weights[0] / sum(weights), abs=0.03)
    assert len(ahead) > 200
    assert np.abs(ahead).max() < 4 * 256, "four packs, where they come in a random order"
    _, ahead, _ = left(2)
    assert np.abs(ahead).max() < 2 * 256, "two packs"
    monkeypatch.setattr(packing, "best_fit", as_they_come)
    own_chunks = dataclasses.replace(config.data, cache=str(tmp_path / "as they come"))
    config = dataclasses.replace(config, data=own_chunks)
    _, ahead, documents = left(2)
    assert np.abs(ahead).max() <= documents.max(), "one document, where packs take them in order"


def as_they_come(tokens: np.ndarray, images: np.ndarray, *limits: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(tokens), dtype=np.int32), packing.next_fit(tokens, images, *limits[:3])


def test_a_saved_ledger_gives_the_same_packs_with_an_empty_cache(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus("c", random_documents(150, 4, mean_text=40))
    config = config_of(corpus.path, **{"data.cache": tmp_path / "one"})
    ledger = open_run_ledger(config)
    reading, consumed = ledger.reading_at(12, config)
    loader = loader_of(reading, config.data, INTERLEAVED, ledger=ledger, first_pack=consumed, global_batch=4)
    saved = Ledger.from_json(json.loads(json.dumps(loader.ledger_after(consumed + 8).to_json())))
    fresh = config_of(corpus.path, **{"data.cache": tmp_path / "two"})
    went_on = open_run_ledger(fresh, INTERLEAVED, saved, 14, consumed + 8)
    assert went_on == ledger
    there, back = documents_of(config, ledger, range(96)), documents_of(fresh, went_on, range(96))
    assert there == back
    assert any(begin for *_, (_, begin) in there), "rests of documents are among them"
    assert len(there) > 200


def test_skipped_packs_between_phases(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(150, 5, **SHORT))
    config = config_of(corpus.path)
    plain = open_run_ledger(config)
    before = plain.skip(10, 4)  # in the first phase: the next one begins four packs later
    assert [s.first_pack for s in before.segments] == [0, 24, 44]
    at = plain.skip(20, 3)  # the first packs of the next one, not the last ones of the one before
    assert [s.first_pack for s in at.segments] == [0, 20, 43]
    assert at.locate(20) == 23
    used = documents_of(config, at, range(90))
    assert max(Counter(used).values()) == 1
    skipped = set(documents_of(config, plain, range(20, 23)))
    assert skipped.isdisjoint(used[: len(documents_of(config, plain, range(40)))])


def test_a_ledger_of_many_rewinds_counts_them_once() -> None:
    """`locate` is asked for each pack that is read."""
    plan = {"tokens_per_pack": 8, "images_per_pack": 2, "num_patches": 4, "context_length": 8}
    rng = np.random.default_rng(0)
    ledger, used = Ledger(dict(plan)), list(range(3000))
    for _ in range(40):
        at, count = int(rng.integers(1500)), int(rng.integers(1, 20))
        ledger = ledger.skip(at, count)
        del used[at : at + count]
    assert [ledger.locate(consumed) for consumed in range(2000)] == used[:2000]
    below = np.searchsorted(used, np.arange(2000)).tolist()
    assert [ledger._used_before(pack) for pack in range(2000)] == below
    again = Ledger.from_json(ledger.to_json())
    with mock.patch.object(ledger_module, "sorted", create=True, side_effect=sorted) as sorting:
        for consumed in range(9):
            again.locate(consumed)
            again.ranges(consumed, 9)
            again.segment_after(consumed)
    assert sorting.call_count <= 3, "the skipped packs, the phases and where segments begin"
    assert again == ledger
    assert again.segments is again.segments


def test_packs_skipped_across_the_end_of_a_phase(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    """The last packs of one phase and the first of the next: both phases go on behind them, as one loader reads it."""
    corpus = make_corpus("c", random_documents(150, 5, **SHORT))
    config = config_of(corpus.path, **{"data.cache": tmp_path / "one"})
    plain = open_run_ledger(config)
    ledger = plain.skip(18, 4)
    assert [(s.first_pack, s.consumed) for s in ledger.segments] == [(0, 0), (20, 18), (22, 18), (24, 20), (44, 40)]
    plans = [entry["plan"]["tokens_per_pack"] for entry in ledger.entries if "skip" in entry]
    assert plans == [128, 256]
    bad, read = documents_of(config, plain, range(18, 22)), documents_of(config, ledger, range(60))
    assert max(Counter(bad + read).values()) == 1
    assert {document for epoch, document, _ in bad + read if epoch == 0} == set(range(150))
    # of the phase gone back to, from before the packs that were skipped to behind them; and a run that goes on there
    reading, _ = ledger.reading_at(4, config)
    options: dict[str, Any] = {"global_batch": 2, "micro_batch": 2}
    loader = loader_of(reading, config.data, INTERLEAVED, ledger=ledger, first_pack=16, steps=2, **options)
    assert [batch.packs for batch in loader] == [(16, 17), (22, 23)]
    given = Counter(origin.document for pack in (16, 17, 22, 23) for origin in loader.provenance(pack))
    assert given == Counter(document for _, document, _ in documents_of(config, ledger, range(16, 20)))
    saved = Ledger.from_json(json.loads(json.dumps(loader.ledger_after(18).to_json())))
    assert saved == ledger
    fresh = config_of(corpus.path, **{"data.cache": tmp_path / "two"})
    went_on = open_run_ledger(fresh, INTERLEAVED, saved, 5, 18)
    assert went_on.segments == ledger.segments
    assert documents_of(fresh, went_on, range(60)) == read
    # what was skipped stays as it was planned, also where the phase that was gone back from is another now
    other = config_of(corpus.path, phases=[*EARLY[:2], {"steps": 5, "tokens_per_pack": 192}])
    replaced = open_run_ledger(other, INTERLEAVED, ledger, 4, 16)
    planned = [(s.first_pack, s.settings["tokens_per_pack"]) for s in replaced.segments]
    assert planned == [(0, 128), (20, 256), (22, 128), (24, 192), (44, 256)]
    seen = documents_of(other, replaced, range(60))
    assert max(Counter(bad + seen).values()) == 1


def test_what_earlier_versions_skipped_is_read_as_they_did(make_corpus: MakeCorpus) -> None:
    """Without a plan: by number, whatever the phase."""
    corpus = make_corpus("c", random_documents(150, 5, **SHORT))
    plain = open_run_ledger(config_of(corpus.path))
    for skip, first_packs in (((18, 4), [0, 24, 44]), ((20, 3), [0, 20, 43]), ((10, 4), [0, 24, 44])):
        entry = dict(zip(("from_pack", "skip"), skip, strict=True))
        ledger = Ledger.from_json({**plain.to_json(), "entries": [*plain.entries, entry]})
        assert [s.first_pack for s in ledger.segments] == first_packs
        assert ledger.segment_after(19).first_pack == 0
        once_more = ledger.skip(38, 4)
        assert [s.first_pack for s in once_more.segments][:2] == first_packs[:2]
        assert once_more.segments[2].consumed == 38


def test_without_phases_a_ledger_is_as_it_was(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(40, 6, **SHORT))
    config = config_of(corpus.path, phases=[])
    ledger = open_run_ledger(config)
    assert ledger.to_json() == open_ledger(config.data, 16, 128).to_json()
    assert ledger.reading_at(3, config)[1] == 12
    lighter = config_of(corpus.path, phases=[{"steps": 3, "contrastive_weight": 1.0}])
    assert len(phases_of(lighter)) == 2
    assert [s.number for s in open_run_ledger(lighter).segments] == [0], "what is read does not change"


def test_phases_to_come_may_change_and_those_that_were_may_not(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(100, 7, **SHORT))
    ledger = open_run_ledger(config_of(corpus.path))
    longer = [EARLY[0], {**EARLY[1], "steps": 4}]
    changed = config_of(corpus.path, phases=longer)
    later = open_run_ledger(changed, INTERLEAVED, ledger, 5, 18)
    assert [e["from_step"] for e in later.phases] == [0, 4, 8]
    assert [e["consumed"] for e in later.phases] == [0, 16, 24]
    # a run that began without phases
    plain = open_run_ledger(config_of(corpus.path, phases=[]))
    fields = {"model.vision.patch_dropout": 0.5, "model.vision.unmasked_steps": 4}
    dropping = config_of(corpus.path, phases=[], **fields)
    masked = open_run_ledger(dropping, INTERLEAVED, plain, 10, 40)
    assert [(e["from_step"], e["consumed"], e["phase"]["num_patches"]) for e in masked.phases] == [
        (0, 0, 16), (10, 40, 8), (20, 80, 16),
    ]  # fmt: skip
    with pytest.raises(UserError, match="min_images is 0, but this run began with 1"):
        open_run_ledger(config_of(corpus.path, **{"data.min_images": 0}), INTERLEAVED, ledger, 5, 18)
    with pytest.raises(UserError, match="tokens_per_pack is 128, but this run began with 256"):
        open_run_ledger(config_of(corpus.path, phases=[], **{"data.tokens_per_pack": 128}), INTERLEAVED, plain, 5, 20)


def test_phases_to_come_keep_the_image_slots_that_were_chosen(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a later version would choose them."""
    config = config_of(make_corpus("c", random_documents(100, 7, **SHORT)).path)
    ledger = open_run_ledger(config)
    assert 2 not in {e["phase"]["images_per_pack"] for e in ledger.phases}
    monkeypatch.setattr(packing, "choose_images_per_pack", lambda *_, **__: 2)
    assert open_run_ledger(config, INTERLEAVED, ledger, 2, 8) == ledger


def test_a_run_resumed_with_another_batch_knows_what_its_steps_read(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(100, 13, **SHORT))
    narrow, wide = (config_of(corpus.path, phases=[], **{"train.global_batch": batch}) for batch in (2, 4))
    before = open_run_ledger(narrow)
    assert open_run_ledger(narrow, INTERLEAVED, before, 5, 10) == before
    ledger = open_run_ledger(wide, INTERLEAVED, before, 5, 10)
    assert [ledger.reading_at(step, wide)[1] for step in (0, 3, 5, 7)] == [0, 6, 10, 18]
    assert [ledger.reading_at(step, wide)[0].global_batch for step in (3, 7)] == [2, 4]
    assert replay_html(wide, INTERLEAVED, 3, ledger=ledger) == replay_html(narrow, INTERLEAVED, 3, ledger=before)
    assert [pack.tolist() for pack in packs_of(wide, ledger, range(40))] == [
        pack.tolist() for pack in packs_of(narrow, before, range(40))
    ]
    assert open_run_ledger(wide, INTERLEAVED, ledger, 7, 18) == ledger
    assert open_run_ledger(wide, INTERLEAVED, ledger, 5, 10) == ledger
    for known, step, consumed in ((before, 5, 10), (ledger, 7, 18)):
        for name, value in (("tokens_per_pack", 128), ("images_per_pack", 7)):
            changed = config_of(corpus.path, phases=[], **{f"data.{name}": value})
            message = (
                f"{name} is {value}, but this run began with .* give schedule.phases an entry with the {name} so far"
            )
            with pytest.raises(UserError, match=message):
                open_run_ledger(changed, INTERLEAVED, known, step, consumed)
            entry = {"steps": step, "global_batch": known.reading_at(step - 1, narrow)[0].global_batch}
            entry[name] = known.settings[name]
            as_told = config_of(corpus.path, phases=[entry], **{f"data.{name}": value})
            (later,) = open_run_ledger(as_told, INTERLEAVED, known, step, consumed).segments[1:]
            assert (later.first_pack, later.settings[name]) == (consumed, value)


# --- patch dropout -----------------------------------------------------------------------------------------------


def dropped(path: Path, places: str = "kept", **fields: Any) -> Config:
    wanted = {"model.vision.patch_dropout": 0.75, "model.vision.patch_dropout_places": places}
    return config_of(path, phases=[], **wanted, **fields)


def test_kept_patches_are_drawn_by_seed_pack_and_slot() -> None:
    draws = np.array([draw_patches(3, pack, slot, 49, 12) for pack in range(60) for slot in range(50)])
    assert draws.shape == (3000, 12)
    assert (np.diff(draws, axis=1) > 0).all(), "ascending, none twice"
    assert draws.min() == 0
    assert draws.max() == 48
    expected, deviation = 3000 * 12 / 49, (3000 * 12 / 49 * (1 - 12 / 49)) ** 0.5
    assert (np.abs(np.bincount(draws.ravel()) - expected) < 5 * deviation).all(), "each patch is as likely"
    together = sum(5 in row and 6 in row for row in draws)
    pairs = 3000 * 12 * 11 / (49 * 48)
    assert abs(together - pairs) < 5 * pairs**0.5, "and so is each pair"
    assert len({tuple(row) for row in draws}) == 3000
    assert (draw_patches(3, 7, 5, 49, 12) == draws[7 * 50 + 5]).all()
    assert (draw_patches(4, 7, 5, 49, 12) != draws[7 * 50 + 5]).any()


def test_patches_that_are_kept_are_the_same_at_every_layout(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(150, 8, **SHORT))
    config = dropped(corpus.path)
    ledger = open_run_ledger(config)
    whole = batches_of(config, ledger, range(2))
    reading, _ = ledger.reading_at(0, config)
    assert whole[0].num_patches == 4 == config.model.vision.num_kept
    slots = len(whole[0].image_valid) // 4
    kept = [batch.kept_patches.reshape(4, slots, 4) for batch in whole]
    assert kept[0].shape == kept[1].shape, "static"
    for rank in range(2):
        loader = loader_of(
            reading, dataclasses.replace(config.data, workers=1), INTERLEAVED, ledger=ledger, steps=2, global_batch=4,
            rank=rank, world_size=2,
        )  # fmt: skip
        for number, batch in enumerate(loader):
            step, micro = divmod(number, 2)
            assert (batch.kept_patches.reshape(slots, 4) == kept[step][2 * micro + rank]).all()
            assert (batch.kept_patches.reshape(slots, 4).numpy() == draw_rows(batch.packs[0], slots)).all()


def draw_rows(pack: int, slots: int) -> np.ndarray:
    return np.array([draw_patches(0, pack, slot, 16, 4) for slot in range(slots)])


def test_fewer_placeholders_make_room_for_documents(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(150, 9, **SHORT))
    images = {}
    for name, config in {
        "none": config_of(corpus.path, phases=[]),
        "all": dropped(corpus.path, "all"),
        "kept": dropped(corpus.path),
    }.items():
        (batch,) = batches_of(config, open_run_ledger(config), range(1))
        images[name] = batch.num_images
        at = batch.image_start[batch.image_start >= 0]
        run = config.model.vision.num_placeholders
        assert (batch.tokens[at[:, None] + torch.arange(run)] == corpus.tokenizer.placeholder).all()
        assert (batch.tokens[at + run] == corpus.tokenizer.eoi).all()
    assert images["all"] == images["none"]
    assert images["kept"] > 1.5 * images["none"]
