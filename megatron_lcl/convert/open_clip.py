"""Checkpoints in the reference's format (open_clip with LCL's additions) as models of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import load_open_clip, model_config


def from_open_clip(state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> LCL:
    """The model with the parameters of a checkpoint in the reference's format.

    `config`: dict as in the reference's `model_configs/*.json`. Raises ValueError naming tensors that are missing,
    unknown, or of the wrong shape.
    """
    model = LCL(model_config(config), seed=None)
    load_open_clip(model.layers, model.config, state_dict)
    return model
