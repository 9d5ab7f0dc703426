"""What the selftest trains: a tiny model, one ragged global batch a step, and the layouts that must agree on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch, num_runs
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train.optimizer import learning_rate

STEPS = 3
MIN_PACKS = 4
"""of a step; more where there are more replicas, each of which has one at least"""
TOKENS, IMAGES, CONTEXT = 60, 4, 40
"""token slots and image slots of a pack; longest sequence"""
IMAGES_OF_PACK = ((4, 0, 3, 0), (2, 0, 4, 0), (3, 0, 1, 0))
"""images of each pack of each step, over and over: with two replicas the second one never has an image"""


@dataclass(frozen=True)
class Case:
    """A layout and a way to compute the contrast."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 1
    strategy: str = "retain"
    climbs: bool = False
    """the log scale starts just below ln 100, and the steps go uphill, so that it goes up and is clamped; in other
    cases it goes down"""
    dtype: str = "float32"

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def name(self) -> str:
        name = f"tp {self.tensor}  pp {self.pipeline}  dp {self.data}  ZeRO-{self.zero}  {self.strategy}"
        name += f", {self.dtype}" * (self.dtype != "float32")
        return f"{name}, scale at its bound" if self.climbs else name

    @property
    def global_batch(self) -> int:
        """Packs of a step: what decides the result, beside `climbs`."""
        return -(-MIN_PACKS // self.data) * self.data

    def lr(self, step: int) -> float:
        """Learning rate of a step: negative where the steps go uphill."""
        rate = learning_rate(step, self.config().optimizer, STEPS)
        return -rate if self.climbs else rate

    def config(self) -> Config:
        """The run's config."""
        return configs.from_dict(
            {
                "model": {
                    "vision": {
                        "image_size": 16,
                        "patch_size": 8,
                        "width": 40,
                        "layers": 2,
                        "heads": 4,
                        "mlp_width": 64,
                    },
                    "language": {
                        "context_length": CONTEXT,
                        "vocab_size": 103,  # divides into nothing
                        "width": 32,  # no module's parameters are so few that their bytes are not counted
                        "layers": 3,
                        "heads": 4,
                        "mlp_width": 48,
                    },
                    "pool_heads": 4,
                },
                "data": {"tokens_per_pack": TOKENS, "images_per_pack": IMAGES},
                "contrast": {
                    "strategy": self.strategy,
                    "initial_log_scale": math.log(99.95 if self.climbs else 1 / 0.07),
                },
                "optimizer": {"lr": 1e-3, "warmup": 0, "clip_norm": 0.5},
                "zero": {"stage": self.zero},
                "parallel": {"tensor": self.tensor, "pipeline": self.pipeline},
                "train": {
                    "steps": STEPS,
                    "global_batch": self.global_batch,
                    "micro_batch": 1,
                    "dtype": self.dtype,  # the same on every device: it is what the bounds are for
                },
                # no parameter is so small that ZeRO-3 leaves it whole
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
            }
        )


CASES = (
    Case(),
    Case(tensor=2),
    Case(pipeline=2),
    Case(pipeline=2, strategy="recompute"),
    Case(data=2),
    Case(data=2, strategy="recompute"),
    Case(data=2, zero=2),
    Case(data=2, zero=3, strategy="recompute"),
    Case(tensor=2, pipeline=2),
    Case(tensor=2, pipeline=2, strategy="recompute"),
    Case(tensor=2, data=2),
    Case(tensor=2, data=2, strategy="recompute", climbs=True),
    Case(pipeline=2, data=2),
    Case(pipeline=2, data=2, strategy="recompute", climbs=True),
    Case(pipeline=4),
    Case(tensor=4),
    # what a run on GPUs uses: half precision, and with it flash-attn or torch's variable-length attention
    Case(dtype="bfloat16"),
    Case(tensor=2, dtype="bfloat16"),
    Case(pipeline=2, data=2, strategy="recompute", dtype="bfloat16"),
    Case(data=2, zero=3, strategy="recompute", dtype="bfloat16"),
)


def make_batches(config: Config, step: int) -> list[PackedBatch]:
    """The packs of a step's global batch, in global order, one to a micro-batch."""
    images = IMAGES_OF_PACK[step]
    return [_pack(config, step, n, images[n % len(images)]) for n in range(config.train.global_batch)]


def _pack(config: Config, step: int, number: int, num_images: int) -> PackedBatch:
    """A pack of two documents and some room at its end; the first image of the second one leads its document."""
    draw = torch.Generator().manual_seed(100_000 * step + number)
    vision, vocab_size = config.model.vision, config.model.language.vocab_size
    special, patches = SpecialTokens.of(vocab_size), vision.num_patches
    tokens, positions, targets = (torch.full((TOKENS,), fill, dtype=torch.int32) for fill in (0, 0, -1))
    image_start, image_soi = (torch.full((IMAGES,), -1, dtype=torch.int32) for _ in range(2))
    bounds, slot = [0], 0
    for document, images in enumerate((num_images - num_images // 2, num_images // 2)):
        ids = [special.sot]
        for leads in [document == 1] * bool(images) + [False] * (images - 1):
            if not leads:
                ids += _words(draw, special.sot)
            image_soi[slot] = -1 if leads else bounds[-1] + len(ids)
            image_start[slot] = bounds[-1] + len(ids) + 1
            ids += [special.soi, *[special.placeholder] * patches, special.eoi]
            slot += 1
        ids += [*_words(draw, special.sot), special.eot]
        assert len(ids) <= CONTEXT, f"a document of {len(ids)} tokens"
        rows = slice(bounds[-1], bounds[-1] + len(ids))
        tokens[rows], positions[rows] = torch.tensor(ids), torch.arange(len(ids))
        following = torch.tensor([*ids[1:], -1])
        hidden = (following == special.placeholder) | (following == special.eoi)
        targets[rows] = torch.where(hidden, -1, following).int()
        bounds.append(rows.stop)
    used = bounds[-1]
    while bounds[-1] < TOKENS:
        bounds.append(min(bounds[-1] + CONTEXT, TOKENS))
    bounds += [TOKENS] * (num_runs(TOKENS, CONTEXT) + 1 - len(bounds))
    rows_with_target = (targets >= 0).nonzero()[:, 0].int()
    target_positions = torch.full((TOKENS,), -1, dtype=torch.int32)
    target_positions[: len(rows_with_target)] = rows_with_target
    pixels = torch.zeros(IMAGES, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
    pixels[:slot] = torch.randint(0, 256, pixels[:slot].shape, generator=draw, dtype=torch.uint8)
    return PackedBatch(
        tokens=tokens,
        positions=positions,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        targets=targets,
        target_positions=target_positions,
        images=pixels,
        image_start=image_start,
        image_soi=image_soi,
        image_valid=(image_start >= 0).int(),
        num_targets=len(rows_with_target),
        num_pairs=int((image_soi >= 0).sum()),
        num_images=slot,
        num_tokens=used,
        max_seqlen=CONTEXT,
        packs=(config.train.global_batch * step + number,),
    )


def _words(draw: torch.Generator, end: int) -> list[int]:
    return torch.randint(1, end, (2 + int(torch.randint(0, 3, (1,), generator=draw)),), generator=draw).tolist()
