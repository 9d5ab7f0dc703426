"""The largest attention logits, against each logit computed by itself; layouts are compared by `selftest`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megatron_lcl import config as configs
from megatron_lcl.model.attention_logits import AttentionLogits, watched
from megatron_lcl.model.lcl import LCL
from megatron_lcl.parallel.mesh import ALONE

HEADS, FEATURES = 3, 8
PARTS = ("vision", "pool", "language", "head")
MODEL = {
    "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "heads": 2, "mlp_width": 16},
    "language": {"context_length": 32, "vocab_size": 40, "width": 16, "layers": 2, "heads": 2, "mlp_width": 16},
    "pool_heads": 2,
}


def rows(number: int, seed: int) -> torch.Tensor:
    return torch.randn(number, HEADS, FEATURES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logit(q: torch.Tensor, k: torch.Tensor) -> float:
    return max(float(q[head] @ k[head]) / math.sqrt(FEATURES) for head in range(HEADS))


def read(logits: AttentionLogits, part: str) -> float:
    found = logits.over_all_processes(ALONE, PARTS, torch.device("cpu"))
    return float(found[PARTS.index(part)])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [1, 5, 16, 65])
def test_of_images_those_that_a_loss_reads(length: int, seed: int) -> None:
    used = torch.tensor([True, False, True])
    q, k = rows(3 * length, seed), rows(3 * length, seed + 10)
    q[length : 2 * length] *= 100  # of the image that nothing reads
    logits = AttentionLogits()
    logits.of_images(q, k, length, used)
    looked = range(length) if length <= 16 else [math.floor(i * (length - 1) / 15) for i in range(16)]
    expected = max(
        logit(q[image * length + row], k[image * length + key])
        for image in (0, 2)
        for row in looked
        for key in range(length)
    )
    assert read(logits, "vision") == pytest.approx(expected)
    logits.of_images(q / 2, k, length, used)
    assert read(logits, "vision") == pytest.approx(expected), "the largest of the layers"
    assert math.isnan(read(logits, "pool"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lengths", [[[3, 1, 4], [8]], [[30, 100, 1], [60, 40]], [[1, 1, 1, 1]]])
def test_of_a_pack_those_inside_of_its_sequences(lengths: list[list[int]], seed: int) -> None:
    """What lies past a pack's last sequence has no logits; neither has a first token, which sees itself alone."""
    tokens = max(sum(pack) for pack in lengths)
    positions = torch.zeros(len(lengths), tokens, dtype=torch.int32)
    first: dict[tuple[int, int], int] = {}
    for p, pack in enumerate(lengths):
        at = 0
        for number in pack:
            positions[p, at : at + number] = torch.arange(number)
            first |= {(p, row): at for row in range(at, at + number)}
            at += number
    q, k = rows(len(lengths) * tokens, seed), rows(len(lengths) * tokens, seed + 10)
    looked = range(tokens) if tokens <= 64 else [math.floor(i * (tokens - 1) / 63) for i in range(64)]
    expected = [
        logit(q[p * tokens + row], k[p * tokens + key])
        for p in range(len(lengths))
        for row in looked
        if (p, row) in first and row > first[p, row]
        for key in range(first[p, row], row + 1)
    ]
    logits = AttentionLogits()
    logits.of_packs(q, k, len(lengths), positions.flatten())
    assert read(logits, "language") == pytest.approx(max(expected) if expected else math.nan, nan_ok=True)


def test_of_the_pool_all_and_what_is_no_number_is_infinite() -> None:
    logits, used = AttentionLogits(), torch.tensor([True])
    q, k = rows(1, 0)[None].transpose(1, 2), rows(4, 1)[None].transpose(1, 2)
    logits.of_pool(torch.cat([q, 100 * q]), torch.cat([k, k.abs()]), torch.tensor([True, False]))
    assert read(logits, "pool") == pytest.approx(max(logit(q[0, :, 0], k[0, :, n]) for n in range(4)))
    q[0, 1, 0, 2] = math.nan
    logits.of_pool(q, k, used)
    logits.of_pool(rows(1, 0)[None].transpose(1, 2), k, used)
    assert read(logits, "pool") == math.inf
    logits.of_images(rows(0, 0), rows(0, 1), 4, torch.zeros(0, dtype=torch.bool))
    assert math.isnan(read(logits, "vision"))


def largest(module: nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    with watched(module) as logits:
        module(images, tokens)
    return logits.over_all_processes(ALONE, PARTS, torch.device("cpu"))


def test_a_model_is_looked_at_where_it_keeps_a_graph_and_stays_the_same() -> None:
    model = LCL(configs.from_dict({"model": MODEL}).model)
    special = model.special
    image = [special.soi, *[special.placeholder] * 4, special.eoi]
    tokens = torch.tensor([[special.sot, 5, 6, *image, 7], [special.sot, 8, *image, 9, 0]])
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = largest(model, images, tokens)
    assert found[:3].isfinite().all()
    assert found[3].isnan()
    with torch.no_grad():
        for parameter in (model.pool.q.weight, model.pool.q.bias):
            parameter.mul_(5)
        assert largest(model, images, tokens).isnan().all(), "no graph"
    factors = largest(model, images, tokens)[:2] / found[:2]
    torch.testing.assert_close(factors, torch.tensor([1.0, 5.0]))
    again = model(images, tokens)
    with watched(model):
        torch.testing.assert_close(model(images, tokens), again, rtol=0, atol=0)
    assert all(vars(layer).get("attention_logits") is None for layer in model.modules()), "nobody looks any more"
