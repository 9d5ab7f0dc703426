"""What is chosen from all documents, once for all jobs and all who resume them: those to hold out, and a tokenizer.

Both come of sums of floating-point numbers, and the first of decoded images too, so another processor or another
release of a library may choose otherwise. Therefore the choice is kept in the work folder, and all read it there.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.scratch import put_in_place
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.prepare import train_tokenizer
from megatron_lcl.data.prepare.bars import Bars
from megatron_lcl.data.prepare.budget import nothing_left
from megatron_lcl.data.prepare.faulty_documents import naming_faulty_documents
from megatron_lcl.data.prepare.holdout import Described, Describer, Grouping, group_name
from megatron_lcl.data.prepare.importers import Importer, Unit, separated
from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.filesystem import exists, matching

FOLDER = "chosen"
"""in the work folder"""
_GROUPS = "held-out.json"
_UNITS = 256
"""the least number of places of an input from which texts are taken that a tokenizer is trained on, if not all are"""


@dataclass(frozen=True)
class Chosen:
    """What all documents of a run are read by."""

    tokenizer: Tokenizer
    groups: frozenset[str] = frozenset()
    """names of those that are held out (`group_name`)"""


def choose(
    importer: Importer,
    tasks: list[list[Unit]],
    tokenizer: Tokenizer | None,
    held_out: tuple[float, int] | None,
    vocab_size: int,
    more_texts: Sequence[str],
    workers: int,
    bars: Bars,
) -> Chosen:
    """Read all documents to choose what is to be held out, by (fraction, seed), and to train the tokenizer if there is
    none. Unusable where there is no document; UserError as `Grouping.held_out` and `train_sentencepiece` raise it."""
    groups: frozenset[str] = frozenset()
    if held_out is not None:
        groups = _held_out_groups(importer, tasks, *held_out, workers, bars)
    return Chosen(tokenizer or _train_tokenizer(importer, tasks, groups, vocab_size, more_texts, bars), groups)


def kept(work: Path, scratch: Path, choose: Callable[[], Chosen]) -> Chosen:
    """What is chosen in the work folder; `choose` is called where there is nothing yet.

    Of several processes that choose at once, where there are no locks, all take what the first one has put there.
    scratch: a folder of this process alone, on the same file system.
    """
    folder = work / FOLDER
    if not exists(folder):
        chosen, own = choose(), scratch / FOLDER
        own.mkdir()
        chosen.tokenizer.save(own / chosen.tokenizer.file_name)
        (own / _GROUPS).write_text(json.dumps(sorted(chosen.groups)), "ascii")
        put_in_place(own, folder)
    found = matching(folder, "tokenizer.*")
    if not found:  # another process has finished and cleared up
        raise FileNotFoundError(folder)
    (tokenizer,) = found
    return Chosen(tokenizers.load(tokenizer), frozenset(json.loads((folder / _GROUPS).read_text("ascii"))))


def _held_out_groups(
    importer: Importer, tasks: list[list[Unit]], fraction: float, seed: int, workers: int, bars: Bars
) -> frozenset[str]:
    grouping, drops = Grouping(), Drops()
    units = list(itertools.chain.from_iterable(tasks))
    results = in_order(_describe_unit, (importer, Describer()), units, workers, ahead=4 * workers)
    found = False
    for described, dropped in bars.over(results, "compare images", "unit", [1] * len(units)):
        drops.add(dropped)
        for document in described:
            found = True
            grouping.add(document)
    if not found:
        raise nothing_left(drops, importer.place)
    return frozenset(grouping.held_out(fraction, seed))


def _describe_unit(shared: tuple[Importer, Describer], unit: Unit) -> tuple[list[Described], Drops]:
    importer, describer = shared
    drops = Drops()
    with naming_faulty_documents(importer, [unit]):
        return [describer.describe(document) for document in importer.documents(unit, drops)], drops


def _train_tokenizer(
    importer: Importer,
    tasks: list[list[Unit]],
    groups: frozenset[str],
    vocab_size: int,
    more_texts: Sequence[str],
    bars: Bars,
) -> Tokenizer:
    most = train_tokenizer.MAX_BYTES
    room = max(most - _size(more_texts), most // 2)
    texts = _sample(importer, list(itertools.chain.from_iterable(tasks)), groups, room, bars)
    return train_tokenizer.train_sentencepiece(itertools.chain(texts, more_texts), vocab_size)


def _sample(importer: Importer, units: list[Unit], groups: frozenset[str], room: int, bars: Bars) -> list[str]:
    """All texts that are not held out; of more than `room` bytes some from all over the input. In the input's order.

    If there are more, units that lie evenly over the bytes of the input are read again, as many as have filled the
    room, each for its share of it: a mixture is seen as one, however its sources are sorted. Unusable where there is no
    document.
    """
    drops = Drops()
    texts, left, number, found = list[str](), room, 0, False
    for unit in bars.over(units, "read texts", "unit", [1] * len(units)):
        number += 1
        own = _texts(importer, unit, groups, left, drops)
        found |= own is not None
        texts += own or []
        left -= _size(own or [])
        if left <= 0:
            break
    if not found:
        raise nothing_left(drops, importer.place)
    if left > 0:
        return texts
    number = max(number, _UNITS)
    ends = np.cumsum([max(unit.size, 1) for unit in units])
    shares = collections.Counter(np.searchsorted(ends, (np.arange(number) + 0.5) / number * ends[-1]).tolist())
    texts, left = [], room
    for n, share in bars.over(shares.items(), "sample texts", "unit", [1] * len(shares)):
        own = _texts(importer, units[n], groups, left * share // number, drops)
        texts += own or []
        left -= _size(own or [])
        number -= share
    return texts


def _texts(importer: Importer, unit: Unit, groups: frozenset[str], room: int, drops: Drops) -> list[str] | None:
    """The first `room` bytes of a unit's texts that are not held out, as they are written; None: it has no document."""
    texts: list[str] | None = None
    with naming_faulty_documents(importer, [unit]):
        for document in importer.documents(unit, drops):
            texts = texts or []
            if group_name(document) in groups:
                continue
            for text in separated(document, importer.separator, importer.kind).texts:
                if text.text.isspace():  # is not encoded; a text behind it may begin with it
                    continue
                raw = text.text.encode(errors="replace")[:room]
                texts.append(raw.decode(errors="ignore"))
                room -= len(raw)
                if room <= 0:
                    return texts
    return texts


def _size(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)
