"""A whole training step, ours beside the method's reference as it works and beside open_clip's own, in one run.

    python benchmarks/train_step.py docs_no_face_shard_151_v3.jsonl [--model b32] [--depth LAYERS] [--repeats 5] [WAY …]

Documents have the texts, and the numbers of images, of real MMC4 annotations; their images are noise of usual sizes,
as JPEG. Each way trains in a process of its own, with all cores, on packs of the same documents:

    lcl           ours: loader, forward, both losses, backward and optimizer, through the engine; float32 and bfloat16
    lcl compiled  the same with `train.compile`; the first step, in which graphs are made, is not timed
    lcl float8    the same with `train.float8`, on a GPU
    lcl muon      the same with the optimizer of `configs/`; its products are in no count of operations
    lcl preloaded the same on packs that were read before: a step that does not wait for data
    like the reference  our modules used as the method's reference uses its own: one document a row, cut at the context
                  length or padded to it, attention under a dense mask, all logits at once, torch's AdamW as it is by
                  default
    clip, coca    ours, on pairs of the same documents, texts cut where open_clip cuts them
    open_clip     its CLIP of the same size and its CoCa, which has a decoder with cross-attention more than ours; their
                  losses and torch's AdamW, on the same pairs as ours in each step, texts padded to its 77 tokens, no
                  loader; bfloat16 is torch.autocast's, its `--precision amp_bf16`

A document that is divided into several sequences counts once, in the step that has its first one. A shard of fewer than
--documents documents is read again from its beginning, since the last pack of an epoch is not full: of 60 documents
that is every fifth. Tokens are those of documents, special ones included, no padding.

The step is the median of the repeats, the peak that of this machine's matrix products (2048³), measured between steps:
the share of it is what compares runs on machines, or at times, that are not alike. Operations are counted as torch's
FlopCounterMode does, what is computed a second time left out. Last, one more step under torch's profiler: the shares of
matrix products and of attention, and in `bound` the share of the peak that would be left if all else took no time. All
have AdamW but `lcl muon`. g14 and l14 are cut to --depth blocks an encoder where memory asks for it, which the first
line says.

Where there is a CUDA device it is what trains: peak is that of products of 8192³, MiB what torch has allocated on it,
the parts are those of one more step, whose parts the device is waited for after, and there is no profiled step. But the
part "data" is that of the timed steps: how long the process waits for the loader, at first while the device still
computes. So the device waits for at most that; for how much, `lcl preloaded` beside `lcl` says. Half of the cores, at
most 8, read. Not run on one yet.

Claims, of the ways that are measured; else the exit code is 1. Of B/32 and B/16 whole on CPUs: `lcl float32` reads at
least 4.4 times the documents a second of `like the reference`, whose step of B/32 is within 15 % of the reference's
own, and reaches 75 % of the peak; `lcl bfloat16` reads 2.0 times the documents of `lcl float32`. Of all models there:
`clip float32` takes at most open_clip's time, the optimizer with clipping and ZeRO under 6 % of each of our steps. On a
GPU: g/14 whole reaches 45 % of the peak in bfloat16, B/16 whole 1.5 times the share of it that open_clip's CLIP does,
and float8 is at least 1.2 times as fast as bfloat16. docs/performance.md says which are missed, and why.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import existing_file, positive
from claims import exit_unless, exit_with
from measuring import resident, versions
from train_step_ways import COCA, CONFIGS, ROWS, Parts, begin, num_workers, place

REFERENCE = "like the reference float32"
WAYS = (
    "lcl float32", "lcl compiled float32", "lcl muon float32", "lcl bfloat16", "lcl compiled bfloat16",
    "lcl muon bfloat16", REFERENCE,
    "clip float32", "open_clip clip float32", "coca float32", "open_clip coca float32",
)  # fmt: skip
ON_GPU = (
    "lcl bfloat16", "lcl preloaded bfloat16", "lcl muon bfloat16", "lcl compiled bfloat16", "lcl float8",
    "clip bfloat16", "open_clip clip bfloat16", "coca bfloat16", "open_clip coca bfloat16",
)  # fmt: skip
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=existing_file, help="a shard docs_*.jsonl of MMC4")
    parser.add_argument(
        "ways", nargs="*", metavar="WAY", help=f"default: {'; '.join(WAYS)}; on a GPU {'; '.join(ON_GPU)}"
    )
    parser.add_argument("--model", choices=CONFIGS, default="b32")
    parser.add_argument("--depth", type=positive, help="blocks of each encoder (default: as published)")
    parser.add_argument("--documents", type=positive, default=400, help="of the corpus (%(default)s)")
    parser.add_argument("--packs", type=positive, default=1, help="of a step (%(default)s)")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(measure(arguments)))
        return 0
    if unknown := [way for way in arguments.ways if way not in (*WAYS, *ON_GPU)]:
        parser.error(f"{unknown[0]!r} is none of: {'; '.join(dict.fromkeys((*WAYS, *ON_GPU)))}")
    with tempfile.TemporaryDirectory(prefix="train-step-") as folder:
        make_corpus(arguments.annotations, Path(folder), arguments.documents)
        found = report(arguments, Path(folder))
    exit_unless(claims(arguments.model, arguments.depth, found))
    return 0


def report(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Prints the table; what `measure` has found, by ways."""
    import torch

    has_gpu = torch.cuda.is_available()
    depth = f", {arguments.depth} blocks an encoder" if arguments.depth else ""
    where = torch.cuda.get_device_name() if has_gpu else f"{os.cpu_count()} cores"
    print(f"{CONFIGS[arguments.model]}{depth}; {where}, {num_workers(has_gpu)} that read; step s is a median")
    print(versions("torch", "deepspeed", "open_clip_torch"))
    columns = [
        "docs/s", "images/s", "tokens/s", "images", "tokens", "step s", "TFLOP", "peak GF/s", "of peak", "bound", "MiB",
    ]  # fmt: skip
    print(f"{'':28}" + "".join(f"{name:>11}" for name in columns) + "   share of the step by part", flush=True)
    measured: dict[str, dict[str, Any]] = {}
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
        found = measured[way] = json.loads(done.stdout.splitlines()[-1])
        print(row(way, found), flush=True)
        if way == REFERENCE and (arguments.model, arguments.depth) == ("b32", None):
            print(beside_the_reference(found), flush=True)
    return measured


def claims(model: str, depth: int | None, found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """The claims about what was measured (`found`: of `measure`, by ways), and which of them hold."""
    on_cpu = any(of["kernels"] for of in found.values())  # steps of a GPU are not profiled
    speed = {way: 1 / statistics.median(of["seconds"]) for way, of in found.items()}
    documents = {way: of["documents"] * speed[way] for way, of in found.items()}
    share = {way: of["flops"] * speed[way] / statistics.median(of["peaks"]) for way, of in found.items()}
    base = on_cpu and depth is None and model in ("b32", "b16")
    on_gpu = None if on_cpu or depth is not None else model
    rows = (
        (base, "the peak", share, "lcl float32", None, 0.75),
        (base, "the reference's documents", documents, "lcl float32", REFERENCE, 4.4),
        (base, "float32's documents", documents, "lcl bfloat16", "lcl float32", 2.0),
        (on_cpu, "open_clip's speed", speed, "clip float32", "open_clip clip float32", 1.0),
        (on_gpu == "g14", "the peak", share, "lcl bfloat16", None, 0.45),
        (on_gpu == "b16", "open_clip's share of the peak", share, "lcl bfloat16", "open_clip clip bfloat16", 1.5),
        (not on_cpu, "bfloat16's speed", speed, "lcl float8", "lcl bfloat16", 1.2),
    )
    held = {
        f"{way}: at least {least} of {what}": of[way] >= least * (of[other] if other else 1)
        for applies, what, of, way, other, least in rows
        if applies and way in found and (other is None or other in found)
    }
    if base and model == "b32" and REFERENCE in found:
        held[f"{REFERENCE}: within 15 % of its own step"] = abs(of_the_reference(found[REFERENCE])[1] - 1) <= 0.15
    for way in (way for way in found if on_cpu and way.startswith(("lcl", "clip", "coca"))):
        updating = statistics.median(found[way]["parts"]["optimizer"]) * speed[way]
        held[f"{way}: optimizer, clipping and ZeRO under 6 % of a step"] = updating < 0.06
    return held


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
        found["tokens"] / step, found["images"], found["tokens"], step, found["flops"] / 1e12, peak / 1e9,
        found["flops"] / step / peak,
        found["flops"] / step / peak / (sum(found["kernels"].values()) or float("nan")), found["memory"],
    )  # fmt: skip
    texts = (f"{n:11.{d}f}" for n, d in zip(numbers, (2, 1, 0, 1, 0, 2, 2, 0, 2, 2, 0), strict=True))
    parts = {name: statistics.median(times) / step for name, times in found["parts"].items()} | found["kernels"]
    return f"{way:28}" + "".join(texts) + "   " + ", ".join(f"{name} {share:.1%}" for name, share in parts.items())


def beside_the_reference(found: dict[str, Any]) -> str:
    """A line that says `of_the_reference`."""
    there, of_it = of_the_reference(found)
    return (
        f"{'':28}  at {REFERENCE_PEAK / 1e9:.0f} GFLOP/s this step would take {there:.1f} s; the reference itself took "
        f"{REFERENCE_SECONDS} s there: {of_it:.2f} of it"
    )


def of_the_reference(found: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a step in the reference's way, at the peak of the machine on which the reference itself was timed, and
    the share of its seconds that they are."""
    step = statistics.median(found["seconds"]) * ROWS / found["documents"]
    there = step * statistics.median(found["peaks"]) / REFERENCE_PEAK
    return there, there / REFERENCE_SECONDS


def make_corpus(annotations: Path, folder: Path, documents: int) -> None:
    """A corpus of MMC4's documents, whose images are noise: what they show costs nothing and decides nothing here."""
    import numpy as np
    from PIL import Image

    from megatron_lcl.data.prepare.preprocess import preprocess

    draw, images = np.random.default_rng(0), folder / "images"
    images.mkdir()
    shard = annotations.read_text(encoding="utf-8").splitlines()[:documents]
    for line in shard:
        for image in json.loads(line)["image_info"]:
            small = draw.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(small).resize((640, 480)).save(encoded, "JPEG", quality=85)
            (images / image["image_name"]).write_bytes(encoded.getvalue())
    lines = itertools.islice(itertools.cycle(shard), documents)
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    preprocess("mmc4", folder / "docs.jsonl", folder / "corpus", images=images, tokenizer="clip")


# --- one way, in a process of its own ----------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one way."""
    import torch

    (way,) = arguments.ways
    name, _, dtype = way.rpartition(" ")
    device = place()
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    parts = Parts()
    torch.manual_seed(0)
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
        waited = {name: times for name, times in parts.all.items() if name == "data"}  # without synchronizing
        parts.all.clear()
        parts.wait = synchronize
        step()
        parts.end_step()
        parts.all |= waited
    else:
        memory = resident("VmHWM") - before
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


if __name__ == "__main__":
    exit_with(main)
