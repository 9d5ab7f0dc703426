"""A step's batch as an HTML page: what the model reads, pack by pack. No GPU, no process group, any machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import jinja2
import numpy as np
import PIL.Image

from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.corpus.tokenizer import SPECIAL_TOKENS, Tokenizer
from megatron_lcl.data.loading.ahead import Turns
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.images import data_url
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.loading.loader import PackedLoader, read_step
from megatron_lcl.data.loading.reader import SequenceOrigin
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.errors import UserError

_SHOWN = 144
"""side of an image on the page, pixels"""
_FIRST = 16
"""packs on a page: hundreds of them, with their images without losses, are more than a browser can show"""


def replay_html(
    config: Config,
    sequences: Sequences,
    step: int,
    rank: int | None = None,
    world_size: int | None = None,
    ledger: Ledger | None = None,
    packs: range | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """The batch of step `step` (counted from 0) of a run with this config, as one self-contained page.

    sequences: those that the run's objective reads.
    rank: only what data-parallel process `rank` of `world_size` reads, with the micro-batch that the config has in this
    step; None: the whole step. ledger: the run's, from a checkpoint, if its blend has changed or ranges were skipped.
    packs: only those, by the numbers that the page shows; None: the first 16. say: told which are on the page where
    these are not all, and where the run does not come to the step. UserError for a step or rank that cannot be, where
    the processes cannot divide the batch, where none of `packs` is read, or where the config says other packs than the
    ledger.
    """
    if rank is None:
        who, layout = "all processes", {}
    elif world_size is None:
        raise UserError(f"--rank {rank}: what it reads depends on the number of processes; give --world-size as well")
    else:
        who = f"process {rank} of {world_size}"
        micro_batch = phase_at(config, step).config.train.micro_batch
        layout = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch}
    loader = read_step(config, sequences, step, ledger, **layout)
    read = _numbers(loader)
    shown = read[:_FIRST] if packs is None else [number for number in read if number in packs]
    if packs is not None and not shown:
        raise UserError(
            f"packs {packs.start} to {packs.stop - 1}: none of them is read; step {step} of {who} reads "
            f"{len(read)} packs, {read[0]} to {read[-1]}"
        )
    notes = []
    if step >= config.train.steps:
        notes.append(
            f"step {step} is none of this run's, 0 to {config.train.steps - 1}, whose train.steps is "
            f"{config.train.steps}; it would read this if it went on"
        )
    if len(shown) < len(read):
        notes.append(
            f"{len(shown)} of {len(read)} packs are shown, {shown[0]} to {shown[-1]} of {read[0]} to {read[-1]}; "
            "--packs A:B shows packs A to B"
        )
    for note in notes:
        say(note)
    return _render("page.html", loader, shown, title=f"Step {step}, {who}", notes=notes)


def render_first_packs(config: Config, sequences: Sequences, packs: int, ledger: Ledger | None = None) -> str:
    """A run's first packs as an HTML fragment that brings its styles: all but the first folded, images as shown.

    UserError where corpora that they are of are not here.
    """
    loader = read_step(config, sequences, 0, ledger, packs)
    return _render("packs.html", loader, _numbers(loader), side=_SHOWN)


def _numbers(loader: PackedLoader) -> list[int]:
    """Of the packs that it reads, in their order."""
    return [number for micro_batch in range(len(loader)) for number in loader.packs_of(micro_batch)]


def _render(template: str, loader: PackedLoader, numbers: list[int], side: int | None = None, **more: Any) -> str:
    """A template with some packs of a loader. side: of images, in pixels, which are then compressed with losses."""
    package = jinja2.PackageLoader("megatron_lcl", "data/pages/templates")
    environment = jinja2.Environment(loader=package, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(
        packs=_packs(loader, numbers, side),
        shown=_SHOWN,
        tokens_per_pack=loader.reader.data.tokens_per_pack,
        images_per_pack=loader.images_per_pack,
        **more,
    )


def _packs(loader: PackedLoader, numbers: list[int], side: int | None) -> Iterator[dict[str, Any]]:
    """What the template shows of each, one at a time: the images of hundreds are gigabytes."""
    batches = Turns(loader.reader, lambda turn: tuple(numbers[turn : turn + 1]), len(numbers))  # of one pack each
    for turn, number in enumerate(numbers):
        batch = batches.read(turn)
        # of the pack's own blend, of which the config may have other corpora by now; they have one tokenizer
        corpora = {source.corpus.where: source.corpus for source in loader.reader.index[number].sources}
        tokenizer = next(iter(corpora.values())).tokenizer
        pack = _pack(batch, loader.provenance(number), tokenizer, side)
        for sequence in pack["sequences"]:
            origin = sequence["origin"]
            sequence["source"] = corpora[origin.corpus].name(origin.document)
        yield pack


def _pack(batch: PackedBatch, origins: list[SequenceOrigin], tokenizer: Tokenizer, side: int | None) -> dict[str, Any]:
    """What the template shows of a batch of one pack; images are scaled down to `side` pixels, if it is given."""
    images = [image for origin in origins for image in origin.images]
    # shown at each `<soi>` that stands for it: where pairs have captions, at two
    slot_of = {row: image.slot for image in images for row in (image.soi, image.start - 1) if row >= 0}
    pair_of = {row: n for n, row in enumerate(sorted(r for r in batch.image_soi.tolist() if r >= 0), 1)}
    bad = dict(batch.bad_images)
    ids, targets = batch.tokens.numpy(), batch.targets.numpy()
    is_target = np.zeros(len(ids), bool)
    is_target[1:] = targets[:-1] >= 0
    assert (ids[is_target] == targets[:-1][is_target[1:]]).all()

    def parts(start: int, stop: int) -> Iterator[dict[str, Any]]:
        def kind(row: int) -> tuple[str, bool]:
            special = int(ids[row]) - tokenizer.sot
            return "text" if special < 0 else SPECIAL_TOKENS[special], bool(is_target[row])

        for (name, counts), group in groupby(range(start, stop), kind):
            run = list(group)
            part: dict[str, Any] = {"kind": name, "counts": counts}
            if name == "text":
                part["text"] = tokenizer.decode(ids[run])
            elif run[0] in slot_of:
                slot = slot_of[run[0]]
                part["pair"] = pair_of.get(run[0])
                part["bad"] = bad.get(slot)
                part["src"] = None if slot in bad else _shown(batch.images[slot].numpy(), side)
            yield part

    sequences = [
        {"origin": o, "parts": list(parts(o.start, o.stop)), "share": (o.stop - o.start) / len(ids)} for o in origins
    ]
    return {
        "number": batch.packs[0],
        "sequences": sequences,
        "num_tokens": batch.num_tokens,
        "num_images": batch.num_images,
        "num_pairs": batch.num_pairs,
        "num_targets": batch.num_targets,
        "num_patches": batch.num_patches,
    }


def _shown(pixels: np.ndarray, side: int | None) -> str:
    """uint8 [3, H, W] as a data URL, lossless; if `side` is given, at no more than so many pixels a side, and lossy:
    hundreds of photographs would make a page of tens of megabytes."""
    image = PIL.Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if side is not None:
        image.thumbnail((side, side))
    return data_url(image, "PNG" if side is None else "WEBP")
