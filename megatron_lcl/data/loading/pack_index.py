"""The pack index: which document goes into which pack.

Packs are numbered from 0 on. Their contents are a pure function of (corpora, settings, ledger): the index is built in
chunks, each from the state in which the one before it ended, and kept in the cache folder under a hash of all it
depends on.

    <cache>/packs-<hash>/   entries.npy (ENTRY), offsets.npy int64: pack b holds entries offsets[b]:offsets[b+1];
                            chunk.json: what it depends on, the state at its end, counts

A state is where a chunk begins: {"pack": its first, "positions": {corpus: [epoch, documents drawn in it]}, "blend":
number of the one before it, "served": {corpus: tokens of that blend}}. The ledger keeps them, so that any pack is found
by building one chunk, whatever of the cache was deleted.

A run with phases has an index for each segment of packs that are planned alike (`ledger.Segment`). All but the first
begin in a state of their own: {"pack": the segment's first, "segment": the same, "left": hash of what the segment
before had drawn and not read: documents, and ranges of those that were read in part; and of `Segment.rests`}. It is
packed first, cut as the segment's settings say; the entries of such a chunk are RANGED.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.lib.recfunctions import repack_fields

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.files import save_array
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading import cache, packing
from megatron_lcl.data.loading.cache import fingerprint
from megatron_lcl.data.loading.chunks import ENTRY, RANGED, Chunk, Entries, Pack, record_in
from megatron_lcl.data.loading.hashes import shuffled
from megatron_lcl.data.loading.ledger import Ledger, Segment, kept_states
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.sequence import END
from megatron_lcl.data.loading.source import Source, key, one_after_another, open_source
from megatron_lcl.errors import UserError

CHUNK = 1 << 20
"""documents of one window at most: what is packed together"""
MIN_CHUNK = CHUNK // 2
"""documents of one chunk at least, where windows are smaller (of short epochs, or of many corpora), and as many packs
lie before it; an epoch of over CHUNK documents has no smaller window"""
FIRST_CHUNK = 512
"""packs of the first chunk at least, or so many documents: a short run reads no more of a small corpus"""
_SHUFFLE = 1 << 62
_T = TypeVar("_T")
_BEGIN: dict[str, Any] = {"pack": 0, "blend": -1, "positions": {}, "served": {}}


# --- packs -------------------------------------------------------------------------------------------------------


Left = tuple[str, int, list[int | list[int]]]
"""fingerprint of a corpus, epoch, and what is unread of it: documents, or [document, begin, until]"""


class _Drawn(NamedTuple):
    """Documents of one corpus, to be packed in a window."""

    epoch: int
    documents: np.ndarray
    """int64 numbers in the corpus"""
    ranges: np.ndarray
    """int64 [documents, 2]: the positions of each that are to be read"""
    turns: np.ndarray
    """where each stands among those of all corpora: numbers that ascend"""


class PackIndex:
    """Packs of one segment of a training run by number, without end. Builds or waits for the chunks it is asked for.

    segment: None: the first. It says what packs depend on, and `data` only where corpora and the cache are. Where a
    rewind has skipped packs of the next phase, those behind them are the ones with which this segment's phase goes on.
    """

    def __init__(self, data: Data, ledger: Ledger, segment: Segment | None = None) -> None:
        self.ledger = ledger
        self.segment = segment or ledger.segments[0]
        self.images_per_pack: int = self.segment.settings["images_per_pack"]
        self._data = self.segment.data(data)
        self._cache = cache.cache_folder(data)
        known = [state for state in ledger.states if state.get("segment", 0) == self.segment.first_pack]
        self._states = sorted(known if self.segment.number else [_BEGIN, *known], key=_pack_of)
        self._goes_on = ledger.goes_on(self.segment)
        self._next: PackIndex | None = None
        """of that segment, once it is needed"""
        self._left: list[Left] = []
        """what the segment before has left, once it is known"""
        self._found: dict[Path, Chunk] = {}
        self._last: Chunk | None = None
        self._corpora: dict[str, Corpus] = {}
        """by their paths: a manifest of thousands of shards takes a while to read"""
        self._sources: dict[str, Source] = {}
        self._opened: dict[Path, Entries] = {}
        self._ahead = 0
        self._builder: threading.Thread | None = None

    @property
    def chunks(self) -> list[Chunk]:
        """Those built or found so far, by their packs."""
        return sorted(self._found.values(), key=lambda chunk: (chunk.first, chunk.stop))

    def __getitem__(self, number: int) -> Pack:
        if (later := self._behind(number)) is not None:
            return later[number]
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

    def chunks_until(
        self, stop: int, wanted: Callable[[dict[str, Any], dict[str, Any]], bool]
    ) -> Iterator[tuple[Chunk, np.ndarray, np.ndarray]]:
        """The chunks of the packs before `stop`, in order, each with its entries and where those of each pack begin.

        wanted: says of two states whether packs between them are to be seen. Others are not given, nor built where the
        ledger knows the states.
        """
        number = self.segment.first_pack
        while number < stop:
            state = self._state_before(number)
            following = bisect.bisect_right(self._states, number, key=_pack_of)
            if following < len(self._states) and not wanted(state, self._states[following]):
                number = _pack_of(self._states[following])
                continue
            chunk = self._chunk_of(number)
            if wanted(chunk.begin, chunk.end):
                entries, offsets = self._built(chunk.begin, Entries).between(0, chunk.stop - chunk.first)
                yield chunk, entries, offsets
            number = chunk.stop

    def prepare(self, number: int) -> None:
        """Have the chunk of pack `number` built, and its corpora open, which processes that are forked then have."""
        if (later := self._behind(number)) is not None:
            return later.prepare(number)
        chunk = self._chunk_of(number)
        self._built(chunk.begin, lambda _: None)
        for wanted in chunk.corpora:
            self.source(wanted)

    def close(self) -> None:
        """Let go of the chunks' files, which are opened again when they are needed, and end what is built beside.

        To be called before processes are forked: a lock that another thread holds would be held in them for ever.
        """
        if self._builder is not None:
            self._builder.join()
        self._opened.clear()
        if self._next is not None:
            self._next.close()

    def _behind(self, number: int) -> PackIndex | None:
        """The index that has pack `number`, or knows which has; None: this one."""
        if self._goes_on is None or number < self._goes_on.first_pack:
            return None
        self._next = self._next or PackIndex(self._data, self.ledger, self._goes_on)
        return self._next

    def ledger_at(self, number: int) -> Ledger:
        """The ledger with all states up to that from which pack `number` is found, as far as records say them."""
        if (later := self._behind(number)) is not None:
            later.ledger = self.ledger_at(later.segment.first_pack - 1)
            return later.ledger_at(number)
        state = self._state_before(number)
        while (chunk := self._recorded(state)) is not None and chunk.stop <= number:
            state = chunk.end
        others = [s for s in self.ledger.states if s.get("segment", 0) != self.segment.first_pack]
        own = [s for s in self._states if s["pack"] and "left" not in s]
        states = sorted((s for s in (*others, *own) if s["pack"] <= number), key=_pack_of)
        return replace(self.ledger, states=tuple(kept_states(states)))

    def source(self, wanted: str) -> Source:
        """The corpus with this fingerprint, looked for where config and ledger say."""
        if wanted not in self._sources:
            corpus, s = self.corpus(wanted), self.segment.settings
            if corpus is None:
                places = ", ".join(self._places(wanted))
                raise UserError(
                    f"a corpus that this run uses (fingerprint {wanted}) is at none of {places}; put it back"
                )
            self._sources[wanted] = open_source(
                corpus,
                self._data,
                s["num_patches"],
                s["context_length"],
                s["images_per_pack"],
                _sequences(s),
                version=s["version"],
            )
        return self._sources[wanted]

    def corpus(self, wanted: str) -> Corpus | None:
        """The corpus with this fingerprint; None: it is nowhere where config and ledger say, or may not be read."""
        for path in self._places(wanted):
            with contextlib.suppress(UserError, PermissionError):
                if path not in self._corpora:
                    self._corpora[path] = open_corpus(path, self._data.cache)
                if self._corpora[path].fingerprint == wanted:
                    return self._corpora[path]
        return None

    def _places(self, wanted: str) -> list[str]:
        return [*(c.path for c in self._data.corpora), *self.ledger.paths_of(wanted)]

    def _entries(self, chunk: Chunk, local: int) -> np.ndarray:
        while True:
            if chunk.folder not in self._opened:
                while len(self._opened) > 1:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[chunk.folder] = self._built(chunk.begin, Entries)
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
            chunk = self._recorded(state) or self._note(state, self._built(state, record_in))
            if number < chunk.stop:
                self._last = chunk
                return chunk
            state = chunk.end

    def _state_before(self, number: int) -> dict[str, Any]:
        assert number >= self.segment.first_pack, f"pack {number} is of an earlier segment than {self.segment}"
        if not self._states or number < _pack_of(self._states[0]):
            before = PackIndex(self._data, self.ledger, self.ledger.segments[self.segment.number - 1])
            begin, self._left = before.handed_on(self.segment)
            self._states.insert(0, begin)
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
            "version": self.segment.settings["version"],
            "settings": self.segment.settings,
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
        stop = min(state["pack"] + max(state["pack"], FIRST_CHUNK), inputs["until"] or math.inf)
        while not blocks or (documents < MIN_CHUNK and state["pack"] < stop):
            window = self._window(inputs["blend"], state, totals)
            documents += window[2]
            blocks.append(window[0])
            counts.append(np.diff(window[1]))
        offsets = np.cumsum(np.concatenate(counts))
        entries = np.concatenate(blocks)
        if (entries["until"] == END).all():
            entries = repack_fields(entries[list(ENTRY.names or ())])
        save_array(folder / "entries.npy", entries)
        save_array(folder / "offsets.npy", offsets)
        record = {"inputs": inputs, "end": state, "packs": len(offsets) - 1, "documents": documents, **totals}
        (folder / cache.RECORD).write_text(json.dumps(record, indent=1))

    def handed_on(self, following: Segment) -> tuple[dict[str, Any], list[Left]]:
        """The state in which the following segment begins, and what is left for it.

        That is what of the window of the last pack before it no pack before it has.
        """
        number = following.first_pack
        inputs = self._place(self._chunk_of(number - 1).begin)[1]
        state, totals = json.loads(json.dumps(inputs["state"])), {"tokens": 0, "images": 0}
        while state["pack"] < number:
            first = state["pack"]
            entries, offsets, _ = self._window(inputs["blend"], state, totals)
        read, rest = np.split(entries, [offsets[number - first]])
        left = []
        for c, (name, _) in enumerate(inputs["blend"]):
            unread, begun = rest[rest["corpus"] == c], read[read["corpus"] == c]
            if found := self._unread(self.source(name), unread, begun, following.rests):
                left.append((name, int(unread["epoch"][0]), found))
        begin = {"pack": number, "segment": number, "blend": -1, "positions": state["positions"], "served": {}}
        rests = {"rests": following.rests} if following.rests > 1 else {}  # chunks of earlier versions are found again
        return begin | ({"left": fingerprint({"left": left, **rests})} if left else {}), left

    def _unread(self, source: Source, unread: np.ndarray, read: np.ndarray, rests: int) -> list[int | list[int]]:
        """What is left of a corpus, in order, from the entries of its sequences: those not read, and those that are.

        rests: unless 0, also ranges of documents that are read in part.
        """
        items, places, counts = np.unique(_item_of(unread), return_index=True, return_counts=True)
        in_part = np.isin(items, _item_of(read))
        parts, stops = unread["part"][np.lexsort((unread["part"], _item_of(unread)))], np.cumsum(counts)
        found: list[int | list[int]] = []
        for item in np.argsort(places).tolist():
            document, _, epoch, _, begin, until = unread[places[item]].item()
            if not in_part[item]:
                found.append(document if until == END else [document, begin, until])
            elif rests:
                cuts = source.cuts(document, epoch, begin, until)
                own = parts[stops[item] - counts[item] : stops[item]]  # ascending
                runs = np.split(own, np.flatnonzero(np.diff(own) > 1) + 1)
                found += [[document, cuts[run[0]], cuts[run[-1] + 1]] for run in runs]
        return found

    def _window(
        self, blend: list[list[Any]], state: dict[str, Any], totals: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Pack the next documents, up to where the first corpus ends its epoch (or an even part of it).

        The packs come in a random order, so that their contents do not depend on their places in the window.
        Brings `state` and `totals` up to date; returns entries, offsets and the number of documents drawn.
        """
        settings = self.segment.settings
        drawn = self._take_left(blend) if state.pop("left", None) else self._draw(blend, state)
        blocks = []
        for c, (name, _) in enumerate(blend):
            epoch, documents, ranges, turns = drawn[c]
            sizes = self.source(name).sizes(documents, epoch, ranges)
            block = np.empty(len(sizes), RANGED)
            block["corpus"], block["epoch"], block["part"] = c, epoch, sizes[:, 1]
            block["document"] = documents[sizes[:, 0]]
            block["begin"], block["until"] = ranges[sizes[:, 0]].T
            blocks.append((block, sizes[:, 2], sizes[:, 3], turns[sizes[:, 0]]))
        entries, sizes, images, turn = (np.concatenate(x) for x in zip(*blocks, strict=True))
        del blocks, block  # of long documents a window has 10^8 sequences
        as_drawn = np.argsort(turn, kind="stable")
        entries, sizes, images = entries[as_drawn], sizes[as_drawn], images[as_drawn]
        del turn, as_drawn
        mixed = settings["version"] > 2
        capacity, slots = settings["tokens_per_pack"], settings["images_per_pack"]
        most = packing.max_sequences(capacity, _sequences(settings).doubled)
        order, offsets = packing.best_fit(sizes, images, capacity, slots, most, mixed)
        if mixed:  # those packed last are of what is left over, so that a window would end with what fits worst
            count = len(offsets) - 1
            packs = shuffled(key(settings["seed"], state["pack"], _SHUFFLE), count, 0, count)
            places, offsets = one_after_another(offsets[packs], np.diff(offsets)[packs])
            order = order[places]
        state["pack"] += len(offsets) - 1
        totals["tokens"] += int(sizes.sum())
        totals["images"] += int(images.sum())
        return entries[order], offsets, sum(len(of_corpus.documents) for of_corpus in drawn)

    def _take_left(self, blend: list[list[Any]]) -> list[_Drawn]:
        """What the segment before has left, for each corpus of the blend; a corpus that is gone is left out.

        At every prefix each corpus is within about one item of its share of the tokens that are left; in segments of
        earlier versions one corpus comes after the other.
        """
        found, before = [], 0
        for name, _ in blend:
            epoch, items = next(((e, items) for n, e, items in self._left if n == name), (0, []))
            rows = [[item, 0, END] if isinstance(item, int) else item for item in items]
            table = np.array(rows, np.int64).reshape(-1, 3)
            documents, ranges = table[:, 0], table[:, 1:]
            turns: np.ndarray = before + np.arange(len(items))
            before += len(items)
            if self.segment.rests > 1:  # the share of its corpus's tokens that an item's middle stands at
                sizes = self.source(name).sizes(documents, epoch, ranges)
                tokens = np.bincount(sizes[:, 0], sizes[:, 2], len(items))
                turns = (np.cumsum(tokens) - tokens / 2) / max(1, tokens.sum())
            found.append(_Drawn(epoch, documents, ranges, turns))
        return found

    def _draw(self, blend: list[list[Any]], state: dict[str, Any]) -> list[_Drawn]:
        """The next documents of each corpus; brings the positions and what was served in `state` up to date."""
        num = len(blend)
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
            shuffled(order_key(s.key, p[0]), len(s.tokens), p[1], p[1] + span)
            for s, p, span in zip(sources, positions, spans, strict=True)
        ]
        starts = np.cumsum([0, *spans]).astype(np.int64)
        tokens = np.concatenate([s.tokens[d] for s, d in zip(sources, drawn, strict=True)])
        turns = packing.blend(tokens, starts, weights, served)
        taken = np.bincount(turns, minlength=num)
        for (name, _), position, count, n in zip(blend, positions, taken, left, strict=True):
            epoch_over = count == n
            state["positions"][name] = [
                position[0] + int(epoch_over),
                0 if epoch_over else position[1] + int(count),
            ]
        state["served"] = {f: int(s) for (f, _), s in zip(blend, served, strict=True)}
        return [
            _Drawn(position[0], documents[: taken[c]], _whole(taken[c]), np.flatnonzero(turns == c))
            for c, (position, documents) in enumerate(zip(positions, drawn, strict=True))
        ]


def order_key(source_key: Any, epoch: int) -> Any:
    """What the order of a source's documents in an epoch is drawn from (`shuffled`)."""
    return key(int(source_key), _SHUFFLE, epoch)


def _whole(num: int) -> np.ndarray:
    """The ranges of so many whole documents."""
    return np.broadcast_to(np.array([0, END]), (num, 2))


def _item_of(entries: np.ndarray) -> np.ndarray:
    """A number for each document, or range of one, that RANGED entries are cut from."""
    return entries["document"] << 31 | entries["begin"]


def _sequences(settings: Mapping[str, Any]) -> Sequences:
    """Which sequences a ledger's packs hold, as far as their sizes depend on it."""
    captions, alone = settings.get("captions", False), settings.get("captions_alone", False)
    return Sequences(interleaved=not settings["contrast_only"], contrast=not alone, captions=captions)


def _pack_of(state: dict[str, Any]) -> int:
    return int(state["pack"])
