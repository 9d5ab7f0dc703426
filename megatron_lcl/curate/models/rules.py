"""What an encoder says, as rules of `curate` (`joins.Join`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_lcl.curate.documents import Gone, Range
from megatron_lcl.curate.duplicates.facts import Facts
from megatron_lcl.curate.duplicates.join import Removals
from megatron_lcl.curate.duplicates.rules import Describing, table_of
from megatron_lcl.curate.models.features import feature_facts, join_features, join_scores, read_head
from megatron_lcl.curate.models.matching import matching_facts
from megatron_lcl.curate.models.settings import FeatureDuplicates, HeadScore, ModelRules
from megatron_lcl.data.corpus.store import Corpus


class _Asking(Describing):
    """A rule whose facts are an encoder's: written once, whatever the number of rules that read the same features."""

    facts_of = "features"

    def __init__(self, encoder: str, tokenizer: str | None, against: Sequence[str] = ()) -> None:
        super().__init__(against)
        self.encoder, self.tokenizer = encoder, tokenizer

    def describe(self, corpus: Corpus, task: Range, gone: Gone) -> Facts:
        """As `feature_facts` says."""
        return feature_facts(corpus, task, self.encoder, self.tokenizer, gone)


class Scores(_Asking):
    """Images that a linear head scores too low or too high."""

    def __init__(self, encoder: str, tokenizer: str | None, settings: HeadScore, name: str) -> None:
        super().__init__(encoder, tokenizer)
        self.settings, self.rule = settings, f"image.{name}"
        read_head(settings.head)  # which says what is wrong with it

    @property
    def threshold(self) -> Any:
        low, high = self.settings.min_score, self.settings.max_score
        return " ".join(f"{name} {value:g}" for name, value in (("min", low), ("max", high)) if value is not None)

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """As `join_scores` says."""
        yield table_of(join_scores(facts, self.settings))


class SameFeatures(_Asking):
    """Images whose features are nearly those of an image before, or in other corpora."""

    rule = "image.features"

    def __init__(
        self, encoder: str, tokenizer: str | None, settings: FeatureDuplicates, against: Sequence[str] = ()
    ) -> None:
        super().__init__(encoder, tokenizer, against)
        self.settings = settings

    @property
    def threshold(self) -> Any:
        return self.settings.min_cosine

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """As `join_features` says."""
        yield from map(table_of, join_features(facts, self.settings, scratch, sorted(prepared.iterdir())))


class Matched(_Asking):
    """Images to which no text is matched (their document has none, or they do not decode), or one that is too unlike;
    the others' matches are new."""

    rule = facts_of = "image.matching"

    def __init__(self, encoder: str, tokenizer: str | None, min_similarity: float | None) -> None:
        super().__init__(encoder, tokenizer)
        self.threshold = min_similarity

    def describe(self, corpus: Corpus, task: Range, gone: Gone) -> Facts:
        """As `matching_facts` says."""
        return matching_facts(corpus, task, self.encoder, self.tokenizer, gone)

    def decide(self, facts: Sequence[Path], prepared: Path, scratch: Path, workers: int) -> Iterator[pa.Table]:
        """value: the similarity, NaN of an image without a text."""
        least = -np.inf if self.threshold is None else self.threshold
        for file in facts:
            with np.load(file) as found:
                out = (found["matched_text"] < 0) | ~(found["similarity"] >= least)
                document, item, value = (found[name][out] for name in ("document", "item", "similarity"))
                yield table_of(Removals(document, item, value, [""] * len(value)))

    def matches(self, file: Path) -> dict[int, dict[int, tuple[float, int]]]:
        """Of a file of facts: similarity and number of the text, by document and item."""
        matches: dict[int, dict[int, tuple[float, int]]] = {}
        with np.load(file) as found:
            columns = (found[name].tolist() for name in ("document", "item", "similarity", "matched_text"))
            for document, item, similarity, text in zip(*columns, strict=True):
                matches.setdefault(document, {})[item] = (similarity, text)
        return matches


def joins_of(rules: ModelRules, against: Sequence[str] = ()) -> Iterator[Scores | SameFeatures | Matched]:
    """The rules that are on, where there is an encoder. against: corpora whose images are duplicates, too."""
    assert rules.encoder is not None
    encoder = (rules.encoder, rules.tokenizer)
    for name, head in rules.heads.items():
        yield Scores(*encoder, head, name)
    if rules.duplicates is not None:
        yield SameFeatures(*encoder, FeatureDuplicates(rules.min_cosine, rules.duplicates), against)
    if rules.match:
        yield Matched(*encoder, rules.min_similarity)
