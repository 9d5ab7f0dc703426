"""Sections `optimizer` and `zero`: how it is minimized."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Positive

Decay = Annotated[float, Field(ge=0, le=1 - 2**-24)]
"""what a moving average keeps in a step: below 1, in float32 too, or it would stay 0, and its correction be 0/0"""


@dataclass(frozen=True, config=STRICT)
class Part:
    """How fast a part of the model is trained, beside the others."""

    lr: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="learning rate of the part, as a multiple of the scheduled one (discriminative fine-tuning, arXiv "
        "1801.06146, section 3.2)",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="weight decay of the part, as a multiple of optimizer.weight_decay"
    )


@dataclass(frozen=True, config=STRICT)
class Encoder(Part):
    """The same of a part with blocks."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0,
        description="factor d of the learning rate from a block to the one below: of L blocks the n-th has "
        "d^(L + 1 - n), the embedding below them d^(L + 1) (ELECTRA, arXiv 2003.10555; BEiT, arXiv 2106.08254, "
        "fine-tunes with 0.65 to 0.85); 1: none",
    )


@dataclass(frozen=True, config=STRICT)
class Parts:
    """Learning rate and weight decay by part."""

    vision: Encoder = Encoder()
    pool: Part = Part()
    language: Encoder = Encoder()
    head: Part = Part()


@dataclass(frozen=True, config=STRICT)
class Muon:
    """Momentum orthogonalized by Newton-Schulz, matrix by matrix; with `optimizer.name: muon`."""

    momentum: Decay = Field(default=0.95, description="Nesterov momentum (published: 0.95)")
    newton_schulz_steps: Positive = Field(default=5, description="Newton-Schulz iterations per update (published: 5)")
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="type in which the iterations are computed (published: bfloat16)"
    )
    per_head: bool = Field(
        default=False,
        description="orthogonalize the rows of each head of q, k and v by themselves; false: each of the three whole",
    )


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """The optimizer, with warmup and cosine decay."""

    name: Literal["adamw", "apex_fused_adam", "stable_adamw", "muon"] = Field(
        default="adamw",
        description="adamw: torch's AdamW (paper); apex_fused_adam: FusedAdam of NVIDIA's apex (not PyPI's package of "
        "that name); stable_adamw: AdamW whose update of a tensor is clipped (arXiv 2304.13013); muon: Muon for the "
        "blocks' and the pool's matrices, at AdamW's learning rate (arXiv 2502.16982), AdamW for the rest",
    )
    lr: Annotated[float, Field(gt=0)] = Field(
        default=5e-4, description="peak learning rate (paper: 5e-4 on pairs, 3e-4 on interleaved documents)"
    )
    min_lr: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="learning rate that the cosine decay reaches one step after the last step (reference: 0)",
    )
    warmup: Count = Field(default=2000, description="steps of linear warmup (paper: 2000)")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.98), description="Adam's beta1, beta2 (paper: 0.9, 0.98)")
    eps: Annotated[float, Field(gt=0)] = Field(default=1e-6, description="Adam's epsilon (paper: 1e-6)")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.2,
        description="weight decay of parameters with two or more dimensions (paper: 0.2); biases, norms and the log "
        "scale have none",
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="largest global gradient norm, larger ones are clipped; 0: no clipping, as in the reference's "
        "scripts",
    )
    parts: Parts = Parts()
    muon: Muon = Muon()


@dataclass(frozen=True, config=STRICT)
class Zero:
    """DeepSpeed's ZeRO."""

    stage: Annotated[int, Field(ge=1, le=3)] = Field(
        default=1,
        description="ZeRO stage, sharded over data-parallel ranks: 1 optimizer states; 2 also gradients; 3 also "
        "parameters",
    )
