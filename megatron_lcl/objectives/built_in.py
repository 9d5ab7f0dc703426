"""The paper's objective and the two that its table compares it with."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.data.loading.sequence import INTERLEAVED, PAIRS, Sequences
from megatron_lcl.errors import UserError
from megatron_lcl.objectives import contrast, generation
from megatron_lcl.objectives.base import Objective, StepInputs, Term
from megatron_lcl.objectives.contrast import Contrast, contrast_gathers
from megatron_lcl.objectives.generation import Generation
from megatron_lcl.parallel.mesh import Axis, Mesh


class LatentCompression(Objective):
    """`lcl`: contrast and generation on interleaved documents (arXiv 2406.07543), with the config's weights."""

    sequences = INTERLEAVED
    tasks = ("retrieval", "generation")
    metrics = (*generation.METRICS, *contrast.METRICS)
    all_features_first = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.objective.contrastive_weight == config.objective.generation_weight == 0:
            raise UserError(
                "objective.contrastive_weight and objective.generation_weight are both 0, which leaves nothing to "
                "train for; give one of them a weight above 0"
            )

    @property
    def trains(self) -> tuple[EvaluationTask, ...]:
        weights = self.config.objective
        contrast = ("retrieval",) if weights.contrastive_weight != 0 else ()
        generation = ("generation",) if weights.generation_weight != 0 else ()
        return (*contrast, *generation)

    def terms(self, step: StepInputs) -> Sequence[Term]:
        weights = self.config.objective
        return [Contrast(step, weights.contrastive_weight), Generation(step, weights.generation_weight)]

    def gathers(self, pairs: Sequence[int], mesh: Mesh) -> list[tuple[Axis, int]]:
        return contrast_gathers(pairs, self.config.model.language.width, mesh)


class Clip(Objective):
    """`clip`: contrast only, on pairs, each text encoded alone."""

    sequences = PAIRS
    tasks = ("retrieval",)
    metrics = LatentCompression.metrics  # a run's lines have the same keys as those of `lcl`
    all_features_first = True

    def terms(self, step: StepInputs) -> Sequence[Term]:
        return [Contrast(step, 1.0), Generation(step, 0.0)]

    def gathers(self, pairs: Sequence[int], mesh: Mesh) -> list[tuple[Axis, int]]:
        return contrast_gathers(pairs, self.config.model.language.width, mesh)


class GenerationOnly(Objective):
    """`generation`: no contrast."""

    sequences = Sequences(contrast=False)
    tasks = ("generation",)
    metrics = LatentCompression.metrics  # of the contrast all are 0
    all_features_first = False

    def terms(self, step: StepInputs) -> Sequence[Term]:
        return [Generation(step, 1.0)]
