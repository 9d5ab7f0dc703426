"""The model as ONE list of layers: [patches, ViT blocks…, pool + interleave, language blocks…, head].

Every layer maps `Activations` to `Activations`; the head maps them to `Outputs`. One process runs the list as an
`nn.Sequential`, a pipeline as a `PipelineModule`; parameters are called `{index}.name` in both.

Between layers, rows are split over the tensor ranks (see parallel.mappings): in the vision encoder the L rows of all
image slots; after it the token rows, and likewise the image latents.

Shape legend: N image slots, P patches of an image, K of them that stay (`PackedBatch.kept_patches`; else K = P),
L = 1+registers+K, V vision width, D language width, R = B*T token slots; S rows of this tensor rank's shard of any.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_lcl.attention import Adaptive, PackedAttention, full_attention
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.model.activations import Activations, Outputs, unit_norm
from megatron_lcl.model.attention_logits import AttentionLogits
from megatron_lcl.model.block import Block, Norm, Recompute
from megatron_lcl.model.drop_path import LANGUAGE, VISION, DropPath, numbers_of, rate_of
from megatron_lcl.model.positions import positions_for
from megatron_lcl.model.transfer import from_host
from megatron_lcl.parallel.layers import (
    ColumnLinear,
    RowLinear,
    SharedParameters,
    VocabularyEmbedding,
    gathered_linear,
    mark_split,
    rows_of,
)
from megatron_lcl.parallel.mappings import (
    gather_from_sequence_parallel,
    gather_replicated,
    local_shard,
    pad_rows,
    reduce_scatter_to_sequence_parallel,
    shard_size,
)
from megatron_lcl.parallel.mesh import ALONE, Axis

MAX_LOG_SCALE = math.log(100)
PARTS = ("vision", "pool", "language", "head")
"""of the model, in the order of its layers"""
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


class Patches(nn.Module):
    """Patch embedding, class token, registers, learned positions, first norm."""

    def __init__(self, vision: Vision, norm: Norm, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.patch_size = vision.patch_size
        self.projection = nn.Linear(3 * vision.patch_size**2, vision.width, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(vision.width))
        self.positions = nn.Parameter(torch.empty(1 + vision.num_patches, vision.width))
        """of the class token and of the patches; registers have none"""
        self.registers = nn.Parameter(torch.empty(vision.registers, vision.width)) if vision.registers else None
        self.norm = norm(vision.width) if vision.embedding_norm else None
        self.prefix = vision.num_prefix
        self.shared = SharedParameters(self, axis)

    def forward(self, inputs: Activations) -> Activations:
        x = Activations(*inputs)
        num_images, length = len(x.hidden), self.prefix + x.num_patches
        size = shard_size(num_images * length, self.axis)
        start = self.axis.rank * size
        first, last = start // length, -(-(start + size) // length)  # the images to which the own rows belong
        kept = x.kept_NK if x.kept_NK is None else x.kept_NK[first:last]
        with self.shared.summing(self):
            rows_SV = self.encode(x.hidden[first:last], kept).flatten(0, 1)[start - first * length :][:size]
        return x._replace(hidden=pad_rows(rows_SV, size))

    def encode(self, images: torch.Tensor, kept_NK: torch.Tensor | None = None) -> torch.Tensor:
        """Images [N, 3, H, W], uint8 or normalized float → [N, L, V]; of any size that is a multiple of the patch's.

        kept_NK: the patches of each image that are read, each with the position that it has in the whole image (FLIP,
        Li et al. 2023, arXiv 2212.00794); None: all.
        """
        if not images.is_floating_point():
            images = normalize(images)
        n, _, height, width = images.shape
        p = self.patch_size
        rows = images.reshape(n, 3, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        positions = positions_for(self.positions, rows.shape[1])
        if kept_NK is not None:
            rows = rows[torch.arange(n, device=rows.device)[:, None], kept_NK]
            positions = torch.cat([positions[:1].expand(n, 1, -1), rows_of(positions[1:], kept_NK)], 1)
        patches = self.projection(rows.to(self.projection.weight.dtype))
        classes = self.class_embedding.expand(n, 1, -1)
        rows = torch.cat([classes, patches], 1) + positions
        if self.registers is not None:
            rows = torch.cat([rows[:, :1], self.registers.to(rows.dtype).expand(n, -1, -1), rows[:, 1:]], 1)
        return rows if self.norm is None else self.norm(rows)


class VisionBlock(Block):
    """Block in which every patch of an image sees every other."""

    def __init__(
        self, vision: Vision, norm: Norm, axis: Axis, recompute: Recompute = "none", drop: DropPath | None = None
    ) -> None:
        super().__init__(vision, norm, axis, recompute, drop)
        self.prefix = vision.num_prefix

    def forward(self, inputs: Activations) -> Activations:
        x = Activations(*inputs)
        length = self.prefix + x.num_patches

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.attention_logits is not None:
                self.attention_logits.of_images(q, k, length, x.images_used)
            return _attend_images(length, q, k, v)

        num_rows = len(x.image_start) * length
        return x._replace(hidden=self.residual(x.hidden, num_rows, attend, self._factors(x)))

    def _factors(self, x: Activations) -> Sequence[torch.Tensor]:
        """Drop path's, by image slot."""
        if self.drop is None or not self.training or not x.packs:
            return ()
        packs, size, device = numbers_of(x.packs, x.hidden.device), len(x.hidden), x.hidden.device
        num_images, slots = len(x.image_start), len(x.image_start) // len(x.packs)
        rows = torch.arange(size, device=device) + self.axis.rank * size
        images = rows // (self.prefix + x.num_patches)
        images = images.clamp(max=num_images - 1)  # rows past the end are padding
        return self.drop.factors(packs[images // slots], images % slots, x.hidden.dtype)

    def encode(self, hidden_NLV: torch.Tensor) -> torch.Tensor:
        """The block in one process, on whole images [N, L, V]."""
        attend = functools.partial(_attend_images, hidden_NLV.shape[1])
        rows = hidden_NLV.flatten(0, 1)  # their number not by `len`, which is a constant to torch.export
        return self.residual(rows, rows.shape[0], attend).view_as(hidden_NLV)


def _attend_images(length: int, *qkv: torch.Tensor) -> torch.Tensor:
    """Every row of an image of `length` rows sees every other."""
    heads = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in qkv)
    return full_attention(*heads).transpose(1, 2).flatten(0, 1)


class PoolInterleave(nn.Module):
    """Final vision norm; attention pool; token embedding; patch embeddings put at the images' placeholders.

    The pool has one learned query; q, k and v have each a LayerNorm and a bias, the output projection has none. The
    same v-norm, v-projection and output projection, applied to each patch, give the embeddings of the placeholders. Of
    patches that are left out neither the pool nor a placeholder has anything.
    """

    attention_logits: AttentionLogits | None = None
    """as a block's"""

    def __init__(self, model: Model, norm: Norm, axis: Axis) -> None:
        super().__init__()
        v, d = model.vision.width, model.language.width
        self.axis, self.heads = axis, model.pool_heads // axis.size
        self.all_places = model.vision.patch_dropout_places == "all"
        self.prefix = model.vision.num_prefix
        self.norm = norm(v) if model.vision.norm_eps == 1e-5 else norm(v, eps=model.vision.norm_eps)
        self.query = nn.Parameter(torch.empty(1, v))
        self.norm_q, self.norm_k, self.norm_v = norm(v), norm(v), norm(v)
        self.q, self.k, self.v = (ColumnLinear(v, d, axis) for _ in range(3))
        self.out = RowLinear(d, d, axis, partial_output=True)
        self.embedding = VocabularyEmbedding(model.language.vocab_size, d, axis)
        self.positions = nn.Parameter(torch.empty(model.language.context_length, d))
        self.shared = SharedParameters(self, axis)

    def forward(self, inputs: Activations) -> Activations:
        x = Activations(*inputs)
        with self.shared.summing(self):
            return x._replace(hidden=self._rows(x))

    def _rows(self, x: Activations) -> torch.Tensor:
        # until they are split again, all rows (latents, patches, tokens' embeddings) are to be summed over ranks
        length = self.prefix + x.num_patches
        latents_ND, patches_NKD = self._pool(self.norm(x.hidden), len(x.image_start), length, x.images_used)
        tokens_RD = self.embedding(x.tokens)
        num_rows, offsets = len(tokens_RD), torch.arange(x.num_patches, device=x.hidden.device)
        if self.all_places and x.kept_NK is not None:  # places of patches left out keep their id's embedding
            offsets = x.kept_NK.long()
        rows_NK = torch.where(x.image_start[:, None] >= 0, x.image_start[:, None] + offsets, num_rows)
        patches_RD = patches_NKD.flatten(0, 1).to(tokens_RD.dtype)  # under autocast a linear layer's is another one
        # an empty slot's embeddings go to an extra row, which is dropped again
        rows_RD = F.pad(tokens_RD, (0, 0, 0, 1)).index_copy(0, rows_NK.flatten(), patches_RD)[:-1]
        positions_SD = rows_of(self.positions, local_shard(x.positions, self.axis))
        rows_SD = reduce_scatter_to_sequence_parallel(rows_RD, self.axis) + positions_SD
        return torch.cat([rows_SD, reduce_scatter_to_sequence_parallel(latents_ND, self.axis)])

    def patch_features(self, hidden_NLV: torch.Tensor) -> torch.Tensor:
        """The normed patch tokens [N, P, V], the features that LCL trains."""
        return self.norm(hidden_NLV[:, self.prefix :])

    def pool(self, hidden_NLV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ViT output [N, L, V] → image latents z [N, D], not normalized, and placeholders' embeddings [N, P, D].

        In one process.
        """
        return self._pool(self.norm(hidden_NLV).flatten(0, 1), *hidden_NLV.shape[:2])

    def _pool(
        self, normed_SV: torch.Tensor, num_images: int, length: int, used_N: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = num_images * length
        q = self.q(self.norm_q(self.query)).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [H, 1, K]
        inputs_SV = (self.norm_k(normed_SV), self.norm_v(normed_SV))
        k, v = gathered_linear(inputs_SV, (self.k, self.v), self.axis, num_rows)
        k, v = (x.unflatten(0, (num_images, length))[:, self.prefix :] for x in (k, v))  # the patches alone
        q = q.expand(num_images, -1, -1, -1)  # one query: [N, H, 1, K]
        heads = [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (k, v)]
        if self.attention_logits is not None and used_N is not None:
            self.attention_logits.of_pool(q, heads[0], used_N)
        pooled = full_attention(q, *heads).flatten(1)
        return self.out(pooled), self.out(v)


class LanguageBlock(Block):
    """Block in which a row sees the rows before it in its sequence; the image latents after them pass unchanged."""

    def __init__(
        self,
        language: Language,
        norm: Norm,
        axis: Axis,
        recompute: Recompute,
        drop: DropPath | None,
        attention: PackedAttention,
    ) -> None:
        super().__init__(language, norm, axis, recompute, drop)
        self.packed_attention = attention

    def forward(self, inputs: Activations) -> Activations:
        x = Activations(*inputs)
        num_rows = len(x.tokens)
        size = shard_size(num_rows, self.axis)
        rows_SD, latents_SD = x.hidden[:size], x.hidden[size:]

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if self.attention_logits is not None:
                self.attention_logits.of_packs(q, k, max(len(x.packs), 1), x.positions)
            return self.packed_attention(q, k, v, x.cu_seqlens, x.max_seqlen)

        rows_SD = self.residual(rows_SD, num_rows, attend, self._factors(x, size))
        return x._replace(hidden=torch.cat([rows_SD, latents_SD]))

    def _factors(self, x: Activations, size: int) -> Sequence[torch.Tensor]:
        """Drop path's of `size` rows, by the first row of their sequence."""
        if self.drop is None or not self.training or not x.packs:
            return ()
        packs, tokens = numbers_of(x.packs, x.hidden.device), len(x.tokens) // len(x.packs)
        rows = (torch.arange(size, device=x.hidden.device) + self.axis.rank * size).clamp(max=len(x.tokens) - 1)
        starts = x.cu_seqlens.long()[torch.searchsorted(x.cu_seqlens, rows.int(), right=True) - 1]
        return self.drop.factors(packs[rows // tokens], starts % tokens, x.hidden.dtype)


class Head(nn.Module):
    """Final norm and projection of the context features; language-model head with its own norm; the log scale, and the
    bias of the contrast's logits where the model has one."""

    def __init__(
        self, language: Language, initial_log_scale: float, initial_bias: float | None, norm: Norm, axis: Axis
    ) -> None:
        super().__init__()
        self.axis, self.vocab_size = axis, language.vocab_size
        self.initial_values = {"log_scale": initial_log_scale}
        """of the parameters that are one number, float32 whatever the others' dtype"""
        if initial_bias is not None:
            self.initial_values["logit_bias"] = initial_bias
        self.norm = norm(language.width)
        self.projection = nn.Linear(language.width, language.width, bias=False)
        self.vocabulary_norm = norm(language.width)
        self.vocabulary = nn.Parameter(torch.empty(shard_size(self.vocab_size, axis), language.width))
        mark_split(self.vocabulary, 0, self.vocab_size)
        self.shared = SharedParameters(self, axis)
        # outputs: their gradients are complete
        self.log_scale = nn.Parameter(torch.empty(1, dtype=torch.float32))
        self.logit_bias = None if initial_bias is None else nn.Parameter(torch.empty(1, dtype=torch.float32))

    @property
    def numbers(self) -> dict[str, nn.Parameter]:
        """The parameters that are one number, by name: see `initial_values`."""
        return {name: getattr(self, name) for name in self.initial_values}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Head:
        """Casts and moves of the module (`.bfloat16()`, `.to(device)`): what is one number moves, but stays float32."""
        before = {name: parameter.data for name, parameter in self.numbers.items()}
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value.dtype == torch.float32 and not value.is_meta:
                parameter = self.numbers[name]
                parameter.data = value.to(parameter.device)
        return self

    def forward(self, inputs: Activations) -> Outputs:
        with self.shared.summing(self):
            return self._outputs(Activations(*inputs))

    def _outputs(self, x: Activations) -> Outputs:
        num_rows, num_images = len(x.tokens), len(x.image_soi)
        size = shard_size(num_rows, self.axis)
        rows_RD = gather_from_sequence_parallel(x.hidden[:size], self.axis, num_rows)
        hidden = self.vocabulary_norm(rows_RD[x.target_positions])
        targets = x.targets[x.target_positions]
        # the tensor ranks have one batch, and equal shards of one vocabulary
        nll = generation_loss(hidden, self.vocabulary, targets, self.axis.group, self.vocab_size, agreed=True)
        contexts_SD = self._contexts(rows_RD[local_shard(x.image_soi.clamp(min=0), self.axis)])
        latents_SD = x.hidden[size:].float()
        latents_ND, contexts_ND = (gather_replicated(y, self.axis, num_images) for y in (latents_SD, contexts_SD))
        # a copy: where a parameter itself is an output, DeepSpeed's bf16 optimizer loses its gradient without an error
        numbers = {name: parameter.to(torch.float32, copy=True) for name, parameter in self.numbers.items()}
        return Outputs(nll, latents_ND, contexts_ND, **numbers)

    def text_features(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Language-model outputs [N, D] → unit-norm context features [N, D], float32."""
        return unit_norm(self._contexts(hidden_ND))

    def _contexts(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        return self.projection(self.norm(hidden_ND)).float()

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Language-model outputs [N, D] → logits [N, vocabulary]; for writing text, never in training."""
        return F.linear(self.vocabulary_norm(hidden_ND), self.vocabulary)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """RGB [N, 3, H, W], uint8 or floats from 0 to 1 (else: ValueError) → float32, by CLIP's mean and deviation."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
    elif not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; give uint8, or floats (to `normalize`: from 0 to 1)")
    elif not ((images >= 0) & (images <= 1)).all():
        said = f"images are floats from {images.amin():g} to {images.amax():g}; those to be normalized are from 0 to 1"
        raise ValueError(f"{said}: divide by 255, or clamp (what is normalized already is not to be, again)")
    mean, std = (from_host(c, images.device, torch.float32).view(3, 1, 1) for c in (IMAGE_MEAN, IMAGE_STD))
    return (images.float() - mean) / std


def layer_specs(
    model: Model,
    initial_log_scale: float,
    norm: Norm = nn.LayerNorm,
    axis: Axis = ALONE,
    recompute: Recompute = "none",
    recompute_every: int = 1,
    attention: PackedAttention | None = None,
    seed: int = 0,
) -> list[functools.partial[Any]]:
    """What makes each layer, in order; nothing is built yet.

    axis: the tensor ranks over which every layer is split. recompute: what is recomputed in backward, in every
    `recompute_every`-th block of each encoder. attention: of the language blocks; None: chosen when it is called.
    seed: of drop path.
    """
    vision, language = model.vision, model.language
    attention = attention or Adaptive()
    # where the epsilon is torch's own, the norm is called as ever
    vision_norm = norm if vision.norm_eps == 1e-5 else functools.partial(norm, eps=vision.norm_eps)

    def blocks(
        block: type[nn.Module], encoder: Vision | Language, norm: Norm, first: int, *more: Any
    ) -> list[functools.partial[Any]]:
        made = []
        for i in range(encoder.layers):
            rate = rate_of(i, encoder.layers, encoder.drop_path)
            drop = DropPath(rate, seed, first + i) if rate else None
            recomputed = recompute if i % recompute_every == 0 else "none"
            made.append(functools.partial(block, encoder, norm, axis, recomputed, drop, *more))
        return made

    return [
        functools.partial(Patches, vision, vision_norm, axis),
        *blocks(VisionBlock, vision, vision_norm, VISION),
        functools.partial(PoolInterleave, model, norm, axis),
        *blocks(LanguageBlock, language, norm, LANGUAGE, attention),
        functools.partial(Head, language, initial_log_scale, model.logit_bias, norm, axis),
    ]


def build_layers(
    model: Model,
    initial_log_scale: float,
    norm: Norm = nn.LayerNorm,
    axis: Axis = ALONE,
    recompute: Recompute = "none",
    recompute_every: int = 1,
    seed: int = 0,
) -> list[nn.Module]:
    """The list of layers (see `layer_specs`), parameters not yet initialized (see `initialize`)."""
    specs = layer_specs(model, initial_log_scale, norm, axis, recompute, recompute_every, seed=seed)
    return [make() for make in specs]


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: Model) -> Mapping[str, torch.Size]:
    """Shapes of all parameters `{index}.name` of a model, whole and unpadded; computed once for a model."""
    with torch.device("meta"):
        layers = build_layers(model, 0.0)
    return MappingProxyType(
        {f"{i}.{name}": p.shape for i, layer in enumerate(layers) for name, p in layer.named_parameters()}
    )


@functools.lru_cache(maxsize=8)
def shared_parameters(model: Model) -> frozenset[str]:
    """The parameters `{index}.name` whose gradients tensor ranks add up (`SharedParameters`), computed once."""
    with torch.device("meta"):
        layers: list[Any] = build_layers(model, 0.0)
    return frozenset(f"{i}.{name}" for i, layer in enumerate(layers) for name in layer.shared.names)


@functools.lru_cache(maxsize=64)
def layer_kinds(model: Model) -> tuple[tuple[str, int], ...]:
    """What stands at each index of the list of layers: its kind, and of a block its number in its encoder."""
    vision, language = (range(encoder.layers) for encoder in (model.vision, model.language))
    blocks = (("vision", number) for number in vision), (("language", number) for number in language)
    return ("patches", 0), *blocks[0], ("pool", 0), *blocks[1], ("head", 0)


def part_of_layer(index: int, model: Model) -> str:
    """The part of the model that a layer counts as; the pool's has the token embedding and the last vision norm too."""
    kind, _ = layer_kinds(model)[index]
    return "vision" if kind == "patches" else kind


def num_layers(model: Model) -> int:
    """Patches, vision blocks, pool, language blocks, head."""
    return len(layer_kinds(model))


def num_parameters(model: Model, without: Collection[str] = ()) -> int:
    """Numbers that a model learns; without those of parameters `{index}.name`."""
    return sum(shape.numel() for name, shape in parameter_shapes(model).items() if name not in without)


def num_of_parts(model: Model) -> dict[str, int]:
    """The same of each part of the model, as `part_of_layer` has them."""
    found = dict.fromkeys(PARTS, 0)
    for name, shape in parameter_shapes(model).items():
        found[part_of_layer(int(name.partition(".")[0]), model)] += shape.numel()
    return found
