"""The two things LCL trains, measured on documents that it has not seen: the contrast and the generation.

Every document of a held-out corpus once, without augmentation, by rules of its own (see `rules`). Retrieval: the latent
z of each distinct image against the features of all distinct contexts; the right ones are those read at a `<soi>` of
the image. And the other way round: given what stands before an image, find it among all held-out images, and among
those of its own document.

Every data-parallel replica reads and computes a part of the corpus, and ranks a part of the queries against all
replicas' answers, so during training no process waits for another to evaluate.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from tqdm import tqdm

from megatron_lcl import objectives
from megatron_lcl.config import Config, EvaluationTask
from megatron_lcl.convert.find import average_of, find_checkpoint, read_config, step_of
from megatron_lcl.convert.load import load_model
from megatron_lcl.data.corpus.cache_folders import writable_cache
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch, batch_bytes
from megatron_lcl.data.loading.shared_memory import workers_with_room
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.evaluate.encoders.spec import parse_spec
from megatron_lcl.evaluate.encoders.untrained import untrained_model
from megatron_lcl.evaluate.heldout_packs import Origin, Packs, slots_in_use
from megatron_lcl.evaluate.heldout_ranks import Pairs
from megatron_lcl.evaluate.heldout_results import (
    PICTURE,
    Example,
    HeldOut,
    as_result,
    table,
    with_recalls,
    write_heldout,
)
from megatron_lcl.evaluate.results import make_output, write_picture
from megatron_lcl.evaluate.retrieval import contrast_losses
from megatron_lcl.evaluate.rules import heldout_rules
from megatron_lcl.evaluate.trained import why_untrained
from megatron_lcl.evaluate.workers import Advance, check_workers, default_devices, in_processes
from megatron_lcl.model.activations import Outputs
from megatron_lcl.model.lcl import LCL
from megatron_lcl.parallel.mesh import Axis, Mesh

_TOKENS = 4096
"""token slots of a forward pass outside of a run"""
_EQUAL = 1e-5
"""cosine similarities that are as near are taken for equal: their last bits differ with the batches"""

TASKS: tuple[EvaluationTask, ...] = get_args(EvaluationTask)

Forward = Callable[[Sequence[PackedBatch] | None, int], Sequence[tuple[PackedBatch, Outputs | None]]]
"""`forward(read, num)`: what the model makes of `num` micro-batches, on every process of the replica. `read`: the
micro-batches, on the process that reads for its replica, else None. Outputs are on the last pipeline stage only."""


@dataclass(frozen=True)
class ModelSource:
    """Makes the model of process i, with its run's config, for an evaluation by several processes."""

    spec: str
    """of a checkpoint its folder, or `random:CONFIG`"""
    devices: tuple[str, ...]
    """process i takes the i-th, round and round"""

    def __call__(self, number: int) -> tuple[LCL, Config]:
        spec = parse_spec(self.spec)
        if spec.seed is not None:
            model, config = untrained_model(spec.name, spec.seed)
        else:
            config, model = read_config(Path(spec.name)), load_model(Path(spec.name))
        return model.to(self.devices[number % len(self.devices)]).eval(), config


def evaluate_checkpoint(
    checkpoint: str | Path,
    corpus: Path,
    output: Path | None = None,
    processes: int = 1,
    devices: Sequence[str] = (),
) -> str:
    """`evaluate_heldout` of a run, a checkpoint or `random:CONFIG`; returns the table.

    `output`: folder for the numbers and the examples as JSON, which the report shows, and for a picture. The i-th of
    `processes` is on the i-th of `devices` (none: `default_devices`). UserError where they cannot be.
    """
    devices = tuple(devices or default_devices())
    check_workers(processes, devices)
    # once: a run may save another one meanwhile
    folder = find_checkpoint(Path(checkpoint)) if parse_spec(str(checkpoint)).seed is None else None
    source = ModelSource(str(folder or checkpoint), devices)
    model, config = source(0)
    config = replace(config, data=replace(config.data, cache=writable_cache(config.data.cache)))
    tokenizer = open_corpus(corpus, config.data.cache).tokenizer
    if tokenizer.vocab_size != config.model.language.vocab_size:
        raise UserError(
            f"the tokenizer of {corpus} has {tokenizer.vocab_size} ids, the model {config.model.language.vocab_size}; "
            "preprocess the held-out documents with the model's tokenizer"
        )
    if output is not None:
        make_output(output)
    step = None if folder is None else step_of(folder)
    result, examples = evaluate_heldout(model, config, corpus, step=step, source=source, processes=processes)
    if output is not None:
        write_heldout(output, replace(result, average=None if folder is None else average_of(folder)), examples)
        write_picture([as_result(result, str(checkpoint))], output / PICTURE)
    return table(result)


def evaluate_heldout(
    model: LCL,
    config: Config,
    corpus: str | Path,
    num_examples: int = 8,
    progress: bool = True,
    step: int | None = None,
    source: ModelSource | None = None,
    processes: int = 1,
) -> tuple[HeldOut, list[Example]]:
    """Measure `model`, of the run's `config`, on every document of `corpus`.

    With `processes` > 1 each makes the model again by `source`, and encodes an equal part of the corpus; this one ranks
    the pairs. The batches do not depend on the number of processes; the number of threads of each does, which may
    change last bits.
    """
    device = next(model.parameters()).device
    with _current(device):
        evaluation = _of_model(model, config, corpus, Axis(), processes)
        processes = min(processes, evaluation.num_batches)
        if processes <= 1:
            result, examples = evaluation.run(step, num_examples, intervals=True, progress=progress)
        else:
            assert source is not None, "this model cannot be made again in another process"
            jobs = [partial(_encode_part, source, config, str(corpus), processes) for _ in range(processes)]
            total = processes * -(-evaluation.num_batches // processes)  # each has as many, the last ones may be empty
            with tqdm(desc="evaluate", unit="batch", total=total, disable=not progress) as bar:
                parts = [pickle.loads(part) for part in in_processes(jobs, bar)]
            result, examples = evaluation.measure(_Encoded.joined(parts, device), step, num_examples, intervals=True)
    return replace(result, dtype=str(next(model.parameters()).dtype).removeprefix("torch.")), examples


def _encode_part(
    source: ModelSource, config: Config, corpus: str, processes: int, number: int, _threads: int, advance: Advance
) -> bytes:
    """A pickled `_Encoded` of one of several processes. The collectives of its axis are never called: the first process
    measures.

    Pickled here: `multiprocessing` would leave tensors in shared memory, which may be small, of a process that ends.
    """
    model, _ = source(number)
    with _current(next(model.parameters()).device):
        evaluation = _of_model(model, config, corpus, Axis(rank=number, size=processes), processes)
        return pickle.dumps(_Encoded.joined([evaluation.encode(advance)], "cpu"))


def _of_model(model: LCL, config: Config, corpus: str | Path, data: Axis, processes: int) -> HeldOutEvaluation:
    """By one whole model; processes: on this machine."""
    device = next(model.parameters()).device
    model.eval()
    config = replace(config, data=replace(config.data, workers=_workers_with_room(config, processes)))

    def forward(read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
        assert read is not None
        return [(batch, model.layers(batch.to(device))) for batch in read]

    return HeldOutEvaluation(config, corpus, Mesh(Axis(), data), forward, tokens=_TOKENS)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """With it as the current one: Triton's kernels run there, and batches are pinned for it."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _workers_with_room(config: Config, processes: int) -> int:
    """The run's number of loader processes, or fewer, as shared memory has room for their micro-batches."""
    rules, size = heldout_rules(config.model), config.model.vision.image_size
    tokens, images = rules["sequence_tokens"], rules["sequence_images"]
    batch = batch_bytes(max(1, _TOKENS // tokens), tokens, images, size)
    return workers_with_room(config.data.workers, processes * batch)


class HeldOutEvaluation:
    """An evaluation that all processes of a run make together, as often as they like."""

    def __init__(
        self,
        config: Config,
        corpus: str | Path,
        mesh: Mesh,
        forward: Forward,
        tasks: Sequence[EvaluationTask] = (),
        tokens: int = 0,
        at_once: int = 1,
    ) -> None:
        """Every process calls it.

        tasks: what to measure; none: what the run's objective trains. tokens: token slots of a forward pass, where
        a pack is not larger; at_once: micro-batches that `forward` gets together, always so many (a pipeline wants
        it; what the corpus lacks is padding). None of these changes the numbers.
        """
        self.corpus = str(corpus)
        self.mesh = mesh
        self.forward = forward
        self.at_once = at_once
        self.tasks = check_tasks(config, tasks)
        self.rules = heldout_rules(config.model)
        self.micro_batch = max(1, tokens // self.rules["sequence_tokens"])
        """packs of a forward pass"""
        self.packs: Packs | None = None
        if mesh.loads_data:
            self.packs = Packs(config, self.corpus, mesh.data, self.micro_batch, at_once)
        self.fingerprint: str | None
        self.num_batches, self.num_documents, self.fingerprint = mesh.model_parallel.broadcast_object(
            (len(self.packs.loader), self.packs.num_documents, self.packs.fingerprint) if self.packs else (0, 0, None)
        )

    @torch.no_grad()
    def run(
        self, step: int | None = None, num_examples: int = 8, intervals: bool = False, progress: bool = False
    ) -> tuple[HeldOut, list[Example]]:
        """Measure the model after `step` steps; the numbers are on every process, the examples on the first one.

        Raises RunError, on every process, if the corpus has nothing for the tasks.
        """
        total, hidden = self.num_batches, not (progress and self.mesh.is_first)
        with tqdm(desc="evaluate", unit="batch", total=total, disable=hidden) as bar:
            encoded = self.encode(bar.update)
        return self.measure(encoded, step, num_examples, intervals)

    @torch.no_grad()
    def encode(self, advance: Advance) -> _Encoded:
        """What the model makes of this replica's part of the corpus; `advance` is told of micro-batches."""
        packs = self.packs
        if not self.num_batches:
            raise RunError(f"{self.corpus} has no document that the rules of evaluation leave; nothing can be measured")
        encoded = _Encoded()
        batches = iter(packs.loader if packs else ())
        for _ in range(0, self.num_batches, self.at_once):
            read = list(itertools.islice(batches, self.at_once)) if packs else None
            for batch in read or ():
                assert packs is not None
                encoded.origins += packs.origins(batch)
                encoded.bad += [(batch.packs[0], reason) for _, reason in batch.bad_images]
            if read is not None:
                read = [slots_in_use(batch, "generation" in self.tasks) for batch in read]
            for batch, out in self.forward(read, self.at_once):
                encoded.add(batch, out)
            advance(self.at_once)
        return encoded

    @torch.no_grad()
    def measure(
        self, own: _Encoded, step: int | None, num_examples: int, intervals: bool
    ) -> tuple[HeldOut, list[Example]]:
        """What `run` returns, of what this replica has encoded."""
        mesh, packs, origins = self.mesh, self.packs, own.origins
        places = mesh.model_parallel.broadcast_object([origin.place for origin in origins])

        found: tuple[HeldOut, list[_Picked]] | None = None
        if own.features is not None:  # the last pipeline stage
            found = self._measure(own, places, num_examples, intervals)
        found = mesh.world.broadcast_object(found, source=mesh.world.size - mesh.data_tensor.size)
        assert found is not None, "the first process of the last stage has it"
        result, picked = replace(found[0], step=step), found[1]
        if packs:
            bad = itertools.chain.from_iterable(mesh.data.gather_objects(own.bad))
            in_order = sorted(bad, key=lambda image: image[0])  # as one process reads them
            result = replace(result, bad_images=tuple(reason for _, reason in in_order))
        if not result.pairs and not result.targets:
            undecodable = f" ({len(result.bad_images)} of its images do not decode)" if result.bad_images else ""
            raise RunError(
                f"{self.corpus} has nothing for {' and '.join(self.tasks)}{undecodable}; there is nothing to evaluate"
            )
        return result, self._examples(origins, picked)

    def _measure(
        self, own: _Encoded, places: Sequence[tuple[int, ...]], num_examples: int, intervals: bool
    ) -> tuple[HeldOut, list[_Picked]]:
        """The numbers, and some images, at evenly spaced quantiles of the rank, best first: neither the best nor the
        worst alone.

        places: of this replica's pairs, see `Pairs`. Called on the last pipeline stage; everything is gathered over its
        replicas.
        """
        data = self.mesh.data
        num_images = sum(data.gather_objects(own.num_images))
        result = HeldOut(
            self.corpus, self.num_documents, 0, 0, num_images, rules=self.rules, fingerprint=self.fingerprint
        )
        if "generation" in self.tasks:
            nll, targets = data.all_reduce(own.generation).tolist()
            if targets:
                result = replace(result, targets=int(targets), bits_per_token=nll / targets / math.log(2))
        if "retrieval" not in self.tasks:
            return result, []
        image, text = own.stacked()
        device = image.device
        sizes = data.gather_objects(len(image))
        offset, num_pairs = sum(sizes[: data.rank]), sum(sizes)
        if not num_pairs:
            return result, []
        images, texts = data.gather_ragged(image, sizes), data.gather_ragged(text, sizes)
        all_places = data.gather_ragged(torch.tensor(places, dtype=torch.int64, device=device).view(-1, 5), sizes)
        losses = contrast_losses(image, texts, offset, own.scale, own.bias)
        losses += contrast_losses(text, images, offset, own.scale, own.bias)
        losses = data.gather_ragged(losses, sizes)
        result = replace(result, pairs=num_pairs, contrastive_loss=float(losses.mean()) / 2)

        pairs = Pairs(all_places.cpu().numpy())
        images, texts = (
            every[torch.from_numpy(first).to(device)]
            for every, first in ((images, pairs.first_image), (texts, pairs.first_context))
        )
        ranked = pairs.rank(images, texts, data)
        # equal ranks and similarities in the corpus's order: that of the rows follows from the number of replicas
        ranks, num_contexts = ranked[0].ranks, ranked[0].right
        order = pairs.images_in_order[ranks[pairs.images_in_order].argsort(kind="stable")]
        quantiles = torch.linspace(0, len(order) - 1, min(num_examples, len(order))).round().long()
        in_order = pairs.contexts_in_order
        texts_in_order = texts[torch.from_numpy(in_order).to(device)]
        picked = []
        for i in order[quantiles.numpy()].tolist():
            near = in_order[_nearest(images[i], texts_in_order)]
            first, right = pairs.first_context[near].tolist(), pairs.are_together(i, near).tolist()
            picked.append(_Picked(int(pairs.first_image[i]), int(ranks[i]), first, right, int(num_contexts[i])))
        return with_recalls(result, ranked, intervals), picked

    def _examples(self, origins: list[Origin], picked: list[_Picked]) -> list[Example]:
        if self.packs is None:
            return []
        data = self.mesh.data
        offset = sum(data.gather_objects(len(origins))[: data.rank])
        needed = {i for one in picked for i in (one.pair, *one.nearest)}
        own = {i: self.packs.pair(origins[i - offset]) for i in needed if offset <= i < offset + len(origins)}
        pairs = {i: pair for theirs in data.gather_objects(own) for i, pair in theirs.items()}
        return [
            Example(pairs[i], rank, tuple(pairs[j] for j in near), tuple(right), num_contexts)
            for i, rank, near, right, num_contexts in picked
        ]


class _Picked(NamedTuple):
    """An `Example` with indices of the pairs in their place."""

    pair: int
    rank: int
    nearest: list[int]
    right: list[bool]
    num_contexts: int


def _nearest(image: torch.Tensor, texts: torch.Tensor) -> np.ndarray:
    """Indices of the three of texts [N, D] that an image [D] is most similar to, of equal ones the first."""
    similarity, found = (image @ texts.t()).double().cpu().numpy(), []
    for _ in range(min(3, len(similarity))):
        found.append(int((similarity >= similarity.max() - _EQUAL).argmax()))
        similarity[found[-1]] = -np.inf
    return np.array(found)


def check_tasks(config: Config, tasks: Sequence[EvaluationTask]) -> tuple[EvaluationTask, ...]:
    """The tasks, or, if none are named, those that the objective trains. UserError where it does not train one, or
    nothing that held-out documents measure."""
    trained = objectives.trained_by(config)
    if not trained:
        raise UserError(
            f"{why_untrained(config, 'retrieval')} what held-out documents measure; leave them out (of a run: "
            "evaluate.corpus; of `evaluate`: --corpus)"
        )
    for task in tasks:
        if task not in trained:
            raise UserError(f"{why_untrained(config, task)} what {task} measures; remove that task")
    return tuple(task for task in TASKS if task in (tasks or trained))


class _Encoded:
    """What the model made of this replica's part of the corpus."""

    def __init__(self) -> None:
        self.origins: list[Origin] = []
        """of the pairs; this and `bad` are on the process that reads for its replica"""
        self.bad: list[tuple[int, str]] = []
        """of each image that does not decode: the first pack of its micro-batch; its name and the reason"""
        self.features: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.generation = torch.zeros(2, dtype=torch.float64)
        """sum of the negative log-likelihoods (nats), number of targets"""
        self.scale = 1.0
        self.bias: float | None = None
        self.num_images = 0

    def add(self, batch: PackedBatch, out: Outputs | None) -> None:
        if out is None:
            return
        if self.features is None:
            self.features = []
            self.generation = self.generation.to(out.generation.device)
            self.scale = float(out.log_scale.exp())
            self.bias = None if out.logit_bias is None else float(out.logit_bias)
        pairs = (batch.image_soi >= 0).nonzero()[:, 0].to(out.image_features.device)
        self.features.append((out.image_features[pairs], out.text_features[pairs]))
        self.generation[0] += out.generation
        self.generation[1] += batch.num_targets
        self.num_images += batch.num_images

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and text features of the pairs, [n, D] each."""
        assert self.features, "no micro-batch"
        image, text = zip(*self.features, strict=True)
        return torch.cat(image), torch.cat(text)

    @classmethod
    def joined(cls, parts: Sequence[_Encoded], device: str | torch.device) -> _Encoded:
        """Parts that processes have encoded, each with features, as one, on the device."""
        whole = cls()
        whole.origins = [origin for part in parts for origin in part.origins]
        whole.bad = [image for part in parts for image in part.bad]
        image, text = zip(*(part.stacked() for part in parts), strict=True)
        whole.features = [(torch.cat([t.to(device) for t in image]), torch.cat([t.to(device) for t in text]))]
        whole.generation = torch.stack([part.generation.to(device) for part in parts]).sum(0)
        whole.scale, whole.bias = parts[0].scale, parts[0].bias
        whole.num_images = sum(part.num_images for part in parts)
        return whole
