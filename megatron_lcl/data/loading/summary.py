"""What a run's packs hold, in numbers that are said before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.loading.blend import blend_of
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.loader import PackedLoader, loader_of
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.reader import PackReader
from megatron_lcl.data.loading.rules import Sequences, longest_text
from megatron_lcl.data.loading.sequence import PIECE, START, STOP
from megatron_lcl.data.loading.source import VERSION, Source
from megatron_lcl.units import counted

PACKS = 64
"""packs that are looked at; those of a corpus are alike, being drawn at random"""


@dataclass(frozen=True)
class Summary:
    """Of some packs: images, those in the contrast, documents, those that had to be cut."""

    images_per_pack: int
    chosen: bool
    """I was chosen to fill the packs, and not given"""
    packs: int
    images: int
    pairs: int
    documents: int
    cut: int
    """documents that are several sequences; where a sequence is an image with its text: with a text that is cut"""
    cut_for_images: int
    """those of them that have over I images"""
    texts: int = 0
    """where a sequence is an image with its text: tokens of all texts that images have"""
    unread: int = 0
    """those of them that no sequence has"""
    limits: str = field(default="", compare=False)
    """the fields that are to be raised where texts are cut, with their values"""
    tokens: int = field(default=0, compare=False)
    """token slots that are filled"""
    drawn: tuple[float, ...] = field(default=(), compare=False)
    """of each corpus of the blend, about so many documents a pack, with those that give no sequence; empty where that
    was not asked for"""

    def __str__(self) -> str:
        how = "chosen" if self.chosen else "given"
        text = f"{counted(self.images_per_pack, 'image slot')} a pack ({how}); in {counted(self.packs, 'pack')} "
        text += f"{self.pairs:,} of {self.images:,} images ({_share(self.pairs, self.images):.1%}) are in the contrast"
        text += f", {self.cut:,} of {self.documents:,} documents ({_share(self.cut, self.documents):.1%}) are cut"
        if self.cut_for_images:
            text += f", {self.cut_for_images:,} as they have over {counted(self.images_per_pack, 'image')}"
        if self.unread:
            share = _share(self.unread, self.texts)
            text += f"; {share:.1%} of the tokens of images' texts do not fit and are never read: raise {self.limits}"
        return text

    def numbers(self) -> dict[str, Any]:
        """For the metrics."""
        return {
            "images_per_pack": self.images_per_pack,
            "contrast_share": _share(self.pairs, self.images),
            "cut_share": _share(self.cut, self.documents),
            "unread_share": _share(self.unread, self.texts),
        }


def summarize(loader: PackedLoader, consumed: int, chosen: bool, names: Mapping[str, str] | None = None) -> Summary:
    """Of the packs that a training loader gives after `consumed` packs. names: `Phase.names`."""
    reader, ledger = loader.reader, loader.ledger
    assert isinstance(reader.index, PackIndex)
    assert ledger is not None
    images = pairs = documents = cut = cut_for_images = tokens = texts = unread = 0
    for number in (ledger.locate(consumed + i) for i in range(PACKS)):
        pack = reader.index[number]
        for origin in (origins := reader.provenance(number)):
            images += len(origin.images)
            pairs += sum(image.pair for image in origin.images)
        tokens += origins[-1].stop
        for entry in pack.entries[pack.entries["part"] == 0]:  # one of each document
            source, document = pack.sources[entry["corpus"]], entry["document"]
            many = bool(source.images[document] > source.rules.max_images)
            documents += 1
            if source.rules.num_patches:
                cut += many or bool(source.tokens[document] > source.rules.max_tokens)
                cut_for_images += many
            else:  # a sequence is an image with its text, and no other one reads what is cut off
                whole, read = _texts_of_pairs(source, int(document), int(entry["epoch"]))
                cut += read < whole
                texts, unread = texts + whole, unread + whole - read
    reader.index.close()
    counts = images, pairs, documents, cut, cut_for_images, texts, unread
    return Summary(loader.images_per_pack, chosen, PACKS, *counts, _limits(reader, names or {}), tokens)


def _texts_of_pairs(source: Source, document: int, epoch: int) -> tuple[int, int]:
    """Of a document whose sequences are its pairs: tokens of the texts that its images have, and of those how many are
    in any sequence."""
    rows, _, _, first, shard = source.arranged(document, epoch)
    read: dict[int, set[tuple[int, int]]] = {}
    for row in rows[::2].tolist():  # the rows between are images
        read.setdefault(row[PIECE], set()).add((row[START], row[STOP]))
    whole = sum(int(shard.lengths[first + piece]) for piece in read)
    return whole, sum(len(set().union(*(range(*span) for span in spans))) for spans in read.values())


def _limits(reader: PackReader, names: Mapping[str, str]) -> str:
    """What says how much of a text a pair has, with its value: one field, or both where neither helps alone."""
    context, slots = reader.context_length, reader.data.tokens_per_pack

    def longest(context: int, slots: int) -> int:
        return longest_text(reader.sequences, reader.num_placeholders, context, slots)

    now = longest(context, slots)
    fields = {
        "model.language.context_length": (context, longest(context + 2, slots) > now),
        "data.tokens_per_pack": (slots, longest(context, slots + 2) > now),
    }
    neither = not any(helps for _, helps in fields.values())
    return " and ".join(
        f"{names.get(name, name)} = {value}" for name, (value, helps) in fields.items() if helps or neither
    )


def summarize_config(
    config: Config,
    sequences: Sequences,
    previous: Ledger | None,
    consumed: int,
    step: int = 0,
    version: int = VERSION,
    names: Mapping[str, str] | None = None,
) -> Summary:
    """Of a run's next packs after `step` steps and `consumed` packs.

    sequences: those that the run's objective reads; previous: the run's ledger, where it has one; version: else that of
    its rules (`source.VERSION`); names: else those of the step's phase (`Phase.names`).
    """
    phase = phase_at(config, step)
    ledger = open_run_ledger(config, sequences, previous, step, consumed, version)
    reading, _ = ledger.reading_at(step, phase.config)
    loader = loader_of(reading, config.data, sequences, first_pack=consumed, ledger=ledger)
    summary = summarize(loader, consumed, phase.config.data.images_per_pack is None, names or phase.names)
    index = loader.reader.index
    assert isinstance(index, PackIndex)
    # by its weight and not counted: a corpus with a small one may have no document in so few packs
    blend, _ = blend_of(config.data)  # of whose shares the ledger's is, in whatever order
    a_pack = summary.tokens / summary.packs / sum(corpus["weight"] for corpus in blend)
    drawn = (a_pack * corpus["weight"] / index.source(corpus["fingerprint"]).mean_tokens for corpus in blend)
    return replace(summary, drawn=tuple(drawn))


def _share(part: int, whole: int) -> float:
    return part / max(1, whole)
