"""A replica's part of a held-out corpus as micro-batches, and where each of their pairs came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
import xxhash

from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.reader import ImageOrigin
from megatron_lcl.data.loading.rules import INTERLEAVED, PAIRS
from megatron_lcl.data.loading.sequential_index import SequentialIndex
from megatron_lcl.evaluate.heldout_results import CONTEXT_CHARACTERS, Pair
from megatron_lcl.evaluate.rules import heldout_data, heldout_rules
from megatron_lcl.parallel.mesh import Axis


@dataclass(frozen=True)
class Origin:
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
    context: int
    """hash of what the model reads before that `<soi>`: the tokens, and of the images among them `content`"""
    tokens: np.ndarray

    @property
    def place(self) -> tuple[int, int, int, int, int]:
        """What `heldout_ranks.Pairs` is made of."""
        return self.document, self.part, self.row, self.content, self.context


class Packs:
    """This replica's part of a held-out corpus, and where each pair came from."""

    def __init__(self, config: Config, corpus: str, data: Axis, micro_batch: int, at_once: int) -> None:
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
        )  # which page-locks nothing: `PackedBatch.to` does, after `slots_in_use` has copied the few images there are
        index = self.loader.reader.index
        assert isinstance(index, SequentialIndex)
        self.num_documents = index.num_documents
        self._corpus = index.source.corpus
        self.fingerprint = self._corpus.fingerprint
        self._tokenizer = self._corpus.tokenizer

    def origins(self, batch: PackedBatch) -> Iterator[Origin]:
        """Of the batch's pairs, in the order of their slots."""
        tokens, soi = batch.tokens.numpy(), batch.image_soi.numpy()
        pack_tokens, slots = len(tokens) // len(batch.packs), self.loader.images_per_pack
        valid = batch.image_valid.numpy()
        for b, pack in enumerate(batch.packs):
            images = ((origin, image) for origin in self.loader.provenance(pack) for image in origin.images)
            for origin, image in sorted(images, key=lambda both: both[1].slot):
                if soi[b * slots + image.slot] >= 0:
                    before = tokens[b * pack_tokens + origin.start : b * pack_tokens + image.soi]
                    read = (before < self._tokenizer.sot) | (before == self._tokenizer.soi)
                    text = before[read][-CONTEXT_CHARACTERS:]
                    earlier = [i for i in origin.images if i.soi < image.soi and valid[b * slots + i.slot]]
                    context = xxhash.xxh3_64(before.astype("<i4").tobytes())
                    context.update(np.array([self._content(i) for i in earlier], "<i8").tobytes())
                    yield Origin(
                        document=int(origin.document),
                        shard=int(image.shard),
                        image=int(image.image),
                        content=self._content(image),
                        part=int(origin.part),
                        row=int(image.soi - origin.start),
                        context=int.from_bytes(context.digest(), "big", signed=True),
                        tokens=text.copy(),
                    )

    def _content(self, image: ImageOrigin) -> int:
        digest = self._corpus.shard(image.shard).image_xxh3[image.image].tobytes()
        return int.from_bytes(digest[:8], "little", signed=True)

    def pair(self, origin: Origin) -> Pair:
        """With its context as text."""
        runs = np.split(origin.tokens, np.flatnonzero(origin.tokens == self._tokenizer.soi))
        texts = [self._tokenizer.decode(run[run < self._tokenizer.sot]) for run in runs]
        text = "\n".join(text for text in texts if text)
        return Pair(origin.document, origin.shard, origin.image, text[-CONTEXT_CHARACTERS:])


def slots_in_use(batch: PackedBatch, with_targets: bool) -> PackedBatch:
    """The batch without its empty image slots; a pack has as many as could fit a sequence, and most stay empty."""
    used = batch.image_valid.nonzero()[:, 0]
    if not len(used):  # one at least: a pipeline stage sends rows
        used = torch.zeros(1, dtype=torch.int64)
    slots = {name: getattr(batch, name)[used] for name in ("images", "image_start", "image_soi", "image_valid")}
    return replace(batch, **slots, num_targets=batch.num_targets if with_targets else 0)
