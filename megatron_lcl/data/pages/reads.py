"""Which steps of a run read a document: the way back from `replay`, from the same plan. No image is read."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from megatron_lcl.config import Config
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading.blend import corpora_read
from megatron_lcl.data.loading.hashes import places_of
from megatron_lcl.data.loading.ledger import Ledger, Segment, open_run_ledger
from megatron_lcl.data.loading.pack_index import PackIndex, order_key
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.source import source_key
from megatron_lcl.errors import UserError
from megatron_lcl.units import counted


class Read(NamedTuple):
    """A document in a pack."""

    step: int | None
    """counted from 0; None: a rewind has skipped the pack"""
    pack: int
    epoch: int
    corpus: str
    """its fingerprint"""
    document: int
    """its number in the corpus"""


def found_reads(
    config: Config, sequences: Sequences, source: str, steps: int, done: int, ledger: Ledger | None = None
) -> str:
    """A line for each time that one of a run's first `steps` steps reads a document whose source has `source` in it.

    done: how many of the steps are made. sequences, ledger: as of `replay_html`. UserError where no corpus of the run
    is here, or none of them has such a document.
    """
    if ledger is not None:
        ledger.check(config, sequences)
    ledger = ledger or open_run_ledger(config, sequences)
    index = PackIndex(config.data, ledger)
    read = corpora_read(ledger.entries)
    found = ((c.fingerprint, index.corpus(c.fingerprint)) for c in read)
    corpora = {fingerprint: corpus for fingerprint, corpus in found if corpus is not None}
    lines = [
        f"{c.paths[0]} is not here: what it held cannot be looked up" for c in read if c.fingerprint not in corpora
    ]
    documents = {name: np.fromiter(corpus.find(source), np.int64) for name, corpus in corpora.items()}
    num = sum(map(len, documents.values()))
    if not num:
        raise UserError("; ".join([f"no document of this run's corpora has {source!r} in its source", *lines]))
    reads = reads_of(config, ledger, {corpora[name]: numbers for name, numbers in documents.items()}, steps)
    of_document: dict[tuple[str, int], list[Read]] = {}
    for each in reads:
        of_document.setdefault((each.corpus, each.document), []).append(each)
    for name, corpus in corpora.items():
        for number in documents[name].tolist():
            lines.append(f"{corpus.where}, document {number}: {corpus.name(number)}")
            own = of_document.get((name, number), [])
            lines += [f"  {_when(each.step, done)}, pack {each.pack}, epoch {each.epoch}" for each in own]
    until = f"steps 0 to {steps - 1}" + (f", of which {done} are made" if done < steps else "")
    return "\n".join([*lines, f"{until}: read {counted(len(reads), 'time')}, of {counted(num, 'document')}"])


def _when(step: int | None, done: int) -> str:
    if step is None:
        return "skipped by a rewind"
    return f"step {step}" + (" (to come)" if step >= done else "")


def reads_of(config: Config, ledger: Ledger, documents: Mapping[Corpus, np.ndarray], steps: int) -> list[Read]:
    """When the first `steps` steps of a run read some documents, in the order of the packs.

    documents: int64 numbers in their corpora. Of what the ledger knows where it begins only chunks of packs are looked
    at that have drawn one of them: where a document stands in the order of an epoch is computed.
    """
    consumed = ledger.reading_at(steps, config)[1]
    end = ledger.locate(consumed - 1) + 1 if consumed else 0
    segments, found = ledger.segments, []
    for segment, following in itertools.zip_longest(segments, segments[1:]):
        stop = min(end, following.first_pack) if following else end
        found += _of_segment(config, ledger, segment, documents, stop)

    def step_of(pack: int) -> int | None:
        before = bisect.bisect_left(range(pack + 1), pack, key=ledger.locate)
        if ledger.locate(before) != pack:
            return None
        return bisect.bisect_right(range(steps), before, key=lambda step: ledger.reading_at(step, config)[1]) - 1

    return [Read(step_of(pack), pack, epoch, corpus, document) for pack, epoch, corpus, document in found]


def _of_segment(
    config: Config, ledger: Ledger, segment: Segment, documents: Mapping[Corpus, np.ndarray], stop: int
) -> list[tuple[int, int, str, int]]:
    """(pack, epoch, corpus, document), ascending: where a segment's packs before `stop` hold documents."""
    fingerprints = {corpus.fingerprint: corpus for corpus in documents}

    @functools.lru_cache(maxsize=len(documents) + 1)
    def places(name: str, epoch: int) -> np.ndarray:
        corpus = fingerprints[name]
        drawn_from = order_key(source_key(segment.settings["seed"], name), epoch)
        return places_of(drawn_from, len(corpus), documents[corpus])

    def wanted(begin: dict[str, Any], end: dict[str, Any]) -> bool:
        if "left" in begin:  # of what the segment before has drawn
            return True
        for name, corpus in fingerprints.items():
            first, last = (state["positions"].get(name, [0, 0]) for state in (begin, end))
            if not len(documents[corpus]) or first == last:
                continue
            if last[0] - first[0] > 1:
                return True
            for epoch in {first[0], last[0]}:
                start = first[1] if epoch == first[0] else 0
                until = last[1] if epoch == last[0] else len(corpus)
                at = places(name, epoch)
                if ((at >= start) & (at < until)).any():
                    return True
        return False

    found: set[tuple[int, int, str, int]] = set()
    for chunk, entries, offsets in PackIndex(config.data, ledger, segment).chunks_until(stop, wanted):
        for number, name in enumerate(chunk.corpora):
            if name in fingerprints:
                own = (entries["corpus"] == number) & np.isin(entries["document"], documents[fingerprints[name]])
                rows = np.flatnonzero(own)
                packs = chunk.first + np.searchsorted(offsets, rows, "right") - 1
                for pack, entry in zip(packs.tolist(), entries[rows], strict=True):
                    if pack < stop:
                        found.add((pack, int(entry["epoch"]), name, int(entry["document"])))
    return sorted(found)
