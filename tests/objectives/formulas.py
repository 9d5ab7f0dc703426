"""What tests of an objective's equations share: a small model and its step, and the same in float64, one by one."""

from __future__ import annotations

import copy
from typing import Any

import torch

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.layers import normalize
from megatron_lcl.model.lcl import LCL, pack_padded
from megatron_lcl.objectives.base import GlobalCounts, StepInputs
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.train.result import PendingResult, StepResult
from megatron_lcl.train.step import StepLoss

MODEL = {
    "vision": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "heads": 2, "mlp_width": 48},
    "language": {"context_length": 48, "vocab_size": 0, "width": 24, "layers": 2, "heads": 2, "mlp_width": 48},
    "pool_heads": 2,
}


def config_of(corpus: Corpus, name: str, **objective: float) -> Config:
    model = copy.deepcopy(MODEL)
    model["language"]["vocab_size"] = corpus.tokenizer.vocab_size  # type: ignore[index]
    data = {"tokens_per_pack": 96, "images_per_pack": 4, "workers": 0, "cache": str(corpus.path / "cache")}
    train = {"global_batch": 4, "steps": 2}
    tree = {"model": model, "data": {**data, "corpora": str(corpus.path)}, "train": train}
    return configs.from_dict({**tree, "objective": {"name": name, **objective}})


def loader_of(config: Config) -> PackedLoader:
    sequences, vision = objectives.create(config).sequences, config.model.vision
    context, packs = config.model.language.context_length, config.train.global_batch
    options: dict[str, Any] = {"global_batch": packs, "steps": 1, "sequences": sequences}
    return PackedLoader(config.data, vision.num_patches, vision.image_size, context, **options)


def step_of(config: Config, model: LCL, batches: list[PackedBatch]) -> tuple[StepLoss, float, list[torch.Tensor]]:
    """A step's loss of two replicas' worth of micro-batches on one process: the loss, its value and gradients."""
    counts = GlobalCounts.of(batches, Mesh(ALONE, ALONE), torch.device("cpu"))
    outputs = [model.layers(batch) for batch in batches]
    numbers = {name: parameter.detach() for name, parameter in model.head.numbers.items()}
    step = StepInputs(batches, outputs, counts=counts, mesh=Mesh(ALONE, ALONE), **numbers)
    loss = StepLoss(objectives.create(config), step, float("inf"))
    surrogate = sum(loss.of(m, out) for m, out in enumerate(outputs))
    gradients = torch.autograd.grad(surrogate, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return loss, float(loss.mean()), list(gradients)


def result_of(loss: StepLoss, model: LCL) -> StepResult:
    """What the step says of itself."""
    numbers = loss.numbers() | {"log_scale": model.head.log_scale.detach()[0]}
    return PendingResult(numbers, loss.objective, loss.step.counts, ALONE, torch.device("cpu")).read()


def hidden_rows(model: LCL, ids: list[int], images: torch.Tensor) -> torch.Tensor:
    """Language-model outputs [S, D] for one sequence by itself."""
    tokens = torch.tensor([ids])
    x: Any = Activations.of(pack_padded(tokens, torch.tensor([len(ids)]), images, model.config))
    for layer in list(model.layers)[:-1]:
        x = layer(x)
    return x.hidden[: len(ids)]


def log_likelihoods(model: LCL, hidden: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """log P of each of `ids`, predicted from the row of `hidden` with the same number."""
    return model.head.logits(hidden).log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]


def in_double(model: LCL) -> LCL:
    """A copy that computes in float64."""
    double = copy.deepcopy(model).double()
    for parameter in double.head.numbers.values():
        parameter.data = parameter.data.double()
    return double


def assert_same_gradients(ours: list[torch.Tensor], loss: torch.Tensor, double: LCL) -> None:
    truth = torch.autograd.grad(loss, list(double.parameters()), allow_unused=True, materialize_grads=True)
    whole = torch.stack([g.norm() for g in truth]).norm()
    for (name, _), a, b in zip(double.named_parameters(), ours, truth, strict=True):
        assert float((a.double() - b).norm()) <= 2e-5 * float(b.norm()) + 1e-7 * float(whole), name


def pairs_in(corpus: Corpus, loader: PackedLoader, batches: list[PackedBatch]) -> list[tuple[list[int], torch.Tensor]]:
    """Every pair's text, as the corpus has it, and the pixels that the batch has of its image."""
    found = []
    for batch in batches:
        for b, number in enumerate(batch.packs):
            for origin in loader.provenance(number):
                for image in origin.images:
                    k, local = corpus.locate(origin.document)
                    shard = corpus.shard(k)
                    first, stop = (int(x) for x in shard.document_offsets[local : local + 2])
                    images = [i for i in range(first, stop) if shard.modes[i] == 1]
                    piece = images[origin.part]
                    assert shard.piece(piece) == image.image
                    text = shard.piece(piece - 1)  # each image of this corpus follows its text
                    pixels = batch.images[b * loader.images_per_pack + image.slot]
                    found.append((text.tolist(), pixels))  # type: ignore[union-attr]
    return found


def to_double(images: torch.Tensor) -> torch.Tensor:
    """uint8 images as the model normalizes them, in float64."""
    return normalize(images).double()


def double_tokens(model: LCL, images: torch.Tensor) -> torch.Tensor:
    return model.vision_tokens(to_double(images))
