"""The ways of train_step.py: a training step of each, ours, the reference's and open_clip's; used by that program."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
CONFIGS = {"b32": "lcl_vitb32", "b16": "lcl_vitb16", "l14": "lcl_vitl14", "g14": "lcl_vitg"}
OPEN_CLIP = {"b32": "ViT-B-32", "b16": "ViT-B-16", "l14": "ViT-L-14", "g14": "ViT-g-14"}
COCA = {"b32": "coca_ViT-B-32", "l14": "coca_ViT-L-14"}
ROWS = 8
"""documents of a step of the reference"""
TEXT = 77
"""tokens of a text of open_clip"""
EOT = 49407
"""the end of a text, in CLIP's vocabulary"""
IMAGES = 64
"""image slots of a pack of pairs"""


class Parts:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.wait: Callable[[], None] = lambda: None
        self.of_step: dict[str, float] = {}
        self.all: dict[str, list[float]] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wait()
        self.of_step[name] = self.of_step.get(name, 0.0) + time.perf_counter() - start

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time counted."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.part(name):
                return function(*arguments, **options)

        return call

    def end_step(self) -> None:
        for name, seconds in self.of_step.items():
            self.all.setdefault(name, []).append(seconds)
        self.of_step.clear()


def begin(arguments: argparse.Namespace, name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A way's step, a function that gives the numbers of what it has trained on, and those that are always the same."""
    if name.startswith("open_clip"):
        return open_clip_step(arguments, name, dtype, parts)
    step = reference_step if name == "like the reference" else our_step
    return step(arguments, name, dtype, parts)


def place() -> Any:
    """The device that trains."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def num_workers(has_gpu: bool) -> int:
    """Processes that read: a GPU waits for one that decodes; beside a CPU that trains, more would take its cores."""
    return max(1, min(8, len(os.sched_getaffinity(0)) // 2)) if has_gpu else 1


def config_of(arguments: argparse.Namespace, objective: str, dtype: str, options: Collection[str] = ()) -> Any:
    """The shipped config of the size, on the corpus; one process, one pack a micro-batch. options: words of a way."""
    from megatron_lcl import config as configs

    file = ROOT / "configs" / f"{CONFIGS[arguments.model]}_interleaved.yaml"
    given: dict[str, Any] = {
        "data.corpora": str(arguments.work / "corpus"),
        "data.cache": str(arguments.work / "cache"),
        "data.workers": num_workers(place().type == "cuda"),
        "objective.name": objective,
        "contrast.strategy": "retain",
        "train.dtype": "bfloat16" if dtype == "float8" else dtype,
        "train.float8": dtype == "float8",
        "optimizer.name": "muon" if "muon" in options else "adamw",  # as in what it is measured beside
        "train.compile": "compiled" in options or dtype == "float8",
        "parallel.tensor": 1,
        "train.micro_batch": 1,
        "train.global_batch": arguments.packs,
        "checkpoint.every": 1000,
    }
    if arguments.depth:
        given |= {"model.vision.layers": arguments.depth, "model.language.layers": arguments.depth}
    if objective != "lcl":
        patches = configs.load(file, {}).model.vision.num_patches
        # a text is cut where open_clip cuts it; as many tokens as pairs for all image slots have, 28 a text
        length, slots = {"clip": (TEXT, 30), "coca": (TEXT - 1 + patches + 2, 63 + patches)}[objective]
        given |= {"model.language.context_length": length, "data.tokens_per_pack": slots * IMAGES}
        given["data.images_per_pack"] = IMAGES
    return configs.load(file, {key: str(value) for key, value in given.items()})


def loader_for(config: Any) -> Any:
    from megatron_lcl import objectives
    from megatron_lcl.data.loading.ledger import open_run_ledger
    from megatron_lcl.data.loading.loader import loader_of

    sequences = objectives.create(config).sequences
    ledger = open_run_ledger(config, sequences)
    reading, _ = ledger.reading_at(0, config)
    return loader_of(
        reading,
        config.data,
        sequences,
        global_batch=config.train.global_batch,
        ledger=ledger,
        pin_memory=place().type == "cuda",
    )


def our_step(arguments: argparse.Namespace, name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step as `train` makes it."""
    from megatron_lcl.model.flops import Sizes, of_step
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.prefetch import Prefetcher

    objective, *options = name.split()
    config = config_of(arguments, objective, dtype, options)
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= one
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    loader = loader_for(config)
    number = config.train.global_batch
    batches = iter(loader)
    if "preloaded" in options:
        batches = itertools.cycle(list(itertools.islice(batches, steps_of(arguments) * number)))
    prefetcher = Prefetcher(batches, number, engine.device)
    stepper._first_forwards = parts.timed("forward", stepper._first_forwards)  # of lcl, clip and coca: all of them
    engine.backward = parts.timed("backward", engine.backward)
    engine.step = parts.timed("optimizer", engine.step)

    def step() -> dict[str, float]:
        with parts.part("data"):
            packs, copies = prefetcher.take()
        pending = stepper.start(broadcast_batches(copies, number, 1, mesh, engine.device), 1e-4)
        with parts.part("data"):  # on a GPU the next step's is read here
            prefetcher.begin()
        pending.read()
        sizes = Sizes.of(packs)
        origins = [origin for pack in packs for n in pack.packs for origin in loader.reader.provenance(n)]
        return {
            "documents": num_documents(origins) if objective == "lcl" else 0,
            "images": sum(pack.num_images for pack in packs),
            "tokens": sum(pack.num_tokens for pack in packs),
            "flops": of_step(config.model, sizes, contrast=True).total,
        }

    return step, {}


def steps_of(arguments: argparse.Namespace) -> int:
    """Steps of a way: one that warms up, those that are timed, one more for the parts."""
    return arguments.repeats + 2


def num_documents(origins: Iterable[Any]) -> int:
    """Documents of sequences: one of several sequences counts once, with its first."""
    return sum(origin.part == 0 for origin in origins)


def reference_step(arguments: argparse.Namespace, _name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step as the reference makes it, of the same parameters."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_lcl import config as configs
    from megatron_lcl.model import layers as modules
    from megatron_lcl.model.flops import Sizes, of_step
    from megatron_lcl.model.initialize import initialize
    from megatron_lcl.model.lcl import LayerList

    assert dtype == "float32"
    config = config_of(arguments, "lcl", dtype)
    length = config.model.language.context_length

    def attend(q: Any, k: Any, v: Any, _cu_seqlens: Any, _max: int) -> Any:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    def all_logits(hidden: Any, weight: Any, targets: Any, *_: Any, **__: Any) -> Any:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets.long(), ignore_index=-1, reduction="sum")

    stack = [make() for make in modules.layer_specs(config.model, config.initial_log_scale, attention=attend)]
    initialize(dict(enumerate(stack)), config.model, 0)
    model = LayerList(*stack)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    # documents are whole in its packs, or as long as these: not divided, but cut at the end of their row
    whole = configs.replace(config, model__language__context_length=config.data.tokens_per_pack)
    rows = padded_rows(loader_for(whole), length)
    mask = torch.zeros(0)

    def of_images(batch: Any) -> float:
        found = of_step(config.model, Sizes.of([batch]))
        return found.vision + found.pool

    def step() -> dict[str, float]:
        nonlocal mask
        with parts.part("data"):
            batch, own = next(rows)
            mask = own
        optimizer.zero_grad()
        with parts.part("forward"), mock.patch.object(modules, "generation_loss", all_logits):
            out = model(batch)
            pairs = (batch.image_soi >= 0).nonzero()[:, 0]
            images, texts = (F.normalize(x[pairs], dim=-1) for x in (out.image_features, out.text_features))
            logits = out.log_scale.exp() * images @ texts.T
            labels = torch.arange(len(logits))
            contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            loss = 0.1 * contrast + out.generation / batch.num_targets
        with parts.part("backward"):
            loss.backward()
        with parts.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        numbers = {"documents": ROWS, "images": batch.num_images, "tokens": batch.num_tokens}
        return numbers | {"flops": of_rows + of_images(batch)}

    of_rows = 0.0  # all but that of images is the same in every step
    with FlopCounterMode(display=False) as counter:
        of_rows = -step()["flops"]
    of_rows += counter.get_total_flops()
    return step, {}


def padded_rows(loader: Any, length: int) -> Iterator[tuple[Any, Any]]:
    """Batches of documents, each cut at the context length or padded to it, and the mask of their attention,
    [ROWS, 1, S, S]."""
    import torch

    from megatron_lcl.data.loading.batch import PackedBatch

    waiting: list[dict[str, Any]] = []
    for pack in loader:
        origins = itertools.chain.from_iterable(map(loader.reader.provenance, pack.packs))
        waiting += [document_of(pack, own.start, own.stop, length) for own in origins if own.part == 0]
        while len(waiting) >= ROWS:
            now, waiting = waiting[:ROWS], waiting[ROWS:]
            tokens, targets = torch.zeros(ROWS * length, dtype=torch.int32), torch.full((ROWS * length,), -1).int()
            used = torch.zeros(ROWS, length, dtype=torch.bool)
            starts, sois = [], []
            for i, document in enumerate(now):
                at, own = i * length, len(document["tokens"])
                tokens[at : at + own], targets[at : at + own] = document["tokens"], document["targets"]
                used[i, :own] = True
                starts.append(document["start"] + at)
                sois.append(torch.where(document["soi"] >= 0, document["soi"] + at, -1))
            allowed = torch.ones(length, length, dtype=torch.bool).tril() & used[:, None, None, :]
            allowed |= torch.eye(length, dtype=torch.bool)  # a row of padding sees itself, or its softmax is of nothing
            images = torch.cat([document["images"] for document in now])
            batch = PackedBatch(
                tokens=tokens,
                positions=torch.arange(length, dtype=torch.int32).repeat(ROWS),
                cu_seqlens=torch.arange(ROWS + 1, dtype=torch.int32) * length,
                targets=targets,
                target_positions=torch.arange(ROWS * length),
                images=images,
                image_start=torch.cat(starts).int(),
                image_soi=torch.cat(sois).int(),
                image_valid=torch.ones(len(images), dtype=torch.int32),
                kept_patches=torch.empty(0, dtype=torch.int32),
                num_targets=int((targets >= 0).sum()),
                num_pairs=int((torch.cat(sois) >= 0).sum()),
                num_images=len(images),
                num_tokens=int(used.sum()),
                max_seqlen=length,
                num_patches=pack.num_patches,
            )
            yield batch, torch.zeros(ROWS, 1, length, length).masked_fill_(~allowed, float("-inf"))


def document_of(pack: Any, start: int, stop: int, length: int) -> dict[str, Any]:
    """The document in rows start … stop-1 of a pack, cut at the context length, or before an image that crosses it."""
    import torch

    inside = (pack.image_start >= start) & (pack.image_start < stop)
    first = pack.image_start[inside] - start
    stays = first + pack.num_patches < length  # its `<eoi>` too
    last = min([stop - start, length, *(int(row) - 1 for row in first[~stays])])
    targets = pack.targets[start : start + last].clone()
    targets[-1] = -1
    soi = pack.image_soi[inside][stays]
    return {
        "tokens": pack.tokens[start : start + last],
        "targets": targets,
        "images": pack.images[inside][stays],
        "start": first[stays],
        "soi": torch.where(soi >= 0, soi - start, -1),
    }


def pairs_of(packs: list[Any], length: int) -> tuple[Any, Any, int]:
    """Of packs of pairs the images, uint8 [N, 3, H, W], the texts as open_clip has them, [N, length], `<sot> text
    <eot>` and zeros, and how many tokens these are. Its vocabulary, and the ids of both marks, are ours."""
    import torch

    images, texts = [], []
    for pack in packs:
        begins = pack.cu_seqlens
        for slot in (pack.image_soi >= 0).nonzero()[:, 0]:
            soi = pack.image_soi[slot]
            first = begins[torch.searchsorted(begins, soi, right=True) - 1]
            text = pack.tokens[first:soi]
            texts.append(torch.cat([text, text.new_tensor([EOT])]))
            images.append(pack.images[slot])
    padded = torch.zeros(len(texts), length, dtype=torch.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return torch.stack(images), padded, sum(map(len, texts))


def open_clip_step(arguments: argparse.Namespace, name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step of open_clip's model of this size on the pairs that ours reads in the same step."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD

    objective, device = name.split()[-1], place()
    coca = objective == "coca"
    batches = open_clip_batches(arguments, objective, dtype, device)
    named = (COCA if coca else OPEN_CLIP)[arguments.model]
    cut: dict[str, Any] = {}
    if arguments.depth:
        cut = {"vision_cfg": {"layers": arguments.depth}, "text_cfg": {"layers": arguments.depth}}
        known = open_clip.get_model_config(named)
        cut = {part: {**known[part], **value} for part, value in cut.items()}
    model = open_clip.create_model(named, pretrained=None, device=device, **cut)
    model.train()
    loss_of = open_clip.loss.CoCaLoss(2.0, 1.0) if coca else open_clip.loss.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (IMAGE_MEAN, IMAGE_STD))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    following, of_image = itertools.cycle(batches), 0.0

    def train(pixels: Any, texts: Any) -> None:
        optimizer.zero_grad()
        with parts.part("forward"), autocast:
            images = (pixels.float() / 255 - mean) / std  # as in ours, a part of the step
            found = loss_of(**model(images, texts), output_dict=True) if coca else loss_of(*model(images, texts))
            loss: Any = sum(found.values()) if isinstance(found, dict) else found
        with parts.part("backward"):
            loss.backward()
        with parts.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    def step() -> dict[str, float]:
        pixels, texts, tokens = next(following)
        train(pixels, texts)
        size = len(pixels)
        return {"documents": 0, "images": size, "tokens": tokens, "flops": size * of_image}

    with FlopCounterMode(display=False) as counter:
        train(*batches[0][:2])
    of_image = counter.get_total_flops() / len(batches[0][0])  # but for the similarities the same for each
    return step, {}


def open_clip_batches(
    arguments: argparse.Namespace, objective: str, dtype: str, device: Any
) -> list[tuple[Any, Any, int]]:
    """The pairs of each step, on the device before the first: its own loader is not measured."""
    packs = iter(loader_for(config_of(arguments, objective, dtype)))
    batches = []
    for _ in range(steps_of(arguments)):
        # CoCa adds a token of its own
        pixels, texts, tokens = pairs_of(list(itertools.islice(packs, arguments.packs)), TEXT - (objective == "coca"))
        batches.append((pixels.to(device), texts.to(device), tokens))
    return batches
