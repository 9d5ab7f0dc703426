"""What the selftest trains: a tiny model, one ragged global batch a step, and the layouts that must agree on it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config, Optimizer
from megatron_lcl.config.phases import phase_at
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train.optimizer import learning_rate

STEPS = 3
MIN_PACKS = 4
"""of a step; more where there are more replicas, each of which has one at least"""
TOKENS, IMAGES, CONTEXT = 60, 4, 40
"""token slots and image slots of a pack; longest sequence, but in `PHASES`"""
PHASES = [
    {
        "steps": 2,
        "image_size": 16,
        "context_length": 28,
        "patch_dropout": 0.5,
        "micro_batch": 1,
        "contrastive_weight": 0.3,
        "contrastive_weight_change": "linear",
    }
]
WEIGHTS_OF_PHASES = (0.3, 0.2, 0.1)
"""of the contrast, in each step where there are phases"""
FROZEN = ("vision.patches.*", "vision.blocks.0.*", "language.blocks.1.mlp.*")
"""the lowest part, below which backward stops, and something in the middle"""
EMA, TAIL = 0.5, 0.5
IMAGES_OF_PACK = ((4, 0, 3, 0), (2, 0, 4, 0), (3, 0, 1, 0))
"""images of each pack of each step, over and over: with two replicas the second one never has an image"""


@dataclass(frozen=True)
class Case:
    """A layout, a way to compute the contrast, and what is minimized."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    strategy: str = "retain"
    climbs: bool = False
    """the log scale starts just below ln 100, and the steps go uphill, so that it goes up and is clamped; in other
    cases it goes down"""
    dtype: str = "float32"
    objective: str = "lcl"
    phases: str = ""
    """`kept` or `all`: in the first two steps images are smaller, sequences shorter, half of the patches are left out
    (with placeholders for those that are kept, or for all), and the weight of the contrast goes linearly to the third
    step's, which reads twice as many packs, two to a micro-batch"""
    optimizer: str = "adamw"
    """the others: also with learning rates by part and depth"""
    freeze: bool = False
    """`FROZEN` is not trained"""
    averages: bool = False
    """of the weights: exponential, by which lone images and texts are encoded, and a plain mean of the last steps"""
    options: bool = False
    """both encoders have drop path, LayerScale and QK-norm, and images have registers"""
    compiled: bool = False
    """blocks are compiled; in one process only, as what is sent is not counted then"""

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        name = f"tp {self.tensor}  pp {self.pipeline}  dp {self.data}  ZeRO-{self.zero}  {self.strategy}"
        name += f", {self.dtype}" * (self.dtype != "float32") + f", {self.objective}" * (self.objective != "lcl")
        name += f", phases with {self.phases} places" if self.phases else ""
        name += f", {self.optimizer}" * (self.optimizer != "adamw")
        name += ", frozen" * self.freeze + ", averages" * self.averages + ", model options" * self.options
        name += ", compiled" * self.compiled
        return f"{name}, scale at its bound" if self.climbs else name

    @property
    def global_batch(self) -> int:
        """Packs of a step; of the first steps where there are phases."""
        return -(-MIN_PACKS // self.data) * self.data

    def lr(self, step: int) -> float:
        """Learning rate of a step: negative where the steps go uphill."""
        rate = learning_rate(step, self.config())
        return -rate if self.climbs else rate

    @property
    def truth(self) -> tuple[Any, ...]:
        """What decides the result: cases in which it is the same are compared with one run of one process."""
        options = (self.climbs, self.objective, self.phases, self.optimizer, self.freeze, self.averages)
        return (self.global_batch, *options, self.config().model)

    def config(self) -> Config:
        """The run's config."""
        optimizer: dict[str, Any] = {"lr": 1e-3, "warmup": 0, "clip_norm": 0.5}
        if self.optimizer != "adamw":
            # one momentum, so that the first step's tells all gradients
            muon = {"dtype": "float32", "momentum": Optimizer().betas[0], "per_head": True}
            parts = {"vision": {"lr": 0.5, "layer_decay": 0.8}, "head": {"weight_decay": 0.0}}
            optimizer |= {"name": self.optimizer, "muon": muon, "parts": parts}
        # ZeRO-3 gathers the norms of a head's queries in messages too small to be counted
        options = {"drop_path": 0.6, "layer_scale": 0.5, "qk_norm": self.zero < 3} if self.options else {}
        return configs.from_dict(
            {
                "model": {
                    "vision": {
                        "image_size": 24 if self.phases else 16,
                        "patch_size": 8,
                        "width": 40,
                        "layers": 2,
                        "heads": 4,
                        "mlp_width": 64,
                        "patch_dropout_places": self.phases or "kept",
                        **({"registers": 3, **options} if options else {}),
                    },
                    "language": {
                        "context_length": CONTEXT,
                        "vocab_size": 103,  # divides into nothing
                        "width": 32,  # no module's parameters are so few that their bytes are not counted
                        "layers": 3,
                        "heads": 4,
                        "mlp_width": 48,
                        **options,
                    },
                    "pool_heads": 4,
                },
                "data": {"tokens_per_pack": TOKENS, "images_per_pack": IMAGES},
                "objective": {"name": self.objective}
                | ({"contrastive_weight": WEIGHTS_OF_PHASES[-1]} if self.phases else {}),
                "contrast": {
                    "strategy": self.strategy,
                    "initial_log_scale": math.log(99.95 if self.climbs else 1 / 0.07),
                },
                "optimizer": optimizer,
                "average": {"ema": [EMA], "tail": [TAIL]} if self.averages else {},
                "evaluate": {"average": f"ema_{EMA:g}"} if self.averages else {},
                "zero": {"stage": self.zero},
                "parallel": {"tensor": self.tensor, "pipeline": self.pipeline},
                "train": {
                    "steps": STEPS,
                    "global_batch": self.global_batch * (2 if self.phases else 1),
                    "micro_batch": 2 if self.phases else 1,
                    "freeze": list(FROZEN) if self.freeze else [],
                    "compile": self.compiled,
                    "dtype": self.dtype,  # the same on every device: it is what the bounds are for
                },
                "schedule": {"phases": PHASES, "batch_doublings": [2]} if self.phases else {},
                # no parameter is so small that ZeRO-3 leaves it whole
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if self.zero == 3 else {},
            }
        )


CASES = (
    Case(),
    Case(tensor=2),
    Case(pipeline=2, strategy="recompute"),
    Case(data=2),
    Case(data=2, zero=2),
    Case(data=2, zero=3, strategy="recompute"),
    Case(tensor=2, pipeline=2),
    Case(tensor=2, data=2, strategy="recompute", climbs=True),
    Case(pipeline=2, data=2, objective="coca"),
    Case(tensor=2, data=2, objective="emu", optimizer="stable_adamw", freeze=True),
    Case(pipeline=2, data=2, strategy="recompute", phases="kept"),
    Case(tensor=2, data=2, optimizer="muon", averages=True),
    Case(tensor=2, pipeline=2, objective="siglip", options=True),
    # what a run on GPUs uses: half precision, and with it flash-attn or torch's variable-length attention
    Case(dtype="bfloat16"),
    Case(pipeline=2, data=2, strategy="recompute", dtype="bfloat16"),
)
"""each axis, ZeRO stage, strategy, loss, optimizer and option of the model at least once; on one GPU bfloat16 too, on
two plain data parallelism"""
MORE_CASES = (
    Case(pipeline=2),
    Case(data=2, strategy="recompute"),
    Case(tensor=2, data=2),
    Case(pipeline=2, data=2),
    Case(pipeline=2, data=2, strategy="recompute", climbs=True),
    Case(pipeline=4),
    Case(tensor=4),
    Case(tensor=2, data=2, strategy="recompute", objective="coca"),
    Case(pipeline=2, data=2, objective="emu", optimizer="stable_adamw", freeze=True),
    Case(data=2, zero=3, objective="emu", optimizer="stable_adamw", freeze=True),
    Case(tensor=2, data=2, phases="kept"),
    Case(tensor=2, pipeline=2, phases="all"),
    Case(data=2, zero=3, strategy="recompute", phases="kept"),
    Case(pipeline=2, data=2, optimizer="muon", averages=True),
    Case(data=2, zero=3, strategy="recompute", optimizer="muon", averages=True),
    Case(data=2, zero=3, strategy="recompute", objective="siglip", options=True),
    Case(tensor=2, pipeline=2, objective="genlip"),
    Case(tensor=2, objective="clip"),
    Case(data=2, zero=3, objective="generation"),
    Case(objective="siglip", options=True, dtype="bfloat16"),
    Case(compiled=True),
    Case(tensor=2, dtype="bfloat16"),
    Case(tensor=2, pipeline=2, strategy="recompute", dtype="bfloat16"),
    Case(data=2, zero=3, strategy="recompute", dtype="bfloat16"),
)
"""the rest of what goes with what, the other objectives among it, and compiled blocks where there is a compiler"""


def make_batches(config: Config, step: int) -> list[PackedBatch]:
    """The packs of a step's global batch, in global order."""
    config, images = phase_at(config, step).config, IMAGES_OF_PACK[step]
    make = _documents if objectives.create(config).sequences.interleaved else _pairs
    return [
        _pack(config, make, config.train.global_batch * step + n, images[n % len(images)], 100_000 * step + n)
        for n in range(config.train.global_batch)
    ]


def joined(packs: Sequence[PackedBatch]) -> PackedBatch:
    """The packs as one micro-batch."""
    rows = [TOKENS * n for n in range(len(packs))]

    def shifted(name: str) -> torch.Tensor:
        """Numbers of rows, where there are any."""
        own = [getattr(pack, name) for pack in packs]
        return torch.cat([torch.where(x >= 0, x + row, x) for x, row in zip(own, rows, strict=True)])

    positions = shifted("target_positions")
    fields: dict[str, Any] = {
        name: torch.cat([getattr(pack, name) for pack in packs])
        for name in ("tokens", "positions", "targets", "images", "image_valid", "kept_patches")
    }
    fields |= {name: shifted(name) for name in ("image_start", "image_soi")}
    fields["target_positions"] = torch.cat([positions[positions >= 0], positions[positions < 0]])
    starts = [pack.cu_seqlens[:-1] + row for pack, row in zip(packs, rows, strict=True)]
    fields["cu_seqlens"] = torch.cat([*starts, torch.tensor([TOKENS * len(packs)], dtype=torch.int32)])
    for name in ("num_targets", "num_pairs", "num_images", "num_tokens"):
        fields[name] = sum(getattr(pack, name) for pack in packs)
    fields["max_seqlen"] = max(pack.max_seqlen for pack in packs)
    return dataclasses.replace(packs[0], **fields, packs=tuple(n for pack in packs for n in pack.packs))


def lone_images_and_texts(config: Config) -> tuple[torch.Tensor, list[list[int]]]:
    """What an evaluation encodes by itself: three images, and token ids of five texts."""
    draw, size = torch.Generator().manual_seed(7), config.model.vision.image_size
    special = SpecialTokens.of(config.model.language.vocab_size)
    images = torch.randint(0, 256, (3, 3, size, size), generator=draw, dtype=torch.uint8)
    return images, [_words(draw, special.sot) for _ in range(5)]


@dataclass
class _Written:
    """A pack while sequences are put into it, one after another."""

    sequences: list[list[int]]
    image_start: list[int]
    image_soi: list[int]
    targets: list[list[int]]
    """of each sequence's rows, -1 where there is none"""

    @property
    def rows(self) -> int:
        return sum(map(len, self.sequences))


def _pack(config: Config, make: Any, number: int, num_images: int, seed: int) -> PackedBatch:
    """A pack of what `make` writes for so many images, and some room at its end."""
    draw, vision = torch.Generator().manual_seed(seed), config.model.vision
    written = _Written([], [], [], [])
    make(written, config, num_images, draw)
    used, slots = written.rows, len(written.image_soi)
    context = config.model.language.context_length
    tokens, positions, targets = (torch.full((TOKENS,), fill, dtype=torch.int32) for fill in (0, 0, -1))
    image_start, image_soi = (torch.full((IMAGES,), -1, dtype=torch.int32) for _ in range(2))
    tokens[:used] = torch.tensor([i for ids in written.sequences for i in ids])
    targets[:used] = torch.tensor([i for ids in written.targets for i in ids])
    positions[:used] = torch.cat([torch.arange(len(ids)) for ids in written.sequences])
    image_start[:slots], image_soi[:slots] = torch.tensor(written.image_start), torch.tensor(written.image_soi)
    bounds = [0, *itertools.accumulate(map(len, written.sequences))]
    assert max(map(len, written.sequences)) <= context, written
    while bounds[-1] < TOKENS:
        bounds.append(min(bounds[-1] + context, TOKENS))
    rows_with_target = (targets >= 0).nonzero()[:, 0].int()
    target_positions = torch.full((TOKENS,), -1, dtype=torch.int32)
    target_positions[: len(rows_with_target)] = rows_with_target
    pixels = torch.zeros(IMAGES, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    pixels[:slots] = torch.randint(0, 256, pixels[:slots].shape, generator=draw, dtype=torch.uint8)
    kept = torch.empty(0, dtype=torch.int32)
    if vision.patch_dropout:
        drawn = [torch.randperm(vision.num_patches, generator=draw)[: vision.num_kept] for _ in range(IMAGES)]
        kept = torch.cat([patches.sort().values for patches in drawn]).int()
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        targets=targets,
        target_positions=target_positions,
        images=pixels,
        image_start=image_start,
        image_soi=image_soi,
        image_valid=(torch.arange(IMAGES) < slots).int(),
        kept_patches=kept,
        num_targets=len(rows_with_target),
        num_pairs=int((image_soi >= 0).sum()),
        num_images=slots,
        num_tokens=used,
        max_seqlen=max(end - start for start, end in itertools.pairwise(bounds)),
        num_patches=vision.num_kept,
        packs=(number,),
    )


def _documents(written: _Written, config: Config, num_images: int, draw: torch.Generator) -> None:
    """Two documents; the first image of the second one leads its document."""
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_placeholders
    contrast = objectives.create(config).sequences.contrast
    for document, images in enumerate((num_images - num_images // 2, num_images // 2)):
        ids = [special.sot]
        for leads in [document == 1] * bool(images) + [False] * (images - 1):
            if not leads:
                ids += _words(draw, special.sot)
            written.image_soi.append(written.rows + len(ids) if contrast and not leads else -1)
            written.image_start.append(written.rows + len(ids) + 1)
            ids += [special.soi, *[special.placeholder] * patches, special.eoi]
        ids += [*_words(draw, special.sot), special.eot]
        hidden = (special.placeholder, special.eoi)
        written.targets.append([-1 if i in hidden else i for i in ids[1:]] + [-1])
        written.sequences.append(ids)


def _pairs(written: _Written, config: Config, num_images: int, draw: torch.Generator) -> None:
    """Pairs, at most two of which fit, with or without captions, or these alone; or, without images, one document."""
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_placeholders
    sequences = objectives.create(config).sequences
    if not num_images:
        _documents(written, config, 0, draw)
    for _ in range(min(num_images, 2)):
        words = _words(draw, special.sot)
        written.image_soi.append(written.rows + 1 + len(words) if sequences.contrast else -1)
        if sequences.contrast:
            written.sequences.append([special.sot, *words, special.soi])
            written.targets.append([-1] * (2 + len(words)))
        written.image_start.append(written.rows + 2 if sequences.captions else -1)
        if sequences.captions:
            start = [special.sot, special.soi, *[special.placeholder] * patches, special.eoi]
            written.sequences.append([*start, *words, special.eot])
            written.targets.append([*[-1] * (len(start) - 1), *words, special.eot, -1])


def _words(draw: torch.Generator, end: int) -> list[int]:
    return torch.randint(1, end, (2 + int(torch.randint(0, 3, (1,), generator=draw)),), generator=draw).tolist()
