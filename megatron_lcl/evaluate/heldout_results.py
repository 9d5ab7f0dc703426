"""What a held-out evaluation measured: its numbers and examples, as JSON for the report, a table and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.evaluate.heldout_ranks import Ranked
from megatron_lcl.evaluate.results import Metric, Result, proportion
from megatron_lcl.run_folder import EXAMPLES, HELDOUT
from megatron_lcl.units import plain

PICTURE = "heldout.png"
CONTEXT_CHARACTERS = 400
"""of an example's text"""


@dataclass(frozen=True)
class Pair:
    """One image of the held-out corpus and the text before it in its sequence."""

    document: int
    shard: int
    image: int
    context: str
    """the end of it, at most CONTEXT_CHARACTERS; a line end where another image stands"""


@dataclass(frozen=True)
class Example:
    """A distinct image with the contexts that the model finds nearest to it."""

    pair: Pair
    """the first one of the image"""
    rank: int
    """of the image's best own context among the others', 1 is best"""
    nearest: tuple[Pair, ...]
    """the first pair of each of these contexts, whose image may be another"""
    right: tuple[bool, ...] = ()
    """of `nearest`: whether the context stands with the image in any pair; files of earlier versions have none"""
    num_contexts: int = 1
    """distinct contexts that stand with the image; files of earlier versions do not say"""


@dataclass(frozen=True)
class HeldOut:
    """What was measured; None: not measured. Recalls are shares of the distinct images, or of the distinct contexts;
    `chance` is what a random order gives."""

    corpus: str
    documents: int
    pairs: int
    targets: int
    images: int = 0
    """that the documents have and that decode; those without a text before them are no pair"""
    distinct_images: int = 0
    """of the pairs, by their bytes"""
    distinct_contexts: int = 0
    """of the pairs, by what the model reads before the image"""
    bad_images: tuple[str, ...] = ()
    """names and reasons of those that do not decode, which are skipped (on the processes that read)"""
    rules: dict[str, Any] = field(default_factory=dict)
    """see `heldout_rules`; results from before there were any have none"""
    step: int | None = None
    """steps that the model was trained for, where that is known"""
    average: str | None = None
    """name of the average of the weights that was measured; None: the weights"""
    dtype: str | None = None
    """of the weights and activations that were measured; results from before it was recorded have none"""
    fingerprint: str | None = None
    """of the corpus, whose documents and images the examples have by their numbers; files of earlier versions have
    none"""
    image_to_context_recall_at_1: float | None = None
    image_to_context_recall_at_10: float | None = None
    context_to_image_recall_at_1: float | None = None
    context_to_image_recall_at_10: float | None = None
    chance_at_1: float | None = None
    """from image to context; up to version 2 of the rules also the other way"""
    chance_at_10: float | None = None
    context_to_image_chance_at_1: float | None = None
    context_to_image_chance_at_10: float | None = None
    median_rank: float | None = None
    """of an image's best context"""
    contexts_with_rivals: int = 0
    """distinct contexts of each document, summed over documents, that have a wrong image there to be mistaken for"""
    image_in_document_recall_at_1: float | None = None
    """given the context, the image among those of its document; of the contexts with rivals"""
    chance_in_document: float | None = None
    contrastive_loss: float | None = None
    """nats, over all held-out pairs at once"""
    bits_per_token: float | None = None
    """mean negative log2-likelihood of the targets (text tokens, `<soi>`, `<eot>`)"""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals of the recalls, over other documents"""

    def numbers(self) -> dict[str, float]:
        """What was measured, by name, without the counts."""
        skipped = ("documents", "pairs", "targets", "images", "step", *_COUNTS)
        values = {name: value for name, value in asdict(self).items() if name not in skipped}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}


_COUNTS = ("distinct_images", "distinct_contexts", "contexts_with_rivals")


def with_recalls(result: HeldOut, ranked: tuple[Ranked, Ranked, Ranked], intervals: bool) -> HeldOut:
    """`result` with what `Pairs.rank` gave."""
    forward, backward, among = ranked
    hits = {
        f"{way}_recall_at_{k}": (asked.hits(k), asked.documents)
        for way, asked in (("image_to_context", forward), ("context_to_image", backward))
        for k in (1, 10)
    }
    if len(among.ranks):
        hits["image_in_document_recall_at_1"] = among.hits(1), among.documents
    bounds = {name: proportion(hit, clusters=of) for name, (hit, of) in hits.items()} if intervals else {}
    return replace(
        result,
        distinct_images=len(forward.ranks),
        distinct_contexts=len(backward.ranks),
        contexts_with_rivals=len(among.ranks),
        chance_at_1=forward.chance_at(1),
        chance_at_10=forward.chance_at(10),
        context_to_image_chance_at_1=backward.chance_at(1),
        context_to_image_chance_at_10=backward.chance_at(10),
        median_rank=float(np.median(forward.ranks)),
        chance_in_document=among.chance_at(1) if len(among.ranks) else None,
        intervals={name: (metric.low, metric.high) for name, metric in bounds.items()},
        **{name: float(hit.mean()) for name, (hit, _) in hits.items()},  # type: ignore[arg-type]
    )


def write_heldout(folder: Path, result: HeldOut, examples: list[Example]) -> None:
    """The numbers and the examples as two JSON files in `folder`, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / EXAMPLES, json.dumps([asdict(e) for e in examples]) + "\n")  # for which there may be no room
    replace_text(folder / HELDOUT, json.dumps(asdict(result), indent=1) + "\n")


_RECALLS = (
    # title; name of the value, of its chance, of the number of what it is a mean over
    ("image → context recall@1", "image_to_context_recall_at_1", "chance_at_1", "distinct_images"),
    ("image → context recall@10", "image_to_context_recall_at_10", "chance_at_10", "distinct_images"),
    ("context → image recall@1", "context_to_image_recall_at_1", "context_to_image_chance_at_1", "distinct_contexts"),
    (
        "context → image recall@10",
        "context_to_image_recall_at_10",
        "context_to_image_chance_at_10",
        "distinct_contexts",
    ),
    ("image in document recall@1", "image_in_document_recall_at_1", "chance_in_document", "contexts_with_rivals"),
)


def as_result(result: HeldOut, encoder: str) -> Result:
    """The recalls as a `Result`, for the picture."""
    metrics = {}
    for title, name, chance, _ in _RECALLS:
        value = getattr(result, name)
        if value is not None:
            low, high = result.intervals.get(name, (value, value))
            metrics[title] = Metric(value, low, high, getattr(result, chance))
    return Result("held-out documents", encoder, result.corpus, result.pairs, metrics)


def num_queries(result: HeldOut) -> dict[str, int]:
    """How many the recalls of `as_result` are each a mean over."""
    return {title: getattr(result, count) for title, _, _, count in _RECALLS}


def table(result: HeldOut) -> str:
    """The numbers for a terminal."""
    rows = [("documents, images, pairs", f"{result.documents}, {result.images}, {result.pairs}")]
    if result.pairs:
        rows.append(("distinct images, contexts", f"{result.distinct_images}, {result.distinct_contexts}"))
    if result.bad_images:
        first = "; ".join(result.bad_images[:3]) + ("; …" if len(result.bad_images) > 3 else "")
        rows.append(("images skipped", f"{len(result.bad_images)} do not decode: {first}"))
    for title, metric in as_result(result, "").metrics.items():
        assert metric.chance is not None
        between = f"   ({metric.low:.1%} to {metric.high:.1%})" if result.intervals else ""
        times = metric.value / metric.chance
        chance = f"{plain(100 * metric.chance, 2)}%"
        rows.append((title, f"{metric.value:6.1%}   chance {chance:>5}   {times:4.1f} times chance{between}"))
    if result.median_rank is not None:
        rows.append(("median rank", f"{result.median_rank:.0f} of {result.distinct_contexts}"))
    if result.bits_per_token is not None:
        rows.append(("generation", f"{result.bits_per_token:.3f} bits a token over {result.targets} targets"))
    return "\n".join(f"{name:28}{value}" for name, value in rows)
