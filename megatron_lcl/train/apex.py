"""NVIDIA's apex, which is not the package of that name on the Python package index."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError


def from_apex(module: str, name: str, setting: str, remedy: str) -> Any:
    """`apex.MODULE.NAME`. UserError where NVIDIA's apex is absent, which says what asked for it."""
    try:
        return getattr(importlib.import_module(f"apex.{module}"), name)
    except (ImportError, AttributeError):
        raise UserError(
            f"{setting}, but NVIDIA's apex is not installed (the package of that name on the Python package index is "
            f"something else); build it from NVIDIA's source, or {remedy}"
        ) from None


def fused_adam() -> Any:
    """Apex's FusedAdam."""
    return from_apex("optimizers", "FusedAdam", "optimizer.name is apex_fused_adam", "use adamw")


def fused_layer_norm() -> Any:
    """Apex's FusedLayerNorm."""
    return from_apex("normalization", "FusedLayerNorm", "train.apex_layer_norm is set", "leave it unset")


def check_apex(config: Config) -> None:
    """UserError where the config asks for apex and it is absent."""
    if config.optimizer.name == "apex_fused_adam":
        fused_adam()
    if config.train.apex_layer_norm:
        fused_layer_norm()
