"""The two things LCL trains, measured on documents that it has not seen: the contrast and the generation.

Every document of a held-out corpus once, without augmentation, by rules of its own (see `rules`). Retrieval: each
image's latent z against the context features of all held-out pairs; the true one is the context read at the image's own
`<soi>`. And the other way round: given the text before an image, find it among all held-out images, and among those of
its own document.

Every data-parallel replica reads and computes a part of the corpus, and ranks its own pairs against all replicas', so
during training no process waits for another to evaluate.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

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
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS
from megatron_lcl.data.loading.sequential_index import SequentialIndex
from megatron_lcl.data.loading.shared_memory import workers_with_room
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.evaluate.encoders.spec import parse_spec
from megatron_lcl.evaluate.encoders.untrained import untrained_model
from megatron_lcl.evaluate.heldout_results import (
    CONTEXT_CHARACTERS,
    PICTURE,
    Example,
    HeldOut,
    Pair,
    as_result,
    table,
    with_recalls,
    write_heldout,
)
from megatron_lcl.evaluate.results import make_output, write_picture
from megatron_lcl.evaluate.retrieval import rank_own
from megatron_lcl.evaluate.rules import heldout_data, heldout_rules
from megatron_lcl.evaluate.trained import why_untrained
from megatron_lcl.model.layers import Outputs
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


def evaluate_checkpoint(checkpoint: str | Path, corpus: Path, output: Path | None = None) -> str:
    """`evaluate_heldout` of a run, a checkpoint or `random:CONFIG`, on CUDA where there is one; returns the table.

    `output`: folder for the numbers and the examples as JSON, which the report shows, and for a picture.
    """
    spec, step = parse_spec(str(checkpoint)), None
    if spec.seed is not None:
        model, config = untrained_model(spec.name, spec.seed)
    else:
        folder = find_checkpoint(Path(checkpoint))
        model, config, step = load_model(folder), read_config(folder), step_of(folder)
    config = replace(config, data=replace(config.data, cache=writable_cache(config.data.cache)))
    tokenizer = open_corpus(corpus, config.data.cache).tokenizer
    if tokenizer.vocab_size != config.model.language.vocab_size:
        raise UserError(
            f"the tokenizer of {corpus} has {tokenizer.vocab_size} ids, the model {config.model.language.vocab_size}; "
            "preprocess the held-out documents with the model's tokenizer"
        )
    if output is not None:
        make_output(output)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    result, examples = evaluate_heldout(model, config, corpus, step=step)
    if output is not None:
        write_heldout(output, replace(result, average=None if spec.seed is not None else average_of(folder)), examples)
        write_picture([as_result(result, str(checkpoint))], output / PICTURE)
    return table(result)


def evaluate_heldout(
    model: LCL,
    config: Config,
    corpus: str | Path,
    num_examples: int = 8,
    progress: bool = True,
    step: int | None = None,
) -> tuple[HeldOut, list[Example]]:
    """Measure `model`, of the run's `config`, on every document of `corpus`."""
    device = next(model.parameters()).device
    model.eval()
    config = replace(config, data=replace(config.data, workers=_workers_with_room(config)))

    def forward(read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
        assert read is not None
        return [(batch, model.layers(batch.to(device))) for batch in read]

    evaluation = HeldOutEvaluation(config, corpus, Mesh(Axis(), Axis()), forward, tokens=_TOKENS)
    result, examples = evaluation.run(step, num_examples, intervals=True, progress=progress)
    return replace(result, dtype=str(next(model.parameters()).dtype).removeprefix("torch.")), examples


def _workers_with_room(config: Config) -> int:
    """The run's number of loader processes, or fewer, as shared memory has room for their micro-batches."""
    rules, size = heldout_rules(config.model), config.model.vision.image_size
    tokens, images = rules["sequence_tokens"], rules["sequence_images"]
    return workers_with_room(config.data.workers, batch_bytes(max(1, _TOKENS // tokens), tokens, images, size))


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
        it; what the corpus lacks is padding). Neither changes the numbers.
        """
        self.corpus = str(corpus)
        self.mesh = mesh
        self.forward = forward
        self.at_once = at_once
        self.tasks = check_tasks(config, tasks)
        self.rules = heldout_rules(config.model)
        self.micro_batch = max(1, tokens // self.rules["sequence_tokens"])
        """packs of a forward pass"""
        self.packs = _Packs(config, self.corpus, mesh.data, self.micro_batch, at_once) if mesh.loads_data else None
        self.num_batches, self.num_documents = mesh.model_parallel.broadcast_object(
            (len(self.packs.loader), self.packs.num_documents) if self.packs else (0, 0)
        )

    @torch.no_grad()
    def run(
        self, step: int | None = None, num_examples: int = 8, intervals: bool = False, progress: bool = False
    ) -> tuple[HeldOut, list[Example]]:
        """Measure the model after `step` steps; the numbers are on every process, the examples on the first one.

        Raises RunError, on every process, if the corpus has nothing for the tasks.
        """
        mesh, packs = self.mesh, self.packs
        if not self.num_batches:
            raise RunError(f"{self.corpus} has no document that the rules of evaluation leave; nothing can be measured")
        own = _ReplicaOutputs()
        origins: list[_Origin] = []
        bad: list[str] = []
        batches = iter(packs.loader if packs else ())
        bar = tqdm(desc="evaluate", unit="batch", total=self.num_batches, disable=not (progress and mesh.is_first))
        for _ in range(0, self.num_batches, self.at_once):
            read = list(itertools.islice(batches, self.at_once)) if packs else None
            for batch in read or ():
                assert packs is not None
                origins += packs.origins(batch)
                bad += [reason for _, reason in batch.bad_images]
            if read is not None:
                read = [_slots_in_use(batch, "generation" in self.tasks) for batch in read]
            for batch, out in self.forward(read, self.at_once):
                own.add(batch, out)
            bar.update(self.at_once)
        bar.close()
        places = mesh.model_parallel.broadcast_object([(o.document, o.content, o.part, o.row) for o in origins])

        found: tuple[HeldOut, list[tuple[int, int, list[int]]]] | None = None
        if own.features is not None:  # the last pipeline stage
            found = self._measure(own, places, num_examples, intervals)
        found = mesh.world.broadcast_object(found, source=mesh.world.size - mesh.data_tensor.size)
        assert found is not None, "the first process of the last stage has it"
        result, picked = replace(found[0], step=step), found[1]
        if packs:
            result = replace(result, bad_images=tuple(itertools.chain.from_iterable(mesh.data.gather_objects(bad))))
        if not result.pairs and not result.targets:
            undecodable = f" ({len(result.bad_images)} of its images do not decode)" if result.bad_images else ""
            raise RunError(
                f"{self.corpus} has nothing for {' and '.join(self.tasks)}{undecodable}; there is nothing to evaluate"
            )
        return result, self._examples(origins, picked)

    def _measure(
        self, own: _ReplicaOutputs, places: list[tuple[int, int, int, int]], num_examples: int, intervals: bool
    ) -> tuple[HeldOut, list[tuple[int, int, list[int]]]]:
        """The numbers; and of some pairs their index, the rank of their true context, and the nearest ones' indices.

        places: of this replica's pairs the document, what tells its image from others, and where in the document it is.
        Called on the last pipeline stage; everything is gathered over its replicas.
        """
        data = self.mesh.data
        num_images = sum(data.gather_objects(own.num_images))
        result = HeldOut(self.corpus, self.num_documents, 0, 0, num_images, rules=self.rules)
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
        all_places = data.gather_ragged(torch.tensor(places, dtype=torch.int64, device=device).view(-1, 4), sizes)
        document, content, part, row = all_places.t()
        (documents, inside), (shown, right), (_, right_inside) = map(_numbered, (document, content, all_places[:, :2]))
        mine = slice(offset, offset + len(image))
        same, groups = (shown[mine], shown), (documents[mine], documents)
        forward, image_loss = rank_own(image, texts, offset, own.scale, bias=own.bias, same=same)
        backward, text_loss = rank_own(text, images, offset, own.scale, bias=own.bias, same=same)
        among, _ = rank_own(text, images, offset, own.scale, groups, same=same)
        counts = (number[mine] for number in (right, right_inside, inside))
        rows = torch.stack([*(x.double() for x in (forward, backward, among, *counts)), image_loss + text_loss], 1)
        rows_N = data.gather_ragged(rows, sizes).cpu()
        # equal ranks and similarities in the corpus's order: that of the rows follows from the number of replicas
        in_order = np.lexsort([key.cpu().numpy() for key in (row, part, document)])
        order = in_order[rows_N[:, 0].numpy()[in_order].argsort(kind="stable")]
        quantiles = torch.linspace(0, num_pairs - 1, min(num_examples, num_pairs)).round().long()
        chosen = order[quantiles.numpy()].tolist()
        texts_in_order = texts[torch.from_numpy(in_order).to(device)]
        own_nearest = {
            i: in_order[_nearest(image[i - offset], texts_in_order)].tolist()
            for i in chosen
            if offset <= i < offset + len(image)
        }
        nearest = {i: near for theirs in data.gather_objects(own_nearest) for i, near in theirs.items()}
        return with_recalls(result, rows_N.numpy(), intervals), [(i, int(rows_N[i, 0]), nearest[i]) for i in chosen]

    def _examples(self, origins: list[_Origin], picked: list[tuple[int, int, list[int]]]) -> list[Example]:
        """Examples at evenly spaced quantiles of the rank, best first: neither the best nor the worst alone."""
        if self.packs is None:
            return []
        data = self.mesh.data
        offset = sum(data.gather_objects(len(origins))[: data.rank])
        needed = {i for i, _, near in picked for i in (i, *near)}
        own = {i: self.packs.pair(origins[i - offset]) for i in needed if offset <= i < offset + len(origins)}
        pairs = {i: pair for theirs in data.gather_objects(own) for i, pair in theirs.items()}
        return [Example(pairs[i], rank, tuple(pairs[j] for j in near)) for i, rank, near in picked]


def _nearest(image: torch.Tensor, texts: torch.Tensor) -> np.ndarray:
    """Indices of the three of texts [N, D] that an image [D] is most similar to, of equal ones the first."""
    similarity, found = (image @ texts.t()).double().cpu().numpy(), []
    for _ in range(min(3, len(similarity))):
        found.append(int((similarity >= similarity.max() - _EQUAL).argmax()))
        similarity[found[-1]] = -np.inf
    return np.array(found)


def _numbered(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of [N, …] a number that equal rows share, and how many these are: [N] each."""
    _, numbers, counts = torch.unique(rows, dim=0, return_inverse=True, return_counts=True)
    return numbers, counts[numbers]


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


@dataclass(frozen=True)
class _Origin:
    """Where a pair came from; its context is not yet decoded."""

    document: int
    shard: int
    image: int
    content: int
    """beginning of the hash of the image's bytes"""
    part: int
    """number of the sequence among those that its document is divided into"""
    row: int
    """of its `<soi>` in the sequence"""
    tokens: np.ndarray


class _Packs:
    """This replica's part of a held-out corpus, and where each pair came from."""

    def __init__(
        self,
        config: Config,
        corpus: str,
        data: Axis,
        micro_batch: int,
        at_once: int,
    ) -> None:
        vision, documents = config.model.vision, heldout_rules(config.model)["sequences"] == "documents"
        self.loader = PackedLoader(
            heldout_data(config, corpus),
            num_placeholders=vision.num_patches,
            image_size=vision.image_size,
            context_length=config.model.language.context_length,
            rank=data.rank,
            world_size=data.size,
            global_batch=data.size * micro_batch * at_once,
            micro_batch=micro_batch,
            train=False,
            sequences=INTERLEAVED if documents else PAIRS,
            pin_memory=torch.cuda.is_available(),
        )
        index = self.loader.reader.index
        assert isinstance(index, SequentialIndex)
        self.num_documents = index.num_documents
        self._corpus = index.source.corpus
        self._tokenizer = self._corpus.tokenizer

    def origins(self, batch: PackedBatch) -> Iterator[_Origin]:
        """Of the batch's pairs, in the order of their slots."""
        tokens, soi = batch.tokens.numpy(), batch.image_soi.numpy()
        pack_tokens, slots = len(tokens) // len(batch.packs), self.loader.images_per_pack
        for b, pack in enumerate(batch.packs):
            images = ((origin, image) for origin in self.loader.provenance(pack) for image in origin.images)
            for origin, image in sorted(images, key=lambda both: both[1].slot):
                if soi[b * slots + image.slot] >= 0:
                    before = tokens[b * pack_tokens + origin.start : b * pack_tokens + image.soi]
                    read = (before < self._tokenizer.sot) | (before == self._tokenizer.soi)
                    text = before[read][-CONTEXT_CHARACTERS:]
                    digest = self._corpus.shard(image.shard).image_xxh3[image.image].tobytes()
                    content = int.from_bytes(digest[:8], "little", signed=True)
                    yield _Origin(
                        document=int(origin.document),
                        shard=int(image.shard),
                        image=int(image.image),
                        content=content,
                        part=int(origin.part),
                        row=int(image.soi - origin.start),
                        tokens=text.copy(),
                    )

    def pair(self, origin: _Origin) -> Pair:
        """With its context as text."""
        runs = np.split(origin.tokens, np.flatnonzero(origin.tokens == self._tokenizer.soi))
        texts = [self._tokenizer.decode(run[run < self._tokenizer.sot]) for run in runs]
        text = "\n".join(text for text in texts if text)
        return Pair(origin.document, origin.shard, origin.image, text[-CONTEXT_CHARACTERS:])


def _slots_in_use(batch: PackedBatch, with_targets: bool) -> PackedBatch:
    """The batch without its empty image slots; a pack has as many as could fit a sequence, and most stay empty."""
    used = batch.image_valid.nonzero()[:, 0]
    if not len(used):  # one at least: a pipeline stage sends rows
        used = torch.zeros(1, dtype=torch.int64)
    slots = {name: getattr(batch, name)[used] for name in ("images", "image_start", "image_soi", "image_valid")}
    return replace(batch, **slots, num_targets=batch.num_targets if with_targets else 0)


class _ReplicaOutputs:
    """What the model made of this replica's part of the corpus."""

    def __init__(self) -> None:
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
