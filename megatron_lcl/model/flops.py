"""Floating-point operations of a step, by part: what a model of these sizes must compute on a batch of these sizes.

Counted are matrix products and the two products of attention, 2 operations a multiply-add, as torch's FlopCounterMode
counts them; norms, activations and softmax are not, nor is what is computed a second time to save memory. A backward is
two products for each of the forward: one for the input, one for the weight; the patch embedding has no gradient for its
input. Attention is counted over all pairs of rows of a sequence, also where a causal mask hides half of them. The
interpolation of position embeddings (once a micro-batch, for images of another size than the model's) is not counted.

Shape legend as in `model.layers`: N image slots, K patches of an image that are read, L = K and the rows before them, V
and D widths, R token slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.data.loading.batch import PackedBatch


@dataclass(frozen=True)
class Sizes:
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

    def __add__(self, other: Sizes) -> Sizes:
        return Sizes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Sizes)))


@dataclass(frozen=True)
class Flops:
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

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Flops)))


def forward(model: Model, sizes: Sizes) -> Flops:
    """Of a forward: of the vocabulary the logits of `sizes.targets` rows; no similarities."""
    vision, d = model.vision, model.language.width
    images, patches, v = sizes.images, sizes.patches, vision.width
    prefix, rows = vision.num_prefix, vision.num_prefix * images + patches
    squares = prefix**2 * images + 2 * prefix * patches + sizes.patch_squares  # of (prefix + K) of each image
    return Flops(
        vision=_embedding(model, sizes) + _blocks(vision, rows, squares),
        # keys and values of every row; one query attends to the patches; the output of each latent and each patch
        pool=2 * (2 * rows * v * d + v * d) + 4 * patches * d + 2 * (images + patches) * d * d,
        language=_blocks(model.language, sizes.rows, sizes.squares),
        head=2 * images * d * d + _logits(model, sizes),
        loss=0,
    )


def forward_of_layers(model: Model, sizes: Sizes) -> list[float]:
    """The same of each layer of the model's list."""
    whole, vision, language = forward(model, sizes), model.vision.layers, model.language.layers
    embedding = _embedding(model, sizes)
    return [
        embedding,
        *[(whole.vision - embedding) / vision] * vision,
        whole.pool,
        *[whole.language / language] * language,
        whole.head,
    ]


def of_step(
    model: Model, sizes: Sizes, all_pairs: int | None = None, forwards: int = 1, contrast: bool = True
) -> Flops:
    """Of a step: forwards and backward of all its batches.

    sizes: of the batches of one replica; all_pairs: pairs of the global batch (None: this replica's). forwards: 1, as
    the model must be run; 2 where the first is for the features alone (`contrast.strategy: recompute`), in which case
    the result is what the hardware does rather than what the model needs. contrast: whether the objective has one.
    """
    once = forward(model, sizes)
    first = forward(model, replace(sizes, targets=0))
    others = sizes.pairs * ((sizes.pairs if all_pairs is None else all_pairs) - sizes.pairs)
    # a tile of own images and own texts serves both directions (losses/contrastive_tiles.py): its logits forward and
    # again backward, and two gradients; of other ranks' features each direction has its own tiles. The sigmoid loss,
    # for which a model has a bias, makes no tile twice (losses/sigmoid_tiles.py)
    of_own, of_others = (4, 6) if model.logit_bias is None else (3, 4)
    similarities = 2 * model.language.width * (of_own * sizes.pairs**2 + of_others * others)
    step = Flops(
        vision=3 * once.vision - _embedding(model, sizes),
        pool=3 * once.pool,
        language=3 * once.language,
        head=3 * once.head,
        loss=similarities if contrast else 0,
    )
    for _ in range(forwards - 1):
        step += first
    return step


def _embedding(model: Model, sizes: Sizes) -> float:
    """The patch embedding."""
    return 2 * sizes.patches * 3 * model.vision.patch_size**2 * model.vision.width


def _logits(model: Model, sizes: Sizes) -> float:
    """The product with the vocabulary."""
    return 2 * sizes.targets * model.language.width * model.language.vocab_size


def _blocks(encoder: Vision | Language, rows: int, squares: int) -> float:
    """All blocks of an encoder: q, k, v and output; the feed-forward network; scores and weighted sums of values."""
    width = encoder.width
    return encoder.layers * (rows * (8 * width**2 + 4 * width * encoder.mlp_width) + 4 * squares * width)
