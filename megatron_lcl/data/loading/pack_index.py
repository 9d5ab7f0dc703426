"""The pack index: which document goes into which pack, and the ledger of what changed on the way.

Packs are numbered from 0 on. Their contents are a pure function of (corpora, settings, ledger): the index is built in
chunks, each from the state in which the one before it ended, and kept in the cache folder under a hash of all it
depends on.

    <cache>/packs-<hash>/   entries.npy (ENTRY), offsets.npy int64: pack b holds entries offsets[b]:offsets[b+1];
                            chunk.json: what it depends on, the state at its end, counts

A state is where a chunk begins: {"pack": its first, "positions": {corpus: [epoch, documents drawn in it]}, "blend":
number of the one before it, "served": {corpus: tokens of that blend}}. The ledger keeps them, so that any pack is found
by building one chunk, whatever of the cache was deleted.
"""

from __future__ import annotations

import bisect
import errno
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.files import save_array
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading import cache, packing
from megatron_lcl.data.loading.cache import fingerprint
from megatron_lcl.data.loading.sequence import INTERLEAVED, Sequences, shuffled
from megatron_lcl.data.loading.source import VERSION, Source, key, open_source
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
_T = TypeVar("_T")
_BEGIN: dict[str, Any] = {"pack": 0, "blend": -1, "positions": {}, "served": {}}


# --- ledger ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ledger:
    """What the packs of a run depend on: settings, fixed for the whole run, and entries, only ever appended.

    An entry is {"from_pack": n, "blend": [{"path", "fingerprint", "weight"}, …]}: new shares from the first window of
    documents that begins at pack n or later; or {"from_pack": n, "skip": count}: packs n … n+count-1 are not used.
    """

    settings: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = field(default=())
    states: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    """where chunks begin that were read, by pack, but for the first; they follow from the rest, and save time"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"settings": self.settings, "entries": list(self.entries), "states": list(self.states)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """From what `to_json` gave; checkpoints written before there were states have none."""
        return cls(dict(value["settings"]), tuple(value["entries"]), tuple(value.get("states", ())))

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
        return replace(self, entries=(*self.entries, {"from_pack": start, "skip": stop - start}))

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
    sequences: Sequences = INTERLEAVED,
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
        raise UserError(
            "the corpora of a blend must have the same tokenizer (`megatron-lcl retokenize` changes it); these "
            f"differ: {tokenizers}"
        )
    if len({c["fingerprint"] for c in blend}) < len(blend):
        raise UserError("data.corpora names a corpus twice; give it one entry with the sum of the weights")
    settings: dict[str, Any] = {name: getattr(data, name) for name in _SETTINGS}
    settings |= {"num_patches": num_patches, "context_length": context_length}
    settings["contrast_only"] = not sequences.interleaved  # the key that runs have stored
    if sequences.captions:  # absent elsewhere, as in ledgers written before there were captions
        settings["captions"] = True
    settings["version"] = VERSION
    if previous is None:
        if settings["images_per_pack"] is None:
            settings["images_per_pack"] = _choose_images(data, num_patches, context_length, sequences)
        return Ledger(settings, ({"from_pack": 0, "blend": blend},))
    for name in settings | previous.settings:
        value, old = settings.get(name), previous.settings.get(name)
        if value != old and not (name == "images_per_pack" and value is None):
            raise UserError(
                f"{name} is {value}, but this run began with {old}, and its packs depend on it; go back to {old} or "
                f"start a new run"
            )
    last = previous.blends()[-1]["blend"]
    if [(c["fingerprint"], c["weight"]) for c in blend] == [(c["fingerprint"], c["weight"]) for c in last]:
        return previous
    start = previous.locate(consumed)
    # windows that begin before `start` stay as they were, so what they end in does
    states = tuple(state for state in previous.states if state["pack"] <= start)
    return Ledger(previous.settings, (*previous.entries, {"from_pack": start, "blend": blend}), states)


def _choose_images(data: Data, num_patches: int, context_length: int, sequences: Sequences) -> int:
    per_token, weights = 0.0, sum(c.weight for c in data.corpora)
    for c in data.corpora:
        source = open_source(c.path, data, num_patches, context_length, 1, sequences)
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
    """Packs first … stop-1, in `folder`, unless that was deleted; from state `begin` to `end`, the next one's."""

    first: int
    stop: int
    folder: Path
    corpora: tuple[str, ...]
    begin: dict[str, Any]
    end: dict[str, Any]


class _Entries:
    """The entries of a chunk, from files that stay open."""

    def __init__(self, folder: Path) -> None:
        self._use = cache.Use(folder, cache.RECORD)
        self._entries, self._offsets = (cache.Rows(folder / f"{name}.npy") for name in ("entries", "offsets"))

    def of(self, local: int) -> np.ndarray:
        """Those of the chunk's pack number `local`."""
        self._use.renew()
        start, stop = self._offsets.read(local, local + 2)
        return self._entries.read(int(start), int(stop))


class PackIndex:
    """Packs of a training run by number, without end. Builds or waits for the chunks it is asked for."""

    def __init__(self, data: Data, ledger: Ledger) -> None:
        self.ledger = ledger
        self.images_per_pack: int = ledger.settings["images_per_pack"]
        self._data = data
        self._cache = cache.cache_folder(data)
        self._states = sorted((_BEGIN, *ledger.states), key=_pack_of)
        self._found: dict[Path, Chunk] = {}
        self._last: Chunk | None = None
        self._sources: dict[str, Source] = {}
        self._opened: dict[Path, _Entries] = {}
        self._ahead = 0
        self._builder: threading.Thread | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """Those built or found so far, by their packs."""
        return sorted(self._found.values(), key=lambda chunk: (chunk.first, chunk.stop))

    def __getitem__(self, number: int) -> Pack:
        chunk = self._chunk_of(number)
        entries = self._entries(chunk, number - chunk.first)
        sources = [self.source(f) for f in chunk.corpora]
        for source in sources:
            source.use.renew()
        if self._ahead < chunk.stop and 4 * (number - chunk.first) >= 3 * (chunk.stop - chunk.first):
            self._ahead = chunk.stop  # so that nobody waits at its end; a failure comes back when it is needed
            self._builder = threading.Thread(target=self._built, args=(chunk.end, lambda _: None), daemon=True)
            self._builder.start()
        return Pack(number, sources, entries)

    def prepare(self, number: int) -> None:
        """Have the chunk of pack `number` built."""
        self._built(self._chunk_of(number).begin, lambda _: None)

    def close(self) -> None:
        """Let go of the chunks' files, which are opened again when they are needed, and end what is built beside.

        To be called before processes are forked: a lock that another thread holds would be held in them for ever.
        """
        if self._builder is not None:
            self._builder.join()
        self._opened.clear()

    def ledger_at(self, number: int) -> Ledger:
        """The ledger with all states up to that from which pack `number` is found, as far as records say them."""
        state = self._state_before(number)
        while (chunk := self._recorded(state)) is not None and chunk.stop <= number:
            state = chunk.end
        return replace(self.ledger, states=tuple(s for s in self._states if 0 < s["pack"] <= number))

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
                    Sequences(interleaved=not s["contrast_only"], captions=s.get("captions", False)),
                )
                break
            else:
                raise UserError(
                    f"a corpus that this run uses (fingerprint {wanted}) is at none of {', '.join(paths)}; put it back"
                )
        return self._sources[wanted]

    def _entries(self, chunk: Chunk, local: int) -> np.ndarray:
        while True:
            if chunk.folder not in self._opened:
                while len(self._opened) > 1:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[chunk.folder] = self._built(chunk.begin, _Entries)
            try:
                return self._opened[chunk.folder].of(local)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
                del self._opened[chunk.folder]  # another machine deleted it; it is built again

    def _chunk_of(self, number: int) -> Chunk:
        if self._last is not None and self._last.first <= number < self._last.stop:
            return self._last
        state = self._state_before(number)
        while True:
            chunk = self._recorded(state) or self._note(state, self._built(state, _record_in))
            if number < chunk.stop:
                self._last = chunk
                return chunk
            state = chunk.end

    def _state_before(self, number: int) -> dict[str, Any]:
        return self._states[bisect.bisect_right(self._states, number, key=_pack_of) - 1]

    def _recorded(self, state: dict[str, Any]) -> Chunk | None:
        """The chunk that begins in a state, if it was ever built."""
        folder = self._place(state)[0]
        if folder in self._found:
            return self._found[folder]
        record = cache.read_record(folder)
        return None if record is None else self._note(state, record)

    def _note(self, state: dict[str, Any], record: dict[str, Any]) -> Chunk:
        folder, inputs = self._place(state)
        corpora = tuple(fingerprint for fingerprint, _ in inputs["blend"])
        end = record["end"]
        chunk = self._found[folder] = Chunk(state["pack"], end["pack"], folder, corpora, state, end)
        if self._state_before(end["pack"]) != end:
            bisect.insort(self._states, end, key=_pack_of)
        return chunk

    def _place(self, state: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The folder of the chunk that begins in a state, and all that its packs depend on."""
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
        return self._cache / f"packs-{fingerprint(inputs)}", inputs

    def _built(self, state: dict[str, Any], opened: Callable[[Path], _T]) -> _T:
        """What `opened` makes of the folder of the chunk that begins in a state, which is built if it is not there."""
        folder, inputs = self._place(state)
        built = []

        def build(path: Path) -> None:
            self._build_chunk(path, inputs)
            built.append(path)

        result = cache.build_and_open(folder, build, opened)
        if built:
            cache.trim(self._cache, self._data.cache_gb * 1e9, keep=folder)
        return result

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
        (folder / cache.RECORD).write_text(json.dumps(record, indent=1))

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
        means = [s.mean_tokens for s in sources]
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
            packing.max_sequences(settings["tokens_per_pack"], settings.get("captions", False)),
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


def _pack_of(state: dict[str, Any]) -> int:
    return int(state["pack"])


def _record_in(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / cache.RECORD).read_text(encoding="utf-8"))
    return record


class SequentialIndex:
    """Every document of one corpus that is not skipped, once and in order. Packs past the end are empty."""

    def __init__(self, source: Source, tokens_per_pack: int) -> None:
        self.images_per_pack = source.rules.max_images
        self._source = source
        sizes = source.sizes(np.arange(len(source.tokens)), 0)
        sizes = sizes[np.lexsort((sizes[:, 1], sizes[:, 0]))]
        self._entries = np.zeros(len(sizes), ENTRY)
        self._entries["document"], self._entries["part"] = sizes[:, 0], sizes[:, 1]
        self.num_documents = len(np.unique(sizes[:, 0]))
        places = packing.max_sequences(tokens_per_pack, source.rules.caption_patches > 0)
        self._offsets = packing.next_fit(sizes[:, 2], sizes[:, 3], tokens_per_pack, self.images_per_pack, places)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> Pack:
        self._source.use.renew()
        bounds = self._offsets[number : number + 2] if number < len(self) else (0, 0)
        return Pack(number, [self._source], self._entries[bounds[0] : bounds[1]])

    def prepare(self, number: int) -> None:
        """Nothing is built later."""

    def close(self) -> None:
        """No files are open for long."""
