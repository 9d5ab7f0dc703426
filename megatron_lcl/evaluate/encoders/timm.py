"""timm's models as encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import PIL.Image
import torch

from megatron_lcl.convert.libraries import require
from megatron_lcl.data.loading.images import bounded
from megatron_lcl.evaluate.encoders.encoder import Encoder, Features, drawn_from, loading
from megatron_lcl.evaluate.encoders.hub import Remote, hub_file
from megatron_lcl.evaluate.encoders.spec import Spec


class TimmEncoder(Encoder):
    """A timm model: pooled is what it puts before its classifier."""

    def __init__(self, spec: Spec, device: str | torch.device = "cpu") -> None:
        self._version = require("timm", spec.text)
        import timm.data

        with loading(spec.text, "timm", _remote(spec)), drawn_from(spec.seed or 0):
            module: Any = timm.create_model(spec.name)
            if spec.seed is None:
                # with as many classes as the weights have: only then does timm insist on every tensor
                num_classes = module.pretrained_cfg["num_classes"]
                module = timm.create_model(spec.name, pretrained=True, num_classes=num_classes)
            self._config = timm.data.resolve_model_data_config(module)
            self._transform: Any = timm.data.create_transform(**self._config)
        super().__init__(spec.text, module, device)

    def _prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return self._transform(bounded(image))

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        features = module.forward_features(images)
        return Features(module.forward_head(features, pre_logits=True).flatten(1), patch_tokens(module, features))

    @property
    def settings(self) -> Any:
        return [self._version, self._config]


def patch_tokens(module: Any, features: torch.Tensor) -> torch.Tensor:
    """[N, P, V] of what a timm model's `forward_features` gives: without class and register tokens, a map as a row of
    its places; P = 0 where it has neither."""
    if features.dim() == 2:
        return features[:, None][:, :0]
    if features.dim() == 3:
        return features[:, getattr(module, "num_prefix_tokens", 0) :]
    channels_last = features.shape[-1] == getattr(module, "num_features", None)
    return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


def _remote(spec: Spec) -> Remote | None:
    """A file that timm fetches for this model."""
    from timm.models import get_pretrained_cfg, parse_model_name

    untrained = f"{spec.text}?pretrained=no for an untrained one"
    instead = f"give timm:local-dir:DIR with config.json and its weights, or {untrained}"
    try:
        source, name = parse_model_name(spec.name)
        config = None if source or spec.seed is not None else get_pretrained_cfg(name)
    except (ValueError, RuntimeError, AssertionError):  # which `create_model` explains
        return None
    if source == "hf-hub":
        return hub_file(name, "config.json", "give timm:local-dir:DIR with config.json and its weights")
    if config is None or config.file:
        return None
    if config.hf_hub_id:
        return hub_file(config.hf_hub_id, "config.json", instead)
    if not config.url:
        return None
    url, file = (config.url, Path(urlsplit(config.url).path).name) if isinstance(config.url, str) else config.url
    return Remote(url, instead, Path(torch.hub.get_dir()) / "checkpoints" / file)
