"""Model cards: what the weights are, which features to use, and an example that runs as it stands."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_lcl.config import Config, Model
from megatron_lcl.convert.pool import attention_pool


@dataclass(frozen=True)
class Card:
    """What a model card says that the weights do not."""

    name: str = "An LCL vision encoder"
    license: str = "other"
    """the weights' licence, as an SPDX identifier in lower case; `other`: not stated"""
    datasets: tuple[str, ...] = ()
    """what it was trained on, in words or as hub ids"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """name → value, as measured"""
    run: Config | None = None
    """the run's config, quoted in full"""


def write_card(folder: Path, kind: str, model: Model, card: Card) -> None:
    """`README.md`."""
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
        f"```python\n{_EXAMPLE[kind].format(pool=inspect.getsource(attention_pool).replace(_UNTYPED, ''))}```",
        "`certificate.json` has the measured difference between these features and megatron_lcl's own.",
        f"## Data\n\n{data}",
        "## Metrics\n\n" + (f"| metric | value |\n| --- | --- |\n{metrics}" if metrics else "None were given."),
        f"## Licence\n\n{'Not stated.' if card.license == 'other' else card.license}",
    ]
    if card.run is not None:
        from megatron_lcl.config import to_yaml

        sections.append(f"## Config\n\n```yaml\n{to_yaml(card.run)}```")
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


_UNTYPED = "  # type: ignore[no-untyped-def]"

_ADVICE = {
    "hf": (
        "Not `pooler_output`: that is the class token's output, which LCL never reads and so never trains. And not "
        "`last_hidden_state` as it is: it comes before the final norm. Use the normed patch tokens (for dense tasks, "
        "or their mean), or the image latent z, which the attention pool makes of them:"
    ),
}

_EXAMPLE = {
    "hf": """\
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoModel

{pool}
folder = "."  # this folder
model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
with safe_open(f"{{folder}}/attention_pool.safetensors", "pt") as file:
    pool, heads = {{name: file.get_tensor(name).to(model.dtype) for name in file.keys()}}, int(file.metadata()["heads"])
inputs = processor(Image.open("image.jpg"), return_tensors="pt").to(model.dtype)
norm = getattr(model, "vision_model", model).post_layernorm
with torch.no_grad():
    patches = norm(model(**inputs).last_hidden_state[:, 1:])  # [1, patches, width]
    z = F.normalize(attention_pool(patches, pool, heads), dim=-1)  # [1, latent width]
""",
}
