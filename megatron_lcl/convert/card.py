"""Model cards: what the weights are, which features to use, and an example that runs as it stands.

The front matter is that of the Hugging Face Hub (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_lcl.config import Config, Corpus, Model, to_dict
from megatron_lcl.convert.find import average_of, find_checkpoint, known_config, step_of, without_average
from megatron_lcl.data.corpus.corpus_manifest import filters_of, source_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.blend import CorpusRead, corpora_read
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.run_folder import CHECKPOINTS, HELDOUT, PROGRESS

README = "README.md"
"""the card's own file"""


@dataclass(frozen=True)
class Measured:
    """One metric of a model."""

    task: str
    data: str
    """what it was measured on, in words"""
    metric: str
    value: float
    interval: tuple[float, float] | None = None
    """95 %"""
    chance: float | None = None
    """what guessing gives"""
    items: str = ""
    """what it is a mean over: 41 pairs, say"""
    hub_data: str = ""
    """the data set's identifier on the Hub, where it has one"""
    dtype: str = "float32"
    """of the weights and activations that were measured, in words"""

    def row(self) -> str:
        """A line of the card's table."""
        interval = "" if self.interval is None else "{:.6g} – {:.6g}".format(*self.interval)
        chance = "" if self.chance is None else f"{self.chance:.6g}"
        cells = (self.task, self.data, self.metric, f"{self.value:.6g}", interval, chance, self.items, self.dtype)
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Card:
    """What a model card says that the weights do not."""

    name: str = "An LCL vision encoder"
    license: str = "other"
    """the weights' license, as an SPDX identifier in lower case (apache-2.0, cc-by-4.0 …); `other`: not stated"""
    datasets: tuple[str, ...] = ()
    """what it was trained on, one line each: an identifier on the Hub (org/name), and after a colon words about it; or
    words alone"""
    metrics: tuple[Measured, ...] = ()
    run: Config | None = None
    """the run's config, quoted in full but for folders"""
    origin: str = ""
    """which of the run's checkpoints the weights are, and the code that wrote it, in words; may be empty"""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), *(("data description", text) for text in self.datasets)):
            if not text.strip() or "\n" in text:
                raise UserError(f"a model card's {what} is one line of text, not {text!r}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise UserError(
                f"license {self.license!r} is no SPDX identifier in lower case, such as apache-2.0, mit, cc-by-4.0, or "
                "other; see https://spdx.org/licenses"
            )

    def replaced(
        self,
        name: str | None = None,
        license: str | None = None,
        datasets: Sequence[str] | None = None,
        metrics: Sequence[Measured] = (),
    ) -> Card:
        """A copy with those of the fields that are given; metrics are added."""
        return dataclasses.replace(
            self,
            name=self.name if name is None else name,
            license=self.license if license is None else license,
            datasets=self.datasets if datasets is None else tuple(datasets),
            metrics=(*self.metrics, *metrics),
        )


def card_of(path: Path) -> Card:
    """What is known of a checkpoint (whatever `load_model` takes): which one it is, its run's config, the corpora that
    the run has read, and held-out results."""
    checkpoint = find_checkpoint(path)
    run = known_config(checkpoint)
    if run is None:
        return Card()
    progress = _progress(checkpoint)
    read = corpora_read(progress.get("ledger", {}).get("entries", ()))
    return Card(
        datasets=tuple(map(_describe, read)) or tuple(map(_unrecorded, run.data.corpora)),
        metrics=_heldout(checkpoint),
        run=run,
        origin=_origin(checkpoint, progress),
    )


def _progress(checkpoint: Path) -> dict[str, Any]:
    """Where the run stood that wrote a checkpoint; empty where that is not known, as of an import."""
    try:
        progress: dict[str, Any] = json.loads((without_average(checkpoint) / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return progress


def _origin(checkpoint: Path, progress: Mapping[str, Any]) -> str:
    """Which checkpoint it is and what wrote it, as far as that is known."""
    step, code = progress.get("step", step_of(checkpoint)), progress.get("code", {})
    if step is None:
        return ""
    average = f" (average `{name}`)" if (name := average_of(checkpoint)) else ""
    written = ", ".join(f"{name} {code[name]}" for name in ("megatron_lcl", "commit", "source") if name in code)
    return f"step {step:,}{average}" + (f", written by {written}" if written else "")


def _describe(read: CorpusRead) -> str:
    text = f"{Path(read.paths[0]).name} (the corpus is not here, so its manifest is not quoted)"
    for path in read.paths:
        with contextlib.suppress(UserError, OSError):  # it may be on another machine, or another one be there now
            if url_of(path) is None and (corpus := open_corpus(path)).fingerprint == read.fingerprint:
                text = f"{Path(path).name}: {_quoted(corpus.manifest)}"
                break
    begins = f", from pack {read.from_pack:,} on at the earliest" if read.from_pack else ""
    return f"{text}{begins}{', read earlier' if read.is_earlier else ''}, fingerprint {read.fingerprint}"


def _unrecorded(corpus: Corpus) -> str:
    return f"{Path(corpus.path).name} (which corpus this was is not known here, so no manifest is quoted)"


def _quoted(manifest: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{name} {value:,}" for name, value in manifest["counts"].items() if isinstance(value, int))
    part = "in whole or in part " if "merged" in manifest["source"] else ""
    filtered = f", filtered {part}by {', '.join(filters)}" if (filters := filters_of(manifest)) else ""
    return f"{source_text(manifest)} ({counts}){filtered}"


def _heldout(checkpoint: Path) -> tuple[Measured, ...]:
    """Numbers of the run's held-out evaluation, if they were measured on this checkpoint."""
    of_run = without_average(checkpoint)
    if of_run.parent.name != CHECKPOINTS:
        return ()
    try:
        numbers = json.loads((of_run.parent.parent / HELDOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if (numbers.pop("step", None), numbers.pop("average", None)) != (step_of(checkpoint), average_of(checkpoint)):
        return ()
    facts = [f"{numbers[what]:,} {what}" for what in ("documents", "images") if numbers.get(what)]
    version = (numbers.get("rules") or {}).get("version")  # files of earlier versions have none
    facts.append(f"version {version} of the rules" if version else "by the run's own data settings")
    data = f"{Path(str(numbers.get('corpus', ''))).name} ({', '.join(facts)})"
    intervals = numbers.get("intervals") or {}
    dtype = numbers.get("dtype") or "not recorded"
    found = []
    for metric, name, chances, items in _HELDOUT_METRICS:
        if isinstance(value := numbers.get(name), int | float):
            interval = tuple(intervals[name]) if name in intervals else None
            chance = next((numbers[key] for key in chances if numbers.get(key) is not None), None)
            of = next((f"{numbers[key]:,} {key.replace('_', ' ')}" for key in items if numbers.get(key)), "")
            measured = Measured(HELDOUT_TASK, data, metric, value, interval, chance, of, dtype=dtype)
            found.append(measured)
            if name == "bits_per_token":
                found.append(dataclasses.replace(measured, metric="perplexity", value=2**value))
    return tuple(found)


HELDOUT_TASK = "held-out documents"
_HELDOUT_METRICS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    # name here; in the file; of its chance; of what it is a mean over (of both, then the name in earlier versions)
    ("image to context recall@1", "image_to_context_recall_at_1", ("chance_at_1",), ("distinct_images", "pairs")),
    ("image to context recall@10", "image_to_context_recall_at_10", ("chance_at_10",), ("distinct_images", "pairs")),
    (
        "context to image recall@1",
        "context_to_image_recall_at_1",
        ("context_to_image_chance_at_1", "chance_at_1"),
        ("distinct_contexts", "pairs"),
    ),
    (
        "context to image recall@10",
        "context_to_image_recall_at_10",
        ("context_to_image_chance_at_10", "chance_at_10"),
        ("distinct_contexts", "pairs"),
    ),
    (
        "image in document recall@1",
        "image_in_document_recall_at_1",
        ("chance_in_document",),
        ("contexts_with_rivals", "pairs_with_rivals"),
    ),
    ("median rank", "median_rank", (), ("distinct_images", "pairs")),
    ("contrastive loss (nats)", "contrastive_loss", (), ("pairs",)),
    ("bits per token", "bits_per_token", (), ("targets",)),
)


POOLED = "or the image latent z, which the attention pool makes of them:"
"""how the advice of every format ends, before the example"""


@dataclass(frozen=True)
class Usage:
    """What a card says of a format: how its files are used."""

    library: str
    """the Hub's name of the library that loads them"""
    advice: str
    """which features to use"""
    example: str
    """Python that computes them, run in the export's folder"""
    note: str = ""
    """what else is to be known of it: a paragraph behind the example"""
    difference: str = ""
    """what the library does otherwise, which the certificate does not see"""


def write_card(folder: Path, usage: Usage, model: Model, card: Card) -> None:
    """The card as a file of an export's folder."""
    v, t = model.vision, model.language
    data = "\n".join(f"* {name}" for name in card.datasets) or "Not stated."
    metrics = "\n".join(m.row() for m in card.metrics)
    table = (
        "Measured on the checkpoint itself, at its own image size.\n\n"
        "| task | data | metric | value | 95 % interval | chance | mean over | computed in |\n"
        f"| --- | --- | --- | --- | --- | --- | --- | --- |\n{metrics}"
    )
    front = yaml.safe_dump(_front_matter(usage, card), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---\n\n# {card.name}",
        f"A vision transformer {_beginning(card.run)} by {_training(card.run)}, with megatron_lcl. "
        f"{v.layers} blocks of width {v.width}, {v.heads} heads, patches of {v.patch_size} px, images of "
        f"{v.image_size} px; image latents of width {t.width}."
        + (f" The weights are those of {card.origin}." if card.origin else ""),
        "## Which features to use\n\n" + usage.advice,
        f"Run in this folder:\n\n```python\n{usage.example}```",
        *([usage.note] if usage.note else []),
        "`certificate.json` has the measured difference between these features and megatron_lcl's own."
        + (usage.difference and f" {usage.difference}"),
        f"## Data\n\n{data}",
        "## Metrics\n\n" + (table if metrics else "None were given."),
        f"## License\n\n{'Not stated.' if card.license == 'other' else card.license}",
    ]
    if card.run is not None:
        sections.append(f"## Config\n\n```yaml\n{_config(card.run)}```")
    (folder / README).write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _beginning(run: Config | None) -> str:
    """Whose weights the training began with: their license is one of the result's, too."""
    sources = [f"the weights of `{_public(source)}`" for source in _sources(run)]
    return f"trained from {', trained from '.join(sources)}," if sources else "pre-trained from scratch"


def _sources(run: Config | None) -> list[str]:
    """What a run's weights began with, and what those did: runs and models as the configs name them, the last first.

    A run that went on from another one's checkpoint began as that did, if its config is here to say how.
    """
    sources: list[str] = []
    seen: set[str] = set()
    while run is not None:
        resumed, output = run.checkpoint.resume, Path(run.train.output).resolve()
        goes_on = resumed != "auto" and not Path(resumed).resolve().is_relative_to(output)
        source = resumed if goes_on else run.train.init_from
        if source is None or source in seen:
            break
        seen.add(source)
        run = _config_at(source)
        if run is None or not goes_on:
            sources.append(source)
    return sources


def _config_at(source: str) -> Config | None:
    """The config of a run whose folder is here; None of all else."""
    try:
        return known_config(Path(source)) if exists(Path(source)) else None
    except (UserError, OSError):  # a folder that holds no weights any more, or that this user may not enter
        return None


def _training(run: Config | None) -> str:
    """What the weights were trained by; weights without a run are published ones, which are LCL's."""
    name = "lcl" if run is None else run.objective.name
    return TRAINING.get(name, f"the objective `{name}` of another package than megatron_lcl's own")


def _front_matter(usage: Usage, card: Card) -> dict[str, Any]:
    known = card.license in _HUB_LICENSES
    # before a colon stands a name; a folder's, which is no identifier, would be another's data set
    names = [text.partition(":")[0] for text in card.datasets]
    datasets = [name for name in names if is_hub_id(name)]
    metrics = sorted({kind for m in card.metrics if (kind := _metric_type(m.metric))})
    results = _results(card.metrics)
    return {
        "license": card.license if known else "other",
        **({} if known else {"license_name": card.license}),
        "pipeline_tag": "image-feature-extraction",
        "library_name": usage.library,
        "tags": ["vision", "latent-compression-learning", "megatron-lcl"],
        **({"datasets": datasets} if datasets else {}),
        **({"metrics": metrics} if metrics else {}),
        **({"model-index": [{"name": card.name, "results": results}]} if results else {}),
    }


def _results(metrics: Sequence[Measured]) -> list[dict[str, Any]]:
    """As the Hub's model-index has them: one entry for each task and data set.

    An entry needs the data set's identifier there, so that what has none stands in the card's table alone.
    """
    listed = [m for m in metrics if m.hub_data and _metric_type(m.metric)]
    return [
        {
            "task": {"type": _TASK_TYPES.get(task, "image-feature-extraction"), "name": task},
            "dataset": {"type": hub_data, "name": data},
            "metrics": [{"type": _metric_type(m.metric), "name": m.metric, "value": m.value} for m in group],
        }
        for (task, data, hub_data), group in itertools.groupby(listed, lambda m: (m.task, m.data, m.hub_data))
    ]


def _metric_type(name: str) -> str | None:
    """The Hub's word for a metric; None where it has none."""
    return next((word for word in _METRIC_TYPES if word in name.lower()), None)


def is_hub_id(name: str) -> bool:
    """Whether a data set may be called so on the Hub: org/name (huggingface_hub's `validate_repo_id`)."""
    parts = name.split("/")
    legal = all(re.fullmatch(r"\w([\w.-]*\w)?", part, re.ASCII) for part in parts)
    return len(parts) == 2 and legal and len(parts[1]) <= 96 and "--" not in name and ".." not in name


def _config(run: Config) -> str:
    """The config as YAML, without its folders."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(v) for key, v in value.items()}
        if isinstance(value, list):
            return [public(v) for v in value]
        return _public(value) if isinstance(value, str) else value

    return yaml.safe_dump(public(to_dict(run)), sort_keys=False, allow_unicode=True)


def _public(text: str) -> str:
    """A path's last component; another library's model (`train.init_from`) whole, but for folders in its name."""
    if re.match(r"((vision|language)=)?(timm|hf|open_clip):(?!//)", text):
        folders = r"(?<=:local-dir:)[^,]+|(?<=@)[^,]+|(?<=:)[/.~][^,]*|(?<=hf:)[^,/]+(/[^,/]+){2,}"
        return re.sub(folders, lambda path: Path(path[0]).name, text)
    return Path(text).name if "/" in text else text


TRAINING = {
    "lcl": "Latent Compression Learning (LCL, NeurIPS 2024, arXiv 2406.07543) on interleaved image-text documents",
    "clip": "contrast of image-text pairs (CLIP, arXiv 2103.00020)",
    "genlip": "captioning of image-text pairs (after GenLIP, arXiv 2605.00809, and OpenVision 2, arXiv 2509.01644, in "
    "one causal language model)",
    "siglip": "contrast of image-text pairs by a sigmoid loss (SigLIP, arXiv 2303.15343)",
    "coca": "contrast and captioning of image-text pairs (after CoCa, arXiv 2205.01917, in one causal language model)",
    "generation": "next-token prediction on interleaved image-text documents, without a contrast",
    "emu": "next-token prediction and regression of image latents on interleaved image-text documents (after Emu, "
    "arXiv 2307.05222)",
}
"""what each objective of this package trains by, by its name"""

_TASK_TYPES = {
    "zero-shot classification": "zero-shot-image-classification",
    "k-NN": "image-classification",
    "linear probe": "image-classification",
    "attentive probe": "image-classification",
    "captioning": "image-to-text",
}

_METRIC_TYPES = ("accuracy", "recall", "bleu", "cider", "perplexity")
"""https://huggingface.co/metrics, and CIDEr as cards have it"""

_HUB_LICENSES = {  # https://huggingface.co/docs/hub/repositories-licenses
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
    "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unknown", "other",
}  # fmt: skip
"""what the Hub calls licenses; any other is `other` with a `license_name`"""
