"""What `bash launch/quickstart.sh` takes and gives: wall time, peak memory, and how well the encoder finds contexts.

    python benchmarks/quickstart.py [--seeds 5] [--output DIR]

Runs the script as a newcomer would, with a virtual environment of its own, and trains again with further seeds, since
one small run says little; and with each seed on the pages alone, by the config that the quickstart takes where it has
no emoji, on the same corpus of pages: what retrieval among the held-out pages gains or loses by the blend.

Beside it stands what the documents allow: kernel ridge regression from an image's pixels (12×12 RGB and a color
histogram) to the tf-idf of the 40 words before it, on the same split, at every strength of regularization, the best of
which is chosen on the held-out pairs themselves and so flatters it.

Claims, else the exit code is 1: at most ten minutes and 4 GiB; each seed names at least 40 times as many emoji as
chance; the script's own run waits for data for under 2 % of its time; and with several seeds retrieval among the pages
is on average, both ways, not below that of training on the pages alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml
from claims import exit_unless, exit_with
from PIL import Image as PILImage

import megatron_lcl
from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.demo.train import packaged_config, write_config
from megatron_lcl.run_folder import CONFIG, HELDOUT, METRICS, RESULTS

ROOT = Path(__file__).resolve().parent.parent
MINUTES, GIBIBYTES, TOP_1, DATA_WAIT = 10, 4.0, 40, 0.02
"""at most; at most; times chance, at least; share of a run's time, below"""


class PeakMemory:
    """Largest sum of the proportional set sizes of this process's descendants, sampled twice a second."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.5):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it has ended
                    total += process.memory_full_info().pss
            self.bytes = max(self.bytes, total)


def pairs(corpus: Path) -> tuple[np.ndarray, list[list[str]]]:
    """Of every image with text before it in its document: pixels and colors [N, F]; the 40 words before it."""
    pixels, words = [], []
    for document in megatron_lcl.open_corpus(corpus):
        before: list[str] = []
        for item in document.items:
            if isinstance(item, Text):
                before += re.findall(r"[a-z]{2,}", item.text.lower())
            elif isinstance(item, Image) and before:
                rgb = decode_eval(item.data, 64).transpose(1, 2, 0)
                small = np.asarray(PILImage.fromarray(rgb).resize((12, 12), PILImage.Resampling.BOX)) / 255
                bins: Any = (rgb // 64).reshape(-1, 3) @ (16, 4, 1)
                pixels.append(np.concatenate([small.ravel(), np.bincount(bins, minlength=64) / len(bins) * 8]))
                words.append(before[-40:])
    return np.array(pixels), words


def tf_idf(words: list[list[str]], known: Counter[str], num_documents: int) -> np.ndarray:
    columns = {word: i for i, word in enumerate(known)}
    table = np.zeros((len(words), len(columns)))
    for row, document in zip(table, words, strict=True):
        for word in document:
            if word in columns:
                row[columns[word]] += np.log(num_documents / known[word])
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def ridge(training: Path, held_out: Path) -> list[tuple[float, float]]:
    """(strength, recall@10 as a multiple of chance), image → context, on the held-out pairs."""
    (x, words), (x_new, words_new) = pairs(training), pairs(held_out)
    known = Counter(word for document in words for word in set(document))
    y, y_new = (tf_idf(some, known, len(words)) for some in (words, words_new))
    mean, scale = x.mean(0), x.std() * np.sqrt(x.shape[1])
    x, x_new = (x - mean) / scale, (x_new - mean) / scale
    kernel, kernel_new = (np.exp(-((a[:, None] - x) ** 2).sum(2)) for a in (x, x_new))
    found = []
    for strength in 10.0 ** np.arange(-3, 3):
        guess = kernel_new @ np.linalg.solve(kernel + strength * np.eye(len(x)), y - y.mean(0))
        similarity = guess @ (y_new - y.mean(0)).T
        places = (similarity >= similarity.diagonal()[:, None]).sum(1)
        found.append((float(strength), float((places <= 10).mean()) * len(places) / 10))
    return found


def seed_run(folder: Path, python: Path, config: Path, name: str, seed: int) -> Path:
    """The run of a config with another seed, evaluated on the pages and, where there are some, on the emoji."""
    run, pictures = folder / f"{name}-{seed}", folder / "emoji" / "evaluate" / "artist-distinct"
    settings: dict[str, object] = {"config": config, "train.seed": seed, "data.seed": seed, "train.output": run}
    commands: list[tuple[str, dict[str, object]]] = [
        ("train", settings),
        ("evaluate", {"checkpoint": run, "corpus": folder / "heldout", "output": run}),
    ]
    if pictures.is_dir():
        commands.append(("evaluate", {"checkpoint": run, "data": pictures, "task": "zero-shot", "output": run}))
    for command, options in commands:
        given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        subprocess.run([python, "-m", "megatron_lcl", command, *given], check=True, stdout=subprocess.DEVNULL)
    return run


def times_chance(run: Path) -> list[float]:
    """Of a run: recall@10 from image to context and back among the held-out pages; top-1 on the emoji, NaN without."""
    pages = json.loads((run / HELDOUT).read_text())
    chances = {"image_to_context": "chance_at_10", "context_to_image": "context_to_image_chance_at_10"}
    found = [pages[f"{way}_recall_at_10"] / pages[chance] for way, chance in chances.items()]
    if not (run / RESULTS).is_file():
        return [*found, math.nan]
    top = json.loads((run / RESULTS).read_text())[0]["metrics"]["accuracy"]
    return [*found, top["value"] / top["chance"]]


def data_wait(run: Path) -> float:
    """Share of a run's time for which it waited for batches: the mean of its lines."""
    lines = map(json.loads, (run / METRICS).read_text().splitlines())
    return statistics.mean(line["data_wait"] for line in lines if "data_wait" in line)


def print_runs(title: str, runs: list[Path]) -> np.ndarray:
    """Returns `times_chance` of each run [runs, 3]."""
    print(f"\n{title:24}{'image→context @10':>20}{'context→image @10':>20}{'emoji top-1':>16}   (times chance)")
    numbers = np.array([times_chance(run) for run in runs])
    for run, row in zip(runs, numbers, strict=True):
        print(f"{run.name:24}{row[0]:>20.2f}{row[1]:>20.2f}{row[2]:>16.1f}")
    if len(runs) > 1:
        of_mean = zip(numbers.mean(0), numbers.std(0, ddof=1) / len(runs) ** 0.5, (20, 20, 16), strict=True)
        print(f"{'mean ± standard error':24}" + "".join(f"{f'{m:.2f} ± {e:.2f}':>{w}}" for m, e, w in of_mean))
    return numbers


def claims(blend: np.ndarray, alone: np.ndarray, wait: float) -> dict[str, bool]:
    """Of `times_chance` of the runs on the blend and on the pages alone [runs, 3], and of `data_wait`."""
    held = {f"data wait under {DATA_WAIT:.0%}": wait < DATA_WAIT}
    if not np.isnan(blend[:, 2]).any():  # with emoji
        held[f"emoji top-1 at least {TOP_1} times chance, each seed"] = bool((blend[:, 2] >= TOP_1).all())
    if len(blend) > 1:
        for way, name in enumerate(("image → context", "context → image")):
            held[f"{name} not below that of the pages alone"] = bool(blend[:, way].mean() >= alone[:, way].mean())
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each kind, the script's own included")
    parser.add_argument("--output", type=Path, help="where to leave everything; default: nowhere")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = arguments.output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quickstart-")))
        work = work.resolve()
        folder, environment = work / "quickstart", work / "venv"
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with PeakMemory() as peak:
            subprocess.run(
                ["bash", ROOT / "launch" / "quickstart.sh", "--output", folder],
                check=True,
                cwd=work,
                env={**os.environ, "VENV": str(environment)},
                stdout=sys.stderr,
            )
        seconds, gibibytes = time.monotonic() - started, peak.bytes / 2**30
        print(f"wall time {seconds:.0f} s, peak memory {gibibytes:.2f} GiB (proportional set sizes of all processes)")
        wait = data_wait(folder / "run")
        print(f"data wait {wait:.2%} of the run's time\n")
        python = environment / "bin" / "python"
        blend, alone = folder / CONFIG, folder / "alone" / CONFIG
        first = yaml.safe_load(blend.read_text())["train"]["seed"]
        seeds = range(first, first + arguments.seeds)
        config = packaged_config(
            "megatron_lcl.quickstart", "manual.yaml", {"manual": folder / "corpus"}, alone.parent, None
        )
        write_config(config, alone)
        runs = [folder / "run", *(seed_run(folder, python, blend, "blend", seed) for seed in seeds[1:])]
        of_blend = print_runs("the blend", runs)
        of_alone = print_runs("the pages alone", [seed_run(folder, python, alone, "alone", seed) for seed in seeds])
        print("\nkernel ridge, pixels → words: strength, image→context @10")
        for strength, multiple in ridge(folder / "corpus", folder / "heldout"):
            print(f"{strength:>10g}{multiple:>12.1f} × chance")
    fits = {f"{MINUTES} minutes": seconds <= 60 * MINUTES, f"{GIBIBYTES:g} GiB": gibibytes <= GIBIBYTES}
    exit_unless(fits | claims(of_blend, of_alone, wait))


if __name__ == "__main__":
    exit_with(main)
