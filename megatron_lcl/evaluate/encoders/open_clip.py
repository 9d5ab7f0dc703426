"""OpenCLIP's models as encoders."""

from __future__ import annotations

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F

from megatron_lcl.convert.libraries import require
from megatron_lcl.convert.open_clip import TOWER_CONFIG
from megatron_lcl.data.loading.images import bounded
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import (
    Encoder,
    Features,
    drawn_from,
    hash_tokenizer,
    loading,
    sequences_of,
)
from megatron_lcl.evaluate.encoders.hub import Remote, hub_file
from megatron_lcl.evaluate.encoders.spec import Spec
from megatron_lcl.evaluate.encoders.timm import patch_tokens
from megatron_lcl.filesystem import is_dir


class OpenClipEncoder(Encoder):
    """An OpenCLIP model: pooled is what `encode_image` gives."""

    def __init__(self, spec: Spec, device: str | torch.device = "cpu") -> None:
        self._version = require("open_clip", spec.text)
        import open_clip

        if spec.name.startswith(("local-dir:", "hf-hub:")):
            self._architecture, pretrained = spec.name, ""
        else:
            architecture, _, pretrained = spec.name.partition("@")
            self._architecture = architecture.replace("/", "-")  # as OpenCLIP itself reads ViT-B/32
            if not pretrained and spec.seed is None and self._architecture in open_clip.list_models():
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(self._architecture)) or "a file's path"
                raise UserError(
                    f"{spec.text} names no weights; give {spec.text}@PRETRAINED, where PRETRAINED is one of {tags}, or "
                    "none for an untrained one"
                )
        self._remote = _remote(spec, self._architecture, pretrained)
        with loading(spec.text, "OpenCLIP", self._remote), drawn_from(spec.seed or 0):
            if spec.seed is None:
                module, self._transform = open_clip.create_model_from_pretrained(
                    self._architecture,
                    pretrained or None,
                    # which OpenAI's and some others' weights were trained with; ViT-B-32 alone means the exact GELU
                    force_quick_gelu=_pretrained_config(self._architecture, pretrained).get("quick_gelu", False),
                )
            else:
                options: dict[str, Any] = {"load_weights": False} if ":" in self._architecture else {}
                if "hf_model_name" in _text_config(self._architecture):
                    options["pretrained_text"] = False
                module, _, self._transform = open_clip.create_model_and_transforms(self._architecture, **options)
        super().__init__(spec.text, module, device)

    def _prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return self._transform(bounded(image))  # type: ignore[operator]

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        if (trunk := getattr(module.visual, "trunk", None)) is not None:  # a timm model, as SigLIP's are
            features = trunk.forward_features(images)
            return Features(module.visual.head(trunk.forward_head(features)), patch_tokens(trunk, features))
        # CoCa's last norm comes after a pool of queries; the patches' own stands in that pool
        pool = getattr(module.visual, "attn_pool", None)
        with sequences_of(getattr(module.visual, "ln_post", None) if pool is None else pool.ln_k) as tokens:
            pooled = module.encode_image(images)
        return Features(pooled, tokens[-1][:, 1:] if tokens else pooled[:, None][:, :0])

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        with loading(self.name, "OpenCLIP", self._remote if self._architecture.startswith("hf-hub:") else None):
            name = _text_config(self._architecture).get("hf_tokenizer_name")
        if not name:
            return open_clip.get_tokenizer(self._architecture)
        remote = None
        if not (self._architecture.startswith("local-dir:") or is_dir(Path(name))):
            remote = hub_file(name, "tokenizer_config.json", "give open_clip:local-dir:DIR with a tokenizer of its own")
        with loading(self.name, "OpenCLIP", remote):
            # the folder's config could ask for its code to be run
            return open_clip.get_tokenizer(self._architecture, trust_remote_code=False)

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        module: Any = self.module
        return F.normalize(module.encode_text(self._tokenizer(texts).to(self.device)).float(), dim=-1).cpu()

    @property
    def tokenizer_fingerprint(self) -> str:
        held = getattr(self._tokenizer, "tokenizer", None)  # transformers'; OpenCLIP's own come with it
        return "" if held is None else hash_tokenizer(held)

    @property
    def settings(self) -> Any:
        module: Any = self.module
        return [self._version, module.visual.preprocess_cfg]


def _pretrained_config(architecture: str, pretrained: str) -> dict[str, Any]:
    """What OpenCLIP says of these weights; nothing of a file's."""
    import open_clip

    return open_clip.get_pretrained_cfg(architecture, pretrained) if pretrained else {}


def _text_config(architecture: str) -> dict[str, Any]:
    """What OpenCLIP's config of this model says of its text tower."""
    import open_clip

    kind, _, name = architecture.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(name) / TOWER_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    elif kind == "hf-hub":
        from open_clip.factory import _get_hf_config

        config = _get_hf_config(name)["model_cfg"]
    else:
        config = open_clip.get_model_config(architecture) or {"text_cfg": {}}
    return config["text_cfg"]


def _remote(spec: Spec, architecture: str, pretrained: str) -> Remote | None:
    """A file that OpenCLIP fetches for this model."""
    kind, _, name = architecture.partition(":")
    instead = "give open_clip:local-dir:DIR, or open_clip:NAME@FILE"
    if kind == "hf-hub":
        return hub_file(name, TOWER_CONFIG, instead)
    if kind == "local-dir":
        return None
    instead += "" if spec.seed is not None else f", or open_clip:{architecture}@none for an untrained one"
    weights = _pretrained_config(architecture, pretrained)
    if weights.get("hf_hub"):
        repository, file = os.path.split(weights["hf_hub"])
        return hub_file(repository, file or "open_clip_config.json", instead)
    text = _text_config(architecture).get("hf_model_name")  # whose config it asks for
    return hub_file(text, "config.json", instead) if text else None
