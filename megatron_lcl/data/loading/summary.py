"""What a run's packs hold, in numbers that are said before it begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.loader import PackedLoader, loader_of
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.source import VERSION
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
    """documents that are several sequences"""
    cut_for_images: int
    """those of them that have over I images"""
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
        return text

    def numbers(self) -> dict[str, Any]:
        """For the metrics."""
        return {
            "images_per_pack": self.images_per_pack,
            "contrast_share": _share(self.pairs, self.images),
            "cut_share": _share(self.cut, self.documents),
        }


def summarize(loader: PackedLoader, consumed: int, chosen: bool) -> Summary:
    """Of the packs that a training loader gives after `consumed` packs."""
    reader, ledger = loader.reader, loader.ledger
    assert isinstance(reader.index, PackIndex)
    assert ledger is not None
    images = pairs = documents = cut = cut_for_images = tokens = 0
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
            if source.rules.num_patches:  # else a sequence is an image with its text, and nothing is cut
                cut += many or bool(source.tokens[document] > source.rules.max_tokens)
                cut_for_images += many
    reader.index.close()
    return Summary(loader.images_per_pack, chosen, PACKS, images, pairs, documents, cut, cut_for_images, tokens)


def summarize_config(
    config: Config,
    sequences: Sequences,
    previous: Ledger | None,
    consumed: int,
    step: int = 0,
    version: int = VERSION,
) -> Summary:
    """Of a run's next packs after `step` steps and `consumed` packs.

    sequences: those that the run's objective reads; previous: the run's ledger, where it has one; version: else that of
    its rules (`source.VERSION`).
    """
    phase = phase_at(config, step)
    ledger = open_run_ledger(config, sequences, previous, step, consumed, version)
    reading, _ = ledger.reading_at(step, phase.config)
    loader = loader_of(reading, config.data, sequences, first_pack=consumed, ledger=ledger)
    summary = summarize(loader, consumed, phase.config.data.images_per_pack is None)
    index = loader.reader.index
    assert isinstance(index, PackIndex)
    # by its weight and not counted: a corpus with a small one may have no document in so few packs
    blend = ledger.blends()[-1]["blend"]
    a_pack = summary.tokens / summary.packs / sum(corpus["weight"] for corpus in blend)
    drawn = (a_pack * corpus["weight"] / index.source(corpus["fingerprint"]).mean_tokens for corpus in blend)
    return replace(summary, drawn=tuple(drawn))


def _share(part: int, whole: int) -> float:
    return part / max(1, whole)
