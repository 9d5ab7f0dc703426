"""The ledger: what the packs of a run depend on, and what of it changed on the way.

A run with phases (`config.phases`) has an entry for each. Packs are numbered through all of them. Phases whose packs
are planned alike are one segment; with the next one the documents go on where the last pack read left them, also in the
midst of one.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megatron_lcl.config import Config, Data
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading import packing
from megatron_lcl.data.loading.blend import blend_of, has_shares_of, paths_in, with_paths_of
from megatron_lcl.data.loading.reading import Reading
from megatron_lcl.data.loading.rules import INTERLEAVED, Sequences
from megatron_lcl.data.loading.source import VERSION, open_source
from megatron_lcl.errors import UserError

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
_OF_OBJECTIVE = ("contrast_only", "captions", "captions_alone")
"""what the ledger holds of the sequences that the objective reads; the keys that runs have stored"""
PLANNED = ("tokens_per_pack", "images_per_pack", "num_patches", "context_length")
"""those settings that may change from phase to phase"""
STATES, _FEWEST_STATES = 1000, 20
"""that a ledger keeps at most, and at most of however many corpora: the chunks between two, of 1000 at most 1/150 of a
run's, are built again where they are needed"""
_POSITIONS = 100_000
"""of corpora, of about 100 bytes each, in all states of a ledger: each state names every corpus"""


@dataclass(frozen=True)
class Segment:
    """Packs of a run that are planned with the same settings."""

    number: int
    consumed: int
    """packs that the run used before it"""
    first_pack: int
    """number of its first pack"""
    settings: dict[str, Any]
    rests: int = 2
    """it begins with what the segment before has left: 2: of all corpora, each of which has its share of the tokens
    throughout; 1, as an earlier version planned it: of one corpus after the other; 0, as the first one did: so, without
    the rests of documents that were read in part"""

    def data(self, data: Data) -> Data:
        """`data` with what the packs are planned with, whatever a config says by now."""
        return replace(data, **{name: self.settings[name] for name in _SETTINGS})


class _Skipped(NamedTuple):
    """Packs that are not used."""

    ranges: list[list[int]]
    """[first, stop], in order; no two of them touch"""
    total: list[int]
    """packs in the first n ranges, for n from 0 to all of them"""
    used: list[int]
    """packs before each range that are used"""


@dataclass(frozen=True)
class Ledger:
    """What the packs of a run depend on: the settings that it began with, and entries, which are only ever
    appended, but that a corpus may have moved.

    An entry is {"from_pack": n, "blend": [{"path", "fingerprint", "weight"}, …], "tokenizer": fingerprint}: new shares
    from the first window of documents that begins at pack n or later; entries of earlier versions have no tokenizer,
    and a corpus that was moved has "moved_from", the paths before; or
    {"from_pack": n, "skip": count, "plan": {the settings PLANNED, and "rests"}}: packs n … n+count-1 are not used, and
    were planned like that, also where a rewind has gone back into an earlier phase; entries of earlier versions have no
    plan, and theirs is that of the packs around them; or
    {"from_step": s, "consumed": n, "phase": a `Reading`, "rests": 2}: from step s (counted from 0) on, behind n packs,
    all steps read that; the first ones what is left, as `Segment.rests` says: earlier versions wrote true, which is 1,
    or nothing, which is 0. Phases that are still to come may be replaced.
    """

    settings: dict[str, Any]
    entries: tuple[dict[str, Any], ...] = field(default=())
    states: tuple[dict[str, Any], ...] = field(default=(), compare=False)
    """where chunks begin that were read, by pack, but for the first, or some of them (`kept_states`); they follow from
    the rest, and save time"""

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {"settings": self.settings, "entries": list(self.entries), "states": list(self.states)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """From what `to_json` gave; checkpoints written before there were states have none."""
        return cls(dict(value["settings"]), tuple(value["entries"]), tuple(value.get("states", ())))

    def check(self, config: Config, sequences: Sequences) -> None:
        """UserError where a config says other packs than these. sequences: those that its objective reads."""
        vision, context = config.model.vision, config.model.language.context_length
        settings = _settings_of(config.data, vision.num_placeholders, context, sequences)
        _check_unchanged(settings, self.settings, (*PLANNED, "version"))

    def locate(self, consumed: int) -> int:
        """Number of the pack that comes after `consumed` packs were used: those of skipped ranges are jumped over."""
        skipped = self._skipped
        return consumed + skipped.total[bisect.bisect_right(skipped.used, consumed)]

    def ranges(self, consumed: int, count: int) -> list[tuple[int, int]]:
        """Numbers of the `count` packs that come after `consumed` packs were used: ranges (first, stop), in order."""
        first, found = self.locate(consumed), []
        for start, stop in self._skipped.ranges:
            if first < start < first + count:
                found.append((first, start))
                first, count = stop, count - (start - first)
        return [*found, (first, first + count)]

    def skip(self, consumed: int, count: int) -> Ledger:
        """A ledger in which the `count` packs that would follow after `consumed` packs are not used.

        It has a new entry for each segment that they are of.
        """
        first = self.locate(consumed)
        stop = self.locate(consumed + count - 1) + 1
        segments, entries = self.segments, list(self.entries)
        ends = [*(segment.first_pack for segment in segments[1:]), stop]
        for segment, end in zip(segments, ends, strict=True):
            start, end = max(first, segment.first_pack), min(stop, end)
            if start < end:
                plan = {**{name: segment.settings[name] for name in PLANNED}, "rests": segment.rests}
                entries.append({"from_pack": start, "skip": end - start, "plan": plan})
        return replace(self, entries=tuple(entries))

    @cached_property
    def _skipped(self) -> _Skipped:
        merged: list[list[int]] = []
        for start, stop in sorted((e["from_pack"], e["from_pack"] + e["skip"]) for e in self.entries if "skip" in e):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], stop)
            else:
                merged.append([start, stop])
        total = [0, *itertools.accumulate(stop - start for start, stop in merged)]
        used = [start - before for (start, _), before in zip(merged, total, strict=False)]
        return _Skipped(merged, total, used)

    def blends(self) -> list[dict[str, Any]]:
        """The entries that set a blend, in order."""
        return [e for e in self.entries if "blend" in e]

    def paths_of(self, wanted: str) -> list[str]:
        """Where the corpus with this fingerprint has been, by all entries, in order: last where it was found last."""
        found = (c for entry in self.blends() for c in entry["blend"] if c["fingerprint"] == wanted)
        return [path for corpus in found for path in paths_in(corpus)]

    @cached_property
    def phases(self) -> tuple[dict[str, Any], ...]:
        """The entries of phases, in order; none where the run has but one and leaves out no patch."""
        return tuple(sorted((e for e in self.entries if "phase" in e), key=lambda e: e["consumed"]))

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """Stretches of packs that are planned alike, in order: one at least.

        Packs that a rewind has skipped stay as they were planned, and so do the documents in them. Where it has gone
        back into the phase before theirs, that phase goes on behind them in a segment of its own.
        """
        found = [Segment(0, 0, 0, self.settings)]
        planned = [(e["from_pack"], e["from_pack"] + e["skip"]) for e in self.entries if "plan" in e]
        # a phase begins behind the last pack of the one before, whatever is skipped from there on
        begins = {self.locate(entry["consumed"] - 1) + 1 for entry in self.phases}
        for first in sorted(begins.union(*planned)):
            plan, rests = self._plan_of(first)
            settings = {**self.settings, **{name: plan[name] for name in PLANNED}}
            if settings != found[-1].settings:
                found.append(Segment(len(found), self._used_before(first), first, settings, rests))
        return tuple(found)

    def _plan_of(self, pack: int) -> tuple[Mapping[str, Any], int]:
        """The settings PLANNED with which a pack is planned, among others, and `Segment.rests`."""
        for entry in self.entries:
            if "plan" in entry and entry["from_pack"] <= pack < entry["from_pack"] + entry["skip"]:
                return entry["plan"], int(entry["plan"]["rests"])
        used = self._used_before(pack)
        begun = [entry for entry in self.phases if entry["consumed"] <= used]
        return (begun[-1]["phase"], int(begun[-1].get("rests", 0))) if begun else (self.settings, 1)

    def _used_before(self, pack: int) -> int:
        """How many packs of lower numbers are used."""
        begun = bisect.bisect_left(self._skipped.ranges, [pack])
        return max(self._skipped.used[begun - 1], pack - self._skipped.total[begun]) if begun else pack

    def goes_on(self, segment: Segment) -> Segment | None:
        """The segment in which the phase goes on that a segment is of, behind packs of later phases that a rewind has
        skipped; None where it does not."""
        later = self.segments[segment.number + 1 :]
        behind_skipped = (s for s in later if s.consumed == later[0].consumed)
        return next((s for s in behind_skipped if s.settings == segment.settings), None)

    def reads_alike(self) -> bool:
        """Whether all packs are planned alike and no patch is left out: steps differ in how many they read, at most."""
        return len(self.segments) == 1 and not any(entry["phase"]["kept_patches"] for entry in self.phases)

    def read_at(self, consumed: int) -> list[dict[str, Any]]:
        """The corpora that are needed to go on behind `consumed` packs, as entries of their blend: those of the window
        of documents that the run is in, and at the begin of a segment of the one before.

        Whatever `data.corpora` is by then: a window is read to its end, and plans its packs from all of its documents.
        """
        number, segment = self.locate(consumed), self.segment_after(consumed)
        found: list[dict[str, Any]] = []
        while True:
            own = (s["pack"] for s in self.states if s.get("segment", 0) == segment.first_pack)
            begin = max((pack for pack in own if pack <= number), default=None)
            window = segment.first_pack if begin is None else begin
            found += [entry for entry in self.blends() if entry["from_pack"] <= window][-1]["blend"]
            if begin is not None or segment.number == 0:
                return found
            number, segment = segment.first_pack - 1, self.segments[segment.number - 1]

    def segment_after(self, consumed: int) -> Segment:
        """The segment of the pack that comes after `consumed` packs were used."""
        return [segment for segment in self.segments if segment.consumed <= consumed][-1]

    def reading_at(self, step: int, config: Config) -> tuple[Reading, int]:
        """What a step (counted from 0) reads, and how many packs the run uses before it.

        config: the run's, which says it where the ledger has no phases.
        """
        before = [entry for entry in self.phases if entry["from_step"] <= step]
        if not before:
            batch = config.train.global_batch
            return replace(Reading.of(config), images_per_pack=self.settings["images_per_pack"]), step * batch
        reading = Reading.from_json(before[-1]["phase"])
        return reading, before[-1]["consumed"] + (step - before[-1]["from_step"]) * reading.global_batch


def kept_states(states: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Those of a run's states, in order, that its checkpoints keep: all up to STATES, or to fewer where there are more
    than 100 corpora; of more the last one, from which it goes on, and about half as many of the others, evenly."""
    corpora = max((len(state["positions"]) for state in states), default=0)
    limit = min(STATES, max(_FEWEST_STATES, _POSITIONS // max(1, corpora)))
    if len(states) <= limit:
        return states
    *before, last = states
    kept = before[:1]
    for state in before:
        if (state["pack"] - kept[-1]["pack"]) * limit >= last["pack"] * 2:
            kept.append(state)
    return [*kept, last]


# --- opening -----------------------------------------------------------------------------------------------------


def open_ledger(
    data: Data,
    num_placeholders: int,
    context_length: int,
    *,
    sequences: Sequences = INTERLEAVED,
    previous: Ledger | None = None,
    consumed: int = 0,
    but: tuple[str, ...] = (),
    version: int = VERSION,
) -> Ledger:
    """The ledger of a new run, or of one resumed after `consumed` packs: `previous` and the changes of `data.corpora`.

    Of a run in which nothing else changes; of any other: `open_run_ledger`. Chooses I (`images_per_pack`) where the
    config leaves it open; a resumed run keeps it. UserError if a setting that fixes the packs has changed, but for
    those named in `but`. version: of the rules of a new run (`source.VERSION`); a resumed one keeps its own.
    """
    blend, tokenizer = blend_of(data)
    settings = _settings_of(data, num_placeholders, context_length, sequences) | {"version": version}
    if previous is None:
        if settings["images_per_pack"] is None:
            settings["images_per_pack"] = _choose_images(data, num_placeholders, context_length, sequences)
        return Ledger(settings, ({"from_pack": 0, "blend": blend, "tokenizer": tokenizer},))
    settings["version"] = min(VERSION, previous.settings["version"])
    _check_unchanged(settings, previous.settings, but)
    _check_tokenizer(previous, data, tokenizer)
    return _with_blend(previous, blend, tokenizer, consumed)


def open_run_ledger(
    config: Config,
    sequences: Sequences = INTERLEAVED,
    previous: Ledger | None = None,
    step: int = 0,
    consumed: int = 0,
    version: int = VERSION,
) -> Ledger:
    """The ledger of a run with all its phases; of one that goes on after `step` steps and `consumed` packs `previous`,
    what has changed of `data.corpora`, and of the phases that are still to come.

    Where the config says of step `step` other than `previous` does, a phase begins there. UserError as `open_ledger`,
    which says what `version` is.
    """
    phases = phases_of(config)
    early, vision = phases[0].config, phases[0].config.model.vision
    context = early.model.language.context_length
    alike = len(phases) == 1 and not vision.patch_dropout and (previous is None or previous.reads_alike())
    ledger = open_ledger(
        early.data,
        vision.num_placeholders,
        context,
        sequences=sequences,
        previous=previous,
        consumed=consumed,
        but=() if alike else PLANNED,
        version=version,
    )
    if alike and not ledger.phases and consumed == step * early.train.global_batch:
        return ledger
    entries = [entry for entry in ledger.phases if entry["consumed"] < consumed]
    if not entries and consumed:  # it had one phase, without patch dropout; of another batch, if nothing else is new
        planned = {name: ledger.settings[name] for name in PLANNED}
        size = config.model.vision.image_size
        entries = [_entry(0, 0, Reading(**planned, image_size=size, kept_patches=None, global_batch=consumed // step))]
    before = {entry["from_step"]: Reading.from_json(entry["phase"]) for entry in (previous or ledger).phases}
    for phase in phases:
        if phase.stop <= step:
            continue
        first = max(step, phase.first)
        reading = Reading.of(phase.config)
        last = Reading.from_json(entries[-1]["phase"]) if entries else None
        if reading.images_per_pack is None:
            chosen = [at.images_per_pack for at in (last, before.get(first)) if at and at.has_slots_of(reading)]
            if chosen:
                slots = chosen[0]
            elif first == consumed == 0:
                slots = ledger.settings["images_per_pack"]
            else:
                slots = _choose_images(phase.config.data, reading.num_patches, reading.context_length, sequences)
            reading = replace(reading, images_per_pack=slots)
        if reading != last:
            entries.append(_entry(first, consumed, reading))
        consumed += (phase.stop - first) * reading.global_batch
    others = (entry for entry in ledger.entries if "phase" not in entry)
    ledger = replace(ledger, entries=(*others, *entries))
    pairs = zip(ledger.segments, (previous or ledger).segments, strict=False)
    unchanged = {mine.first_pack for mine, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)}
    return replace(ledger, states=tuple(s for s in ledger.states if s.get("segment", 0) in unchanged))


def _entry(step: int, consumed: int, reading: Reading) -> dict[str, Any]:
    plain = asdict(reading)
    kept = None if reading.kept_patches is None else list(reading.kept_patches)
    return {"from_step": step, "consumed": consumed, "phase": {**plain, "kept_patches": kept}, "rests": Segment.rests}


def _settings_of(data: Data, num_placeholders: int, context_length: int, sequences: Sequences) -> dict[str, Any]:
    settings: dict[str, Any] = {name: getattr(data, name) for name in _SETTINGS}
    settings |= {"num_patches": num_placeholders, "context_length": context_length}
    settings["contrast_only"] = not sequences.interleaved  # the key that runs have stored
    if sequences.captions:  # absent elsewhere, as in ledgers written before there were captions
        settings["captions"] = True
    if sequences.captions and not sequences.doubled:
        settings["captions_alone"] = True
    return settings


def _check_unchanged(settings: Mapping[str, Any], before: Mapping[str, Any], but: tuple[str, ...]) -> None:
    for name in {**settings, **before}:
        value, old = settings.get(name), before.get(name)
        if value == old or name in but or (name == "images_per_pack" and value is None):
            continue
        if name in _OF_OBJECTIVE:
            raise UserError(
                "objective.name reads other sequences of the documents than the objective that this run began with, "
                "and its packs depend on it; go back to that one or start a new run"
            )
        phase = ""
        if name in PLANNED:
            field_name = "image_size" if name == "num_patches" else name
            phase = f", or give schedule.phases an entry with the {field_name} so far, for the steps made so far"
        raise UserError(
            f"{name} is {value}, but this run began with {old}, and its packs depend on it; go back to {old} or "
            f"start a new run{phase}"
        )


def _check_tokenizer(previous: Ledger, data: Data, tokenizer: str) -> None:
    """UserError where the run has read corpora with another tokenizer: its ids would mean other words from here on."""
    before = tokenizer_of(previous, data)
    if before not in (None, tokenizer):
        raise UserError(
            f"{data.corpora[0].path} has another tokenizer than the corpora that this run has read, and a run has one; "
            "write the corpus with theirs (`preprocess --tokenizer`, `megatron-lcl retokenize`), or start a new run"
        )


def tokenizer_of(ledger: Ledger, data: Data) -> str | None:
    """Fingerprint of the tokenizer of the corpora that a run has read; None where the run is of an earlier version,
    which did not note it, and none of these corpora is found where config and ledger say."""
    blends = ledger.blends()[::-1]
    noted = next((entry["tokenizer"] for entry in blends if "tokenizer" in entry), None)
    read = [corpus for entry in blends for corpus in entry["blend"]]
    fingerprints = {corpus["fingerprint"] for corpus in read}
    for path in () if noted else (*(c.path for c in data.corpora), *(path for c in read for path in paths_in(c))):
        with contextlib.suppress(UserError, OSError):
            corpus = open_corpus(path, data.cache)
            if corpus.fingerprint in fingerprints:
                return str(corpus.manifest["tokenizer"]["fingerprint"])
    return noted


def begins_other_blend(before: Ledger, now: Ledger) -> bool:
    """Whether `now`, which goes on from `before`, reads other corpora, or other shares of them, from there on."""
    return len(now.blends()) > len(before.blends())


def _with_blend(previous: Ledger, blend: list[dict[str, Any]], tokenizer: str, consumed: int) -> Ledger:
    entries = [e | {"blend": with_paths_of(blend, e["blend"])} if "blend" in e else e for e in previous.entries]
    previous = replace(previous, entries=tuple(entries))  # paths are in no hash
    if has_shares_of(blend, previous.blends()[-1]["blend"]):
        return previous
    start = previous.locate(consumed)
    entry = {"from_pack": start, "blend": blend, "tokenizer": tokenizer}
    # windows that begin before `start` stay as they were, so what they end in does
    states = tuple(state for state in previous.states if state["pack"] <= start)
    return Ledger(previous.settings, (*previous.entries, entry), states)


def _choose_images(data: Data, num_placeholders: int, context_length: int, sequences: Sequences) -> int:
    images_per_token = sequences_per_token = 0.0
    weights = math.fsum(c.weight for c in data.corpora)  # alike with every Python
    for c in data.corpora:
        corpus = open_corpus(c.path, data.cache)
        source = open_source(corpus, data, num_placeholders, context_length, 1, sequences)
        tokens, images = int(source.tokens.sum(dtype=np.int64)), int(source.images.sum(dtype=np.int64))
        share = c.weight / weights / max(1, tokens)
        images_per_token += share * images
        # a document that is cut is several, but long ones are not those of which a pack may hold too few
        sequences_per_token += share * (np.count_nonzero(source.tokens) if sequences.interleaved else images)
    return packing.choose_images_per_pack(
        images_per_token, data.tokens_per_pack, sequences_per_token, captions=sequences.doubled
    )
