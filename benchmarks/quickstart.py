"""What `bash launch/quickstart.sh` takes and gives: wall time, peak memory, and how well the encoder finds contexts.

    python benchmarks/quickstart.py [--seeds 3] [--output DIR]

Runs the script as a newcomer would, with a virtual environment of its own, and trains again with further seeds, since
one small run says little. Beside it stands what the documents allow: kernel ridge regression from an image's pixels
(12×12 RGB and a colour histogram) to the tf-idf of the 40 words before it, on the same split, at every strength of
regularisation, the best of which is chosen on the held-out pairs themselves and so flatters it. Exit code 1 where ten
minutes or 4 GiB are exceeded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import yaml
from PIL import Image as PILImage

import megatron_lcl
from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.loading.images import decode_eval

ROOT = Path(__file__).resolve().parent.parent
MINUTES, GIBIBYTES = 10, 4.0


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
    """Of every image with text before it in its document: pixels and colours [N, F]; the 40 words before it."""
    pixels, words = [], []
    for document in megatron_lcl.open_corpus(corpus):
        before: list[str] = []
        for item in document.items:
            if isinstance(item, Text):
                before += re.findall(r"[a-z]{2,}", item.text.lower())
            elif isinstance(item, Image) and before:
                rgb = decode_eval(item.data, 64).transpose(1, 2, 0)
                small = np.asarray(PILImage.fromarray(rgb).resize((12, 12), PILImage.Resampling.BOX)) / 255
                bins = (rgb // 64).reshape(-1, 3) @ (16, 4, 1)
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


def seed_run(folder: Path, python: Path, seed: int) -> dict[str, float]:
    """The run of `folder`, with another seed."""
    config, run = folder / "config.yaml", folder / f"seed-{seed}"
    settings = {"config": config, "train.seed": seed, "data.seed": seed, "train.output": run}
    for command, options in (
        ("train", settings),
        ("evaluate", {"checkpoint": run, "corpus": folder / "heldout", "output": run}),
    ):
        given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        subprocess.run([python, "-m", "megatron_lcl", command, *given], check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "heldout.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs in all, the script's own included")
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
        print(f"wall time {seconds:.0f} s, peak memory {gibibytes:.2f} GiB (proportional set sizes of all processes)\n")
        print(f"{'held-out pairs':24}{'image→context @10':>20}{'context→image @10':>20}{'bits a token':>14}")
        first = yaml.safe_load((folder / "config.yaml").read_text())["train"]["seed"]
        results = [json.loads((folder / "run" / "heldout.json").read_text())]
        results += [seed_run(folder, environment / "bin" / "python", first + i) for i in range(1, arguments.seeds)]
        times = np.array(
            [
                [r[f"{way}_recall_at_10"] / r["chance_at_10"] for way in ("image_to_context", "context_to_image")]
                for r in results
            ]
        )
        for i, (row, result) in enumerate(zip(times, results, strict=True)):
            name = f"seed {first + i}, {result['pairs']} pairs"
            print(f"{name:24}{row[0]:>12.1f} × chance{row[1]:>12.1f} × chance{result['bits_per_token']:>14.3f}")
        if len(times) > 1:
            of_mean = zip(times.mean(0), times.std(0, ddof=1) / len(times) ** 0.5, strict=True)
            print(f"{'mean ± standard error':24}" + "".join(f"{m:>13.2f} ± {e:.2f}" for m, e in of_mean))
        print("\nkernel ridge, pixels → words: strength, image→context @10")
        for strength, multiple in ridge(folder / "corpus", folder / "heldout"):
            print(f"{strength:>10g}{multiple:>12.1f} × chance")
    return int(seconds > 60 * MINUTES or gibibytes > GIBIBYTES)


if __name__ == "__main__":
    raise SystemExit(main())
