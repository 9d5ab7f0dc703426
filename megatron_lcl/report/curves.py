"""Which charts a report has: the metrics that are known, in their order, and any others under their prefix."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from markupsafe import Markup

from megatron_lcl.report.charts import Line, Mark, chart, short, swatch
from megatron_lcl.report.events import NAMES, Event, Events
from megatron_lcl.report.series import Points, Series


@dataclass(frozen=True)
class Spec:
    """A chart: its title, and the metrics that are drawn in it, with their labels where there are several."""

    title: str
    names: tuple[str, ...]
    labels: tuple[str, ...] = ()
    levels: Mapping[str, str] = field(default_factory=dict)
    """metrics to compare with, and what they are called; of several that are drawn, each is of the line in its place"""
    scaled: Mapping[str, float] = field(default_factory=dict)
    """factors of metrics whose unit is another"""
    in_percent: bool = False
    is_id: bool = False
    """values are names of something: said whole, not read back from the curve, and of several runs there is no mean"""

    def factor(self, name: str) -> float:
        """What a metric's values are multiplied by."""
        return 100.0 if self.in_percent else self.scaled.get(name, 1.0)


MAX_TEXT = 160
"""characters of what is said of an event at its mark, which every chart has"""
CHANCE = {"chance_accuracy": "chance (1 / pairs)"}
_LN2 = math.log(2)


def _both(name: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Of latents and of context features: metrics, and what they are called."""
    return (f"latent_{name}", f"context_{name}"), ("latents", "contexts")


def _of_ranks(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the times of all processes: metrics, and what they are called."""
    names = {"max": "slowest", "median": "median", "min": "fastest"}
    return tuple(f"rank_{kind}_seconds/{name}" for name in names), tuple(names.values())


GROUPS: tuple[tuple[str, tuple[Spec, ...]], ...] = (
    (
        "Training",
        (
            Spec("loss that is minimized", ("loss",)),
            Spec(
                "generation loss (nats a token)",
                ("generation", "heldout/bits_per_token"),
                ("training", "held out"),
                scaled={"heldout/bits_per_token": _LN2},
            ),
            Spec("contrastive loss (nats)", ("contrastive",)),
            Spec("regression loss", ("regression",)),
            Spec(
                "accuracy of the contrast in the batch (%)",
                ("image_accuracy", "text_accuracy"),
                ("image to text", "text to image"),
                CHANCE,
                in_percent=True,
            ),
            Spec("ln(pairs) − contrastive loss (nats)", ("mutual_information",)),
            Spec(
                "cosine similarity",
                ("positive_similarity", "hardest_negative_similarity"),
                ("own pair", "hardest other"),
            ),
        ),
    ),
    (
        "Evaluations",
        (
            *(
                Spec(
                    f"held-out recall@{k} (%)",
                    (f"heldout/image_to_context_recall_at_{k}", f"heldout/context_to_image_recall_at_{k}"),
                    ("image to context", "context to image"),
                    {f"heldout/chance_at_{k}": "chance", f"heldout/context_to_image_chance_at_{k}": "chance"},
                    in_percent=True,
                )
                for k in (10, 1)
            ),
            Spec(
                "held out, the image among its document's (%)",
                ("heldout/image_in_document_recall_at_1",),
                levels={"heldout/chance_in_document": "chance"},
                in_percent=True,
            ),
            Spec("held-out median rank of the true context", ("heldout/median_rank",)),
            Spec("held-out bits a token", ("heldout/bits_per_token",)),
            Spec("held-out contrastive loss (nats)", ("heldout/contrastive_loss",)),
            Spec(
                "labeled images: accuracy (%)",
                ("labeled/knn_accuracy", "labeled/zero_shot_accuracy", "labeled/zero_shot_mean_per_class_recall"),
                ("k-NN", "zero-shot", "zero-shot, mean of the classes"),
                {"labeled/chance": "chance"},
                in_percent=True,
            ),
            Spec(
                "labeled images: zero-shot, top 5 (%)",
                ("labeled/zero_shot_accuracy_top_5",),
                levels={"labeled/chance_top_5": "chance"},
                in_percent=True,
            ),
            Spec(
                "seconds of an evaluation",
                ("heldout/seconds", "labeled/seconds"),
                ("held-out documents", "labeled images"),
            ),
        ),
    ),
    (
        "Throughput and memory",
        (
            Spec("images a second", ("images_per_second",)),
            Spec("tokens a second", ("tokens_per_second",)),
            Spec("model FLOPs utilization, MFU (%)", ("mfu",), in_percent=True),
            Spec("TFLOP/s of all processes", ("flops_per_second",), scaled={"flops_per_second": 1e-12}),
            Spec("seconds a step", ("step_seconds",)),
            Spec(
                "time spent waiting for data (%)",
                ("data_wait", "data_wait_max"),
                ("mean of the processes", "most of a process"),
                in_percent=True,
            ),
            Spec("seconds a step, by process", *_of_ranks("step")),
            Spec("seconds of own work a step, by process", *_of_ranks("work")),
            Spec("slowest process (rank)", ("slowest_rank",), is_id=True),
            Spec("seconds a step that it is behind", ("slowest_lag_seconds",)),
            Spec("seconds that steps waited for checkpoints", ("checkpoint_wait_seconds",)),
            Spec("peak memory of a device (GiB)", ("memory_peak_bytes",), scaled={"memory_peak_bytes": 2.0**-30}),
        ),
    ),
    (
        "Optimizer",
        (
            Spec("learning rate", ("lr",)),
            Spec("gradient norm", ("grad_norm",)),
            Spec("log of the contrast's scale", ("log_scale",)),
            Spec("bias of the contrast's logits", ("logit_bias",)),
        ),
    ),
    (
        "Health of the features",
        (
            Spec("effective rank", *_both("effective_rank")),
            Spec("spread (0: all the same)", *_both("spread")),
            Spec("standard deviation", *_both("std")),
            Spec("dead features (%)", *_both("dead_features"), in_percent=True),
            Spec("alignment: squared distance of a pair", ("alignment",)),
            Spec("uniformity of the latents", ("uniformity",)),
        ),
    ),
    (
        "Checkpoints",
        (
            Spec(
                "seconds of a checkpoint",
                ("checkpoint_stall_seconds", "checkpoint_write_seconds"),
                ("training waited", "writing"),
            ),
            Spec("size of a checkpoint (MB)", ("checkpoint_bytes",), scaled={"checkpoint_bytes": 1e-6}),
        ),
    ),
    (
        "What the steps read",
        (
            Spec("pairs of a step", ("num_pairs",)),
            Spec("images of a step", ("num_images",)),
            Spec("tokens of a step", ("num_tokens",)),
            Spec("targets of a step", ("num_targets",)),
            Spec("images of a step that did not decode", ("num_bad_images",)),
            Spec("steps without a pair, since the last start", ("steps_without_pairs",)),
            Spec("steps skipped, since the last start", ("skipped_steps",)),
            Spec("negatives of an image or text", ("negatives_per_anchor",)),
            Spec("image slots that hold none", ("image_slots_padded",)),
            Spec("token slots that hold none", ("token_slots_padded",)),
        ),
    ),
)
CHANCE_OF = {
    name: tuple(spec.levels)[n::-1]
    for _, specs in GROUPS
    for spec in specs
    if spec.levels
    for n, name in enumerate(spec.names)
}
"""of shares, which are shown in percent: the metric of what chance has, then what earlier versions called it"""
FAMILIES = {
    "grad_norm": "gradient norm by part",
    "update_norm": "update norm by part",
    "max_attention_logit": "largest attention logit by part",
    "lr": "learning rate by part",
}
"""prefixes whose metrics have one unit and are drawn together"""
MAX_LINES = 8
"""in a chart"""
FOLDED = frozenset({"Checkpoints", "What the steps read"})
"""headings whose charts are folded at first"""
_WORD = re.compile(r"[_/]+")


class Group(NamedTuple):
    """Charts under a heading."""

    title: str
    figures: list[Markup]
    is_folded: bool


def specs_for(names: Sequence[str]) -> list[tuple[str, list[Spec]]]:
    """The charts of these metrics, by group: the known ones, then others by what stands before a `/` in their name."""
    left = dict.fromkeys(names)
    found: list[tuple[str, list[Spec]]] = []
    for title, specs in GROUPS:
        chosen = [spec for spec in specs if any(name in left for name in spec.names)]
        if title == "Optimizer":
            chosen += _families(left)
        found.append((title, chosen))
    known = {name for _, specs in found for spec in specs for name in (*spec.names, *spec.levels)}
    others: dict[str, list[Spec]] = {}
    for name in sorted(left.keys() - known):
        prefix, slash, _ = name.partition("/")
        others.setdefault(words(prefix) if slash else "Further metrics", []).append(Spec(words(name), (name,)))
    for title, more in others.items():
        home = next((chosen for known, chosen in found if known.lower() == title.lower()), None)
        if home is None and title == "heldout":
            home = next(chosen for known, chosen in found if known == "Evaluations")
        if home is not None:
            home += more
        else:
            found.append((title[:1].upper() + title[1:], more))
    return [(title, specs) for title, specs in found if specs]


def _families(names: Mapping[str, None]) -> Iterator[Spec]:
    for prefix, title in FAMILIES.items():
        members = [name for name in names if name.startswith(f"{prefix}/")]
        for first in range(0, len(members), MAX_LINES):
            some = members[first : first + MAX_LINES]
            yield Spec(title, tuple(some), tuple(words(name.partition("/")[2]) for name in some))


def words(name: str) -> str:
    """A metric's name as text."""
    return _WORD.sub(" ", name)


def groups(series: Mapping[str, Series], last_step: int, events: Mapping[str, Events]) -> list[Group]:
    """All charts of a run."""
    drawn = {name: one for name, one in series.items() if one.num_values > 1 and not one.is_zero}
    marks = marks_of(events, last_step)
    found = []
    for title, specs in specs_for(list(drawn)):
        figures = [figure for spec in specs if (figure := _figure(spec, drawn, last_step, marks))]
        if figures:
            found.append(Group(title, figures, title in FOLDED))
    return found


def marks_of(events: Mapping[str, Events], last_step: int) -> list[Mark]:
    """Events as marks, one of a kind where a chart has room for no more."""
    kept: dict[tuple[str, int], tuple[Event, int]] = {}
    for kind, of_kind in events.items():
        for event, number in of_kind.stretches:
            place = kind, event.step * 150 // max(last_step, 1)
            first, before = kept.get(place, (event, 0))
            kept[place] = first, before + number
    marks = []
    for (kind, _), (first, number) in kept.items():
        more = f", and {number - 1:,} more" if number > 1 else ""
        said = textwrap.shorten(first.text, MAX_TEXT, placeholder=" …")
        text = said if kind == "phase" else f"{NAMES.get(kind, kind)}: {said}"
        marks.append(Mark(first.step, kind, text + more))
    return marks


def _figure(spec: Spec, series: Mapping[str, Series], last_step: int, marks: Sequence[Mark]) -> Markup:
    named = [(n, name) for n, name in enumerate(spec.names) if name in series]
    lines: list[Line] = []
    for n, name in named:
        label = spec.labels[n] if spec.labels else spec.title
        lines.append(line_of(label, series[name].points(), spec.factor(name), color=len(lines)))
    levels = [(n, name) for n, name in enumerate(spec.levels) if name in series]
    for n, name in levels:
        label = f"{spec.levels[name]}, {spec.labels[n]}" if len(levels) > 1 else spec.levels[name]
        lines.append(line_of(label, series[name].points(), spec.factor(name), color=n, quiet=True))
    drawn = chart(lines, last_step, marks, spec.title, is_read=not spec.is_id)
    if not drawn:
        return drawn
    entries = [(line.color, line.quiet, line.label) for line in lines] if len(lines) > 1 else []
    n, name = named[0]
    value = (series[name].last or 0.0) * spec.factor(name)
    now = f"{value:.0f}" if spec.is_id else short(value)
    return figure(spec.title, drawn, entries, now)


def line_of(label: str, points: Points, factor: float = 1.0, color: int = 0, quiet: bool = False) -> Line:
    """Through the least and the largest value of each stretch."""
    low, high = points.low * factor, points.high * factor
    return Line(label, points.first, points.final, low, high, color, quiet)


def figure(title: str, drawn: Markup, entries: Sequence[tuple[int, bool, str]] = (), now: str = "") -> Markup:
    """A chart with its title, a key where there are several lines, and a place for the number under the pointer."""
    key = Markup("").join(
        Markup("<span>{}{}</span>").format(swatch(color, quiet), label) for color, quiet, label in entries
    )
    return Markup(
        '<figure class="plot"><figcaption><b>{}</b><span class="now" data-now="{}">{}</span></figcaption>{}{}</figure>'
    ).format(title, now, now, drawn, Markup('<p class="key">{}</p>').format(key) if key else "")
