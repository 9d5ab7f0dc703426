"""The pack index: which document goes into which pack, and the ledger of what changed on the way.

Packs are numbered from 0 on. Their contents are a pure function of (corpora, settings, ledger): the index is built in
chunks, each from the state in which the one before it ended, and kept in the cache folder under a hash of all it
depends on.

    <cache>/packs-<hash>/   entries.npy (ENTRY), offsets.npy int64: pack b holds entries offsets[b]:offsets[b+1];
                            chunk.json: what it depends on, the state at its end, counts
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.config import Data
from megatron_lcl.data import packing
from megatron_lcl.data.sequence import shuffled
from megatron_lcl.data.source import (
    VERSION,
    Source,
    build_once,
    cache_folder,
    fingerprint,
    key,
    open_source,
    save_array,
)
from megatron_lcl.data.store import open_corpus
from megatron_lcl.errors import UserError

CHUNK = 1 << 20
"""documents of one window at most: what is packed together"""
MIN_CHUNK = 1 << 16
"""documents of one chunk at least, if epochs are shorter"""
ENTRY = np.dtype([("document", np.int64), ("corpus", np.int32), ("epoch", np.int32), ("part", np.int32)])
"""one sequence: the part'th of a document in an epoch; corpus counts the chunk's corpora"""

_SETTINGS = (
    "tokens_per_pack",
    "images_per_pack",
    "min_similarity",
    "max_images_per_segment",
    "max_images",
    "min_images",
    "image_first",
    "pair_layout",
    "seed",
)
_SHUFFLE = 1 << 62


# --- ledger ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """What the packs of a run depend on: settings, fixed for the whole run, and entries, only ever appended.

    An entry is {"from_pack": n, "blend": [{"path", "fingerprint", "weight"}, …]}: new shares from the first window of
    documents that begins at pack n or later; or {"from_pack": n, "skip": count}: packs n … n+count-1 are not used.
    """

    settings: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"settings": self.settings, "entries": list(self.entries)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        return cls(dict(value["settings"]), tuple(value["entries"]))

    def locate(self, consumed: int) -> int:
        """Number of the pack that comes after `consumed` packs were used: those of skipped ranges are jumped over."""
        pack = consumed
        for start, stop in self._skipped():
            if pack >= start:
                pack += stop - start
        return pack

    def skip(self, consumed: int, count: int) -> Ledger:
        """A ledger in which the `count` packs that would follow after `consumed` packs are not used."""
        start = self.locate(consumed)
        stop = self.locate(consumed + count - 1) + 1
        return Ledger(self.settings, (*self.entries, {"from_pack": start, "skip": stop - start}))

    def _skipped(self) -> list[list[int]]:
        merged: list[list[int]] = []
        for start, stop in sorted((e["from_pack"], e["from_pack"] + e["skip"]) for e in self.entries if "skip" in e):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([start, stop])
        return merged

    def blends(self) -> list[dict[str, Any]]:
        """The entries that set a blend, in order."""
        return [e for e in self.entries if "blend" in e]


def open_ledger(
    data: Data,
    num_patches: int,
    context_length: int,
    *,
    contrast_only: bool = False,
    previous: Ledger | None = None,
    consumed: int = 0,
) -> Ledger:
    """The ledger of a new run, or of one resumed after `consumed` packs: `previous` and the changes of `data.corpora`.

    Chooses I (`images_per_pack`) where the config leaves it open; a resumed run keeps it. UserError if a setting that
    fixes the packs has changed.
    """
    if not data.corpora:
        raise UserError("data.corpora is empty; name at least one corpus, e.g. data.corpora=[{path: corpus}]")
    blend = [{"path": c.path, "fingerprint": open_corpus(c.path).fingerprint, "weight": c.weight} for c in data.corpora]
    tokenizers = {c.path: open_corpus(c.path).manifest["tokenizer"]["fingerprint"] for c in data.corpora}
    if len(set(tokenizers.values())) > 1:
        raise UserError(f"the corpora of a blend must have the same tokenizer; these differ: {tokenizers}")
    if len({c["fingerprint"] for c in blend}) < len(blend):
        raise UserError("data.corpora names a corpus twice; give it one entry with the sum of the weights")
    settings: dict[str, Any] = {name: getattr(data, name) for name in _SETTINGS}
    settings |= {"num_patches": num_patches, "context_length": context_length, "contrast_only": contrast_only}
    settings["version"] = VERSION
    if previous is None:
        if settings["images_per_pack"] is None:
            settings["images_per_pack"] = _choose_images(data, num_patches, context_length, contrast_only)
        return Ledger(settings, ({"from_pack": 0, "blend": blend},))
    for name, value in settings.items():
        old = previous.settings.get(name)
        if value != old and not (name == "images_per_pack" and value is None):
            raise UserError(
                f"{name} is {value}, but this run began with {old}, and its packs depend on it; go back to {old} or "
                f"start a new run"
            )
    last = previous.blends()[-1]["blend"]
    if [(c["fingerprint"], c["weight"]) for c in blend] == [(c["fingerprint"], c["weight"]) for c in last]:
        return previous
    return Ledger(previous.settings, (*previous.entries, {"from_pack": previous.locate(consumed), "blend": blend}))


def _choose_images(data: Data, num_patches: int, context_length: int, contrast_only: bool) -> int:
    per_token, weights = 0.0, sum(c.weight for c in data.corpora)
    for c in data.corpora:
        source = open_source(c.path, data, num_patches, context_length, 1, contrast_only)
        images, tokens = source.images.sum(dtype=np.int64), source.tokens.sum(dtype=np.int64)
        per_token += c.weight / weights * float(images) / max(1, float(tokens))
    return packing.choose_images_per_pack(per_token, data.tokens_per_pack)


# --- packs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pack:
    """The sequences of one pack: sources, and ENTRY rows whose `corpus` counts them."""

    number: int
    sources: Sequence[Source]
    entries: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """Packs first … stop-1, in `folder`; `end` is the state that the next chunk begins with."""

    first: int
    stop: int
    folder: Path
    corpora: tuple[str, ...]
    end: dict[str, Any]


class PackIndex:
    """Packs of a training run by number, without end. Builds or waits for the chunks it is asked for."""

    def __init__(self, data: Data, ledger: Ledger) -> None:
        self.ledger = ledger
        self.images_per_pack: int = ledger.settings["images_per_pack"]
        self._data = data
        self._cache = cache_folder(data)
        self.chunks: list[Chunk] = []
        """built or found so far, from the first on"""
        self._sources: dict[str, Source] = {}
        self._loaded: dict[Path, tuple[np.ndarray, np.ndarray]] = {}
        self._ahead = 0

    def __getitem__(self, number: int) -> Pack:
        chunk = self._chunk_of(number)
        if chunk.folder not in self._loaded:
            while len(self._loaded) > 1:
                self._loaded.pop(next(iter(self._loaded)))
            entries, offsets = (np.load(chunk.folder / f"{n}.npy", mmap_mode="r") for n in ("entries", "offsets"))
            self._loaded[chunk.folder] = entries, offsets
        entries, offsets = self._loaded[chunk.folder]
        if chunk is self.chunks[-1] and self._ahead < chunk.stop and 4 * (number - chunk.first) >= 3 * len(offsets):
            self._ahead = chunk.stop  # so that nobody waits at its end; a failure comes back when it is needed
            threading.Thread(target=self._next_chunk, daemon=True).start()
        local = number - chunk.first
        return Pack(number, [self.source(f) for f in chunk.corpora], entries[offsets[local] : offsets[local + 1]])

    def source(self, wanted: str) -> Source:
        """The corpus with this fingerprint, looked for where config and ledger say."""
        if wanted not in self._sources:
            paths = [c.path for c in self._data.corpora]
            paths += [c["path"] for e in self.ledger.blends() for c in e["blend"] if c["fingerprint"] == wanted]
            for path in paths:
                try:
                    if open_corpus(path).fingerprint != wanted:
                        continue
                except UserError:
                    continue
                s = self.ledger.settings
                self._sources[wanted] = open_source(
                    path,
                    self._data,
                    s["num_patches"],
                    s["context_length"],
                    s["images_per_pack"],
                    s["contrast_only"],
                )
                break
            else:
                raise UserError(
                    f"a corpus that this run uses (fingerprint {wanted}) is at none of {', '.join(paths)}; put it back"
                )
        return self._sources[wanted]

    def _chunk_of(self, number: int) -> Chunk:
        while not self.chunks or number >= self.chunks[-1].stop:
            self.chunks.append(self._next_chunk())
        return next(c for c in reversed(self.chunks) if c.first <= number)

    def prepare(self, number: int) -> None:
        """Have the chunk of pack `number` built."""
        self._chunk_of(number)

    def _next_chunk(self) -> Chunk:
        state: dict[str, Any] = (
            self.chunks[-1].end if self.chunks else {"pack": 0, "blend": -1, "positions": {}, "served": {}}
        )
        blends = self.ledger.blends()
        current = max(i for i, e in enumerate(blends) if i == 0 or e["from_pack"] <= state["pack"])
        later = [e["from_pack"] for e in blends[current + 1 :]]
        inputs: dict[str, Any] = {
            "version": VERSION,
            "settings": self.ledger.settings,
            "blend": [[c["fingerprint"], c["weight"]] for c in blends[current]["blend"]],
            "until": min(later, default=None),
            "state": {**state, "blend": current, "served": state["served"] if state["blend"] == current else {}},
        }
        folder = build_once(self._cache / f"packs-{fingerprint(inputs)}", lambda path: self._build_chunk(path, inputs))
        record = json.loads((folder / "chunk.json").read_text())
        corpora = tuple(fingerprint for fingerprint, _ in inputs["blend"])
        return Chunk(state["pack"], record["end"]["pack"], folder, corpora, record["end"])

    def _build_chunk(self, folder: Path, inputs: dict[str, Any]) -> None:
        state = json.loads(json.dumps(inputs["state"]))
        blocks: list[np.ndarray] = []
        counts = [np.zeros(1, np.int64)]
        documents, totals = 0, {"tokens": 0, "images": 0}
        while documents < MIN_CHUNK and not (
            blocks and inputs["until"] is not None and state["pack"] >= inputs["until"]
        ):
            window = self._window(inputs["blend"], state, totals)
            documents += window[2]
            blocks.append(window[0])
            counts.append(np.diff(window[1]))
        offsets = np.cumsum(np.concatenate(counts))
        save_array(folder / "entries.npy", np.concatenate(blocks))
        save_array(folder / "offsets.npy", offsets)
        record = {"inputs": inputs, "end": state, "packs": len(offsets) - 1, "documents": documents, **totals}
        (folder / "chunk.json").write_text(json.dumps(record, indent=1))

    def _window(
        self, blend: list[list[Any]], state: dict[str, Any], totals: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Pack the next documents, up to where the first corpus ends its epoch (or an even part of it).

        Brings `state` and `totals` up to date; returns entries, offsets and the number of documents drawn.
        """
        settings, num = self.ledger.settings, len(blend)
        sources = [self.source(fingerprint) for fingerprint, _ in blend]
        weights = np.array([w for _, w in blend], np.float64)
        weights /= weights.sum()
        positions = [state["positions"].get(f, [0, 0]) for f, _ in blend]  # epoch, documents drawn in it
        served = np.array([state["served"].get(f, 0) for f, _ in blend], np.float64)

        left = [len(s.tokens) - p[1] for s, p in zip(sources, positions, strict=True)]
        means = [_mean_tokens(s) for s in sources]
        stops = [math.ceil(n / math.ceil(n / (CHUNK // num))) for n in left]
        needs = [stop * mean / w for stop, mean, w in zip(stops, means, weights, strict=True)]
        spans = [
            min(n, stop if need == min(needs) else math.ceil(1.1 * min(needs) * w / mean) + 16)
            for n, stop, need, w, mean in zip(left, stops, needs, weights, means, strict=True)
        ]
        drawn = [
            shuffled(key(int(s.key), _SHUFFLE, p[0]), len(s.tokens), p[1], p[1] + span)
            for s, p, span in zip(sources, positions, spans, strict=True)
        ]
        starts = np.cumsum([0, *spans]).astype(np.int64)
        tokens = np.concatenate([s.tokens[d] for s, d in zip(sources, drawn, strict=True)])
        turns = packing.blend(tokens, starts, weights, served)
        taken = np.bincount(turns, minlength=num)

        blocks = []
        for c, (source, position, documents) in enumerate(zip(sources, positions, drawn, strict=True)):
            sizes = source.sizes(documents[: taken[c]], position[0])
            block = np.empty(len(sizes), ENTRY)
            block["corpus"], block["epoch"], block["part"] = c, position[0], sizes[:, 1]
            block["document"] = documents[sizes[:, 0]]
            blocks.append((block, sizes[:, 2], sizes[:, 3], np.flatnonzero(turns == c)[sizes[:, 0]]))
        entries, sizes, images, turn = (np.concatenate(x) for x in zip(*blocks, strict=True))
        as_drawn = np.argsort(turn, kind="stable")
        entries, sizes, images = entries[as_drawn], sizes[as_drawn], images[as_drawn]
        order, offsets = packing.best_fit(
            sizes,
            images,
            settings["tokens_per_pack"],
            settings["images_per_pack"],
            packing.max_sequences(settings["tokens_per_pack"]),
        )
        for (name, _), position, count, n in zip(blend, positions, taken, left, strict=True):
            epoch_over = count == n
            state["positions"][name] = [
                position[0] + int(epoch_over),
                0 if epoch_over else position[1] + int(count),
            ]
        state["served"] = {f: int(s) for (f, _), s in zip(blend, served, strict=True)}
        state["pack"] += len(offsets) - 1
        totals["tokens"] += int(sizes.sum())
        totals["images"] += int(images.sum())
        return entries[order], offsets, int(taken.sum())


def _mean_tokens(source: Source) -> float:
    total = int(source.tokens.sum(dtype=np.int64))
    if total == 0:
        raise UserError(
            f"no document of {source.corpus.path} is left after selection; lower data.min_similarity or data.min_images"
        )
    return total / len(source.tokens)


class InOrder:
    """Every document of one corpus that is not left out, once and in order. Packs past the end are empty."""

    def __init__(self, source: Source, tokens_per_pack: int) -> None:
        self.images_per_pack = source.rules.max_images
        self._source = source
        sizes = source.sizes(np.arange(len(source.tokens)), 0)
        sizes = sizes[np.lexsort((sizes[:, 1], sizes[:, 0]))]
        self._entries = np.zeros(len(sizes), ENTRY)
        self._entries["document"], self._entries["part"] = sizes[:, 0], sizes[:, 1]
        self.num_documents = len(np.unique(sizes[:, 0]))
        places = packing.max_sequences(tokens_per_pack)
        self._offsets = packing.next_fit(sizes[:, 2], sizes[:, 3], tokens_per_pack, self.images_per_pack, places)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Pack:
        bounds = self._offsets[number : number + 2] if number < len(self) else (0, 0)
        return Pack(number, [self._source], self._entries[bounds[0] : bounds[1]])

    def prepare(self, number: int) -> None:
        """Nothing is built later."""
