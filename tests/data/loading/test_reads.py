"""Protects which steps are said to read a document: those whose batches hold it, and no chunk is built for nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from corpora import MakeCorpus, jpeg
from hypothesis import given
from hypothesis import strategies as st

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading import pack_index
from megatron_lcl.data.loading.hashes import places_of, shuffled
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.data.pages.reads import Read, found_reads, reads_of
from megatron_lcl.errors import UserError
from megatron_lcl.train.checkpoint.folder import Progress


@given(st.integers(0, 2**64 - 1), st.integers(1, 3000))
def test_places_are_where_the_permutation_has_its_elements(key: int, size: int) -> None:
    key, elements = np.uint64(key), np.arange(size)
    order = shuffled(key, size, 0, size)
    assert (places_of(key, size, order) == elements).all()
    assert (order[places_of(key, size, elements)] == elements).all()


@pytest.fixture
def blend(make_corpus: MakeCorpus) -> list[Corpus]:
    """Two corpora; some documents are cut."""
    documents = [[list(range(1 + 7 * (d % 9))), (jpeg(d % 8), None, None)] for d in range(40)]
    return [make_corpus("a", documents, num_shards=2), make_corpus("b", documents[:25][::-1])]


def config_of(corpora: list[Corpus], phases: str = "[]") -> Config:
    tree = {
        "data.corpora": str([{"path": str(corpus.path), "weight": k + 1.0} for k, corpus in enumerate(corpora)]),
        "data.tokens_per_pack": "128",
        "data.workers": "0",
        "model.vision.image_size": "16",
        "model.vision.patch_size": "8",
        "model.language.context_length": "32",
        "train.steps": "60",
        "train.global_batch": "2",
        "schedule.phases": phases,
    }
    return configs.load(overrides=tree)


def by_provenance(config: Config, ledger: Ledger, corpora: list[Corpus], steps: int) -> set[Read]:
    """What the batches of the steps hold, as their loader says."""
    fingerprints = {corpus.where: corpus.fingerprint for corpus in corpora}
    found = set()
    for step in range(steps):
        reading, first = ledger.reading_at(step, phase_at(config, step).config)
        loader = loader_of(reading, config.data, INTERLEAVED, ledger=ledger, first_pack=first)
        for number in (ledger.locate(first + k) for k in range(reading.global_batch)):
            for origin in loader.provenance(number):
                found.add(Read(step, number, origin.epoch, fingerprints[origin.corpus], origin.document))
    return found


@pytest.mark.parametrize(("documents_of_chunk", "packs"), [(1, 32), (180, 32), (1, 7)])
def test_the_steps_of_a_document_are_those_whose_batches_hold_it(
    blend: list[Corpus], documents_of_chunk: int, packs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through epochs, phases, a rewind and a change of the blend; also where an epoch has many chunks."""
    for name, value in (("MIN_CHUNK", documents_of_chunk), ("CHUNK", packs), ("FIRST_CHUNK", documents_of_chunk)):
        monkeypatch.setattr(pack_index, name, value)
    both = config_of(blend, '[{"steps": 9, "context_length": 16, "tokens_per_pack": 64, "global_batch": 3}]')
    config = dataclasses.replace(both, data=config_of(blend[:1]).data)
    ledger = open_run_ledger(both).skip(33, 4)
    ledger = open_run_ledger(config, INTERLEAVED, ledger, 25, 9 * 3 + 16 * 2)
    steps = 40
    expected = by_provenance(config, ledger, blend, steps)
    assert len({read.epoch for read in expected}) > 2
    assert len({read.corpus for read in expected if read.step and read.step > 35}) == 1
    numbers = {corpus: np.arange(len(corpus)) for corpus in blend}
    found = reads_of(config, ledger, numbers, steps)
    skipped = [read for read in found if read.step is None]
    assert sorted({read.pack for read in skipped}) == [33, 34, 35, 36]
    assert set(found) - set(skipped) == expected
    assert [read.pack for read in found] == sorted(read.pack for read in found)
    assert reads_of(config, ledger, numbers, 12) == [read for read in found if read.pack < 33], (
        "none that is skipped next"
    )
    for corpus in blend:
        for number in range(0, len(corpus), 2):
            own = [read for read in found if (read.corpus, read.document) == (corpus.fingerprint, number)]
            assert reads_of(config, ledger, {corpus: np.array([number])}, steps) == own
            assert own


def test_only_chunks_are_built_that_hold_the_document(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run whose ledger knows where they begin, on a machine with an empty cache."""
    for name, value in (("MIN_CHUNK", 1), ("CHUNK", 50), ("FIRST_CHUNK", 1)):
        monkeypatch.setattr(pack_index, name, value)
    corpus = make_corpus("c", [[[d, d], (jpeg(d % 8), None, None)] for d in range(400)])
    config = config_of([corpus])
    index = PackIndex(config.data, open_run_ledger(config))
    assert index[119].number == 119
    ledger = index.ledger_at(119)
    assert len(ledger.states) > 10
    expected = by_provenance(config, ledger, [corpus], 60)
    there = dataclasses.replace(config, data=dataclasses.replace(config.data, cache=str(tmp_path / "empty")))
    with patch.object(PackIndex, "_build_chunk", autospec=True, side_effect=PackIndex._build_chunk) as built:
        found = reads_of(there, ledger, {corpus: np.array([123])}, 60)
    assert set(found) == {read for read in expected if read.document == 123}
    assert len(found) >= built.call_count - 1 > 0, "one an epoch, and the last, which no state ends"
    for stride in (4, 9, 14):  # of a long run only some states are kept, between which an epoch may end
        few = dataclasses.replace(ledger, states=ledger.states[::stride])
        for number in range(0, 400, 9):
            found = reads_of(there, few, {corpus: np.array([number])}, 60)
            assert set(found) == {read for read in expected if read.document == number}


def test_what_is_printed(blend: list[Corpus]) -> None:
    """By a part of the source's name; what is not made yet is said to be to come."""
    a, b = blend
    config = config_of([a, b])
    name = a.name(17)
    reads = [r for r in by_provenance(config, open_run_ledger(config), blend, 60) if r.document == 17]
    own = sorted((r.step, r.pack, r.epoch) for r in reads if r.corpus == a.fingerprint)
    done = own[1][0]
    assert done > own[0][0]
    lines = found_reads(config, INTERLEAVED, name, 60, done).splitlines()
    start = lines.index(f"{a.where}, document 17: {name}") + 1
    assert lines[start : start + len(own)] == [
        f"  step {step}{' (to come)' * (step >= done)}, pack {pack}, epoch {epoch}" for step, pack, epoch in own
    ]
    assert lines[-1] == f"steps 0 to 59, of which {done} are made: read {len(reads)} times, of 2 documents"
    ledger = open_run_ledger(config)
    gone = dataclasses.replace(
        ledger,
        entries=tuple({**e, "blend": [{**c, "path": c["path"] + "-"} for c in e["blend"]]} for e in ledger.entries),
    )
    only = dataclasses.replace(config, data=config_of([b]).data)
    with pytest.raises(UserError, match=f"has 'no such' in its source; {a.path}- is not here: what it held cannot"):
        found_reads(only, INTERLEAVED, "no such", 60, 0, gone)


def test_the_command(blend: list[Corpus], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a config without a run all its steps; of a run those that its newest checkpoint has, or as many as are asked
    for. What is of a page is refused."""
    config = dataclasses.replace(
        config_of(blend), train=dataclasses.replace(config_of(blend).train, output=str(tmp_path))
    )
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(config))
    words = ["replay", str(file), "--source", blend[0].name(17)]
    assert main(words) == 0
    of_all = capsys.readouterr().out
    assert of_all.splitlines()[-1].startswith("steps 0 to 59, of which 0 are made: read ")
    assert main([*words, "--step", "1000"]) == 0
    assert capsys.readouterr().out == of_all, "no steps behind the end"
    with patch("megatron_lcl.train.checkpoint.folder.last_progress") as progress:
        progress.return_value = Progress(7, 14, open_run_ledger(config).to_json())
        assert main(words) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("steps 0 to 6: read ")
        assert main([*words, "--step", "9"]) == 0
        assert capsys.readouterr().out.splitlines()[-1].startswith("steps 0 to 8, of which 7 are made: read ")
    for more, said in (
        (["--packs", "1:2"], "--packs is of a page; give --source without it"),
        (["--step", "0"], "--step 0: --source looks at the steps before it; give 1 or more"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(words[:2]) == 2
    assert "give --step N for a page of its batch, or --source NAME" in capsys.readouterr().err
