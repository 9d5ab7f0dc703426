"""k-NN and zero-shot classification of labeled images while a run trains, by all of its processes together.

The numbers are those of `evaluate --data` on a checkpoint of the step, but for the intervals. There the model
lies in one process; here its layers lie as the run's layout says, so images and texts take the way of a step's
micro-batches (`batches`).

Every data-parallel replica encodes a share of the images and of the classes' texts, and classifies its share of the
test images against all of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F

from megatron_lcl import objectives
from megatron_lcl.config import Config, LabeledTask
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.errors import RunError, UserError, describe_os_error
from megatron_lcl.evaluate.batches import image_batch, text_batch
from megatron_lcl.evaluate.checking import BadBlob, attempt, without_bad
from megatron_lcl.evaluate.heldout import Forward
from megatron_lcl.evaluate.image_set import Blob, ImageSet
from megatron_lcl.evaluate.knn import check_neighbors, knn_predict, with_training
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.trained import why_untrained
from megatron_lcl.evaluate.workers import ahead
from megatron_lcl.evaluate.zero_shot import by_texts
from megatron_lcl.filesystem import is_dir
from megatron_lcl.model.activations import Outputs
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.run_folder import LABELED

TASKS: tuple[LabeledTask, ...] = get_args(LabeledTask)
_IMAGES = 256
"""in a batch at most"""
_FEW_IMAGES = 8
"""in a batch at least, however small a pack is: no gradient is kept"""


@dataclass(frozen=True)
class LabeledSets:
    """What is measured, and on what."""

    tasks: tuple[LabeledTask, ...]
    test: ImageSet
    train: ImageSet | None
    """of knn"""
    left_out: str = ""
    """why zero-shot is not among the tasks, where the objective trains it and the config names no tasks"""


def open_labeled(config: Config) -> LabeledSets:
    """The images of `evaluate.labeled` and the tasks on them. UserError, in one line, for what cannot be measured.

    Without tasks in the config: knn where there are training images, zero-shot where the objective trains it and the
    classes have names.
    """
    own = config.evaluate
    assert own.labeled is not None
    test = open_images(own.labeled, templates=own.prompts or None)
    test.need_labels()
    tasks = named_tasks(config)
    trained = "retrieval" in objectives.trained_by(config)
    if not own.tasks:
        possible = {"knn": is_dir(Path(own.labeled) / "train"), "zero-shot": trained and not test.numbered}
        tasks = tuple(task for task in TASKS if possible[task])
    if not tasks and not trained:
        raise UserError(
            f"evaluate.labeled = {own.labeled} has no folder 'train' for knn, and "
            f"{why_untrained(config, 'retrieval')} what zero-shot measures; remove evaluate.labeled"
        )
    if "zero-shot" in tasks and not trained:
        raise UserError(f"{why_untrained(config, 'retrieval')} what zero-shot measures; remove that task")
    if not tasks or "zero-shot" in tasks:
        test.need_names()
    train = None
    if "knn" in tasks:
        train, test = with_training(own.labeled, "train", test)
        check_neighbors(own.neighbors, train)
    left_out = ""
    if not own.tasks and trained and test.numbered:
        left_out = f"zero-shot is not measured on {test.name}: no classnames.txt gives the classes names"
    return LabeledSets(tasks, test, train, left_out)


def named_tasks(config: Config) -> tuple[LabeledTask, ...]:
    """Those of `evaluate.tasks` that labeled images are for."""
    return tuple(task for task in TASKS if task in config.evaluate.tasks)


@dataclass(frozen=True)
class Labeled:
    """What was measured. All values are shares of the test images."""

    data: str
    classes: int
    images: int
    """measured on"""
    train_images: int = 0
    """of knn"""
    neighbors: int = 0
    """of knn"""
    prompts: tuple[str, ...] = ()
    """of zero-shot"""
    step: int | None = None
    average: str | None = None
    """name of the average of the weights that was measured; None: the weights"""
    bad_images: tuple[str, ...] = ()
    """names and reasons of those that do not decode, which are skipped"""
    values: dict[str, float] = field(default_factory=dict)
    """by name, chance among them"""


def write_labeled(folder: Path, result: Labeled) -> None:
    """As JSON, for the report."""
    replace_text(folder / LABELED, json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")


class LabeledEvaluation:
    """An evaluation that all processes of a run make together, as often as they like."""

    def __init__(self, config: Config, mesh: Mesh, forward: Forward, rows: int, at_once: int = 1) -> None:
        """Every process calls it.

        rows: token slots of a forward pass of training. at_once: micro-batches that `forward` gets together, always so
        many. Neither changes the numbers.
        """
        self.config, self.mesh, self.forward, self.at_once = config, mesh, forward, at_once
        found = mesh.world.broadcast_object(open_labeled(config) if mesh.is_first else None)
        assert found is not None, "the first process has looked"
        self.sets = found
        vision = config.model.vision
        self._image_size = vision.image_size
        self._images_at_once = min(_IMAGES, max(_FEW_IMAGES, rows // (vision.num_patches + 2)))
        self._texts: list[list[int]] = []
        """token ids of this replica's classes, the templates of each together"""
        self._texts_at_once = 1
        if "zero-shot" in self.sets.tasks and mesh.loads_data:
            tokenizer = open_corpus(config.data.corpora[0].path, config.data.cache).tokenizer
            test, room = self.sets.test, objectives.longest_text(config)
            texts = [template.replace("{c}", c) for c in test.classes for template in test.templates]
            ids = [list(row[:room]) for row in tokenizer.encode_batch(texts)]
            low, high = (bound * len(test.templates) for bound in self._share(len(test.classes)))
            self._texts = ids[low:high]
            self._texts_at_once = min(_IMAGES, max(1, rows // (2 + max(map(len, ids)))))
        self._texts_at_once = mesh.model_parallel.broadcast_object(self._texts_at_once)

    @torch.no_grad()
    def run(self, step: int | None = None) -> Labeled:
        """Measure the model after `step` steps; the result is on every process.

        Images that do not decode are skipped and named. RunError, on every process, where too few are left, or the
        storage of some fails.
        """
        test, train, mesh = self.sets.test, self.sets.train, self.mesh
        texts_CD = self._class_features() if "zero-shot" in self.sets.tasks else None
        own_test, test, bad = self._encode(test)
        own_train = None
        if train is not None:
            own_train, train, bad_train = self._encode(train)
            if (k := self.config.evaluate.neighbors) > len(train):
                first = bad_train[0]  # without bad ones `open_labeled` has found enough
                raise RunError(
                    f"k = {k} neighbors, but of {train.name} {len(train)} images decode; of {len(bad_train)} that do "
                    f"not, the first: {first.name} ({first.reason})"
                )
            bad = [*bad, *bad_train]
        values: dict[str, float] | None = None
        if own_test is not None:  # the last pipeline stage
            values = self._classify(own_test, test, own_train, train, texts_CD)
        values = mesh.world.broadcast_object(values, source=mesh.world.size - mesh.data_tensor.size)
        assert values is not None, "the first process of the last stage has them"
        return Labeled(
            test.name,
            len(test.classes),
            len(test),
            0 if train is None else len(train),
            0 if train is None else self.config.evaluate.neighbors,
            test.templates if "zero-shot" in self.sets.tasks else (),
            step,
            bad_images=tuple(f"{b.name}: {b.reason}" for b in bad),
            values=values,
        )

    def _share(self, number: int, rank: int | None = None) -> tuple[int, int]:
        """Which of so many things a replica does: from, to."""
        data = self.mesh.data
        each = -(-number // data.size)
        low = min(number, each * (data.rank if rank is None else rank))
        return low, min(number, low + each)

    def _encode(self, data: ImageSet) -> tuple[torch.Tensor | None, ImageSet, list[BadBlob]]:
        """Latents [n, D] of the images of this replica's share that decode, on the last pipeline stage; the data set
        without those that do not, and these."""
        mesh, model, at_once = self.mesh, self.config.model, self._images_at_once * self.at_once
        low, high = self._share(len(data))
        passes = -(-self._share(len(data), 0)[1] // at_once)
        found: list[BadBlob] = []
        unread: list[str] = []
        decoded = None
        if mesh.loads_data:
            decoded = _decoded(data.images[low:high], low, self._image_size, at_once, found, unread)
        latents: list[torch.Tensor] = []
        for _ in range(passes):
            batches = None
            if decoded is not None:
                images = next(decoded, torch.zeros(0, 3, self._image_size, self._image_size, dtype=torch.uint8))
                batches = [image_batch(some, model) for some in _split(images, self._images_at_once, self.at_once)]
            latents += [out.latents.cpu() for _, out in self.forward(batches, self.at_once) if out is not None]
        # on every process the same, so that all stop at the same place where they do
        of_replicas = mesh.data.gather_objects(mesh.model_parallel.broadcast_object((found, unread)))
        bad, faults = ([entry for own in lists for entry in own] for lists in zip(*of_replicas, strict=True))
        if faults:
            raise RunError(f"{len(faults):,} of the {len(data):,} images of {data.name} were not read: {faults[0]}")
        try:
            kept = without_bad(data, bad, skip=True)
        except UserError as error:
            raise RunError(str(error)) from None
        if mesh.pipeline.size != mesh.pipeline.rank + 1:
            return None, kept, bad
        rows_ND = _first(latents, self.config.model.language.width, high - low)
        missing = {b.index for b in bad}
        return rows_ND[[i - low for i in range(low, high) if i not in missing]], kept, bad

    def _class_features(self) -> torch.Tensor | None:
        """[C, D] unit norm: the mean over templates of each class's text features, scaled to unit norm again; on the
        last pipeline stage."""
        mesh, test = self.mesh, self.sets.test
        low, high = self._share(len(test.classes))
        of_class = len(test.templates)
        passes = -(-self._share(len(test.classes), 0)[1] * of_class // (self._texts_at_once * self.at_once))
        texts = iter(self._texts)
        features: list[torch.Tensor] = []
        for _ in range(passes):
            batches = None
            if mesh.loads_data:
                some = [list(itertools.islice(texts, self._texts_at_once)) for _ in range(self.at_once)]
                batches = [text_batch(rows, self.config.model) for rows in some]
            outputs = self.forward(batches, self.at_once)
            features += [_valid(batch, out).cpu() for batch, out in outputs if out is not None]
        if mesh.pipeline.size != mesh.pipeline.rank + 1:
            return None
        rows_ND = _first(features, self.config.model.language.width, (high - low) * of_class)
        means = rows_ND.unflatten(0, (high - low, of_class)).mean(1)
        return F.normalize(self._gathered(means), dim=-1)

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        """All replicas' rows, on the CPU."""
        data, device = self.mesh.data, "cuda" if torch.cuda.is_available() else "cpu"
        return data.gather_ragged(rows.to(device), data.gather_objects(len(rows))).cpu()

    def _classify(
        self,
        own_test: torch.Tensor,
        test: ImageSet,
        own_train: torch.Tensor | None,
        train: ImageSet | None,
        texts_CD: torch.Tensor | None,
    ) -> dict[str, float]:
        """The shares of the test images that are given their class. Of all replicas; on the last stage alone."""
        data, labels = self.mesh.data, test.need_labels()
        counts = data.gather_objects(len(own_test))
        first = sum(counts[: data.rank])
        own_labels = labels[first : first + len(own_test)]
        values: dict[str, float] = {}
        if own_train is not None and train is not None:
            all_train = self._gathered(own_train)
            right = np.zeros(0, bool)
            if len(own_test):
                predicted = knn_predict(
                    all_train.numpy(),
                    train.need_labels(),
                    own_test.numpy(),
                    len(test.classes),
                    self.config.evaluate.neighbors,
                    device="cuda" if torch.cuda.is_available() else "cpu",
                )
                right = predicted == own_labels
            values["knn_accuracy"] = float(np.concatenate(data.gather_objects(right)).mean())
        if texts_CD is not None:
            rank = by_texts(texts_CD, own_test.numpy(), own_labels).rank if len(own_test) else np.zeros(0, np.int64)
            ranks = np.concatenate(data.gather_objects(rank))
            per_class = [float((ranks[labels == c] < 1).mean()) for c in np.unique(labels)]
            values |= {
                "zero_shot_accuracy": float((ranks < 1).mean()),
                "zero_shot_accuracy_top_5": float((ranks < 5).mean()),
                "zero_shot_mean_per_class_recall": math.fsum(per_class) / len(per_class),
                "chance_top_5": min(5 / len(test.classes), 1.0),
            }
        return values | {"chance": 1 / len(test.classes)}


def _valid(batch: PackedBatch, out: Outputs) -> torch.Tensor:
    """The features of a batch of texts."""
    return out.text_features[(batch.image_soi >= 0).to(out.contexts.device)]


def _split(images: torch.Tensor, size: int, parts: int) -> list[torch.Tensor]:
    """`parts` runs of at most `size` images, the last ones shorter or empty."""
    return [images[i * size : (i + 1) * size] for i in range(parts)]


def _first(parts: Sequence[torch.Tensor], width: int, number: int) -> torch.Tensor:
    """The first `number` rows: behind them are blank ones."""
    return torch.cat([torch.zeros(0, width), *parts])[:number].float()


def _decoded(
    blobs: Sequence[Blob], first: int, size: int, at_once: int, bad: list[BadBlob], unread: list[str]
) -> Iterator[torch.Tensor]:
    """Images [n, 3, size, size] uint8, `at_once` at a time, decoded ahead by threads; blank where one does not decode,
    which is added to `bad` with its index in the data set, or where the storage fails, which `unread` is told: raised
    here, it would leave the other processes waiting. first: index of the first."""

    def read(blob: Blob) -> np.ndarray | str | OSError:
        try:
            return attempt(partial(decode_eval, size=size), blob)
        except OSError as error:
            return error

    def joined(start: int, batch: list[np.ndarray | str | OSError]) -> torch.Tensor:
        images = np.zeros((len(batch), 3, size, size), np.uint8)
        for i, pixels in enumerate(batch, start):
            if isinstance(pixels, OSError):
                unread.append(describe_os_error(pixels))
            elif isinstance(pixels, str):
                bad.append(BadBlob(first + i, blobs[i].name, pixels))
            else:
                images[i - start] = pixels
        return torch.from_numpy(images)

    # a loop's variable would hold a batch until there is the next one; `map` holds none
    return map(joined, range(0, len(blobs), at_once), ahead(read, blobs, at_once, _THREADS))


_THREADS = 4
"""that decode, in a process whose loader's workers wait meanwhile"""
