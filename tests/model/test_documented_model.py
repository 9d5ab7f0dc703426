"""The model and its initial values as docs/model.md has them, in plain torch and float64, one image and one sequence
after another, beside `LCL`."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from data.documented_hashes import key_of

from megatron_lcl import config as configs
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.initialize import initialize
from megatron_lcl.model.layers import build_layers
from megatron_lcl.model.lcl import LCL, LayerList
from megatron_lcl.selftest.cases import IMAGES, TOKENS, Case, joined, make_batches

SEED = 3
MEAN, STD = torch.tensor(
    [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]], dtype=torch.float64
)[:, :, None, None]
VISION = {"image_size": 16, "patch_size": 8, "width": 40, "layers": 3, "heads": 4, "mlp_width": 64}
LANGUAGE = {"context_length": 40, "vocab_size": 103, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "registers": ({"registers": 2, "norm_eps": 1e-3}, {}),
    "scales and norms": (
        {"layer_scale": 0.5, "qk_norm": True, "norm_eps": 1e-3},
        {"layer_scale": 0.1, "qk_norm": True},
    ),
    "drop path": ({"drop_path": 0.6, "registers": 1, "embedding_norm": False}, {"drop_path": 0.7}),
    "patch dropout": ({"patch_dropout": 0.5, "patch_dropout_places": "all"}, {}),
}


def model_of(variant: str) -> Model:
    vision, language = VARIANTS[variant]
    tree = {"vision": {**VISION, **vision}, "language": {**LANGUAGE, **language}, "pool_heads": 4, "logit_bias": -10.0}
    return configs.from_dict({"model": tree}).model


# --- the page -----------------------------------------------------------------------------------------------------


def uniform(*values: int) -> float:
    return (key_of(*values) >> 11) * 2.0**-53


class Documented:
    """The layers, by index, on one image or one sequence."""

    def __init__(self, model: Model, parameters: Mapping[str, torch.Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self.pool = 1 + model.vision.layers
        self.head = self.pool + 1 + model.language.layers

    def norm(self, x: torch.Tensor, name: str, eps: float = 1e-5) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        x = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return x * self.parameters[f"{name}.weight"] + self.parameters[f"{name}.bias"]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.parameters[f"{name}.weight"].t() + self.parameters[f"{name}.bias"]

    def block(
        self, x: torch.Tensor, first: int, n: int, encoder: Vision | Language, causal: bool, pack: int, unit: int
    ) -> torch.Tensor:
        """Block n of an encoder whose first has the index `first`, on rows [rows, width]."""
        name, eps = f"{first + n}", getattr(encoder, "norm_eps", 1e-5)
        normed = self.norm(x, f"{name}.norm1", eps)
        q, k, v = (self.linear(normed, f"{name}.attention.{y}").unflatten(1, (encoder.heads, -1)) for y in "qkv")
        if encoder.qk_norm:
            q, k = self.norm(q, f"{name}.attention.norm_q", eps), self.norm(k, f"{name}.attention.norm_k", eps)
        logits = torch.einsum("qhf,khf->hqk", q, k) / math.sqrt(q.shape[-1])
        if causal:
            logits = logits.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -math.inf)
        attended = torch.einsum("hqk,khf->qhf", logits.softmax(-1), v).flatten(1)
        x = x + self.kept(self.linear(attended, f"{name}.attention.out"), 0, n, encoder, name, pack, unit)
        up = self.linear(self.norm(x, f"{name}.norm2", eps), f"{name}.mlp.up")
        down = self.linear(0.5 * up * (1 + torch.erf(up / math.sqrt(2))), f"{name}.mlp.down")
        return x + self.kept(down, 1, n, encoder, name, pack, unit)

    def kept(
        self, x: torch.Tensor, branch: int, n: int, encoder: Vision | Language, name: str, pack: int, unit: int
    ) -> torch.Tensor:
        """What a branch adds: layer scale, drop path."""
        if encoder.layer_scale is not None:
            x = x * self.parameters[f"{name}.scale{branch + 1}"]
        rate = encoder.drop_path * n / (encoder.layers - 1)
        constant = 2**21 if isinstance(encoder, Vision) else 2**20
        return x * 0 if uniform(SEED, pack, unit, 2 * (n + constant) + branch) < rate else x / (1 - rate)

    def image(
        self, pixels: torch.Tensor, read: list[int], pack: int = 0, slot: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [3, H, W] → z [D], and what is read in place of each placeholder of the patches `read` [K, D]."""
        vision, own = self.model.vision, self.parameters
        colors = (pixels.double() / 255 - MEAN) / STD
        p, side = vision.patch_size, vision.image_size // vision.patch_size
        rows = []
        for patch in read:
            top, left = patch // side * p, patch % side * p
            rows.append(own["0.projection.weight"] @ colors[:, top : top + p, left : left + p].reshape(-1))
            rows[-1] = rows[-1] + own["0.positions"][1 + patch]
        first = [own["0.class_embedding"] + own["0.positions"][0], *own.get("0.registers", ())]
        x = torch.stack([*first, *rows])
        if vision.embedding_norm:
            x = self.norm(x, "0.norm", vision.norm_eps)
        for n in range(vision.layers):
            x = self.block(x, 1, n, vision, False, pack, slot)
        x = self.norm(x, f"{self.pool}.norm", vision.norm_eps)[len(first) :]
        q, k, v = (
            self.linear(self.norm(y, f"{self.pool}.norm_{z}"), f"{self.pool}.{z}").unflatten(
                1, (self.model.pool_heads, -1)
            )
            for y, z in ((own[f"{self.pool}.query"], "q"), (x, "k"), (x, "v"))
        )
        weights = (torch.einsum("qhf,khf->hqk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        pooled = torch.einsum("hqk,khf->qhf", weights, v).flatten(1)
        out = own[f"{self.pool}.out.weight"].t()
        return (pooled @ out)[0], v.flatten(1) @ out

    def sequence(
        self, ids: torch.Tensor, patches: Mapping[int, torch.Tensor], pack: int = 0, first_row: int = 0
    ) -> torch.Tensor:
        """Ids [S], and of some rows the patch in place of the token → what the last block gives, [S, D]."""
        rows = [patches.get(i, self.parameters[f"{self.pool}.embedding.weight"][token]) for i, token in enumerate(ids)]
        x = torch.stack(rows) + self.parameters[f"{self.pool}.positions"][: len(ids)]
        for n in range(self.model.language.layers):
            x = self.block(x, self.pool + 1, n, self.model.language, True, pack, first_row)
        return x

    def context(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden, f"{self.head}.norm") @ self.parameters[f"{self.head}.projection.weight"].t()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden, f"{self.head}.vocabulary_norm")
        return normed @ self.parameters[f"{self.head}.vocabulary"].t()


def initial(model: Model, name: str, shape: torch.Size) -> torch.Tensor:
    """A parameter of a run whose `train.seed` is SEED."""
    index, _, leaf = name.partition(".")
    v, d = model.vision.width**-0.5, model.language.width**-0.5
    pool = 1 + model.vision.layers
    number, head = int(index), pool + 1 + model.language.layers
    encoder = model.vision if number < pool else model.language
    if leaf in ("scale1", "scale2"):
        return torch.full(shape, encoder.layer_scale)
    if leaf in ("log_scale", "logit_bias"):
        return torch.tensor([math.log(1 / 0.07) if leaf == "log_scale" else model.logit_bias])
    if number == 0:
        scales = {"projection.weight": (3 * model.vision.patch_size**2) ** -0.5}
        scales |= {"class_embedding": v, "registers": v, "positions": v}
    elif number == pool:
        scales = {"query": 0.02, "embedding.weight": 0.02, "positions": 0.01, "out.weight": d}
        scales |= {"q.weight": v, "k.weight": v, "v.weight": v}
    elif number == head:
        scales = {"projection.weight": d, "vocabulary": 0.02}
    else:
        width, residual = encoder.width**-0.5, (2 * encoder.layers * encoder.width) ** -0.5
        scales = {f"attention.{x}.weight": width for x in "qkv"} | {"mlp.up.weight": (2 * encoder.width) ** -0.5}
        scales |= {"attention.out.weight": residual, "mlp.down.weight": residual}
    if leaf not in scales:
        return torch.ones(shape) if leaf.endswith(".weight") else torch.zeros(shape)
    digest = hashlib.blake2b(f"{SEED}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") // 2)
    return torch.randn(shape, generator=generator) * scales[leaf]


# --- beside the model ---------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What is compared, of a micro-batch."""

    latents: torch.Tensor
    contexts: torch.Tensor
    logits: torch.Tensor
    """of the rows of documents"""
    generation: torch.Tensor

    def scalar(self) -> torch.Tensor:
        """In which each number has a weight of its own."""
        draw = torch.Generator().manual_seed(1)
        features = (self.latents, self.contexts)
        return self.generation + sum((torch.randn(x.shape, generator=draw) * x).sum() for x in features)


def of_page(page: Documented, batch: PackedBatch) -> Given:
    vision, latents, patches = page.model.vision, [], {}
    kept = batch.kept_patches.view(len(batch.images), -1).tolist() if len(batch.kept_patches) else None
    for slot, pixels in enumerate(batch.images):
        read = kept[slot] if kept else list(range(vision.num_patches))
        z, embeddings = page.image(pixels, read, batch.packs[slot // IMAGES], slot % IMAGES)
        latents.append(z)
        if (start := int(batch.image_start[slot])) >= 0:
            patches |= {start + patch: row for patch, row in zip(read, embeddings, strict=True)}
    hidden: dict[int, torch.Tensor] = {}
    for start, stop in itertools.pairwise(batch.cu_seqlens.tolist()):
        if batch.tokens[start] != 0:
            of_sequence = {row - start: patch for row, patch in patches.items() if start <= row < stop}
            rows = page.sequence(batch.tokens[start:stop], of_sequence, batch.packs[start // TOKENS], start % TOKENS)
            hidden |= dict(zip(range(start, stop), rows, strict=True))
    assert len(hidden) == batch.num_tokens
    logits = page.logits(torch.stack(list(hidden.values())))
    place = {row: i for i, row in enumerate(hidden)}
    targets = [(place[row], int(t)) for row, t in enumerate(batch.targets) if t >= 0]
    generation = -sum(logits[i].log_softmax(-1)[t] for i, t in targets)
    contexts = page.context(torch.stack([hidden[int(row)] for row in batch.image_soi if row >= 0]))
    return Given(torch.stack(latents), contexts, logits, generation)  # type: ignore[arg-type]


def of_model(model: LCL, batch: PackedBatch) -> Given:
    *layers, head = model.layers
    x: Any = Activations.of(batch)
    for layer in layers:
        x = layer(x)
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    used = [row for start, stop in bounds if batch.tokens[start] != 0 for row in range(start, stop)]
    out = head(x)
    return Given(out.latents, out.contexts[batch.image_soi >= 0], model.head.logits(x.hidden[used]), out.generation)


def built(variant: str) -> LCL:
    """With a run's layers, in training."""
    model = LCL(model_of(variant), seed=None)
    model.layers = LayerList(*build_layers(model.config, math.log(1 / 0.07), seed=SEED))
    initialize(dict(enumerate(model.layers)), model.config, SEED)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_page_is_the_model(variant: str) -> None:
    model = built(variant).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    config = replace(Case().config(), model=model.config)
    first, _, second, _ = make_batches(config, 0)
    batch = joined([replace(first, packs=(7,)), replace(second, packs=(9,))])
    lost = int((batch.image_start >= 0).nonzero()[1, 0])  # an image that does not decode
    for starts in (batch.image_start, batch.image_soi):
        starts[lost] = -1
    assert (batch.image_soi >= 0).sum() > 3
    page = Documented(model.config, dict(model.layers.named_parameters()))
    expected, found = of_page(page, batch), of_model(model, batch)
    for name, a, b in zip(Given._fields, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")
    named = dict(model.layers.named_parameters())
    own, truth = (
        torch.autograd.grad(g.scalar(), list(named.values()), allow_unused=True, materialize_grads=True)
        for g in (found, expected)
    )
    whole = torch.stack([g.norm() for g in truth]).norm()
    for name, a, b in zip(named, own, truth, strict=True):
        assert float((a - b).norm()) <= 1e-5 * float(b.norm()) + 1e-7 * float(whole), name


def test_features_alone_are_the_page_s() -> None:
    """Of whole images, and of texts, as the library encodes them: of unit length, nothing dropped."""
    model = built("scales and norms").double()
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    page, special = Documented(model.config, dict(model.layers.named_parameters())), model.special
    latents = torch.stack([page.image(pixels, [0, 1, 2, 3])[0] for pixels in images])
    torch.testing.assert_close(model.encode_image(images).double(), latents / latents.norm(dim=1, keepdim=True))
    texts = [[special.sot, 5, 9, 2], [special.sot, 7]]
    contexts = torch.stack([page.context(page.sequence(torch.tensor([*ids, special.soi]), {})[-1]) for ids in texts])
    ids = torch.tensor([[*texts[0], special.eot], [*texts[1], special.eot, 0, 0]])
    torch.testing.assert_close(model.encode_text(ids).double(), contexts / contexts.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("variant", ["plain", "registers", "scales and norms"])
def test_initial_values_are_the_page_s(variant: str) -> None:
    model = built(variant)
    for name, parameter in model.layers.named_parameters():
        torch.testing.assert_close(parameter.detach(), initial(model.config, name, parameter.shape), msg=name)
