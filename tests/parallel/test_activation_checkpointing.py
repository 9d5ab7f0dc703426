"""Activation checkpointing: the same gradients, and less kept from forward to backward."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_lcl import config as configs
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LayerList, pack_padded
from megatron_lcl.model.special import SpecialTokens

LAYERS = 4
MODEL = configs.from_dict(
    {
        "model": {
            "vision": {
                "image_size": 32,
                "patch_size": 8,
                "width": 64,
                "layers": LAYERS,
                "heads": 2,
                "mlp_width": 256,
            },
            "language": {
                "context_length": 64,
                "vocab_size": 101,
                "width": 64,
                "layers": LAYERS,
                "heads": 2,
                "mlp_width": 256,
            },
            "pool_heads": 2,
        }
    }
).model


def make_batch() -> PackedBatch:
    """Two sequences with uint8 images, as a loader gives them."""
    special, patches = SpecialTokens.of(101), MODEL.vision.num_patches
    image = [special.soi, *[special.placeholder] * patches, special.eoi]
    rows = [[special.sot, 5, 6, *image, 7, *image, special.eot], [special.sot, 9, *image, 8, 3, special.eot]]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(2, int(lengths.max()), dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pack_padded(tokens, lengths, images, MODEL)


class Alive(TorchDispatchMode):
    """Knows the storages that operations made, and so how many bytes of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made.append((StorageWeakRef(storage), storage.nbytes()))
        return out

    def num_bytes(self) -> int:
        gc.collect()
        return sum({ref.cdata: size for ref, size in self.made if not ref.expired()}.values())


class Run:
    """A forward and a backward; `kept`: the bytes alive between them."""

    def __init__(self, recompute: Any, every: int = 1) -> None:
        layers = build_layers(MODEL, 2.0, recompute=recompute, recompute_every=every)
        initialize(dict(enumerate(layers)), MODEL, seed=0)
        model, batch = LayerList(*layers), make_batch()
        with Alive() as alive:
            out = model(batch)
            loss = out.generation + (out.image_features * out.text_features).sum() * out.log_scale.sum()
        self.kept, self.loss = alive.num_bytes(), loss.detach()
        loss.backward()
        self.gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["full", "attention"])
@pytest.mark.parametrize("every", [1, 2])
def test_gradients_are_equal(recompute: str, every: int) -> None:
    plain, ours = Run("none"), Run(recompute, every)
    assert torch.equal(ours.loss, plain.loss)
    assert ours.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in plain.gradients.items())


def test_what_is_computed_again_is_not_kept() -> None:
    kept = {setting: Run(*setting).kept for setting in (("none",), ("full",), ("full", 2), ("attention",))}
    batch, width = make_batch(), 64
    rows = len(batch.images) * (1 + MODEL.vision.num_patches) + len(batch.tokens)
    row = 4 * width * rows  # bytes of one number each for every row and feature, of both encoders together
    # in widths, a block keeps its input, both norms' results, q, k, v, what attention gives, the sum before the second
    # norm, and four each before and behind GELU: 16, of which one that is computed again keeps the first
    saved = {setting: (kept[("none",)] - size) / (LAYERS * row) for setting, size in kept.items()}
    assert 13 < saved[("full",)] < 17
    assert saved[("full", 2)] == pytest.approx(saved[("full",)] / 2, rel=0.02)
    assert 4.5 < saved[("attention",)] < 6.5
