"""Pipeline parallelism, with the negatives of the whole global batch: DeepSpeed's PipelineEngine, other instructions.

Every process knows the integers of all its replica's micro-batches (`broadcast_batches`), so ONE float tensor, the
hidden rows, travels from stage to stage, and its gradient back. Shapes follow from the integers; none is sent.

The last stage computes the losses. What the others owe to them arrives as the gradient of their hidden rows, already
scaled: they must not scale it again, neither by float16's loss scale nor by the number of micro-batches.
"""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe import p2p, schedule
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import PipelineModule
from torch import nn

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.activations import Activations, Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.master_weights import read_numbers
from megatron_lcl.train.pipeline.partition import hidden_shape
from megatron_lcl.train.pipeline.schedule import AllBackward, AllForward
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.step import StepLoss, Stepper, without_drop_path
from megatron_lcl.train.telemetry.clock import Clock

LossOf = Callable[[int, Outputs], torch.Tensor]
"""what the last stage minimizes, from the index of a micro-batch and what the head gave for it"""


class PipelineStage(PipelineModule):
    """This process's consecutive layers; parameters are called `{index}.name`, as without a pipeline."""

    def __init__(self, layers: Mapping[int, nn.Module], bounds: Sequence[int], topology: Any) -> None:
        """layers: this process's, by their index; bounds: the first layer of each stage, and the number of all."""
        self.parts = list(bounds)  # DeepSpeed's name for it
        with contextlib.redirect_stdout(io.StringIO()):  # what DeepSpeed prints would tear the progress bar
            super().__init__([layers.get(index) for index in range(bounds[-1])], topology=topology)

    def _partition_layers(self, method: str = "") -> None:
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def ckpt_layer_path_list(self, ckpt_dir: str, local_layer_idx: int) -> list[str]:
        """DeepSpeed's, which puts the folder's name into a pattern."""
        files: list[str] = super().ckpt_layer_path_list(glob.escape(ckpt_dir), local_layer_idx)
        return files


class ContrastivePipelineEngine(PipelineEngine):
    """DeepSpeed's engine of one stage of the pipeline; see the file's head."""

    def __init__(self, shape_of: Callable[[PackedBatch], tuple[int, ...]], dtype: torch.dtype, **arguments: Any):
        """shape_of: shape of what this stage receives for a micro-batch; dtype: of what travels."""
        super().__init__(**arguments)
        self._shape_of, self._dtype = shape_of, dtype
        self.pipe_buffers["gradients"] = []
        self.clock = Clock(self.device)

    def all_forward(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the head gave for each micro-batch (none in other stages). Without gradients enabled nothing is kept."""
        self._begin(batches)
        self._exec_schedule(AllForward(len(batches), self.num_stages, self.stage_id))
        outputs = self.pipe_buffers["outputs"]
        if not torch.is_grad_enabled():
            self.pipe_buffers["outputs"] = [None] * len(outputs)
            self._begin([])
        return outputs[: len(batches)] if self.is_last_stage() else []

    def all_backward(self, loss_of: LossOf) -> None:
        """After `all_forward` with gradients enabled: the backwards, and the optimizer step."""
        assert len(self._batches) == self.micro_batches, f"{len(self._batches)} micro-batches, not {self.micro_batches}"
        self._loss_of = loss_of
        self._exec_schedule(AllBackward(self.micro_batches, self.num_stages, self.stage_id))
        self._end()

    def one_forward_one_backward(self, batches: Sequence[PackedBatch], loss_of: LossOf) -> None:
        """Forwards, backwards and the optimizer step in DeepSpeed's order."""
        assert len(batches) == self.micro_batches, f"{len(batches)} micro-batches, not {self.micro_batches}"
        self._begin(batches)
        self._loss_of = loss_of
        self._exec_schedule(schedule.TrainSchedule(self.micro_batches, self.num_stages, self.stage_id))
        self._end()

    def _begin(self, batches: Sequence[PackedBatch]) -> None:
        self._batches = batches
        self._num_forwards = 0
        self._num_backwards = 0

    def _end(self) -> None:
        """Nothing of a step is kept while the next one's images come."""
        self._begin([])
        del self._loss_of

    def _exec_nothing(self, buffer_id: int) -> None:
        """Micro-batches are here already."""

    def _exec_recv_activations(self, buffer_id: int) -> None:
        shape = self._shape_of(self._batches[self._num_forwards])
        hidden = self._receive(shape, self.prev_stage)
        self.pipe_buffers["inputs"][buffer_id] = hidden.requires_grad_(torch.is_grad_enabled())

    def _exec_forward_pass(self, buffer_id: int) -> None:
        x = Activations.of(self._batches[self._num_forwards])
        self._num_forwards += 1
        if not self.is_first_stage():
            x = x._replace(hidden=self.pipe_buffers["inputs"][buffer_id])
        self.clock.enter("forward")
        out = DeepSpeedEngine.forward(self, x)
        self.clock.enter("exchange")
        self.pipe_buffers["outputs"][buffer_id] = out if self.is_last_stage() else out.hidden
        if not torch.is_grad_enabled():
            self.pipe_buffers["inputs"][buffer_id] = None

    def _exec_send_activations(self, buffer_id: int) -> None:
        hidden = self.pipe_buffers["outputs"][buffer_id]
        self._send(hidden.detach(), self.next_stage)
        if not torch.is_grad_enabled():
            self.pipe_buffers["outputs"][buffer_id] = None

    def _exec_recv_grads(self, buffer_id: int) -> None:
        shape = self.pipe_buffers["outputs"][buffer_id].shape
        self.pipe_buffers["gradients"][buffer_id] = self._receive(shape, self.next_stage)

    def _exec_backward_pass(self, buffer_id: int) -> None:
        out, self.pipe_buffers["outputs"][buffer_id] = self.pipe_buffers["outputs"][buffer_id], None
        if self.is_last_stage():
            self.clock.enter("loss")
            loss = self._loss_of(self._num_backwards, out)
        else:
            loss = InjectGradient.apply(out, self.pipe_buffers["gradients"][buffer_id])
            self.pipe_buffers["gradients"][buffer_id] = None
        self._num_backwards += 1
        self.clock.enter("backward")
        DeepSpeedEngine.backward(self, loss, scale_wrt_gas=False)
        self.clock.enter("exchange")

    def _exec_send_grads(self, buffer_id: int) -> None:
        hidden, self.pipe_buffers["inputs"][buffer_id] = self.pipe_buffers["inputs"][buffer_id], None
        self._send(hidden.grad, self.prev_stage)

    def _exec_reduce_grads(self) -> None:
        self.clock.enter("reduce")
        super()._exec_reduce_grads()

    def _exec_optimizer_step(self, lr_kwargs: Any = None) -> None:
        self.clock.enter("optimizer")
        super()._exec_optimizer_step(lr_kwargs)

    def _receive(self, shape: Sequence[int], stage: int) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=self._dtype, device=self.device)
        if tensor.numel():
            p2p.recv(tensor, stage)
        return tensor

    def _send(self, tensor: torch.Tensor, stage: int) -> None:
        assert tensor.dtype == self._dtype, f"{tensor.dtype} between stages, not {self._dtype}"
        if tensor.numel():
            p2p.send(tensor.contiguous(), stage)

    _INSTRUCTION_MAP = {  # noqa: RUF012  (DeepSpeed looks functions up here, not methods by name)
        **PipelineEngine._INSTRUCTION_MAP,
        schedule.LoadMicroBatch: _exec_nothing,
        schedule.RecvActivation: _exec_recv_activations,
        schedule.ForwardPass: _exec_forward_pass,
        schedule.SendActivation: _exec_send_activations,
        schedule.RecvGrad: _exec_recv_grads,
        schedule.BackwardPass: _exec_backward_pass,
        schedule.SendGrad: _exec_send_grads,
        schedule.ReduceGrads: _exec_reduce_grads,
        schedule.OptimizerStep: _exec_optimizer_step,
    }


class InjectGradient(torch.autograd.Function):
    """A scalar; the gradient of `hidden` is `gradient`, whatever the scalar is multiplied by before backward.

    So every stage, like the last one, hands DeepSpeed a loss, and DeepSpeed does around its backward what it must.
    """

    @staticmethod
    def forward(ctx, hidden, gradient):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gradient)
        return torch.zeros((), device=hidden.device)

    @staticmethod
    def backward(ctx, _):  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0], None


def build_pipeline_engine(
    stage: PipelineStage, optimizer: torch.optim.Optimizer, settings: dict[str, Any], config: Config, mesh: Mesh
) -> ContrastivePipelineEngine:
    """DeepSpeed's engine around this process's layers; settings: DeepSpeed's config."""
    mpu, first = stage.mpu(), stage.parts[stage.stage_id]
    return ContrastivePipelineEngine(
        lambda batch: hidden_shape(first, batch, config.model, mesh.tensor),
        DTYPES[resolve_dtype(config)],
        args=None,
        model=stage,
        optimizer=optimizer,
        mpu=mpu,
        dist_init_required=False,
        config=settings,
        config_class=DeepSpeedConfig(settings, mpu),
    )


class PipelineStepper(Stepper):
    """Runs steps on the engine of a pipeline."""

    engine: ContrastivePipelineEngine

    def __init__(self, engine: Any, config: Config, mesh: Mesh) -> None:
        super().__init__(engine, config, mesh)
        engine.clock = self.clock

    @torch.no_grad()
    def forward(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        """What the model makes of this replica's micro-batches, on the last stage, elsewhere nothing; no step."""
        with self.clock.paused():
            outputs = self.engine.all_forward([without_drop_path(batch) for batch in batches])
        if not outputs:
            return []
        numbers = read_numbers(self._head())
        return [out._replace(**numbers) for out in outputs]

    def _first_forwards(self, batches: Sequence[PackedBatch]) -> list[Outputs]:
        return self.engine.all_forward(batches)

    def _backwards(self, batches: Sequence[PackedBatch], outputs: list[Outputs], loss: StepLoss | None) -> None:
        outputs.clear()  # the engine has them; their graphs go one by one

        def loss_of(m: int, out: Outputs) -> torch.Tensor:
            assert loss is not None
            return loss.of(m, out) * self.mesh.data.size  # DeepSpeed averages over replicas; ours is one global mean

        if self.objective.keeps_graphs:
            self.engine.all_backward(loss_of)
        else:
            self.engine.one_forward_one_backward(batches, loss_of)

    def _head(self) -> Any:
        return self.engine.module.forward_funcs[-1] if self.engine.is_last_stage() else None
