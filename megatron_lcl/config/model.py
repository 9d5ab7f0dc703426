"""Section `model`: the architecture."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megatron_lcl.config.types import STRICT, Count, Positive, divides

LayerScale = Annotated[float, Field(gt=0)] | None
DropPath = Annotated[float, Field(ge=0, lt=1)]
_LAYER_SCALE = Field(
    default=None,
    description="LayerScale: initial value of the learned factors, one per feature, of the outputs of each block's "
    "attention and feed-forward network (arXiv 2103.17239: 0.1 to 1e-6; DINOv2: 1e-5); null: none",
)
_QK_NORM = Field(
    default=False,
    description="LayerNorm of queries and keys over the features of a head, the same for all heads (ViT-22B, arXiv "
    "2302.05442)",
)
_DROP_PATH = Field(
    default=0.0,
    description="stochastic depth (arXiv 1603.09382): largest probability with which a block's attention, or "
    "feed-forward network, is left out for an image or a sequence; it grows linearly with depth, from 0 in the first "
    "block; in training only",
)


@dataclass(frozen=True, config=STRICT)
class Vision:
    """CLIP-style vision transformer."""

    image_size: Positive = Field(default=224, description="side of the square input image, pixels")
    patch_size: Positive = Field(default=32, description="side of a patch, pixels; must divide image_size")
    width: Positive = Field(default=768, description="hidden width (ViT-B: 768)")
    layers: Positive = Field(default=12, description="number of blocks")
    heads: Positive = Field(default=12, description="attention heads; must divide width")
    mlp_width: Positive = Field(default=3072, description="hidden width of the feed-forward network")
    patch_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0,
        description="fraction of each image's patches that training leaves out, drawn anew for each image (FLIP, arXiv "
        "2212.00794: 0.5 to 0.75); evaluation and export have all patches",
    )
    patch_dropout_places: Literal["kept", "all"] = Field(
        default="kept",
        description="placeholders of an image of which patches are left out, in the token sequence. kept: one for each "
        "patch that is kept, so that packs hold more documents; all: one for each patch, those of the patches left out "
        "being the embedding of the placeholder's id alone",
    )
    unmasked_steps: Count = Field(
        default=0,
        description="the last steps of the run, which have all patches; without them the loss on whole images is worse "
        "(FLIP: a short end; 0: dropout to the end)",
    )
    norm_eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-5,
        description="epsilon of the vision encoder's LayerNorms, the last one included, but not of the attention "
        "pool's, which is 1e-5 (CLIP: 1e-5; ViT, DINOv2: 1e-6)",
    )
    embedding_norm: bool = Field(
        default=True, description="a LayerNorm behind the patch embedding, as CLIP has; false: none, as in ViT"
    )
    registers: Count = Field(
        default=0, description="register tokens beside the class token (arXiv 2309.16588: 4); no part of an image"
    )
    layer_scale: LayerScale = _LAYER_SCALE
    qk_norm: bool = _QK_NORM
    drop_path: DropPath = _DROP_PATH

    def __post_init__(self) -> None:
        divides("model.vision.patch_size", self.patch_size, "model.vision.image_size", self.image_size)
        divides("model.vision.heads", self.heads, "model.vision.width", self.width)

    @property
    def num_patches(self) -> int:
        """Patches per image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_kept(self) -> int:
        """Patches per image that training keeps: the whole part of the remaining fraction, at least one."""
        return max(1, int(self.num_patches * (1 - self.patch_dropout) + 1e-9))

    @property
    def num_placeholders(self) -> int:
        """Placeholders per image in the token sequences of training; in those of evaluation `num_patches`."""
        return self.num_patches if self.patch_dropout_places == "all" else self.num_kept

    @property
    def num_prefix(self) -> int:
        """Rows of an image before its patches: the class token and the registers."""
        return 1 + self.registers

    @property
    def num_rows(self) -> int:
        """Rows of an image in the encoder."""
        return self.num_prefix + self.num_patches


@dataclass(frozen=True, config=STRICT)
class Language:
    """CLIP-style causal language model."""

    context_length: Positive = Field(
        default=2048,
        description="longest sequence, tokens and placeholders together (learned positions); a longer document becomes "
        "several sequences (reference: the rest is dropped)",
    )
    vocab_size: Positive = Field(
        default=49411, description="number of token ids, special tokens included (CLIP's byte pairs: 49,408 + 3)"
    )
    width: Positive = Field(default=512, description="hidden width; image latents and features have the same")
    layers: Positive = Field(default=12, description="number of blocks")
    heads: Positive = Field(default=8, description="attention heads; must divide width")
    mlp_width: Positive = Field(default=2048, description="hidden width of the feed-forward network")
    layer_scale: LayerScale = _LAYER_SCALE
    qk_norm: bool = _QK_NORM
    drop_path: DropPath = _DROP_PATH

    def __post_init__(self) -> None:
        divides("model.language.heads", self.heads, "model.language.width", self.width)


@dataclass(frozen=True, config=STRICT)
class Model:
    """Vision encoder, attention pool and language model."""

    vision: Vision = Vision()
    language: Language = Language()
    pool_heads: Positive = Field(default=8, description="heads of the attention pool; must divide model.language.width")
    logit_bias: float | None = Field(
        default=None,
        description="initial value of the learned bias of the contrast's logits, which a sigmoid loss needs (SigLIP: "
        "-10); null: no bias, in `siglip` -10",
    )

    def __post_init__(self) -> None:
        divides("model.pool_heads", self.pool_heads, "model.language.width", self.language.width)
