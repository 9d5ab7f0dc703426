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


class Features:
    """Features of one micro-batch's pairs, and, after the loss, its gradients with respect to them."""

    def __init__(self, out: Outputs, batch: PackedBatch) -> None:
        pairs = torch.nonzero_static(batch.image_soi >= 0, size=batch.num_pairs)[:, 0]
        self.image, self.text = out.image_features[pairs], out.text_features[pairs]


class Stepper:
    """Runs steps on a DeepSpeed engine."""

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        self.engine, self.mesh, self.objective = engine, mesh, config.objective
        self.retain = config.contrast.strategy == "retain"
        self.with_contrast = config.objective.name != "generation"
        self.with_generation = config.objective.name != "clip"

    def run(self, batches: Sequence[PackedBatch], lr: float) -> StepResult:
        """One step on this process's micro-batches, which lie on the engine's device."""
        engine, size = self.engine, self.mesh.data.size
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        counts, pairs_per_rank = self._global_counts(batches)
        num_targets, num_pairs, num_images, num_tokens = counts
        two_passes = self.with_contrast and not self.retain
        with torch.set_grad_enabled(not two_passes):
            outputs = [engine(batch) for batch in batches]
        features = [Features(out, batch) for out, batch in zip(outputs, batches, strict=True)]
        contrast, image_grads, text_grads, scale_grad = self._contrast(outputs[0].log_scale, features, pairs_per_rank)

        undo_means = size * len(batches)  # DeepSpeed averages over processes and micro-batches; ours is one global mean
        generation = torch.zeros((), dtype=torch.float32, device=engine.device)
        for m, batch in enumerate(batches):
            out = engine(batch) if two_passes else outputs[m]
            own = Features(out, batch) if two_passes else features[m]
            loss = out.log_scale.sum() * scale_grad / len(batches)
            loss = loss + (own.image * image_grads[m]).sum() + (own.text * text_grads[m]).sum()
            if self.with_generation:
                loss = loss + out.generation * (self.objective.generation_weight / max(num_targets, 1))
            generation += out.generation.detach()
            engine.backward(loss * undo_means)
            engine.step()
            outputs[m] = None  # type: ignore[call-overload]  # its graph is spent
        self._clamp_log_scale()

        dist.all_reduce(generation, group=self.mesh.data.group)
        mean_generation = float(generation) / max(num_targets, 1)
        contrastive = float(contrast.loss) if contrast is not None else 0.0
        loss_value = self.objective.contrastive_weight * contrastive * self.with_contrast
        loss_value += self.objective.generation_weight * mean_generation * self.with_generation
        return StepResult(
            loss=loss_value,
            generation=mean_generation,
            contrastive=contrastive,
            log_scale=float(self._log_scale().detach()),
            grad_norm=float(engine.get_global_grad_norm() or 0.0),
            image_accuracy=float(contrast.image_accuracy) if contrast is not None else 0.0,
            text_accuracy=float(contrast.text_accuracy) if contrast is not None else 0.0,
            mutual_information=float(contrast.mutual_information) if contrast is not None else 0.0,
            num_targets=num_targets,
            num_pairs=num_pairs,
            num_images=num_images,
            num_tokens=num_tokens,
        )

    def _global_counts(self, batches: Sequence[PackedBatch]) -> tuple[list[int], list[int]]:
        """Targets, pairs, images, tokens of the global batch; and the pairs of every process."""
        names = ("num_targets", "num_pairs", "num_images", "num_tokens")
        own = torch.tensor([sum(getattr(b, name) for b in batches) for name in names], device=self.engine.device)
        everyone = [torch.empty_like(own) for _ in range(self.mesh.data.size)]
        dist.all_gather(everyone, own, group=self.mesh.data.group)
        table = torch.stack(everyone).cpu()
        return table.sum(0).tolist(), table[:, 1].tolist()

    def _contrast(self, log_scale: torch.Tensor, features: list[Features], pairs_per_rank: list[int]) -> tuple:
        """The contrastive loss and, per micro-batch, its weighted gradients; and this process's share for the scale."""
        if not self.with_contrast:
            zeros = [torch.zeros_like(f.image) for f in features]
            return None, zeros, zeros, torch.zeros_like(log_scale)
        image = torch.cat([f.image for f in features]).detach().requires_grad_()
        text = torch.cat([f.text for f in features]).detach().requires_grad_()
        scale = log_scale.detach().requires_grad_()
        with torch.enable_grad():
            out = contrastive_loss(image, text, scale, group=self.mesh.data.group, counts=pairs_per_rank)
            grads = torch.autograd.grad(out.loss * self.objective.contrastive_weight, (image, text, scale))
        sizes = [len(f.image) for f in features]
        return out, grads[0].split(sizes), grads[1].split(sizes), grads[2]

    def _log_scale(self) -> torch.nn.Parameter:
        return self.engine.module[-1].log_scale

    @torch.no_grad()
    def _clamp_log_scale(self) -> None:
        """Into [0, ln 100], in the parameter and in DeepSpeed's float32 master: clamping one alone would be lost."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_local_fp32_param,
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        parameter: Any = self._log_scale()
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: each process clamps its shard
            safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(0, MAX_LOG_SCALE))
            parameter.ds_tensor.clamp_(0, MAX_LOG_SCALE)
        elif (master := safe_get_full_fp32_param(parameter)) is not None:
            safe_set_full_fp32_param(parameter, master.clamp(0, MAX_LOG_SCALE))
        parameter.clamp_(0, MAX_LOG_SCALE)
