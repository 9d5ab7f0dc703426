"""A whole training step, ours beside the method's reference as it works and beside open_clip's own, in one run.

    python benchmarks/train_step.py docs_no_face_shard_151_v3.jsonl [--model b32] [--depth LAYERS] [--repeats 5] [WAY …]

Documents have the texts, and the numbers of images, of real MMC4 annotations; their images are noise of usual sizes,
as JPEG. Each way trains in a process of its own, with all cores, on packs of the same documents:

    lcl           ours: loader, forward, both losses, backward and optimizer, through the engine; float32 and bfloat16
    lcl compiled  the same with `train.compile`; the first step, in which graphs are made, is not timed
    lcl float8    the same with `train.float8`, on a GPU
    like the reference  our modules used as the method's reference uses its own: one document a row, padded to the
                  context length, attention under a dense mask, all logits at once, torch's AdamW as it is by default
    clip, coca    ours, on pairs of the same documents
    open_clip     its CLIP and CoCa of the same size, their losses and torch's AdamW, on as many images, no loader;
                  bfloat16 is torch.autocast's, its `--precision amp_bf16`

The step is the median of the repeats, the peak that of this machine's matrix products (2048³), measured between steps:
the share of it is what compares runs on machines, or at times, that are not alike. Operations are counted as torch's
FlopCounterMode does, what is computed a second time left out. Last, one more step under torch's profiler: the shares of
matrix products and of attention, and in `bound` the share of the peak that would be left if all else took no time. All
have AdamW. g14 and l14 are cut to --depth blocks an encoder where memory asks for it, which the first line says.

Where there is a CUDA device it is what trains: peak is that of products of 8192³, MiB what torch has allocated on it,
the parts are those of one more step, whose parts the device is waited for after, and there is no profiled step. Not run
on one yet.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
CONFIGS = {"b32": "lcl_vitb32", "b16": "lcl_vitb16", "l14": "lcl_vitl14", "g14": "lcl_vitg"}
OPEN_CLIP = {"b32": "ViT-B-32", "b16": "ViT-B-16", "l14": "ViT-L-14", "g14": "ViT-g-14"}
COCA = {"b32": "coca_ViT-B-32", "l14": "coca_ViT-L-14"}
WAYS = (
    "lcl float32", "lcl compiled float32", "lcl bfloat16", "lcl compiled bfloat16", "like the reference float32",
    "clip float32", "open_clip clip float32", "coca float32", "open_clip coca float32",
)  # fmt: skip
ON_GPU = (
    "lcl bfloat16", "lcl compiled bfloat16", "lcl float8", "clip bfloat16", "open_clip clip bfloat16", "coca bfloat16",
    "open_clip coca bfloat16",
)  # fmt: skip
ROWS = 8
"""documents of a step of the reference"""
REFERENCE_SECONDS, REFERENCE_PEAK = 65.9, 210e9
"""of a step of the method's reference itself, ViT-B/32 and eight such documents, float32, on two cores whose matrix
products reached 205 to 216 GFLOP/s"""
KERNELS = {
    "products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
}  # fmt: skip
"""torch's operations, by what they are called in the table"""
TEXT = 77
"""tokens of a text of open_clip"""
IMAGES = 64
"""image slots of a pack of pairs"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="a shard docs_*.jsonl of MMC4")
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"default: {'; '.join(WAYS)}; on a GPU {'; '.join(ON_GPU)}"
    )
    parser.add_argument("--model", choices=CONFIGS, default="b32")
    parser.add_argument("--depth", type=int, help="blocks of each encoder (default: as published)")
    parser.add_argument("--documents", type=int, default=400, help="of the shard (%(default)s)")
    parser.add_argument("--packs", type=int, default=1, help="of a step (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(measure(arguments)))
        return 0
    if unknown := [way for way in arguments.ways if way not in (*WAYS, *ON_GPU)]:
        parser.error(f"{unknown[0]!r} is none of: {'; '.join(dict.fromkeys((*WAYS, *ON_GPU)))}")
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        make_corpus(arguments.annotations, Path(folder), arguments.documents)
        report(arguments, Path(folder))
    return 0


def report(arguments: argparse.Namespace, folder: Path) -> None:
    import torch

    has_gpu = torch.cuda.is_available()
    depth = f", {arguments.depth} blocks an encoder" if arguments.depth else ""
    where = torch.cuda.get_device_name() if has_gpu else f"{os.cpu_count()} cores"
    print(f"{CONFIGS[arguments.model]}{depth}; {where}; seconds of a step are medians")
    columns = ("docs/s", "images/s", "tokens/s", "step s", "TFLOP", "peak GF/s", "of peak", "bound", "MiB")
    print(f"{'':28}" + "".join(f"{name:>11}" for name in columns) + "   share of the step by part", flush=True)
    for way in arguments.ways or (ON_GPU if has_gpu else WAYS):
        if fault := fault_of(way, has_gpu):
            print(f"{way:28}   {fault}", flush=True)
            continue
        if "coca" in way and arguments.model not in COCA:
            continue
        command = [sys.executable, __file__, str(arguments.annotations), way, "--work", str(folder)]
        command += ["--model", arguments.model, "--packs", str(arguments.packs), "--repeats", str(arguments.repeats)]
        command += ["--depth", str(arguments.depth)] if arguments.depth else []
        environment = {} if has_gpu else {"DS_ACCELERATOR": "cpu"}
        environment["OMP_NUM_THREADS"] = str(len(os.sched_getaffinity(0)))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(row(way, found), flush=True)
        if way == "like the reference float32" and (arguments.model, arguments.depth) == ("b32", None):
            print(beside_the_reference(found), flush=True)


def fault_of(way: str, has_gpu: bool) -> str | None:
    """Why a way cannot be measured here."""
    from megatron_lcl.model.float8 import float8_fault

    if way == "lcl float8":
        return float8_fault()
    return "on CPUs only" if has_gpu and way.startswith("like the reference") else None


def row(way: str, found: dict[str, Any]) -> str:
    """A line of the table."""
    step = statistics.median(found["seconds"])
    peak = statistics.median(found["peaks"])
    numbers = (
        found["documents"] / step if found["documents"] else float("nan"), found["images"] / step,
        found["tokens"] / step, step, found["flops"] / 1e12, peak / 1e9, found["flops"] / step / peak,
        found["flops"] / step / peak / (sum(found["kernels"].values()) or float("nan")), found["memory"],
    )  # fmt: skip
    texts = (f"{n:11.{d}f}" for n, d in zip(numbers, (2, 1, 0, 2, 2, 0, 2, 2, 0), strict=True))
    parts = {name: statistics.median(times) / step for name, times in found["parts"].items()} | found["kernels"]
    return f"{way:28}" + "".join(texts) + "   " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items())


def beside_the_reference(found: dict[str, Any]) -> str:
    """How near the reference's way is to the reference, at the peak of the machine on which that one was timed."""
    step = statistics.median(found["seconds"]) * ROWS / found["documents"]
    there = step * statistics.median(found["peaks"]) / REFERENCE_PEAK
    return (
        f"{'':28}  at {REFERENCE_PEAK / 1e9:.0f} GFLOP/s this step would take {there:.1f} s; the reference itself took "
        f"{REFERENCE_SECONDS} s there: {there / REFERENCE_SECONDS:.2f} of it"
    )


def make_corpus(annotations: Path, folder: Path, documents: int) -> None:
    """A corpus of MMC4's documents, whose images are noise: what they show costs nothing and decides nothing here."""
    import numpy as np
    from PIL import Image

    from megatron_lcl.data.prepare.preprocess import preprocess

    draw, images = np.random.default_rng(0), folder / "images"
    images.mkdir()
    lines = annotations.read_text(encoding="utf-8").splitlines()[:documents]
    for line in lines:
        for image in json.loads(line)["image_info"]:
            small = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(small).resize((640, 480)).save(encoded, "JPEG", quality=85)
            (images / image["image_name"]).write_bytes(encoded.getvalue())
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    preprocess("mmc4", folder / "docs.jsonl", folder / "corpus", images=images, tokenizer="clip")


# --- one way, in a process of its own ----------------------------------------------------------------------------


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


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one way."""
    import torch

    (way,) = arguments.ways
    name, _, dtype = way.rpartition(" ")
    device = place()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    parts = Parts()
    torch.manual_seed(0)
    if name.startswith("open_clip"):
        begin = open_clip_step
    else:
        begin = reference_step if name == "like the reference" else our_step
    before = resident("VmRSS")
    step, facts = begin(arguments, name, dtype, parts)
    step()  # its buffers, the optimizer's moments
    parts.end_step()
    parts.all.clear()
    seconds, peaks, counts, allocated = [], [], [], 0
    for _ in range(arguments.repeats):
        peaks.append(peak(dtype, device, synchronize))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        counts.append(step())
        synchronize()
        seconds.append(time.perf_counter() - start)
        if device.type == "cuda":
            allocated = max(allocated, torch.cuda.max_memory_allocated())
        parts.end_step()
    peaks.append(peak(dtype, device, synchronize))
    mean = {key: statistics.fmean(count[key] for count in counts) for key in counts[0]}
    kernels: dict[str, float] = {}
    if device.type == "cuda":
        memory = allocated / 2**20
        parts.all.clear()
        parts.wait = synchronize
        step()
        parts.end_step()
    else:
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        kernels = shares_of_kernels(step)
    return {
        "seconds": seconds,
        "peaks": peaks,
        "parts": parts.all,
        "memory": memory,
        "kernels": kernels,
        **mean,
        **facts,
    }


def shares_of_kernels(step: Callable[[], object]) -> dict[str, float]:
    """Of one more step's time, that in matrix products and in attention."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
    by_name = {event.key: event for event in profiled.key_averages()}
    found = {}
    for kind, names in KERNELS.items():
        events = (by_name.get(f"aten::{name}") for name in names)
        found[kind] = sum(event.self_cpu_time_total for event in events if event) / 1e6 / took
    return found


def resident(field: str) -> int:
    """A size of this process that Linux keeps, kB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def place() -> Any:
    """The device that trains."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak(dtype: str, device: Any, synchronize: Callable[[], None]) -> float:
    """Operations a second of this machine's matrix products, now; of float8's layers, too, those of bfloat16."""
    import torch

    size = 8192 if device.type == "cuda" else 2048
    kind = torch.bfloat16 if dtype == "float8" else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def config_of(arguments: argparse.Namespace, objective: str, dtype: str, compiled: bool = False) -> Any:
    """The shipped config of the size, on the corpus; one process, one pack a micro-batch."""
    from megatron_lcl import config as configs

    given: dict[str, Any] = {
        "data.corpora": str(arguments.work / "corpus"),
        "data.cache": str(arguments.work / "cache"),
        "data.workers": 1,
        "objective.name": objective,
        "contrast.strategy": "retain",
        "train.dtype": "bfloat16" if dtype == "float8" else dtype,
        "train.float8": dtype == "float8",
        "optimizer.name": "adamw",  # as in what it is measured beside
        "train.compile": compiled or dtype == "float8",
        "parallel.tensor": 1,
        "train.micro_batch": 1,
        "train.global_batch": arguments.packs,
        "checkpoint.every": 1000,
    }
    if arguments.depth:
        given |= {"model.vision.layers": arguments.depth, "model.language.layers": arguments.depth}
    if objective != "lcl":  # texts as long as open_clip's at most; tokens for about as many pairs as there are images
        slots = {"clip": 30, "coca": 112}[objective] * IMAGES
        given |= {"model.language.context_length": 2 * TEXT, "data.tokens_per_pack": slots}
        given["data.images_per_pack"] = IMAGES
    file = ROOT / "configs" / f"{CONFIGS[arguments.model]}_interleaved.yaml"
    return configs.load(file, {key: str(value) for key, value in given.items()})


def loader_for(config: Any) -> Any:
    from megatron_lcl import objectives
    from megatron_lcl.data.loading.ledger import open_run_ledger
    from megatron_lcl.data.loading.loader import loader_of

    sequences = objectives.create(config).sequences
    ledger = open_run_ledger(config, sequences)
    reading, _ = ledger.reading_at(0, config)
    return loader_of(reading, config.data, sequences, global_batch=config.train.global_batch, ledger=ledger)


def our_step(arguments: argparse.Namespace, name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step as `train` makes it."""
    from megatron_lcl.model.flops import Sizes, of_step
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.prefetch import Prefetcher

    objective, _, compiled = name.partition(" ")
    config = config_of(arguments, objective, dtype, bool(compiled))
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ |= one
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    loader = loader_for(config)
    number = config.train.global_batch
    prefetcher = Prefetcher(iter(loader), number, engine.device)
    stepper._first_forwards = parts.timed("forward", stepper._first_forwards)  # of lcl, clip and coca: all of them
    engine.backward = parts.timed("backward", engine.backward)
    engine.step = parts.timed("optimizer", engine.step)

    def step() -> dict[str, float]:
        with parts.part("data"):
            packs, copies = prefetcher.take()
        pending = stepper.start(broadcast_batches(copies, number, 1, mesh, engine.device), 1e-4)
        prefetcher.begin()
        pending.read()
        sizes = Sizes.of(packs)
        documents = sum(len(loader.reader.provenance(n)) for pack in packs for n in pack.packs)
        return {
            "documents": documents if objective == "lcl" else 0,
            "images": sum(pack.num_images for pack in packs),
            "tokens": sum(pack.num_tokens for pack in packs),
            "flops": of_step(config.model, sizes, contrast=True).total,
        }

    return step, {}


def reference_step(arguments: argparse.Namespace, _name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step as the reference makes it, of the same parameters."""
    import torch
    import torch.nn.functional as F
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_lcl.model import layers as modules
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
    rows = padded_rows(loader_for(config), length)
    mask = torch.zeros(0)

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
        return {"documents": ROWS, "images": batch.num_images, "tokens": batch.num_tokens}

    with FlopCounterMode(display=False) as counter:
        step()
    return step, {"flops": float(counter.get_total_flops())}


def padded_rows(loader: Any, length: int) -> Iterator[tuple[Any, Any]]:
    """Batches of documents, each padded to the context length, and the mask of their attention, [ROWS, 1, S, S]."""
    import torch

    from megatron_lcl.data.loading.batch import PackedBatch

    waiting: list[dict[str, Any]] = []
    for pack in loader:
        bounds = pack.cu_seqlens.tolist()
        for first, last in itertools.pairwise(bounds):
            inside = (pack.image_start >= first) & (pack.image_start < last)
            if first < pack.num_tokens and inside.any():
                waiting.append(
                    {
                        "tokens": pack.tokens[first:last],
                        "targets": pack.targets[first:last],
                        "images": pack.images[inside],
                        "start": pack.image_start[inside] - first,
                        "soi": torch.where(pack.image_soi[inside] >= 0, pack.image_soi[inside] - first, -1),
                    }
                )
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


def open_clip_step(arguments: argparse.Namespace, name: str, dtype: str, parts: Parts) -> tuple[Any, dict[str, Any]]:
    """A step of open_clip's model of this size on as many images as ours reads in a pack of pairs."""
    import open_clip
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    objective, device = name.split()[-1], place()
    packs = iter(loader_for(config_of(arguments, objective, dtype)))
    size = sum(next(packs).num_images for _ in range(arguments.packs))
    coca = objective == "coca"
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
    images = torch.randn(size, 3, 224, 224, device=device)
    texts = torch.randint(1, 49406, (size, TEXT - coca), device=device)  # CoCa adds one
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        with parts.part("forward"), autocast:
            found = loss_of(**model(images, texts), output_dict=True) if coca else loss_of(*model(images, texts))
            loss = sum(found.values()) if isinstance(found, dict) else found
        with parts.part("backward"):
            loss.backward()
        with parts.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return {"documents": 0, "images": size, "tokens": size * TEXT}

    with FlopCounterMode(display=False) as counter:
        step()
    return step, {"flops": float(counter.get_total_flops())}


if __name__ == "__main__":
    sys.exit(main())
