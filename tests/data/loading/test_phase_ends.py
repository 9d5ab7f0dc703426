"""Where a phase ends in the midst of documents the next one goes on: of an epoch everything is read exactly once.

Also after a rewind: what its bad packs held is skipped, and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import MakeCorpus, Piece, jpeg, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading import pack_index
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.loader import loader_of
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS, Sequences

STEPS = 200
"""more than an epoch takes"""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few epochs."""
    monkeypatch.setattr(pack_index, "MIN_CHUNK", 60)


def config_of(corpora: Path | str, phases: list[dict[str, Any]], **fields: Any) -> Config:
    tree: dict[str, Any] = {
        "model.vision.image_size": 16,
        "model.vision.patch_size": 8,
        "model.language.context_length": 96,
        "data.corpora": str(corpora),
        "data.tokens_per_pack": 128,
        "data.workers": 0,
        "data.min_images": 0,
        "train.steps": STEPS,
        "train.global_batch": 2,
        "schedule.phases": json.dumps(phases),
    }
    return configs.load(None, {key: str(value) for key, value in (tree | fields).items()})


def sequences_of(
    config: Config, sequences: Sequences, packs: range = range(10**6), ledger: Ledger | None = None
) -> list[tuple[int, list[int], list[int]]]:
    """Of each sequence of the first epoch, or of some of the packs that are used, in the order in which a run reads
    them: its document, counted through all corpora, its tokens of text, and its images, as they are stored."""
    ledger, found = ledger or open_run_ledger(config, sequences), []
    corpora = [open_corpus(corpus.path) for corpus in config.data.corpora]
    firsts = dict(zip((corpus.where for corpus in corpora), np.cumsum([0, *map(len, corpora)]).tolist(), strict=False))
    sot, over = corpora[0].tokenizer.sot, set[str]()
    for phase in phases_of(config):
        reading, consumed = ledger.reading_at(phase.first, phase.config)
        last = consumed + (phase.stop - phase.first) * reading.global_batch
        reader = loader_of(reading, config.data, sequences, ledger=ledger, first_pack=consumed).reader
        for number in map(ledger.locate, range(max(consumed, packs.start), min(last, packs.stop))):
            tokens, origins = reader[(number,)].tokens.numpy(), reader.provenance(number)
            for origin in origins:
                ids, document = tokens[origin.start : origin.stop], firsts[origin.corpus] + origin.document
                if origin.epoch == 0:
                    assert origin.corpus not in over
                    found.append((document, ids[ids < sot].tolist(), [image.image for image in origin.images]))
            over.update(origin.corpus for origin in origins if origin.epoch)
            if len(over) == len(corpora):
                return found
        reader.index.close()
    return found


def numbered(num: int, seed: int, matched: bool) -> list[list[Piece]]:
    """Documents whose tokens are 0, 1, 2, … from their beginning, up to 400, and images among them."""
    rng = np.random.default_rng(seed)
    jpegs, documents = [jpeg(n) for n in range(8)], []
    for _ in range(num):
        cuts = np.unique(rng.integers(0, rng.integers(1, 400), rng.integers(1, 6)))
        texts = [list(range(a, b)) for a, b in zip([0, *cuts], cuts, strict=False) if b > a] or [[0]]
        images = [jpegs[n] for n in rng.permutation(8)[: rng.integers(0, 5)]]  # equal ones are stored once
        if matched:
            pieces: list[Piece] = [*texts, *((image, 0.9, int(rng.integers(len(texts)))) for image in images)]
        else:
            pieces = [*texts]
            for image in images:
                pieces.insert(int(rng.integers(len(pieces) + 1)), (image, None, None))
        documents.append(pieces)
    return documents


def content(documents: list[list[Piece]]) -> tuple[dict[int, Counter[int]], dict[int, int]]:
    """Of each document: its tokens, and how many images it has."""
    texts = {d: Counter(t for p in pieces if not isinstance(p, tuple) for t in p) for d, pieces in enumerate(documents)}
    return texts, {d: sum(isinstance(p, tuple) for p in pieces) for d, pieces in enumerate(documents)}


phase = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 6),
        "image_size": st.sampled_from([8, 16]),
        "context_length": st.sampled_from([24, 40, 96]),
        "tokens_per_pack": st.sampled_from([48, 64, 128]),
        "images_per_pack": st.sampled_from([1, 2, 4]),
        "global_batch": st.integers(1, 3),
    }
)


@pytest.fixture(scope="module", params=["natural", "matched", "blend"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """Corpora, for `data.corpora`, and their documents."""
    kinds = {"blend": [(12, False, 1), (8, True, 2)]}.get(request.param, [(20, request.param == "matched", 1)])
    folder, blend, all_documents = tmp_path_factory.mktemp("ends"), [], []
    for number, matched, weight in kinds:
        documents = numbered(number, 5, matched)
        path = write_corpus(folder / f"{number}", documents, 2, "mmc4" if matched else "jsonl").path
        blend.append({"path": str(path), "weight": weight})
        all_documents += documents
    return json.dumps(blend), all_documents


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(phases=st.lists(phase, min_size=1, max_size=4))
def test_an_epoch_has_every_token_and_image_once_wherever_phases_end(
    written: tuple[str, list[list[Piece]]], phases: list[dict[str, Any]]
) -> None:
    corpora, documents = written
    each_once(sequences_of(config_of(corpora, phases, **EVERY_IMAGE), INTERLEAVED), documents)


EVERY_IMAGE = {"data.max_images_per_segment": 9, "data.max_images": 9}


def each_once(sequences: list[tuple[int, list[int], list[int]]], documents: list[list[Piece]]) -> None:
    texts, images = defaultdict(Counter), defaultdict(list)
    for document, text, seen in sequences:
        texts[document].update(text)
        images[document] += seen
    tokens, counts = content(documents)
    assert texts == tokens
    for document, count in counts.items():
        assert len(images[document]) == len(set(images[document])) == count


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    phases=st.lists(phase, min_size=1, max_size=4),
    bad=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 8)), min_size=1, max_size=3),
)
def test_a_rewind_skips_what_its_bad_packs_held_wherever_phases_end(
    written: tuple[str, list[list[Piece]]], phases: list[dict[str, Any]], bad: list[tuple[int, int]]
) -> None:
    """Bad packs of several phases, where the run goes back into the first of them; and again, to packs behind those."""
    corpora, documents = written
    config = config_of(corpora, phases, **EVERY_IMAGE)
    ledger, skipped = open_run_ledger(config), []
    for first, count in sorted(bad):
        skipped += sequences_of(config, INTERLEAVED, range(first, first + count), ledger)
        ledger = open_run_ledger(config, INTERLEAVED, ledger.skip(first, count), 0, 0)
    each_once(skipped + sequences_of(config, INTERLEAVED, ledger=ledger), documents)


def test_the_next_phase_goes_on_where_the_document_was_cut(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", [[list(range(100))]])
    short = {"steps": 1, "context_length": 34, "tokens_per_pack": 34, "global_batch": 1}
    longer = {"steps": 1, "context_length": 50, "tokens_per_pack": 50, "global_batch": 1}
    config = config_of(corpus.path, [short, longer])
    in_order = open_run_ledger(config, version=2)  # later ones put the parts, each a pack, in a random order
    found = [text for _, text, _ in sequences_of(config, INTERLEAVED, range(3), in_order)]
    assert found == [list(range(32)), list(range(32, 80)), list(range(80, 100))]


def test_each_pair_of_a_document_is_read_once(make_corpus: MakeCorpus) -> None:
    """Pairs are sequences of their own; a phase may end between those of a document."""
    documents = numbered(30, 6, matched=False)
    corpus = make_corpus("c", documents, num_shards=2)
    phases = [
        {"steps": 3, "context_length": 24, "tokens_per_pack": 64, "images_per_pack": 2},
        {"steps": 4, "context_length": 40, "images_per_pack": 3},
    ]
    images = defaultdict(list)
    for document, _, seen in sequences_of(config_of(corpus.path, phases), PAIRS):
        images[document] += seen
    for document, count in content(documents)[1].items():
        assert len(images[document]) == len(set(images[document])) == count
