"""What an objective is, and what a step hands to it.

A step's loss is the sum of an objective's terms, each a weighted mean over the global batch. A term lives for one step,
where the head's outputs are: on every process without a pipeline, on the last stage with one. It gives, micro-batch by
micro-batch, a surrogate: a scalar whose gradient, summed over micro-batches and replicas, is that of the term.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.model.activations import Outputs
from megatron_lcl.parallel.mesh import Axis, Mesh

COUNTS = ("num_pairs", "num_targets", "num_images", "num_tokens", "num_bad_images")
OF_THE_RUN = frozenset(
    (
        *("step", "time", "clock", "loss", "log_scale", "grad_norm", "lr", "contrastive_weight", *COUNTS),
        *("chance_accuracy", "negatives_per_anchor", "image_slots_padded", "token_slots_padded"),
        *("images_per_second", "tokens_per_second", "step_seconds", "data_wait", "data_wait_max"),
        *("flops_per_second", "mfu", "memory_peak_bytes", "skipped_steps", "steps_without_pairs"),
        *("slowest_rank", "slowest_lag_seconds", "slowest_phase", "rank_step_seconds", "rank_work_seconds"),
        # of the lines between steps
        *("skipped", "bad_images", "num_bad_images_since", "health", "stragglers", "strategy", "retain_bytes"),
        *("checkpoint_bytes", "checkpoint_stall_seconds", "checkpoint_write_seconds", "checkpoint_wait_seconds"),
        *("attention", "loss_kernels", "blocks", "kernels_passed_over", "hardware"),
        *("phase", "image_size", "num_patches", "global_batch", "micro_batch"),
        *("images_per_pack", "contrast_share", "cut_share", "unread_share"),
    )
)
"""names in the lines of metrics.jsonl that no term's metric may have: one would replace the other"""
_FAMILIES = (
    *("grad_norm/", "update_norm/", "max_attention_logit/", "lr/"),
    *("rank_step_seconds/", "rank_work_seconds/", "heldout/", "labeled/"),
)
"""what other such names begin with"""

Strategy = Literal["retain", "recompute", "1F1B"]
"""how forwards and backwards of a step follow each other: all forwards, their graphs kept, then all backwards; all
forwards without graphs, then forwards and backwards; forwards and backwards only"""


@dataclass(frozen=True)
class GlobalCounts:
    """Counts of the global batch, known to every process before the forward."""

    counts: dict[str, int]
    """num_pairs, num_targets, num_images, num_tokens, num_bad_images of the global batch"""
    pairs: list[int]
    """pairs of each data-parallel replica"""

    @classmethod
    def of(cls, batches: Sequence[PackedBatch], mesh: Mesh, device: torch.device) -> GlobalCounts:
        """From the micro-batches of this replica; one small exchange over the data axis."""
        own = torch.tensor([sum(getattr(batch, name) for batch in batches) for name in COUNTS], device=device)
        table = mesh.data.all_gather(own).cpu()
        return cls(dict(zip(COUNTS, table.sum(0).tolist(), strict=True)), table[:, 0].tolist())


@dataclass(frozen=True)
class StepInputs:
    """What a step's loss is made of, known before the first backward."""

    batches: Sequence[PackedBatch]
    """the micro-batches of this replica"""
    outputs: Sequence[Outputs]
    """of the first forwards of all of them; none where there is one forward only. With `contrast.strategy: recompute`
    they have no graphs, and their `generation` is NaN, as these forwards leave the targets out"""
    log_scale: torch.Tensor
    """[1] as it is before the step"""
    counts: GlobalCounts
    mesh: Mesh
    logit_bias: torch.Tensor | None = None
    """[1] as it is before the step; None where the model has none"""


class Term(ABC):
    """One loss of a step, a mean over the global batch times a weight. All processes that have outputs make it.

    One of `Objective.parts` is made as `term(step, weight)` with a `StepInputs` and what the mean counts for; of weight
    0 it is measured.
    """

    task: ClassVar[EvaluationTask]
    """what it trains: see `Objective.trains`. Parameters that only other tasks need are frozen, where no other term has
    such a task (train/parts.py)"""
    all_features_first: ClassVar[bool] = False
    """it needs the features of all micro-batches before the first backward, as a contrast does"""
    has_triton: ClassVar[bool] = False
    """what it computes itself has Triton kernels; a run says what it uses. The loss of targets is the head's"""

    @abstractmethod
    def surrogate(self, m: int, out: Outputs) -> torch.Tensor | None:
        """Of micro-batch m, from its outputs with their graph; asked for in order. None: it adds no gradient."""

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """The term, float32 scalar, once all micro-batches were there; the same on every process that has it."""

    @abstractmethod
    def metrics(self) -> Mapping[str, torch.Tensor]:
        """What is said of it, scalars by name, once all micro-batches were there. No other term of the objective may
        give the same name, nor the run itself (`OF_THE_RUN`)."""

    @classmethod  # noqa: B027 - few terms need a setting
    def check_config(cls, config: Config) -> None:
        """UserError, with the remedy, where the config lacks what the term needs; before anything is built."""

    @classmethod
    def gathers(cls, pairs: Sequence[int], width: int, mesh: Mesh) -> list[tuple[Axis, int]]:
        """The all-gathers that it makes in a step: the group, and the bytes that all its ranks have afterwards.

        An all-reduce counts as two. What is small (train/traffic.py) need not be named. pairs: of each data-parallel
        replica; width: of a feature.
        """
        return []


class Objective:
    """What a run minimizes. It is a function of the config, and the same on every process."""

    sequences: ClassVar[Sequences]
    """those that it reads from documents"""
    tasks: ClassVar[tuple[EvaluationTask, ...]]
    """the held-out tasks that it trains"""
    metrics: ClassVar[tuple[str, ...]]
    """names of all that its terms measure, none of them one of the run's own (`OF_THE_RUN`); what a step's terms do not
    give is 0"""

    parts: ClassVar[Sequence[tuple[type[Term], str | float]]] = ()
    """its terms, in the order in which they are added, each with its weight or the field of `published` that has it.
    Own `terms` replace those of `parts`, from which the rest still follows: `trains`, `all_features_first`,
    `has_triton`, `gathers`. Without `parts` it trains its `tasks`, needs no features first, has Triton kernels, and
    gathers nothing; the objective overrides what is otherwise"""
    published: ClassVar[Mapping[str, float]] = {}
    """the fields of the config's `objective` that weight its terms, with the values for those that are not set"""

    def __init__(self, config: Config) -> None:
        """UserError where the settings leave nothing to train, or lack what one of `parts` needs."""
        self.config = config
        self.weights = self._weights_of(config)
        """those of `published`, as they count"""
        if self.weights and not any(self.weights.values()):
            names = " and ".join(f"objective.{name}" for name in self.weights)
            raise UserError(f"{names} are both 0, which leaves nothing to train for; give one of them a weight above 0")
        for term, _ in self.parts:
            term.check_config(config)

    @classmethod
    def _weights_of(cls, config: Config) -> dict[str, float]:
        given = {name: getattr(config.objective, name) for name in cls.published}
        return {name: cls.published[name] if value is None else value for name, value in given.items()}

    @classmethod
    def _weighted_by(cls, weights: Mapping[str, float]) -> list[tuple[type[Term], float]]:
        return [(term, weights[by] if isinstance(by, str) else by) for term, by in cls.parts]

    @classmethod
    def _trained_by(cls, weights: Mapping[str, float]) -> tuple[EvaluationTask, ...]:
        return tuple(dict.fromkeys(term.task for term, weight in cls._weighted_by(weights) if weight))

    def _weighted(self) -> list[tuple[type[Term], float]]:
        return self._weighted_by(self.weights)

    def terms(self, step: StepInputs) -> Sequence[Term]:
        """The terms of a step, in the order in which they are added; all processes that have outputs call it."""
        assert self.parts, f"{type(self).__name__} has neither `parts` nor `terms` of its own"
        return [term(step, weight) for term, weight in self._weighted()]  # type: ignore[call-arg]

    @property
    def trains(self) -> tuple[EvaluationTask, ...]:
        """What of the model it trains, settings considered, named as what measures it: `retrieval`, image latents and
        texts' features in one space; `generation`, the text that follows. An evaluation of the rest is refused."""
        return self._trained_by(self.weights) or self.tasks

    @classmethod
    def may_train(cls, config: Config) -> tuple[EvaluationTask, ...]:
        """As `trains`, of a run in whatever phase, which may weight its contrast as it likes. What of the model only
        other tasks need is frozen. Nothing is known of an objective without `parts`: ()."""
        return cls._trained_by(cls._weights_of(config) | {"contrastive_weight": 1.0})

    @property
    def all_features_first(self) -> bool:
        """Its loss needs the features of all micro-batches before the first backward."""
        return any(term.all_features_first for term, _ in self.parts)

    @property
    def has_triton(self) -> bool:
        """A loss that is computed has Triton kernels: that of targets, by the head, where its sequences have any; of
        its terms, whatever they weigh. Without `parts` taken to be true, as of our terms."""
        return self.sequences.targets or not self.parts or any(term.has_triton for term, _ in self.parts)

    @property
    def strategy(self) -> Strategy:
        """How its forwards and backwards follow each other. `auto` counts, until a run has chosen
        (`train.strategy`), as what needs less."""
        if not self.all_features_first:
            return "1F1B"
        return "retain" if self.config.contrast.strategy == "retain" else "recompute"

    @property
    def keeps_graphs(self) -> bool:
        """Whether the graphs of all micro-batches are kept until the loss over the global batch is there."""
        return self.strategy == "retain"

    @property
    def num_forwards(self) -> int:
        """Forwards of a micro-batch in a step."""
        return 2 if self.strategy == "recompute" else 1

    def gathers(self, pairs: Sequence[int], mesh: Mesh) -> list[tuple[Axis, int]]:
        """The all-gathers of its terms in a step (`Term.gathers`). pairs: of each data-parallel replica."""
        width = self.config.model.language.width
        return [one for term, _ in self.parts for one in term.gathers(pairs, width, mesh)]


def is_of_the_run(name: str) -> bool:
    """Whether a line of metrics.jsonl has a number of the run itself by this name."""
    return name in OF_THE_RUN or name.startswith(_FAMILIES)


def refusal(pipeline: Axis, message: str) -> UserError:
    """For what all processes that make a step's terms find: RunError where these are all of the run."""
    return (RunError if pipeline.size == 1 else UserError)(message)


def refuse_without_features(term: Term, pipeline: Axis, objective: str = "its objective") -> UserError:
    """For a term that needs all features first, of an objective that does not say so. objective: its class."""
    return refusal(
        pipeline,
        f"{type(term).__name__} needs the features of all micro-batches before the first backward, and {objective} "
        f"has `terms` of its own that do not say so; add `all_features_first = True` to {objective}",
    )


def without_targets(batch: PackedBatch) -> PackedBatch:
    """The batch for a pass of which only the features are wanted: the head multiplies no row with the vocabulary."""
    return dataclasses.replace(batch, num_targets=0)
