"""Model cards: what the weights are, which features to use, and an example that runs as it stands."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_lcl.config import Config, Model, to_yaml
from megatron_lcl.convert.load import find_checkpoint, read_config, step_of
from megatron_lcl.convert.pool import attention_pool
from megatron_lcl.data.store import read_manifest


@dataclass(frozen=True)
class Card:
    """What a model card says that the weights do not."""

    name: str = "An LCL vision encoder"
    license: str = "other"
    """the weights' licence, as an SPDX identifier in lower case (apache-2.0, cc-by-4.0 …); `other`: not stated"""
    datasets: tuple[str, ...] = ()
    """what it was trained on, in words, one line each"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """name → value, as measured"""
    run: Config | None = None
    """the run's config, quoted in full"""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), *(("data description", text) for text in self.datasets)):
            if not text.strip() or "\n" in text:
                raise ValueError(f"a model card's {what} is one line of text, not {text!r}")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license):
            raise ValueError(
                f"licence {self.license!r} is no SPDX identifier in lower case, such as apache-2.0, mit, cc-by-4.0, or "
                "other; see https://spdx.org/licenses"
            )

    def replaced(self, name: str | None, license: str | None, datasets: Sequence[str] | None) -> Card:
        """A copy with those of the fields that are given."""
        return dataclasses.replace(
            self,
            name=self.name if name is None else name,
            license=self.license if license is None else license,
            datasets=self.datasets if datasets is None else tuple(datasets),
        )


def card_of(path: Path) -> Card:
    """What is known of a checkpoint (whatever `load_model` takes): its run's config, corpora and held-out results."""
    if not path.is_dir():
        return Card()
    checkpoint = find_checkpoint(path)
    run = read_config(checkpoint)
    corpora = [Path(corpus.path) for corpus in run.data.corpora]
    return Card(
        datasets=tuple(_describe(path) for path in corpora),
        metrics=_heldout(checkpoint),
        run=run,
    )


def _describe(corpus: Path) -> str:
    try:
        manifest = read_manifest(corpus)
    except ValueError:  # it may be on another machine
        return f"{corpus.name} (the corpus is not here, so its manifest is not quoted)"
    counts = ", ".join(f"{name} {value:,}" for name, value in manifest["counts"].items() if isinstance(value, int))
    source = ", ".join(f"{name} {value}" for name, value in manifest["source"].items())
    return f"{corpus.name}: {source} ({counts})"


def _heldout(checkpoint: Path) -> dict[str, float]:
    """Numbers of the run's heldout.json, if they were measured on this checkpoint."""
    if checkpoint.parent.name != "checkpoints":
        return {}
    try:
        numbers = json.loads((checkpoint.parent.parent / "heldout.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if numbers.pop("step", None) != step_of(checkpoint):
        return {}
    return {f"held out: {k.replace('_', ' ')}": v for k, v in numbers.items() if isinstance(v, int | float)}


def write_card(folder: Path, kind: str, model: Model, card: Card, arguments: str = "") -> None:
    """`README.md`. `arguments`: what timm.create_model makes the same model of."""
    front: dict[str, Any] = {
        "license": card.license,
        "pipeline_tag": "image-feature-extraction",
        "library_name": {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}[kind],
        "tags": ["vision", "latent-compression-learning", "megatron-lcl"],
    }
    v, t = model.vision, model.language
    data = "\n".join(f"* {name}" for name in card.datasets) or "Not stated."
    metrics = "\n".join(f"| {name} | {value:.6g} |" for name, value in card.metrics.items())
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {card.name}",
        "A vision transformer pre-trained from scratch by Latent Compression Learning (LCL, NeurIPS 2024, "
        "arXiv 2406.07543) on interleaved image-text documents, with megatron_lcl. "
        f"{v.layers} blocks of width {v.width}, {v.heads} heads, patches of {v.patch_size} px, images of "
        f"{v.image_size} px; image latents of width {t.width}.",
        "## Which features to use\n\n" + _ADVICE[kind],
        f"```python\n{_example(kind, arguments)}```",
        "`certificate.json` has the measured difference between these features and megatron_lcl's own.",
        f"## Data\n\n{data}",
        "## Metrics\n\n" + (f"| metric | value |\n| --- | --- |\n{metrics}" if metrics else "None were given."),
        f"## Licence\n\n{'Not stated.' if card.license == 'other' else card.license}",
    ]
    if card.run is not None:
        sections.append(f"## Config\n\n```yaml\n{to_yaml(card.run)}```")
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


_POOLED = "or the image latent z, which the attention pool makes of them:"

_ADVICE = {
    "hf": (
        "Not `pooler_output`: that is the class token's output, which LCL never reads and so never trains. And not "
        "`last_hidden_state` as it is: it comes before the final norm. Use the normed patch tokens (for dense tasks, "
        f"or their mean), {_POOLED}"
    ),
    "timm": (
        "Not the class token: LCL never reads its output and so never trains it. `config.json` pools what LCL does "
        "train, the mean of the normed patch tokens (`global_pool='avg', fc_norm=False`; without a classifier). For "
        f"dense tasks use `forward_features`, {_POOLED}"
    ),
    "open_clip": (
        "`encode_image` gives the mean of the normed patch tokens; the text tower is a placeholder, for OpenCLIP does "
        "not read texts as LCL does (`lcl.safetensors` and `lcl.json` are the whole model, for megatron_lcl). For "
        f"dense tasks use the tokens, {_POOLED}"
    ),
}

_IMPORTS = """\
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
"""

_READ_POOL = """\
with safe_open(f"{folder}/lcl/attention_pool.safetensors", "pt") as file:
    pool, heads = {name: file.get_tensor(name).float() for name in file.keys()}, int(file.metadata()["heads"])
"""

_EXAMPLE = {  # the words in capitals are filled in
    "hf": """\
IMPORTS
from transformers import AutoImageProcessor, AutoModel

ATTENTION_POOL

folder = "."  # this folder
model, processor = AutoModel.from_pretrained(folder).float(), AutoImageProcessor.from_pretrained(folder)
READ_POOL
images = processor(Image.open("image.jpg"), return_tensors="pt")["pixel_values"]
norm = getattr(model, "vision_model", model).post_layernorm
with torch.no_grad():
    patches = norm(model(images).last_hidden_state[:, 1:])  # [1, patches, width]
    z = F.normalize(attention_pool(patches, pool, heads), dim=-1)  # [1, latent width]
""",
    "timm": """\
IMPORTS
import timm

ATTENTION_POOL

folder = "."  # this folder
# also: timm.create_model(ARGUMENTS, checkpoint_path="model.safetensors"), which has a classifier of zeros
model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
READ_POOL
images = transform(Image.open("image.jpg").convert("RGB"))[None]
with torch.no_grad():
    mean = model(images)  # [1, width]
    patches = model.forward_features(images)[:, 1:]  # [1, patches, width]
    z = F.normalize(attention_pool(patches, pool, heads), dim=-1)  # [1, latent width]
""",
    "open_clip": """\
IMPORTS
import open_clip

ATTENTION_POOL

folder = "."  # this folder
model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
model = model.eval()
READ_POOL
images = transform(Image.open("image.jpg"))[None]
with torch.no_grad():
    mean = model.encode_image(images)  # [1, width]
    model.visual.output_tokens = True
    patches = model.visual(images)[1]  # [1, patches, width]
    z = F.normalize(attention_pool(patches, pool, heads), dim=-1)  # [1, latent width]
""",
}


def _example(kind: str, arguments: str) -> str:
    text = _EXAMPLE[kind].replace("ARGUMENTS", arguments)
    pool = inspect.getsource(attention_pool).replace("  # type: ignore[no-untyped-def]", "")
    for word, words in (("IMPORTS", _IMPORTS), ("ATTENTION_POOL", pool), ("READ_POOL", _READ_POOL)):
        text = text.replace(word + "\n", words)
    return text
