"""One optimizer step on one global batch: both losses, means over the whole of it, negatives from the whole of it.

The contrast needs every micro-batch's features before the first backward. `retain` keeps the graphs of all forwards,
`recompute` runs the forwards twice and keeps none; both give the same gradients. The loss is taken on detached
features; its gradients re-enter each micro-batch's graph as a weighted sum of its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl.config import Config
from megatron_lcl.data.batch import PackedBatch
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.model.stages import MAX_LOG_SCALE, Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.engine import update_log_scale


@dataclass(frozen=True)
class StepResult:
    """What a step gave; the same on every process. Losses are unweighted global means, nats."""

    loss: float
    generation: float
    contrastive: float
    log_scale: float
    grad_norm: float
    image_accuracy: float
    text_accuracy: float
    mutual_information: float
    num_targets: int
    num_pairs: int
    num_images: int
    num_tokens: int
    num_bad_images: int


class Features:
    """Features of one micro-batch's pairs, attached to its graph."""

    def __init__(self, out: Outputs, batch: PackedBatch) -> None:
        pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
        self.image, self.text = out.image_features[pairs], out.text_features[pairs]


class Stepper:
    """Runs steps on a DeepSpeed engine."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self.engine, self.mesh, self.objective = engine, mesh, config.objective
        self.with_contrast = config.objective.name != "generation"
        self.retain = self.with_contrast and config.contrast.strategy == "retain"
        self.with_generation = config.objective.name != "clip"

    def run(self, batches: Sequence[PackedBatch], lr: float) -> StepResult:
        """One step on this process's micro-batches, which lie on the engine's device."""
        engine, objective = self.engine, self.objective
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        counts, pairs_per_rank = self._global_counts(batches)
        num_targets = max(counts["num_targets"], 1)
        contrast = None
        outputs: list[Outputs] = []
        features: list[Features] = []
        if self.with_contrast:
            with torch.set_grad_enabled(self.retain):
                outputs = [engine(batch) for batch in batches]
            features = [Features(out, batch) for out, batch in zip(outputs, batches, strict=True)]
            contrast, image_grads, text_grads, scale_grad = self._contrast(features, pairs_per_rank)

        undo_means = self.mesh.data.size * len(batches)  # DeepSpeed averages over both; ours is one global mean
        generation = torch.zeros((), dtype=torch.float32, device=engine.device)
        for m, batch in enumerate(batches):
            out = outputs[m] if self.retain else engine(batch)
            own = features[m] if self.retain else Features(out, batch)
            if contrast is None:  # in the graph all the same: its parameters have gradients, which are 0
                loss = (own.image.sum() + own.text.sum() + out.log_scale.sum()) * 0
            else:
                loss = out.log_scale.sum() * scale_grad / len(batches)
                loss = loss + (own.image * image_grads[m]).sum() + (own.text * text_grads[m]).sum()
            if self.with_generation:
                loss = loss + out.generation * (objective.generation_weight / num_targets)
            generation += out.generation.detach()
            engine.backward(loss * undo_means)
            engine.step()
        update_log_scale(engine.module[-1].log_scale, lambda value: value.clamp(0, MAX_LOG_SCALE))

        dist.all_reduce(generation, group=self.mesh.data.group)
        contrastive = contrast.loss.detach() if contrast is not None else torch.zeros_like(generation)
        loss = objective.contrastive_weight * self.with_contrast * contrastive
        loss = loss + objective.generation_weight * self.with_generation * generation / num_targets
        values = {
            "loss": loss,
            "generation": generation / num_targets,
            "contrastive": contrastive,
            "log_scale": self._log_scale()[0],
            "image_accuracy": contrast.image_accuracy if contrast is not None else generation * 0,
            "text_accuracy": contrast.text_accuracy if contrast is not None else generation * 0,
            "mutual_information": contrast.mutual_information if contrast is not None else generation * 0,
        }
        numbers = torch.stack([v.float() for v in values.values()]).tolist()  # one wait for the device
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        return StepResult(**dict(zip(values, numbers, strict=True)), grad_norm=grad_norm, **counts)

    def _global_counts(self, batches: Sequence[PackedBatch]) -> tuple[dict[str, int], list[int]]:
        """Targets, pairs, images, tokens of the global batch; and the pairs of every process."""
        names = ("num_pairs", "num_targets", "num_images", "num_tokens")
        own = [sum(getattr(b, name) for b in batches) for name in names]
        own.append(sum(len(b.bad_images) for b in batches))
        mine = torch.tensor(own, device=self.engine.device)
        everyone = [torch.empty_like(mine) for _ in range(self.mesh.data.size)]
        dist.all_gather(everyone, mine, group=self.mesh.data.group)
        table = torch.stack(everyone).cpu()
        total = dict(zip((*names, "num_bad_images"), table.sum(0).tolist(), strict=True))
        return total, table[:, 0].tolist()

    def _contrast(self, features: list[Features], pairs_per_rank: list[int]) -> tuple[Any, ...]:
        """The contrastive loss and, per micro-batch, its weighted gradients; and this process's share for the scale."""
        image = torch.cat([f.image for f in features]).detach().requires_grad_()
        text = torch.cat([f.text for f in features]).detach().requires_grad_()
        scale = self._log_scale().requires_grad_()
        with torch.enable_grad():
            out = contrastive_loss(image, text, scale, group=self.mesh.data.group, counts=pairs_per_rank)
            grads = torch.autograd.grad(out.loss * self.objective.contrastive_weight, (image, text, scale))
        sizes = [len(f.image) for f in features]
        return out, grads[0].split(sizes), grads[1].split(sizes), grads[2]

    def _log_scale(self) -> torch.Tensor:
        """The log scale [1] in float32: DeepSpeed's master where the parameter itself is in half precision."""
        from deepspeed.utils import safe_get_full_fp32_param

        parameter = self.engine.module[-1].log_scale
        if parameter.dtype == torch.float32 and parameter.numel():
            return parameter.detach().clone()
        return safe_get_full_fp32_param(parameter).detach().clone()
