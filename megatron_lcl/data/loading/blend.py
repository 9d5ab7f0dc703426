"""A blend: the corpora of a run with their weights, as an entry of its ledger has them.

It is a list of {"path", "fingerprint", "weight"}; a corpus that was found elsewhere later also has "moved_from", the
paths at which it was before, in order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.errors import UserError

Blend = list[dict[str, Any]]


def blend_of(data: Data) -> tuple[Blend, str]:
    """The blend that `data.corpora` says, and the fingerprint of its tokenizer. UserError where it is none."""
    if not data.corpora:
        raise UserError("data.corpora is empty; name at least one corpus, e.g. data.corpora=[{path: corpus}]")
    opened = [(c, open_corpus(c.path, data.cache)) for c in data.corpora]
    blend = [{"path": c.path, "fingerprint": corpus.fingerprint, "weight": c.weight} for c, corpus in opened]
    tokenizers = [corpus.manifest["tokenizer"]["fingerprint"] for _, corpus in opened]
    if others := [c.path for c, tokenizer in zip(data.corpora, tokenizers, strict=True) if tokenizer != tokenizers[0]]:
        raise UserError(
            "the corpora of a blend must have the same tokenizer (`megatron-lcl retokenize` changes it); that of "
            f"{data.corpora[0].path} is another than that of {', '.join(others)}"
        )
    if len({c["fingerprint"] for c in blend}) < len(blend):
        raise UserError("data.corpora names a corpus twice; give it one entry with the sum of the weights")
    return blend, tokenizers[0]


def has_shares_of(blend: Blend, other: Blend) -> bool:
    """Whether two blends are of the same corpora with the same shares, in whatever order, by weights of any scale."""
    ours, theirs = _shares(blend), _shares(other)
    return ours.keys() == theirs.keys() and all(math.isclose(ours[c], theirs[c], rel_tol=1e-12) for c in ours)


def _shares(blend: Blend) -> dict[str, float]:
    total = math.fsum(corpus["weight"] for corpus in blend)
    return {corpus["fingerprint"]: corpus["weight"] / total for corpus in blend}


def with_paths_of(blend: Blend, before: Blend) -> Blend:
    """The blend `before`, in which corpora of `blend` have the paths that they have there."""
    paths = {corpus["fingerprint"]: corpus["path"] for corpus in blend}
    return [
        _moved(corpus, paths[corpus["fingerprint"]]) if corpus["fingerprint"] in paths else corpus for corpus in before
    ]


def _moved(corpus: dict[str, Any], path: str) -> dict[str, Any]:
    if path == corpus["path"]:
        return corpus
    return {**corpus, "path": path, "moved_from": [before for before in paths_in(corpus) if before != path]}


def paths_in(corpus: dict[str, Any]) -> list[str]:
    """Where a corpus of a blend has been, in order."""
    return [*corpus.get("moved_from", ()), corpus["path"]]


@dataclass(frozen=True)
class CorpusRead:
    """A corpus that is in a blend of a run."""

    fingerprint: str
    paths: tuple[str, ...]
    """where it has been, first where it was found last"""
    from_pack: int
    """of the first blend with it: no earlier pack has its documents"""
    is_earlier: bool
    """the run's last blend does not have it"""


def corpora_read(entries: Iterable[Mapping[str, Any]]) -> list[CorpusRead]:
    """The corpora of a ledger's entries, each once: those of the last blend in its order, then those before."""
    blends = [entry for entry in entries if "blend" in entry]
    last = [corpus["fingerprint"] for corpus in blends[-1]["blend"]] if blends else []
    first: dict[str, int] = {}
    paths: dict[str, list[str]] = {}
    for entry in blends:
        for corpus in entry["blend"]:
            first.setdefault(corpus["fingerprint"], entry["from_pack"])
            paths.setdefault(corpus["fingerprint"], []).extend(paths_in(corpus))
    return [
        CorpusRead(key, tuple(dict.fromkeys(reversed(paths[key]))), first[key], key not in last)
        for key in dict.fromkeys([*last, *first])
    ]
