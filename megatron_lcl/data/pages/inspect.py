"""A corpus as people see it: statistics, one document in the terminal, a page of sample documents."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_lcl.data.corpus.document import KINDS, Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.indexed import TEXT
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.data.pages.distribution import Distribution
from megatron_lcl.errors import UserError
from megatron_lcl.units import counted

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_THUMBNAIL = 320
_LISTED = 50
"""documents of a source, at most"""
_SAMPLES = 12
"""documents on a page"""


def stats(corpus: Corpus) -> dict[str, Any]:
    """Counts, and quantiles (0, 5, 25, 50, 75, 95, 100 %) with means of what the documents are made of; JSON-able.

    Of what has more than a million different values, quantiles are exact to 8 millionths (`Distribution`).
    """
    return _stats(corpus, _distributions(corpus))


def _stats(corpus: Corpus, distributions: dict[str, Distribution]) -> dict[str, Any]:
    formats = np.zeros(len(FORMATS), np.int64)
    for shard in corpus.shards:
        formats += np.bincount(shard.image_format, minlength=len(FORMATS))
    return {
        "path": corpus.where,
        "fingerprint": corpus.fingerprint,
        "source": corpus.manifest["source"],
        "tokenizer": corpus.manifest["tokenizer"],
        "shards": corpus.num_shards,
        "kinds": {kind: corpus.kinds.count(kind) for kind in KINDS if kind in corpus.kinds},
        "counts": corpus.manifest["counts"],
        "drops": corpus.manifest["drops"],
        "image_formats": {name: int(n) for name, n in zip(FORMATS, formats, strict=True) if n},
        "distributions": {
            name: {"mean": found.mean(), "quantiles": found.quantiles(_QUANTILES)}
            for name, found in distributions.items()
        },
    }


def table(statistics: dict[str, Any]) -> str:
    """`stats` for the terminal."""
    shards, ids = counted(statistics["shards"], "shard"), counted(statistics["tokenizer"]["vocab_size"], "token id")
    lines = [f"{statistics['path']}  ({shards}, {ids})"]
    lines += [f"  {name:<14}{count:>16,}" for name, count in statistics["counts"].items()]
    kinds = (f"{kind} ({counted(number, 'shard')})" for kind, number in statistics["kinds"].items())
    lines.append(f"  kinds         {', '.join(kinds)}")
    lines.append("")
    lines.append(f"{'':<24}" + "".join(f"{f'{q:.0%}':>10}" for q in _QUANTILES) + f"{'mean':>12}")
    for name, d in statistics["distributions"].items():
        lines.append(f"{name:<24}" + "".join(f"{q:>10,.4g}" for q in d["quantiles"]) + f"{d['mean']:>12,.4g}")
    lines.append("")
    lines.append("image formats: " + ", ".join(f"{k} {n:,}" for k, n in statistics["image_formats"].items()))
    for row in Drops.from_dict(statistics["drops"]).rows():
        lines.append(f"{row['what']:<10}{row['count']:>12,}  {row['reason']}")
        lines += [f"{'':<24}{name}" for name in row["names"]]
        lines += [f"{'':<24}“{sample['text']}”  ({sample['name']})" for sample in row["samples"]]
    return "\n".join(lines)


def show(corpus: Corpus, i: int) -> str:
    """Document `i` for the terminal. UserError where there is none."""
    document = _document(corpus, i)
    texts, images = counted(len(document.texts), "text"), counted(len(document.images), "image")
    lines = [f"document {i} of {len(corpus):,}: {texts}, {images}"]
    if source := corpus.name(i):
        lines[0] += f"\nsource: {source}"
    lines += [item.text if isinstance(item, Text) else f"[{_caption(item)}]" for item in document.items]
    return "\n\n".join(lines)


def found(corpus: Corpus, source: str) -> str:
    """The documents whose source has `source` in it, a line each; one alone is shown. UserError where there is none."""
    numbers = _find(corpus, source)
    listed = list(itertools.islice(numbers, _LISTED))
    more = sum(1 for _ in numbers)
    if len(listed) == 1:
        return show(corpus, listed[0])
    width = len(str(listed[-1]))
    lines = [f"{i:>{width}}  {corpus.name(i)}" for i in listed]
    lines.append(f"{len(listed) + more:,} documents" + (f", the first {_LISTED} are listed" if more else ""))
    return "\n".join([*lines, f"`megatron-lcl inspect {corpus.where} show N` shows one"])


def _find(corpus: Corpus, source: str) -> Iterator[int]:
    """Numbers of the documents whose source has `source` in it. UserError where there is none."""
    numbers = corpus.find(source)
    first = next(numbers, None)
    if first is None:
        if not any(shard.names for shard in corpus.shards):
            raise UserError(
                f"{corpus.where} does not say where its documents came from, as it was written by an earlier release"
            )
        raise UserError(f"no document of {corpus.where} has {source!r} in its source, such as {corpus.name(0)!r}")
    return itertools.chain((first,), numbers)


def write_page(corpus: Corpus, file: str | Path, source: str | None = None) -> Path:
    """One self-contained HTML page: statistics, histograms, what was dropped, and some documents.

    These are drawn at random, or, with `source`, the first whose source has it in its name. UserError where there is
    none.
    """
    if source:
        chosen = list(itertools.islice(_find(corpus, source), _SAMPLES))
    else:
        rng = np.random.default_rng(0)
        chosen = np.sort(rng.choice(len(corpus), size=min(_SAMPLES, len(corpus)), replace=False)).tolist()
    samples = []
    for i in chosen:
        document = _document(corpus, i)
        parts = [
            {"text": item.text}
            if isinstance(item, Text)
            else {"image": thumbnail(item.data, _THUMBNAIL), "caption": _caption(item)}
            for item in document.items
        ]
        samples.append({"number": i, "source": corpus.name(i), "parts": parts})
    distributions = _distributions(corpus)
    statistics = _stats(corpus, distributions)
    loader = jinja2.PackageLoader("megatron_lcl", "data/pages/templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.get_template("inspect.html")
    histograms = [(name, _histogram(name, found)) for name, found in distributions.items()]
    drops = list(Drops.from_dict(statistics["drops"]).rows())
    numbers = table({**statistics, "drops": Drops().to_dict()})
    page = template.render(
        statistics=statistics, table=numbers, histograms=histograms, drops=drops, samples=samples, wanted=source
    )
    file = Path(file)
    replace_text(file, page)
    return file


def _document(corpus: Corpus, i: int) -> Document:
    if not 0 <= i < len(corpus):
        raise UserError(f"there is no document {i}; the corpus has 0 … {len(corpus) - 1}")
    return corpus[i]


def _distributions(corpus: Corpus) -> dict[str, Distribution]:
    """Of what the histograms are of, for the whole corpus: what there is none of is left out."""
    found: dict[str, Distribution] = {}
    for shard in corpus.shards:
        for name, values in _values_of(shard).items():
            found.setdefault(name, Distribution()).add(values)
    return {name: distribution for name, distribution in found.items() if len(distribution)}


def _values_of(shard: Shard) -> dict[str, np.ndarray]:
    """The same of a shard."""
    texts = shard.modes == TEXT
    return {
        "tokens a document": _per_document(shard, np.where(texts, shard.lengths, 0)),
        "images a document": _per_document(shard, ~texts),
        "tokens a text": shard.lengths[texts],
        "similarity": shard.similarity[~np.isnan(shard.similarity)],
        "image width, pixels": shard.image_width,
        "image height, pixels": shard.image_height,
        "image size, bytes": shard.image_sizes,
    }


def _per_document(shard: Shard, values: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.diff(sums[shard.document_offsets])


def _caption(image: Image) -> str:
    match = "" if image.similarity is None else f", similarity {image.similarity:.3f}"
    text = "" if image.matched_text is None else f" to text {image.matched_text}"
    return f"image, {len(image.data):,} bytes{match}{text}"


def _histogram(name: str, distribution: Distribution) -> str:
    """An SVG of bars; the last one takes in what lies above the 99th percentile."""
    num_bins, width, height = 40, 360, 120
    counts, edges = distribution.histogram(num_bins, 0.99)
    low, high = float(edges[0]), float(edges[-1])
    tallest = max(1, int(counts.max()))
    bar = width / num_bins
    bars: Iterable[str] = (
        f'<rect x="{k * bar:.1f}" y="{height * (1 - n / tallest):.1f}" width="{bar - 1:.1f}" '
        f'height="{height * n / tallest:.1f}"><title>{html.escape(f"{edges[k]:,.4g} … {edges[k + 1]:,.4g}: {n:,}")}'
        "</title></rect>"
        for k, n in enumerate(counts.tolist())
    )
    labels = f'<text x="0" y="{height + 14}">{low:,.4g}</text>'
    labels += f'<text x="{width}" y="{height + 14}" text-anchor="end">{high:,.4g}</text>'
    title = html.escape(f"histogram of {name}, from {low:,.4g} to {high:,.4g}")
    box = f"0 0 {width} {height + 18}"
    return f'<svg viewBox="{box}" role="img" aria-label="{title}">{"".join(bars)}{labels}</svg>'
