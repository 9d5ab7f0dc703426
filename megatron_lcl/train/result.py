"""What a step gives: on the device at first, and on the host once somebody reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch

from megatron_lcl.model.layers import PARTS
from megatron_lcl.objectives.base import GlobalCounts, Objective, refusal
from megatron_lcl.parallel.mesh import Axis


@dataclass(frozen=True)
class Measured:
    """What is looked at in a step that is logged, beside its result."""

    grad_norms: Mapping[str, float]
    """of the gradient before it is clipped, by part of the model; the root of the sum of squares is the whole norm"""
    update_norms: Mapping[str, float]
    """of the change of the float32 weights, weight decay included, by part"""
    attention_logits: Mapping[str, float]
    """the largest, by part; NaN of a part without attention"""
    latents: torch.Tensor
    """[n, D] float32, in host memory: latents of some pairs of the global batch, as the pool gives them; [0, D] on
    processes other than the first, and where there are no pairs"""
    contexts: torch.Tensor
    """[n, D] the context features of the same pairs, as the projection gives them"""


@dataclass(frozen=True)
class StepResult:
    """What a step gave; the same on every process."""

    loss: float
    """what the step minimizes: the weighted sum of the objective's terms"""
    log_scale: float
    """after the step"""
    grad_norm: float
    num_targets: int
    num_pairs: int
    num_images: int
    num_tokens: int
    num_bad_images: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """`Objective.metrics` by name. Losses are unweighted global means, in nats; what is said of a contrast is over all
    pairs of the global batch (`losses.contrastive.ContrastiveOutput`)"""
    measured: Measured | None = field(default=None, compare=False)
    """where the step was asked to measure it"""
    applied: bool = True
    """False: the step has changed nothing, for its loss or gradient is not finite, or the loss is above the limit"""

    def numbers(self) -> dict[str, float]:
        """All numbers of it by name, for a line of metrics."""
        own = [f.name for f in fields(self) if f.name not in ("metrics", "measured", "applied")]
        return {name: getattr(self, name) for name in own} | dict(self.metrics)


class PendingResult:
    """A step that is on its way; its numbers lie on the device until `read`."""

    def __init__(
        self,
        numbers: Mapping[str, torch.Tensor] | None,
        objective: Objective,
        counts: GlobalCounts,
        pipeline: Axis,
        device: torch.device,
        norms: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        wanted: bool = True,
        skipped: torch.Tensor | bool = False,
    ) -> None:
        """numbers: scalars by the names of `result_names`, where the head is, else None; what is missing is 0.
        UserError where there are others. norms: [3, parts] of gradient and update, and the largest attention logits,
        the same on every process. features: [n, 2 D] latents and contexts, without values where the head is not; both
        None where nothing is measured. wanted: whether this process is to have the features. skipped: whether the step
        has changed nothing; a scalar, 1 or 0, where only the device knows it."""
        self.counts, self.pipeline, self.wanted = counts, pipeline, wanted
        self.skipped = skipped
        self.applied: bool | None = None if isinstance(skipped, torch.Tensor) else not skipped
        """whether the step has changed something; None where it must be read"""
        self._names, self._objective = result_names(objective), objective
        own = torch.zeros(len(self._names), device=device)
        if numbers is not None:
            if undeclared := numbers.keys() - {*self._names}:
                named = ", ".join(sorted(undeclared))
                own_name = type(objective).__name__
                raise refusal(pipeline, f"{own_name}.metrics does not name {named}, which its terms give; add it")
            zero = own[0]
            own = torch.stack([numbers.get(name, zero).detach().float() for name in self._names])
        flag = skipped.reshape(1) if isinstance(skipped, torch.Tensor) else own.new_full((1,), skipped)
        self.numbers = torch.cat([own, flag.to(own.device)])
        """[names + 1] as the last stage of a pipeline knows them, and whether the step was skipped"""
        self.loss = self.numbers[0]
        """scalar, as the last stage of a pipeline knows it"""
        self.norms, self.features = norms, features
        self.result: StepResult | None = None

    def read(self) -> StepResult:
        """The result; waits for the device, once. The processes of a pipeline call it together."""
        (result,) = read_results([self])
        return result

    def made(self, numbers: torch.Tensor, norms: torch.Tensor, features: torch.Tensor) -> StepResult:
        """The result, from copies in host memory; norms and features: flat, empty where there are none."""
        *values, skipped = numbers.tolist()
        of_names = dict(zip(self._names, values, strict=True))
        measured = None
        if self.features is not None:
            grads, updates, logits = (dict(zip(PARTS, row, strict=True)) for row in norms.view(3, -1).tolist())
            measured = Measured(grads, updates, logits, *features.view(-1, self.features.shape[1]).chunk(2, 1))
        return StepResult(
            of_names["loss"],
            of_names["log_scale"],
            of_names["grad_norm"],
            **self.counts.counts,
            metrics={name: of_names[name] for name in self._objective.metrics},
            measured=measured,
            applied=not skipped,
        )


def read_results(steps: Sequence[PendingResult]) -> list[StepResult]:
    """The results of some steps; waits for the device once, for all of them. The processes of a pipeline call it
    together."""
    unread = [step for step in steps if step.result is None]
    if unread:
        nothing, pipeline = unread[0].numbers[:0], unread[0].pipeline
        of_last_stage = [part for step in unread for part in (step.numbers, _flat(step.features, nothing))]
        flat = torch.cat(of_last_stage)
        if pipeline.size > 1:
            pipeline.broadcast(flat, source=pipeline.size - 1)
        received = iter(flat.split([len(part) for part in of_last_stage]))
        parts: list[torch.Tensor] = []
        for step in unread:
            numbers, features = next(received), next(received)
            parts += [numbers, _flat(step.norms, nothing), features if step.wanted else nothing]
        host = iter(torch.cat(parts).cpu().split([len(part) for part in parts]))
        for step in unread:
            step.result = step.made(next(host), next(host), next(host))
    return [step.result for step in steps if step.result is not None]


def _flat(tensor: torch.Tensor | None, nothing: torch.Tensor) -> torch.Tensor:
    return nothing if tensor is None else tensor.flatten()


def result_names(objective: Objective) -> tuple[str, ...]:
    """The floating-point numbers of a step's result."""
    return ("loss", "log_scale", "grad_norm", *objective.metrics)
