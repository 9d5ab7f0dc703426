"""One self-contained page about a run: names of pictures, losses, retrieval, the first batch, drops, how to go on."""

from __future__ import annotations

import io
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.convert.find import checkpoints_in, find_checkpoint
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.data.pages.replay import render_first_packs
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.heldout_results import EXAMPLES, RESULT
from megatron_lcl.report.gallery import read_gallery, read_json, read_others
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.checkpoint.folder import last_ledger
from megatron_lcl.train.telemetry import read_metrics

REPORT = "report.html"
"""the page in a run folder, and its template here"""
MAX_THUMBNAIL = 320
"""pixels of an example image's longer side"""
MAX_PACKS = 16
"""of the first batch that are shown"""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page about a run folder; returns its path. UserError where `run` is not a run folder."""
    if not (run / CONFIG).is_file():
        raise UserError(f"{run} is not a run folder: it has no {CONFIG}")
    config = configs.load(run / CONFIG)
    metrics = [line for line in read_metrics(run) if "loss" in line]
    evaluation = read_json(run / RESULT)
    root = Path(__file__).resolve().parents[2]
    environment = jinja2.Environment(loader=jinja2.PackageLoader("megatron_lcl.report", "."), autoescape=True)
    page = environment.get_template(REPORT).render(
        config=config,
        config_yaml=configs.to_yaml(config),
        gallery=read_gallery(run),
        others=read_others(run),
        last=metrics[-1] if metrics else None,
        curves=_curves(metrics),
        evaluation=evaluation,
        examples=_examples(read_json(run / EXAMPLES), evaluation),
        batch=Markup(
            render_first_packs(
                config, objectives.create(config).sequences, min(config.train.global_batch, MAX_PACKS), last_ledger(run)
            )
        ),
        max_packs=MAX_PACKS,
        corpora=[_corpus(open_corpus(c.path)) for c in config.data.corpora],
        checkpoint=find_checkpoint(run).name if metrics and checkpoints_in(run) else None,
        run=run,
        checkout=_quoted(root) if (root / "launch").is_dir() else None,
        environment=_quoted(Path(sys.prefix)) if sys.prefix != sys.base_prefix else None,
    )
    output = output or run / REPORT
    replace_text(output, page)
    return output


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


CURVES = (
    # a line of metrics has it; the title; what it is a mean over
    ("generation", "generation loss (nats a token)", "num_targets"),
    ("contrastive", "contrastive loss (nats)", "num_pairs"),
    ("image_accuracy", "accuracy of the contrast in the batch", "num_pairs"),
)


def _curves(metrics: list[dict[str, Any]]) -> Markup:
    """Losses and accuracy over steps as inline SVG; broken where a step has nothing to measure them on."""
    curves = [(title, values) for name, title, of in CURVES if (values := _values(metrics, name, of))]
    if len(metrics) < 2 or not curves:
        return Markup("")
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(11, 3.1), layout="constrained", squeeze=False)
    steps = [line["step"] for line in metrics]
    for axis, (title, values) in zip(axes[0], curves, strict=True):
        axis.plot(steps, values, color="#2a6f97")
        alone = [i for i, value in enumerate(values) if not math.isnan(value) and _is_alone(values, i)]
        axis.plot([steps[i] for i in alone], [values[i] for i in alone], ".", color="#2a6f97", markersize=3)
        if title == CURVES[-1][1]:
            chance = [1 / line["num_pairs"] if line.get("num_pairs") else math.nan for line in metrics]
            axis.plot(steps, chance, ":", color="#5c6b7a", label="chance (1 / pairs)")
            axis.legend(fontsize=8, frameon=False)
        axis.set_xlim(steps[0], steps[-1])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def _values(metrics: list[dict[str, Any]], name: str, of: str) -> list[float]:
    """A number of every line; NaN where it has none. Empty where no line has one.

    Earlier versions wrote 0 for the mean over no pairs.
    """
    found = [line.get(name) if line.get(of, 1) else None for line in metrics]
    return [math.nan if value is None else value for value in found] if any(v is not None for v in found) else []


def _is_alone(values: list[float], i: int) -> bool:
    """Whether no line leads to a value: neither neighbor is there."""
    return all(math.isnan(value) for value in [*values[max(i - 1, 0) : i], *values[i + 1 : i + 2]])


def _examples(examples: list[dict[str, Any]] | None, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The examples with their images; without, if the held-out corpus is no longer where it was."""
    try:
        corpus = open_corpus(evaluation["corpus"]) if evaluation else None
    except (UserError, OSError):
        corpus = None
    for example in examples or []:
        pair = example["pair"]
        example["src"] = (
            thumbnail(corpus.shard(pair["shard"]).image(pair["image"]), MAX_THUMBNAIL) if corpus is not None else None
        )
    return examples or []


def _corpus(corpus: Corpus) -> dict[str, Any]:
    return {
        "path": corpus.path,
        "source": corpus.manifest.get("source", {}),
        "counts": corpus.manifest["counts"],
        "tokenizer": corpus.manifest["tokenizer"],
        "drops": list(Drops.from_dict(corpus.manifest["drops"]).rows()),
    }
