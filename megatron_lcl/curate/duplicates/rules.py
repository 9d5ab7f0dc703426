"""Duplicates and evaluation images as rules of `curate` (`joins.Join`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from megatron_lcl.curate.documents import Gone, Range, ranges
from megatron_lcl.curate.duplicates.evaluation import (
    contamination_facts,
    evaluation_facts,
    join_evaluation,
    open_index,
    open_set,
    write_index,
)
from megatron_lcl.curate.duplicates.facts import Facts, document_facts, image_facts
from megatron_lcl.curate.duplicates.join import Removals, join_documents, join_images
from megatron_lcl.curate.duplicates.settings import Decontamination, DocumentDuplicates, ImageDuplicates
from megatron_lcl.curate.joins import REMOVED
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.prepare.preprocess import TASK_BYTES
from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.errors import UserError

_IMAGES = 512
"""evaluation images of a task"""


class Describing(ABC):
    """What rules have in common that note facts of documents as arrays, also of the corpora `against`."""

    def __init__(self, against: Sequence[str] = ()) -> None:
        self.against = tuple(against)
        for path in self.against:
            open_corpus(path)  # which says what is wrong with it

    @abstractmethod
    def describe(self, corpus: Corpus, task: Range, gone: Gone) -> Facts:
        """What it wants to know of a range of documents, without the items that are gone."""

    def prepare(self, folder: Path, workers: int) -> None:
        """Facts of the other corpora, a file a range."""
        corpora = [open_corpus(path) for path in self.against]
        items = [(number, task) for number, corpus in enumerate(corpora) for task in ranges(corpus, TASK_BYTES)]
        found = in_order(_described, (self, corpora), items, workers, ahead=4 * workers)
        for number, facts in enumerate(found):
            save_facts(folder / f"{number:06d}", facts)

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        """As `describe` says."""
        save_facts(file, self.describe(corpus, task, gone))


def _described(shared: tuple[Describing, list[Corpus]], item: tuple[int, Range]) -> Facts:
    (rule, corpora), (number, task) = shared, item  # of a process's own, which opens the corpora once
    return rule.describe(corpora[number], task, {})


class Duplicates(Describing):
    """Documents, or images, that stand in the corpus before, or in other corpora."""

    def __init__(self, settings: DocumentDuplicates | ImageDuplicates, against: Sequence[str]) -> None:
        super().__init__(against)
        self.settings = settings
        of_documents = isinstance(settings, DocumentDuplicates)
        self.rule = self.facts_of = "document.duplicates" if of_documents else "image.duplicates"

    @property
    def threshold(self) -> Any:
        return self.settings.action

    def describe(self, corpus: Corpus, task: Range, gone: Gone) -> Facts:
        """As `document_facts` and `image_facts` say."""
        if isinstance(self.settings, DocumentDuplicates):
            return document_facts(corpus, task, self.settings, gone)
        return image_facts(corpus, task, self.settings, gone)

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """As `join_documents` and `join_images` say."""
        against = sorted(prepared.iterdir())
        if isinstance(self.settings, DocumentDuplicates):
            yield from map(table_of, join_documents(facts, self.settings, scratch, against))
        else:
            yield from map(table_of, join_images(facts, self.settings, scratch, against))


class EvaluationSets:
    """Images that are evaluation images, changed a little or not."""

    rule = facts_of = "image.evaluation"

    def __init__(self, settings: Decontamination) -> None:
        self.settings = settings
        open_set.cache_clear()  # files may have come since this process listed them,
        open_index.cache_clear()  # and another index may lie where this process opened one
        self.sizes = {path: len(open_set(path)) for path in settings.sets}
        for path, size in self.sizes.items():
            if not size:
                raise UserError(f"--evaluation.sets: {path} has no images")

    @property
    def threshold(self) -> Any:
        return ", ".join(self.settings.sets)

    def prepare(self, folder: Path, workers: int) -> None:
        """The index of the evaluation images."""
        tasks = [
            _Images(path, first, min(first + _IMAGES, size))
            for path, size in self.sizes.items()
            for first in range(0, size, _IMAGES)
        ]
        files = [folder / f"facts-{number:06d}" for number in range(len(tasks))]
        found = in_order(_facts_of_images, self.settings, tasks, workers, ahead=4 * workers)
        for file, facts in zip(files, found, strict=True):
            save_facts(file, facts)
        write_index(files, folder)
        for file in files:
            file.unlink()

    def facts(self, corpus: Corpus, task: Range, gone: Gone, file: Path, prepared: Path) -> None:
        """As `contamination_facts` says."""
        save_facts(file, contamination_facts(corpus, task, prepared, self.settings, gone))

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """As `join_evaluation` says."""
        yield table_of(join_evaluation(facts, prepared))


class _Images(NamedTuple):
    """Some images of an evaluation set."""

    path: str
    first: int
    last: int


def _facts_of_images(settings: Decontamination, images: _Images) -> Facts:
    return evaluation_facts(*images, settings)


def save_facts(file: Path, facts: Facts) -> None:
    """Write them so that `np.load` reads them."""
    with file.open("wb") as stream:  # np.savez would put a suffix on a path
        np.savez(stream, **facts)  # type: ignore[arg-type]  # one of savez's own names is none of ours


def table_of(removals: Removals) -> pa.Table:
    """Removals as a join gives them."""
    columns = (removals.document, removals.item, removals.value.astype(np.float64), removals.matched)
    return pa.table(dict(zip(REMOVED.names, columns, strict=True))).cast(REMOVED)
