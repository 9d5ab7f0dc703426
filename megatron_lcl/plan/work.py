"""What each layer of the model has to do for a micro-batch: products, attention, and passes over activations.

Shape legend as in `model.layers`. Passes are counted in numbers that are read or written, by the operations as they
stand in model/block.py; what one kernel does (a linear layer with its bias) reads and writes once, and products are not
counted again.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lcl import objectives
from megatron_lcl.config import Config, Language, Vision
from megatron_lcl.model.flops import Sizes, forward_of_layers
from megatron_lcl.plan.devices import Rates
from megatron_lcl.train.precision import DTYPES, resolve_dtype

COPIES = (4, 8)
"""widths of a row, forward and backward: heads in and out of attention, its results put together"""
BLOCK_FORWARD = (10, 2)
"""numbers of a row that a block's forward reads or writes beside its products, in widths and in widths of the feed-
forward network: two norms and two sums (4 + 6); GELU"""
BLOCK_BACKWARD = (12, 3)
"""in backward: norms read two and write one, sums of gradients likewise (6 + 6); GELU"""
BIASES = (5, 1)
"""read once more for the gradients of biases: of q, k, v and of both outputs; of what goes into GELU"""
BLOCK_KERNELS = (22, 45)
"""operations that a block's forward and backward start"""
LOGIT_PASSES = 4
"""passes over a chunk's logits, float32: two for the sum of exponentials, two for the gradient"""


@dataclass(frozen=True)
class Work:
    """Of one pass through a layer, on one process."""

    part: str
    """`vision`, `language` or `vocabulary`: whose rates count"""
    matmul: float = 0.0
    """operations"""
    attention: float = 0.0
    """operations, without the masked half of causal pairs"""
    moved: float = 0.0
    """bytes"""
    kernels: int = 0

    def seconds(self, rates: Rates) -> float:
        busy = self.matmul / rates.matmul[self.part] + self.moved / rates.elements
        if self.attention:
            busy += self.attention / rates.attention[self.part]
        started = self.kernels * rates.kernel
        return busy + started if rates.waits else max(busy, started)


@dataclass(frozen=True)
class LayerWork:
    """Of a layer and a micro-batch."""

    forward: Work
    backward: Work
    """without what activation checkpointing computes again"""
    plain: Work
    """a forward for the features alone"""
    again: Work | None = None
    """what activation checkpointing computes again in backward"""


def sizes_of(config: Config, images: int, packs: int) -> Sizes:
    """Of so many full packs: every image slot filled and a pair, sequences as long as the context.

    images: slots of a pack.
    """
    vision, slots = config.model.vision, config.data.tokens_per_pack
    longest = min(config.model.language.context_length, slots)
    whole, rest = divmod(slots, longest)
    sequences = objectives.create(config).sequences
    placeholders = (
        min(images * vision.num_placeholders, slots - 1) if sequences.interleaved or sequences.captions else 0
    )
    patches = packs * images * vision.num_kept
    return Sizes(
        images=packs * images,
        rows=packs * slots,
        squares=packs * (whole * longest**2 + rest**2),
        targets=packs * (slots - placeholders) if sequences.targets else 0,
        pairs=packs * images if sequences.contrast else 0,
        patches=patches,
        patch_squares=patches * vision.num_kept,
    )


def work_of_layers(config: Config, sizes: Sizes) -> list[LayerWork]:
    """Of each layer for a micro-batch of these sizes, on one of the tensor ranks that share it."""
    model, tensor = config.model, config.parallel.tensor
    number = DTYPES[resolve_dtype(config)].itemsize
    vision, language, train = model.vision, model.language, config.train
    rows = vision.num_prefix * sizes.images + sizes.patches
    squares = vision.num_prefix**2 * sizes.images + 2 * vision.num_prefix * sizes.patches + sizes.patch_squares
    counted = [flops / tensor for flops in forward_of_layers(model, sizes)]
    pixels = 3 * vision.image_size**2 * sizes.images
    embedded = Work("vision", counted[0], moved=(9 * pixels + number * (2 * pixels + 8 * rows * vision.width)) / tensor)
    pool_moved = number * (6 * rows * vision.width + 6 * sizes.rows * language.width) / tensor
    pooled = Work("language", counted[1 + vision.layers], moved=pool_moved, kernels=40)

    def blocks(encoder: Vision | Language, part: str, of: float, rows: int, pairs: float) -> list[LayerWork]:
        attention = 4 * pairs * encoder.width / tensor
        products = of - 4 * (squares if part == "vision" else sizes.squares) * encoder.width / tensor
        forward, backward = _block(encoder, part, products, attention, rows * number / tensor)
        half = 8 * encoder.width / (8 * encoder.width + 4 * encoder.mlp_width)
        half_moved = 4 * encoder.width * rows * number / tensor
        again = {
            "none": None,
            "full": forward,
            "attention": Work(part, products * half, attention, half_moved, BLOCK_KERNELS[0] // 2),
        }[train.activation_checkpointing]
        every = train.activation_checkpointing_every
        return [LayerWork(forward, backward, forward, again if i % every == 0 else None) for i in range(encoder.layers)]

    return [
        LayerWork(embedded, Work("vision", counted[0], moved=8 * number * rows * vision.width / tensor), embedded),
        *blocks(vision, "vision", counted[1], rows, squares),
        LayerWork(pooled, Work("language", 2 * pooled.matmul, moved=2 * pool_moved, kernels=80), pooled),
        *blocks(language, "language", counted[2 + vision.layers], sizes.rows, sizes.squares / 2),
        _head(config, sizes, counted[-1]),
    ]


def _block(
    encoder: Vision | Language, part: str, products: float, attention: float, row_bytes: float
) -> tuple[Work, Work]:
    def moved(*counts: tuple[int, int]) -> float:
        return row_bytes * sum(widths * encoder.width + wide * encoder.mlp_width for widths, wide in counts)

    started, back = BLOCK_KERNELS
    return (
        Work(part, products, attention, moved(BLOCK_FORWARD, (COPIES[0], 0)), started),
        Work(part, 2 * products, 2 * attention, moved(BLOCK_BACKWARD, BIASES, (COPIES[1], 0)), back),
    )


def _head(config: Config, sizes: Sizes, counted: float) -> LayerWork:
    """The vocabulary's products and its gradients, all in the forward (losses/generation.py), and the projection."""
    language, tensor = config.model.language, config.parallel.tensor
    number = DTYPES[resolve_dtype(config)].itemsize
    norms = number * 6 * sizes.rows * language.width
    logits = 4 * LOGIT_PASSES * sizes.targets * language.vocab_size / tensor
    weights = 4 * 2 * language.vocab_size * language.width / tensor
    chunks = 1 + sizes.targets * language.vocab_size // 2**25
    projection = 2 * sizes.images * language.width**2 / tensor
    return LayerWork(
        Work(
            "vocabulary", 3 * (counted - projection) + projection, moved=norms + logits + weights, kernels=15 * chunks
        ),
        Work("language", 2 * projection, moved=2 * norms + 2 * weights, kernels=30),
        Work("language", projection, moved=norms, kernels=15),
    )
