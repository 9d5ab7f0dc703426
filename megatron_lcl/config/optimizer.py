"""Sections `optimizer` and `zero`: how it is minimized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Fraction


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """AdamW with warmup and cosine decay."""

    name: Literal["adamw", "apex_fused_adam"] = Field(
        default="adamw",
        description="adamw: torch's AdamW (paper); apex_fused_adam: FusedAdam of NVIDIA's apex (not PyPI's package of "
        "that name)",
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        default=5e-4, description="peak learning rate (paper: 5e-4 on pairs, 3e-4 on interleaved documents)"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="learning rate that the cosine decay reaches one step after the last step (reference: 0)",
    )
    warmup: Count = Field(default=2000, description="steps of linear warmup (paper: 2000)")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.98), description="Adam's beta1, beta2 (paper: 0.9, 0.98)")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="Adam's epsilon (paper: 1e-6)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2,
        description="weight decay of parameters with two or more dimensions (paper: 0.2); biases, norms and the log "
        "scale have none",
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="largest global gradient norm, larger ones are clipped; 0: no clipping (the paper's value is not "
        "published)",
    )


@dataclass(frozen=True, config=STRICT)
class Zero:
    """DeepSpeed's ZeRO."""

    stage: Annotated[int, Field(ge=1, le=3)] = Field(
        default=1,
        description="ZeRO stage, sharded over data-parallel ranks: 1 optimizer states; 2 also gradients; 3 also "
        "parameters",
    )
