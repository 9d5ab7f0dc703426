"""timm's models as encoders."""

from __future__ import annotations

from typing import Any

import torch

from megatron_lcl.convert.libraries import require
from megatron_lcl.data.loading.images import decode_rgb
from megatron_lcl.evaluate.encoders.encoder import DECODING, Encoder, Features, loading


class TimmEncoder(Encoder):
    """A timm model: pooled is what it puts before its classifier."""

    def __init__(self, spec: str, model: str, device: str | torch.device = "cpu") -> None:
        self._version = require("timm", spec)
        import timm

        with loading(spec, "timm"):
            # with as many classes as the weights have: only then does timm insist on every tensor
            plain: Any = timm.create_model(model)
            num_classes = plain.pretrained_cfg["num_classes"]
            module: Any = timm.create_model(model, pretrained=True, num_classes=num_classes)
            self._config = timm.data.resolve_model_data_config(module)
            self._transform: Any = timm.data.create_transform(**self._config)
        super().__init__(spec, module, device)

    def prepare(self, data: bytes) -> torch.Tensor:
        return self._transform(decode_rgb(data))

    def _encode(self, images: torch.Tensor) -> Features:
        module: Any = self.module
        features = module.forward_features(images)
        return Features(module.forward_head(features, pre_logits=True).flatten(1), self._patches(features))

    def _patches(self, features: torch.Tensor) -> torch.Tensor:
        if features.dim() == 2:
            return features[:, None][:, :0]
        if features.dim() == 3:
            return features[:, getattr(self.module, "num_prefix_tokens", 0) :]
        channels_last = features.shape[-1] == getattr(self.module, "num_features", None)
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)

    @property
    def settings(self) -> Any:
        return [self._version, DECODING, self._config]
