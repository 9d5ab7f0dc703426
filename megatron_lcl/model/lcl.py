"""The model in one process, and its public face: images and padded token ids in, features and losses out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.config import Model
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.losses.sigmoid import sigmoid_loss
from megatron_lcl.model.activations import Activations, Outputs, unit_norm
from megatron_lcl.model.block import Norm
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import Head, LanguageBlock, Patches, PoolInterleave, VisionBlock, build_layers
from megatron_lcl.model.reference_format import state_dict_open_clip
from megatron_lcl.model.special import SpecialTokens


class LayerList(nn.Sequential):
    """All layers in one process; parameters are called `{index}.name`, as in a pipeline."""

    def forward(self, batch: PackedBatch) -> Outputs:
        x: Any = Activations.of(batch)
        for layer in self:
            x = layer(x)
        return x


class LCLOutput(NamedTuple):
    """Losses (unweighted) and features of `LCL.forward`."""

    contrastive_loss: torch.Tensor
    """mean over the pairs, symmetric InfoNCE; of a model with a logit bias the sigmoid loss"""
    generation_loss: torch.Tensor
    """mean over the targets, nats"""
    image_features: torch.Tensor
    """[pairs, D] unit norm"""
    text_features: torch.Tensor
    """[pairs, D] unit norm"""
    logit_scale: torch.Tensor
    """exp of the log scale"""
    logit_bias: torch.Tensor | None = None
    """where the model has one: sigmoid(logit_scale x·y + logit_bias) is then the probability that an image x and a text
    y belong together"""


class LCL(nn.Module):
    """Latent Compression Learning (NeurIPS 2024): vision encoder, attention pool and causal language model.

    Parameters are drawn from `seed`; None leaves them as torch made them, to be loaded. Not `whole`: the vision encoder
    and the pool alone, which encode images, and raise UserError where they are to read text.
    """

    def __init__(
        self,
        config: Model,
        seed: int | None = 0,
        initial_log_scale: float = math.log(1 / 0.07),
        norm: Norm = nn.LayerNorm,
        whole: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.whole = whole
        self.special = SpecialTokens.of(config.language.vocab_size)
        layers = build_layers(config, initial_log_scale, norm)
        if seed is not None:
            initialize(dict(enumerate(layers)), config, seed)
        self.layers = LayerList(*(layers if whole else layers[: 2 + config.vision.layers]))

    def need_language(self) -> None:
        """UserError where there is no language model."""
        if not self.whole:
            raise UserError(
                "these weights are the vision encoder alone, as exports to hf and timm hold it; what reads text needs "
                "the run, one of its checkpoints, or its export to open_clip"
            )

    @property
    def patches(self) -> Patches:
        return self.layers[0]  # type: ignore[return-value]

    @property
    def vision_blocks(self) -> list[VisionBlock]:
        return [layer for layer in self.layers if isinstance(layer, VisionBlock)]

    @property
    def pool(self) -> PoolInterleave:
        return self.layers[1 + self.config.vision.layers]  # type: ignore[return-value]

    @property
    def language_blocks(self) -> list[LanguageBlock]:
        return [layer for layer in self.layers if isinstance(layer, LanguageBlock)]

    @property
    def head(self) -> Head:
        return self.layers[-1]  # type: ignore[return-value]

    def vision_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W], normalized float or uint8 → vision blocks' output [N, 1+registers+P, V], before the
        final norm: the class token, registers where the model has them, patches."""
        self._check_size(images)
        hidden = self.patches.encode(images)
        for block in self.vision_blocks:
            hidden = block.encode(hidden)
        return hidden

    def patch_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W], normalized float or uint8 → patch tokens after the final norm [N, P, V], row by row from
        the top left: the features that LCL trains.

        With a gradient, so that an encoder can be fine-tuned on them. ValueError as of `encode_image`.
        """
        return self.pool.patch_features(self.vision_tokens(images))

    def _check_size(self, images: torch.Tensor) -> None:
        size = self.config.vision.image_size
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images have the shape {tuple(images.shape)}; the model takes [N, 3, {size}, {size}]")

    def _check_ids(self, token_ids: torch.Tensor) -> None:
        """On a GPU this waits for the ids, as finding the rows' lengths does. (Training has packs, which come from a
        corpus of the model's vocabulary.)"""
        if token_ids.dim() != 2 or not token_ids.shape[1]:
            raise ValueError(
                f"token_ids have the shape {tuple(token_ids.shape)}; the model takes [B, S] with S from 1: of one text "
                "give token_ids[None]"
            )
        if token_ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"token_ids are {token_ids.dtype}; give int64")
        size = self.config.language.vocab_size
        outside = token_ids[(token_ids < 0) | (token_ids >= size)]
        if len(outside):
            raise ValueError(
                f"token_ids hold {int(outside[0])}; the model's vocabulary has the ids 0 to {size - 1}: use the "
                "tokenizer that it was trained with"
            )

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, H, W], normalized float or uint8 → image latents z [N, D], unit norm, float32.

        ValueError for another dtype, or another size than the model's.
        """
        return unit_norm(self.pool.pool(self.vision_tokens(images))[0])

    def encode_text(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token ids [B, S], right-padded with 0 → context features [B, D], unit norm, float32.

        Read at `<soi>`, which stands, in a copy, in place of each row's `<eot>`, or of its last token if it has none.
        ValueError for another shape or dtype, ids outside the vocabulary, and an empty row.
        """
        self.need_language()
        self._check_ids(token_ids)
        lengths = _lengths(token_ids)
        if (lengths == 0).any():
            raise ValueError("a row of token_ids is empty (all 0); every text needs at least one token")
        is_end = token_ids == self.special.eot
        ends = torch.where(is_end.any(1), is_end.int().argmax(1), lengths - 1)
        with_soi = token_ids.scatter(1, ends[:, None], self.special.soi)
        size = self.config.vision.image_size
        batch = pack_padded(with_soi, ends + 1, token_ids.new_empty(0, 3, size, size, dtype=torch.uint8), self.config)
        x: Any = Activations.of(batch)
        for layer in list(self.layers)[:-1]:
            x = layer(x)
        return self.head.text_features(x.hidden[torch.cumsum(ends + 1, 0) - 1])

    def state_dict_open_clip(self) -> dict[str, torch.Tensor]:
        """The parameters under the reference's names and in its shapes; `from_open_clip` takes them back.

        Most of the tensors are views of the model's own, which follow it when it is trained on: clone what is to stay.
        Copies are those that the format concatenates (q, k and v of every block) or transposes (the text projection).
        """
        self.need_language()
        return state_dict_open_clip(self.layers, self.config)

    def forward(self, images: torch.Tensor, token_ids: torch.Tensor) -> LCLOutput:
        """Both losses of a batch of sequences.

        images [N, 3, H, W], normalized float or uint8, in the order of the `<soi>` in token_ids [B, S] (int64,
        right-padded with 0). Reference rules for the contrast: every image takes part unless its `<soi>` is its
        sequence's first token. ValueError where images and placeholders do not fit each other, images are of another
        size than the model's, or dtype, or token_ids of another shape or dtype, or outside the vocabulary.
        """
        self.need_language()
        self._check_ids(token_ids)
        self._check_size(images)
        batch = pack_padded(token_ids, _lengths(token_ids), images, self.config)
        out = self.layers(batch)
        pairs = (batch.image_soi >= 0).nonzero()[:, 0]
        image_features, text_features = out.image_features[pairs], out.text_features[pairs]
        if out.logit_bias is None:
            loss = contrastive_loss(image_features, text_features, out.log_scale).loss
        else:
            loss = sigmoid_loss(image_features, text_features, out.log_scale, out.logit_bias).loss
        return LCLOutput(
            loss,
            out.generation / max(batch.num_targets, 1),
            image_features,
            text_features,
            out.log_scale[0].exp(),
            None if out.logit_bias is None else out.logit_bias[0],
        )


def pack_padded(token_ids: torch.Tensor, lengths: torch.Tensor, images: torch.Tensor, config: Model) -> PackedBatch:
    """Padded sequences [B, S] with their lengths [B], and their images [N, 3, H, W] in order, as one pack.

    Every image takes part in the contrast unless its `<soi>` is its sequence's first token (the reference's rule).
    """
    special = SpecialTokens.of(config.language.vocab_size)
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > config.language.context_length:
        raise ValueError(
            f"a sequence has {longest} tokens; the model's context_length is {config.language.context_length}"
        )
    column = torch.arange(token_ids.shape[1], device=token_ids.device)
    valid = column < lengths[:, None]
    tokens, positions = token_ids[valid], column.expand_as(token_ids)[valid]
    following = token_ids.roll(-1, 1)[valid]
    last = positions == lengths.repeat_interleave(lengths) - 1
    targets = torch.where(last | (following == special.placeholder) | (following == special.eoi), -1, following)
    soi = ((tokens == special.soi) & ~last & (following == special.placeholder)).nonzero()[:, 0]
    num_placeholders = int((tokens == special.placeholder).sum())
    run = soi[:, None] + 1 + torch.arange(config.vision.num_patches, device=soi.device)
    fits = run.numel() == num_placeholders and (run < len(tokens)).all()
    if len(soi) != len(images) or not fits or (tokens[run] != special.placeholder).any():
        raise ValueError(
            f"{len(images)} images, but token_ids hold {len(soi)} `<soi>` and {num_placeholders} placeholders; "
            f"every image needs `<soi>`, {config.vision.num_patches} placeholders and `<eoi>`"
        )
    target_positions = (targets >= 0).nonzero()[:, 0]
    image_soi = torch.where(positions[soi] > 0, soi, -1)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).int(),
        targets=targets,
        target_positions=target_positions,
        images=images,
        image_start=soi + 1,
        image_soi=image_soi,
        image_valid=torch.ones_like(soi),
        kept_patches=soi[:0],
        num_targets=len(target_positions),
        num_pairs=int((image_soi >= 0).sum()),
        num_images=len(images),
        num_tokens=len(tokens),
        max_seqlen=longest,
        num_patches=config.vision.num_patches,
    )


def _lengths(token_ids: torch.Tensor) -> torch.Tensor:
    """Lengths [B] of rows right-padded with 0 (a 0 before the last other token is a token)."""
    column = torch.arange(1, token_ids.shape[1] + 1, device=token_ids.device)
    return torch.where(token_ids != 0, column, 0).amax(1)
