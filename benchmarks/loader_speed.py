"""The loader alone: images and tokens a second, and what the first batch of a large corpus costs.

    python benchmarks/loader_speed.py throughput CORPUS [--config FILE] [--workers 0 1 2] [--seconds 20]
    python benchmarks/loader_speed.py first-batch docs_no_face_shard_151_v3.jsonl [--documents 1000000]

`first-batch` resamples real MMC4 annotations to a corpus of that many documents, builds its index once, and then opens
it in new processes: seconds and MiB from the end of `import torch, deepspeed` to the first batch, without workers.
Claim: with a built index under 3 s and 300 MiB, for at most 1,000,000 documents; else the exit code is 1.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from claims import exit_unless, exit_with
from measuring import resident
from packing_scale import shards, write_corpus

DOCUMENTS, SECONDS, MEBIBYTES = 1_000_000, 3, 300


def throughput(arguments: argparse.Namespace) -> None:
    from megatron_lcl import config as configs
    from megatron_lcl.data.loading.loader import PackedLoader

    print("workers  packs/s  images/s  tokens/s  tokens used  image slots used")
    for workers in arguments.workers:
        overrides = {"data.corpora": arguments.source, "data.workers": str(workers)}
        config = configs.load(arguments.config, overrides)
        vision, context = config.model.vision, config.model.language.context_length
        micro = config.train.micro_batch
        loader = PackedLoader(
            config.data, vision.num_patches, vision.image_size, context, global_batch=micro, micro_batch=micro
        )
        batches = iter(loader)
        next(batches)
        packs = images = tokens = 0
        started = time.perf_counter()
        while time.perf_counter() - started < arguments.seconds:
            batch = next(batches)
            packs, images, tokens = packs + micro, images + batch.num_images, tokens + batch.num_tokens
        seconds = time.perf_counter() - started
        print(
            f"{workers:7}  {packs / seconds:7.1f}  {images / seconds:8.0f}  {tokens / seconds:8.0f}"
            f"  {tokens / packs / config.data.tokens_per_pack:11.1%}  {images / packs / loader.images_per_pack:16.1%}",
            flush=True,
        )
        del batches


def _first_batch(folder: str, cache: str) -> tuple[float, float]:
    """Seconds and MiB from the imports to the first batch, in a process of its own."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import torch  # noqa: F401

    before, started = resident("VmRSS"), time.perf_counter()
    from megatron_lcl.config import Corpus, Data
    from megatron_lcl.data.loading.loader import PackedLoader

    data = Data(corpora=(Corpus(folder),), workers=0, cache=cache)
    next(iter(PackedLoader(data, 49, 224, 2048)))
    return time.perf_counter() - started, resident("VmRSS") - before


def first_batch(arguments: argparse.Namespace) -> None:
    import numpy as np
    import PIL.Image

    picture = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    PIL.Image.fromarray(pixels).resize((400, 300)).save(picture, "JPEG")
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "corpus"
        write_corpus(folder, Path(arguments.source), arguments.documents, picture.getvalue())
        results = []
        for _ in range(6):
            with ProcessPoolExecutor(1, context) as pool:
                results.append(pool.submit(_first_batch, str(folder), str(Path(temporary) / "cache")).result())
    print(f"{arguments.documents:,} documents: building the index and the first batch {results[0][0]:.2f} s")
    seconds, mebibytes = zip(*results[1:], strict=True)
    print(
        f"with a built index, {len(seconds)} processes: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to"
        f" {max(seconds):.2f}), {statistics.median(mebibytes):.0f} MiB"
    )
    if arguments.documents <= DOCUMENTS:
        in_time, in_room = statistics.median(seconds) < SECONDS, statistics.median(mebibytes) < MEBIBYTES
        exit_unless({f"first batch in under {SECONDS} s": in_time, f"and under {MEBIBYTES} MiB": in_room})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["throughput", "first-batch"])
    parser.add_argument("source", help="a corpus, or MMC4 annotations")
    parser.add_argument("--config", default=None)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--documents", type=shards, default=DOCUMENTS)
    arguments = parser.parse_args()
    throughput(arguments) if arguments.what == "throughput" else first_batch(arguments)


if __name__ == "__main__":
    exit_with(main)
