"""The paper's objective and those that its table compares it with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from megatron_lcl.config import EvaluationTask
from megatron_lcl.data.loading.rules import CAPTIONED_PAIRS, CAPTIONS, INTERLEAVED, PAIRS, Sequences
from megatron_lcl.objectives import contrast, generation, regression
from megatron_lcl.objectives.base import Objective, Term
from megatron_lcl.objectives.contrast import Contrast, SigmoidContrast
from megatron_lcl.objectives.generation import Generation
from megatron_lcl.objectives.regression import Regression


class LatentCompression(Objective):
    """`lcl`: contrast and generation on interleaved documents (arXiv 2406.07543), with the config's weights.

    L = 0.1 contrastive + 1 generation, where the config does not say other weights.
    """

    sequences = INTERLEAVED
    tasks: ClassVar[tuple[EvaluationTask, ...]] = ("retrieval", "generation")
    metrics: ClassVar[tuple[str, ...]] = (*generation.METRICS, *contrast.METRICS)
    parts: ClassVar[Sequence[tuple[type[Term], str | float]]] = (
        (Contrast, "contrastive_weight"),
        (Generation, "generation_weight"),
    )
    published: ClassVar[Mapping[str, float]] = {"contrastive_weight": 0.1, "generation_weight": 1.0}


class CoCa(LatentCompression):
    """`coca`: contrast and captioning on pairs (CoCa, arXiv 2205.01917), without CoCa's cross-attention decoder.

        L_con = - 1/N [ sum_i log exp(x_i . y_i / s) / sum_j exp(x_i . y_j / s)
                      + sum_i log exp(y_i . x_i / s) / sum_j exp(y_i . x_j / s) ]           (CoCa, eq. 2)
        L_cap = - sum_t log P(y_t | y_<t, x)                                                 (eq. 3)
        L     = lambda_con L_con + lambda_cap L_cap,  lambda_con = 1, lambda_cap = 2         (eq. 4)

    x_i, y_j: unit-norm features of image i and text j; s: a learned temperature. As everywhere here, the contrast is
    the mean of its two directions, half of eq. 2, and L_cap the mean over the targets of the global batch; the weights
    1 and 2 are of these means, as in open_clip's CoCa.

    CoCa's decoder has unimodal layers, which read the text alone and are contrasted, and above them multimodal layers,
    which attend to the image and write the caption. Here all layers of one causal language model do both, on two
    sequences of a pair: `<sot> text <soi>`, whose feature at `<soi>` is contrasted and which has no targets (CoCa's
    unimodal half has no captioning loss), and `<sot> <soi>`, the image's placeholders, `<eoi> text <eot>`, whose text
    and `<eot>` are the targets of L_cap. Both have the same image slot, so that the image is encoded once. Where CoCa
    pools the image twice (256 queries for captions, one for the contrast), captions here read every patch's embedding,
    and the contrast the latent, as in `lcl`.
    """

    sequences = CAPTIONED_PAIRS
    tasks = ("retrieval",)
    published: ClassVar[Mapping[str, float]] = {"contrastive_weight": 1.0, "generation_weight": 2.0}


class Clip(Objective):
    """`clip`: contrast only, on pairs, each text encoded alone."""

    sequences = PAIRS
    tasks = ("retrieval",)
    metrics: ClassVar[tuple[str, ...]] = LatentCompression.metrics  # a run's lines have the same keys as with `lcl`
    parts: ClassVar[Sequence[tuple[type[Term], str | float]]] = ((Contrast, 1.0), (Generation, 0.0))


class SigLip(Clip):
    """`siglip`: `clip` with the sigmoid loss (SigLIP, arXiv 2303.15343, section 3.2), each text encoded alone.

        L = - 1/N sum_i sum_j log sigmoid(z_ij (s x_i . y_j + b)),  z_ij = 1 where i = j, else -1

    over all N images i and all N texts j of the global batch; s = exp(log scale), from ln 10, and the bias b, from -10,
    are learned.
    """

    metrics = (*generation.METRICS, *contrast.SIGMOID_METRICS)
    parts = ((SigmoidContrast, 1.0), (Generation, 0.0))


class GenerationOnly(Objective):
    """`generation`: no contrast."""

    sequences = Sequences(contrast=False)
    tasks = ("generation",)
    metrics = LatentCompression.metrics  # of the contrast all are 0
    parts = ((Generation, 1.0),)


class GenLip(GenerationOnly):
    """`genlip`: captioning alone, on pairs (GenLIP, arXiv 2605.00809; OpenVision 2, arXiv 2509.01644).

        L = - 1/T sum_n sum_t log P(y_nt | y_n,<t, x_n)

    over the T targets of the global batch: of each pair n the image x stands first, and its text y and `<eot>` are the
    targets. GenLIP's single transformer reads patches and text alike and sees the whole image from each patch;
    OpenVision 2 has an encoder and a decoder, as here, where the vision encoder sees the whole image and the causal
    language model reads its patches' embeddings. OpenVision 2's decoder reads a third of the patches, drawn at random.
    """

    sequences = CAPTIONS


class Emu(Objective):
    """`emu`: generation, and regression of image latents, on interleaved documents (Emu, arXiv 2307.05222, section 2).

        L = L_cls + L_reg

    Cross-entropy of the next token, and the squared l2 distance of the next visual embedding to a linear projection of
    the language model's output before it (`Regression`: the mean over D numbers and over images). Emu regresses each of
    the 32 embeddings of an image, of a pre-trained encoder; here, from scratch, the one latent of the image is
    regressed at its `<soi>`, from where `lcl` contrasts it, so that the two differ in the loss alone. As in `lcl` these
    are the images with a text before them; `data.contrast_leading_images` takes all, as Emu does. Emu's embeddings and
    prediction are not normalized, and neither are they here. The gradient reaches the encoder through the target.
    """

    sequences = INTERLEAVED
    tasks = ("retrieval", "generation")
    metrics = (*generation.METRICS, *regression.METRICS)
    parts = ((Regression, "regression_weight"), (Generation, "generation_weight"))
    published: ClassVar[Mapping[str, float]] = {"generation_weight": 1.0, "regression_weight": 1.0}
