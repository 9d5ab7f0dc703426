"""What each layer of the model has to do for a micro-batch: products, attention, and passes over activations.

Shape legend as in `model.layers`. Passes are counted in numbers that are read or written, by the operations as they
stand in model/block.py; what one kernel does (a linear layer with its bias) reads and writes once, and products are not
counted again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from megatron_lcl.config import Config, Language, Vision
from megatron_lcl.model.flops import LayerFlops, Sizes, backward_of_layers, forward_of_layers
from megatron_lcl.model.gradients import LayerGradients
from megatron_lcl.plan.devices import Rates
from megatron_lcl.train.precision import DTYPES, resolve_dtype

COPIES = (4, 8)
"""widths of a row, forward and backward: heads in and out of attention, its results put together"""
BLOCK_FORWARD = (10, 2)
"""numbers of a row that a block's forward reads or writes beside its products, in widths and in widths of the feed-
forward network: two norms and two sums (4 + 6); GELU"""
BLOCK_BACKWARD = (12, 3)
"""in backward: norms read two and write one, sums of gradients likewise (6 + 6: half for attention, half for the feed-
forward network); GELU. The gradient of a bias reads that of what its layer gave once more"""
LINEAR = ("attention.q", "attention.k", "attention.v", "attention.out", "mlp.down", "mlp.up")
"""what multiplies rows in a block; the last gives rows of the feed-forward network's width"""
BLOCK_KERNELS = (22, 33)
"""operations that a block's forward and backward start; with one more for each weight and bias that has a gradient"""
LOGIT_PASSES = (2, 2)
"""passes over a chunk's logits, float32: for the sum of exponentials; for the gradient"""


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


def work_of_layers(config: Config, sizes: Sizes, gradients: Mapping[int, LayerGradients]) -> list[LayerWork]:
    """Of each layer for a micro-batch of these sizes, on one of the tensor ranks that share it.

    gradients: of each layer, by its index. What backward does not enter has no work there.
    """
    model, tensor = config.model, config.parallel.tensor
    number = DTYPES[resolve_dtype(config)].itemsize
    vision, language, pool = model.vision, model.language, 1 + model.vision.layers
    rows = vision.num_prefix * sizes.images + sizes.patches
    forward, backward = (
        [LayerFlops(*(of / tensor for of in astuple(layer))) for layer in layers]
        for layers in (forward_of_layers(model, sizes), backward_of_layers(model, sizes, gradients))
    )
    pixels = 3 * vision.image_size**2 * sizes.images
    of_images, of_tokens = number * rows * vision.width / tensor, number * sizes.rows * language.width / tensor
    embedded = Work("vision", forward[0].total, moved=(9 + 2 * number) * pixels / tensor + 8 * of_images)
    pooled = Work("language", forward[pool].total, moved=6 * of_images + 6 * of_tokens, kernels=40)
    given = gradients[pool].given
    back = 12 * of_images * (given["norm_k"] or given["norm_v"]) + 12 * of_tokens * given[""]

    def blocks(encoder: Vision | Language, first: int, rows: int) -> list[LayerWork]:
        return [
            _block(config, encoder, i, forward[first + i], backward[first + i], rows, gradients[first + i])
            for i in range(encoder.layers)
        ]

    moved = 8 * of_images * gradients[0].given[""]
    return [
        LayerWork(embedded, Work("vision", backward[0].total, moved=moved), embedded),
        *blocks(vision, 1, rows),
        LayerWork(pooled, Work("language", backward[pool].total, moved=back, kernels=80 * given[""]), pooled),
        *blocks(language, pool + 1, sizes.rows),
        _head(config, sizes, forward[-1], backward[-1], gradients[len(forward) - 1]),
    ]


def _block(
    config: Config,
    encoder: Vision | Language,
    index: int,
    forward: LayerFlops,
    backward: LayerFlops,
    rows: int,
    gradients: LayerGradients,
) -> LayerWork:
    """index: of the block in its encoder."""
    part, seen = ("vision", 1.0) if isinstance(encoder, Vision) else ("language", 0.5)  # a mask hides half of the pairs
    row_bytes = rows * DTYPES[resolve_dtype(config)].itemsize / config.parallel.tensor

    def work(flops: LayerFlops, widths: float, wide: float, kernels: int, share: float = 1.0) -> Work:
        moved = row_bytes * (widths * encoder.width + wide * encoder.mlp_width)
        return Work(part, flops.products * share, flops.attention * seen, moved, kernels)

    weights, biases = ([f"{name}.{kind}" in gradients.trained for name in LINEAR] for kind in ("weight", "bias"))
    attends, feeds = gradients.given["attention.out"], gradients.given["mlp.down"]  # whether backward enters
    widths = BLOCK_BACKWARD[0] / 2 * (attends + feeds) + COPIES[1] * attends + sum(biases[:-1])
    started = BLOCK_KERNELS[1] * (attends + feeds) // 2 + sum(weights) + sum(biases)
    forward_widths = BLOCK_FORWARD[0] + COPIES[0]
    whole = full = work(forward, forward_widths, BLOCK_FORWARD[1], BLOCK_KERNELS[0])
    again = None
    if index % config.train.activation_checkpointing_every == 0:
        products = 4 * encoder.width + 2 * encoder.mlp_width
        if stops_short(config, encoder):  # before mlp.down, and the sum that follows on it
            share = 1 - encoder.mlp_width / products
            full = work(forward, forward_widths - 3, BLOCK_FORWARD[1], BLOCK_KERNELS[0] - 2, share)
        half = work(forward, 4, 0, BLOCK_KERNELS[0] // 2, 3 * encoder.width / products)  # before attention.out
        again = {
            "none": None,
            "full": full if gradients.given[""] else None,
            "attention": half if attends else None,
        }[config.train.activation_checkpointing]
    return LayerWork(whole, work(backward, widths, BLOCK_BACKWARD[1] * feeds + biases[-1], started), whole, again)


def stops_short(config: Config, encoder: Vision | Language) -> bool:
    """Whether activation checkpointing of whole blocks makes all but a block's last product again.

    torch stops where it has all that backward reads (set_checkpoint_early_stop). Only LayerScale and drop path read
    what the last product gives; a compiled graph runs to its end.
    """
    return not (config.train.compile or encoder.layer_scale is not None or encoder.drop_path)


def _head(
    config: Config, sizes: Sizes, forward: LayerFlops, backward: LayerFlops, gradients: LayerGradients
) -> LayerWork:
    """The vocabulary's products and its gradients, all in the forward (losses/generation.py), and the projection."""
    language, tensor = config.model.language, config.parallel.tensor
    norms = DTYPES[resolve_dtype(config)].itemsize * 6 * sizes.rows * language.width
    passes = LOGIT_PASSES[0] + LOGIT_PASSES[1] * (backward.vocabulary > 0)
    logits = 4 * passes * sizes.targets * language.vocab_size / tensor
    weights = 4 * 2 * language.vocab_size * language.width / tensor * ("vocabulary" in gradients.trained)
    chunks = 1 + sizes.targets * language.vocab_size // 2**25
    products = forward.vocabulary + backward.vocabulary + forward.products
    return LayerWork(
        Work("vocabulary", products, moved=norms + logits + weights, kernels=15 * chunks),
        Work("language", backward.products, moved=2 * norms + 2 * weights, kernels=30),
        Work("language", forward.products, moved=norms, kernels=15),
    )
