"""OpenCLIP's models as encoders."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_lcl.convert.libraries import require
from megatron_lcl.convert.open_clip import TOWER_CONFIG
from megatron_lcl.data.loading.images import decode_rgb
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import DECODING, Encoder, Features, loading


class OpenClipEncoder(Encoder):
    """An OpenCLIP model: pooled is what `encode_image` gives."""

    def __init__(self, spec: str, model: str, device: str | torch.device = "cpu") -> None:
        self._version = require("open_clip", spec)
        import open_clip

        if model.startswith(("local-dir:", "hf-hub:")):
            self._architecture, pretrained = model, ""
        else:
            self._architecture, _, pretrained = model.partition("@")
            if not pretrained and self._architecture in open_clip.list_models():
                tags = ", ".join(open_clip.list_pretrained_tags_by_model(self._architecture)) or "a file's path"
                raise UserError(f"{spec} names no weights; give {spec}@PRETRAINED, where PRETRAINED is one of {tags}")
        with loading(spec, "OpenCLIP"):
            module, self._transform = open_clip.create_model_from_pretrained(self._architecture, pretrained or None)
        super().__init__(spec, module, device)
        self._spec = spec

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(decode_rgb(data))  # type: ignore[operator]

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        patches: list[torch.Tensor] = []
        norm = getattr(module.visual, "ln_post", None)
        hook = norm.register_forward_hook(lambda _, __, out: patches.append(out)) if norm is not None else None
        try:
            pooled = module.encode_image(images)
        finally:
            if hook is not None:
                hook.remove()
        tokens = [p for p in patches if p.dim() == 3]
        return Features(pooled, tokens[-1][:, 1:] if tokens else pooled[:, None][:, :0])

    @cached_property
    def _tokenizer(self) -> Any:
        import open_clip

        # of a Hugging Face tokenizer; the folder's config could ask for its code to be run
        code = {"trust_remote_code": False} if _hf_tokenizer(self._architecture) else {}
        with loading(self._spec, "OpenCLIP"):
            return open_clip.get_tokenizer(self._architecture, **code)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
        module: Any = self.module
        return F.normalize(module.encode_text(self._tokenizer(list(texts)).to(self.device)).float(), dim=-1).cpu()

    @property
    def settings(self) -> Any:
        module: Any = self.module
        return [self._version, DECODING, module.visual.preprocess_cfg]


def _hf_tokenizer(architecture: str) -> bool:
    """Whether OpenCLIP takes a Hugging Face tokenizer for this model."""
    import open_clip

    kind, _, name = architecture.partition(":")
    if kind == "local-dir":
        config = json.loads((Path(name) / TOWER_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    elif kind == "hf-hub":
        from open_clip.factory import _get_hf_config

        config = _get_hf_config(name)["model_cfg"]
    else:
        config = open_clip.get_model_config(architecture)
    return bool(config["text_cfg"].get("hf_tokenizer_name"))
