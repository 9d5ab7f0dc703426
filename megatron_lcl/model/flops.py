"""Floating-point operations of a step, by part: what a model of these sizes must compute on a batch of these sizes.

Counted are matrix products and the two products of attention, 2 operations a multiply-add, as torch's FlopCounterMode
counts them; norms, activations and softmax are not, nor is what is computed a second time to save memory. A backward is
a product for each factor of the forward's that needs a gradient: the input, the weight; images need none, nor what is
frozen and what lies below all that is trained (model/gradients.py). Backward of attention is all of it, as its kernels
do, where queries, keys or values need a gradient. Attention is counted over all pairs of rows of a sequence, also where
a causal mask hides half of them. The interpolation of position embeddings (once a micro-batch, for images of another
size than the model's) is not counted.

Shape legend as in `model.layers`: N image slots, K patches of an image that are read, L = K and the rows before them, V
and D widths, R token slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Self

from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.gradients import LayerGradients, model_gradients
from megatron_lcl.model.layers import PARTS, layer_kinds, part_of_layer

Times = Callable[..., int]
"""how often a product of a layer's forward is made, by its factors: modules, of what they give, and parameters"""


@dataclass(frozen=True)
class Numbers:
    """What has numbers and nothing else: added, subtracted and multiplied field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> Self:
        return type(self)(*(getattr(self, f.name) * times for f in fields(self)))


@dataclass(frozen=True)
class Sizes(Numbers):
    """What of a batch decides how much there is to compute; of several batches, the sums."""

    images: int
    """image slots N, empty ones included: the encoder computes them all"""
    rows: int
    """token slots R, those past the last document included"""
    squares: int
    """sum over sequences of their length squared, the runs past the last document included"""
    targets: int
    """rows that have a next token to predict"""
    pairs: int
    """images that take part in the contrast"""
    patches: int
    """of all slots: N K"""
    patch_squares: int
    """sum over slots of their number of patches squared: N K squared"""

    @classmethod
    def of(cls, batches: Iterable[PackedBatch]) -> Sizes:
        """Of the batches together."""
        total = cls(0, 0, 0, 0, 0, 0, 0)
        for batch in batches:
            lengths, images, patches = batch.cu_seqlens.diff().long(), len(batch.image_soi), batch.num_patches
            squares = int((lengths * lengths).sum())
            of_images = images * patches, images * patches**2
            total += cls(images, len(batch.tokens), squares, batch.num_targets, batch.num_pairs, *of_images)
        return total


@dataclass(frozen=True)
class Flops(Numbers):
    """Operations by part."""

    vision: float
    pool: float
    """the attention pool, and the projection of every patch to its placeholder"""
    language: float
    head: float
    """the context features, and the products with the vocabulary"""
    loss: float
    """the similarities of all pairs"""

    @property
    def total(self) -> float:
        return self.vision + self.pool + self.language + self.head + self.loss


@dataclass(frozen=True)
class LayerFlops:
    """Operations of one pass through a layer."""

    products: float
    """with the layer's matrices, but for the vocabulary's"""
    attention: float = 0
    """both products, over all pairs of rows of a sequence"""
    vocabulary: float = 0
    """of `sizes.targets` rows"""

    @property
    def total(self) -> float:
        return self.products + self.attention + self.vocabulary


def forward_of_layers(model: Model, sizes: Sizes) -> list[LayerFlops]:
    """Of each layer of the model's list, in a forward."""
    return _of_layers(model, sizes, lambda index: lambda *factors: 1)


def backward_of_layers(model: Model, sizes: Sizes, gradients: Mapping[int, LayerGradients]) -> list[LayerFlops]:
    """The same in a backward. gradients: by the layer's index."""
    return _of_layers(model, sizes, lambda index: gradients[index].num_needed)


def forward(model: Model, sizes: Sizes) -> Flops:
    """Of a forward: of the vocabulary the logits of `sizes.targets` rows; no similarities."""
    return _by_part(model, forward_of_layers(model, sizes))


def of_step(
    model: Model,
    sizes: Sizes,
    all_pairs: int | None = None,
    contrast: bool = True,
    frozen: frozenset[str] = frozenset(),
) -> Flops:
    """Of a step: a forward and a backward of all its batches, as the model needs them.

    `contrast.strategy: recompute` does another forward, for the features alone, which is not counted.

    sizes: of the batches of one replica; all_pairs: pairs of the global batch (None: this replica's). contrast: whether
    the objective has one. frozen: parameters `{index}.name` that are not trained.
    """
    others = sizes.pairs * ((sizes.pairs if all_pairs is None else all_pairs) - sizes.pairs)
    # a tile of own images and own texts serves both directions (losses/contrastive_tiles.py): its logits forward and
    # again backward, and two gradients; of other ranks' features each direction has its own tiles. The sigmoid loss,
    # for which a model has a bias, makes no tile twice (losses/sigmoid_tiles.py). Both give all features a gradient
    of_own, of_others = (4, 6) if model.logit_bias is None else (3, 4)
    similarities = 2 * model.language.width * (of_own * sizes.pairs**2 + of_others * others)
    step = forward(model, sizes)
    step += _by_part(model, backward_of_layers(model, sizes, model_gradients(model, frozen)))
    return step + Flops(0, 0, 0, 0, similarities if contrast else 0)


def _by_part(model: Model, layers: Sequence[LayerFlops]) -> Flops:
    parts: dict[str, float] = dict.fromkeys(PARTS, 0)
    for index, layer in enumerate(layers):
        parts[part_of_layer(index, model)] += layer.total
    return Flops(**parts, loss=0)


def _of_layers(model: Model, sizes: Sizes, times: Callable[[int], Times]) -> list[LayerFlops]:
    """times: of a layer, by its index."""
    vision, language, prefix = model.vision, model.language, model.vision.num_prefix
    rows = prefix * sizes.images + sizes.patches
    squares = prefix**2 * sizes.images + 2 * prefix * sizes.patches + sizes.patch_squares  # (prefix + K)^2 of an image
    patch = 2 * 3 * vision.patch_size**2 * vision.width
    of_kind: dict[str, Callable[[Times], LayerFlops]] = {
        "patches": lambda times: LayerFlops(patch * sizes.patches * times("projection.weight")),
        "vision": lambda times: _block(vision, rows, squares, times),
        "pool": lambda times: _pool(model, sizes, rows, times),
        "language": lambda times: _block(language, sizes.rows, sizes.squares, times),
        "head": lambda times: _head(language, sizes, times),
    }
    return [of_kind[kind](times(index)) for index, (kind, _) in enumerate(layer_kinds(model))]


def _block(encoder: Vision | Language, rows: int, squares: int, times: Times) -> LayerFlops:
    """q, k, v and output; the feed-forward network; scores and weighted sums of values."""
    square, wide = 2 * rows * encoder.width**2, 2 * rows * encoder.width * encoder.mlp_width
    attention = [times("norm1", f"attention.{name}.weight") for name in "qkv"]
    attention.append(times("attention", "attention.out.weight"))
    feed_forward = times("norm2", "mlp.up.weight") + times("mlp.up", "mlp.down.weight")
    return LayerFlops(
        square * sum(attention) + wide * feed_forward, 4 * squares * encoder.width * times("attention", "attention")
    )


def _pool(model: Model, sizes: Sizes, rows: int, times: Times) -> LayerFlops:
    """Keys and values of every row; one query attends to the patches; the output of each latent and each patch."""
    v, d = model.vision.width, model.language.width
    read = times("norm_k", "k.weight") + times("norm_v", "v.weight")
    given = sizes.images * times("attention", "out.weight") + sizes.patches * times("v", "out.weight")
    return LayerFlops(
        2 * v * d * (rows * read + times("norm_q", "q.weight")) + 2 * d * d * given,
        4 * sizes.patches * d * times("attention", "attention"),
    )


def _head(language: Language, sizes: Sizes, times: Times) -> LayerFlops:
    """The context features, and the logits."""
    return LayerFlops(
        2 * sizes.images * language.width**2 * times("norm", "projection.weight"),
        vocabulary=2 * sizes.targets * language.width * language.vocab_size * times("vocabulary_norm", "vocabulary"),
    )
