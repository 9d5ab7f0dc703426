"""How long training waits for data from object storage, beside the disk: quickstart's loader, steps of a given length.

A corpus of photographs (30 to 60 kB) and texts, on the disk and on an S3 server (moto) on loopback behind a proxy that
waits 20 ms before each answer, and answers some requests with 503 or cuts them. The loader is that of
`quickstart/blend.yaml`; in place of the training step the process sleeps, or (`--train`) it is the whole command. Data
wait is the time inside `next(loader)` over all of the time, from the step `--skip` on. One run, one mode after the
other: disk, an empty cache, a cache that has no room, and the cache that the first of them has filled.

Claim, with --train: under 2 % in every mode; else the exit code is 1. Steps in which the process sleeps may be shorter
than any that the loader was made for.

    python benchmarks/storage_data_wait.py [--steps 100] [--step-seconds 0.4 | --train] [--documents 3000]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from claims import exit_unless, exit_with
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data"))

CLAIM = 0.02


def photograph(seed: int) -> bytes:
    """Smooth with grain, as photographs are."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((480, 360), Image.Resampling.BICUBIC), np.int16)
    file = io.BytesIO()
    grain = random.normal(0, 6, smooth.shape)
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--skip", type=int, default=10)
    parser.add_argument("--step-seconds", type=float, default=0.4)
    parser.add_argument("--train", action="store_true", help="train, in place of sleeping")
    parser.add_argument("--latency", type=float, default=0.02)
    parser.add_argument("--unavailable", type=int, default=97, help="each so many-th request: 503")
    parser.add_argument("--cut", type=int, default=89, help="each so many-th request: half a body")
    arguments = parser.parse_args()
    from corpora import write_corpus
    from s3_server import moto, proxied

    from megatron_lcl import config as configs
    from megatron_lcl.data.storage.store import Store

    with tempfile.TemporaryDirectory() as folder, moto() as server, proxied(server) as proxy:
        place, draw = Path(folder), np.random.default_rng(0)
        documents = [
            [draw.integers(0, 500, 60).tolist(), (photograph(d), None, None), draw.integers(0, 500, 60).tolist()]
            for d in range(arguments.documents)
        ]
        local = write_corpus(place / "corpus", documents, 4).path
        size = sum(file.stat().st_size for file in local.iterdir())
        os.environ.update(AWS_ACCESS_KEY_ID="bench", AWS_SECRET_ACCESS_KEY="bench", AWS_ENDPOINT_URL=proxy.url)
        urlopen(Request(f"{proxy.url}/bench", method="PUT"), timeout=60).close()
        store = Store("s3://bench/corpus")
        for file in local.iterdir():
            store.put(file.name, file)
        proxy.keeps = True
        for file in local.glob("*.bin"):
            [about] = store.head([file.name])
            assert about is not None, file.name
            proxy.keep(f"/bench/corpus/{file.name}", file.read_bytes(), about[1])
        print(f"{len(documents):,} documents, {size / 1e6:.0f} MB, steps of {arguments.step_seconds} s")
        modes = [("disk", str(local), "c0", 100.0), ("s3, empty cache", store.url, "c1", 100.0)]
        modes += [("s3, no room", store.url, "c2", 0.0), ("s3, kept", store.url, "c1", 100.0)]
        quickstart = Path(configs.__file__).parents[1] / "quickstart" / "blend.yaml"
        claims = {}
        for name, path, cache, limit in modes:
            overrides = {
                "data.corpora": path,
                "data.cache": str(place / cache),
                "data.storage_cache_gb": str(limit),
                "model.language.vocab_size": "517",
                "train.steps": str(arguments.steps + arguments.skip),
            }
            proxy.reset()
            proxy.latency, proxy.unavailable, proxy.cut = arguments.latency, arguments.unavailable, arguments.cut
            if arguments.train:
                waited, said = trained(quickstart, overrides, place / f"run-{modes.index((name, path, cache, limit))}")
            else:
                waited, said = slept(configs.load(quickstart, overrides), arguments.skip, arguments.step_seconds)
            reads = [request for request in proxy.requests if request.method == "GET"]
            faults = sum(request.status == 503 for request in reads)
            sent = sum(request.sent for request in reads) / 1e6
            print(
                f"{name:16} waited {waited:6.2%} of {said}; {len(reads)} reads, {sent:.0f} MB, {faults} answered 503",
                flush=True,
            )
            claims[f"{name}: under {CLAIM:.0%}"] = waited < CLAIM
    exit_unless(claims if arguments.train else {})


def slept(config: Any, skip: int, step_seconds: float) -> tuple[float, str]:
    """The share of the time for which batches were waited for, with a process that sleeps in place of a step."""
    from megatron_lcl.data.loading.loader import PackedLoader

    vision, train = config.model.vision, config.train
    loader = PackedLoader(
        config.data, vision.num_placeholders, vision.image_size, config.model.language.context_length,
        global_batch=train.global_batch, micro_batch=train.micro_batch, steps=train.steps,
    )  # fmt: skip
    batches, waited, images, began = iter(loader), 0.0, 0, time.perf_counter()
    for step in range(train.steps):
        if step == skip:
            waited, images, began = 0.0, 0, time.perf_counter()
        for _ in range(loader.micro_batches):
            since = time.perf_counter()
            images += next(batches).num_images
            waited += time.perf_counter() - since
        time.sleep(step_seconds)
    total = time.perf_counter() - began
    return waited / total, f"{total:.0f} s, {images / total:.0f} images/s"


def trained(config: Path, overrides: dict[str, str], run: Path) -> tuple[float, str]:
    """The same of a run, as its metrics say it, from its second line on."""
    words = [word for key, value in overrides.items() for word in (f"--{key}", value)]
    words += ["--train.output", str(run), "--train.progress", "false", "--checkpoint.every", "0"]
    words += ["--schedule.cooldown", "0"]  # the config's may be longer than so few steps
    subprocess.run(
        [sys.executable, "-m", "megatron_lcl", "train", "--config", str(config), *words],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "data_wait" in line][1:]
    waits, steps = ([line[key] for line in lines] for key in ("data_wait", "step_seconds"))
    return statistics.mean(waits), f"{len(lines)} times 10 steps of {statistics.median(steps):.2f} s"


if __name__ == "__main__":
    exit_with(main)
