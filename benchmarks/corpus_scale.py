"""Workers, memory and opening. Claims: two workers at least 1.7 times one; under 600 MiB a worker at 1e5 and 1e6
segments; a corpus of 1,000,000 documents opens, and gives its first and last, in under 1 s and 200 MiB of private
memory.

    python benchmarks/corpus_scale.py workers|memory|open [--tokenizer clip|FILE.model]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megatron_lcl.data.corpus.store import FORMAT_VERSION, ShardWriter, open_corpus, write_manifest
from megatron_lcl.data.corpus.tokenizer import load, train_sentencepiece
from megatron_lcl.data.prepare.preprocess import preprocess


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["workers", "memory", "open"])
    parser.add_argument("--tokenizer", default="clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, tokenizer = arguments.one
        preprocess("jsonl", source, target, tokenizer=tokenizer)
        return print(peak())
    with tempfile.TemporaryDirectory() as folder:
        {"workers": workers, "memory": memory, "open": opening}[arguments.what](Path(folder), arguments)


def write_source(folder: Path, num_segments: int, num_files: int) -> int:
    """JSON-lines files of documents of eight segments; returns bytes of text."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlcumwfgypbvk", k=rng.randint(2, 9))) for _ in range(30_000)]
    weights = [1 / (k + 5) for k in range(len(words))]
    sentences = [" ".join(rng.choices(words, weights, k=rng.randint(5, 40))) for _ in range(20_000)]
    folder.mkdir()
    size = 0
    for number in range(num_files):
        with open(folder / f"{number:03d}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(num_segments // num_files // 8):
                texts = rng.choices(sentences, k=8)
                size += sum(map(len, texts))
                file.write(json.dumps({"items": [{"text": text} for text in texts]}) + "\n")
    return size


def peak() -> float:
    """Most resident memory of this process so far, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def workers(folder: Path, arguments: argparse.Namespace) -> None:
    size = write_source(folder / "in", 1_000_000, 8) / 1e6
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for number in range(arguments.rounds):
        for num_workers, values in times.items():
            start, cpu = time.perf_counter(), cpu_seconds()
            preprocess("jsonl", folder / "in", folder / f"out-{number}-{num_workers}", tokenizer=arguments.tokenizer,
                       workers=num_workers, task_bytes=1)  # fmt: skip
            values.append((time.perf_counter() - start, cpu_seconds() - cpu))
    print(f"{'workers':<10}{'text, MB/s':>12}{'seconds':>10}{'CPU seconds':>13}")
    for num_workers, values in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*values, strict=True))
        print(f"{num_workers:<10}{size / wall:>12.2f}{wall:>10.2f}{cpu:>13.2f}")
    ratio = statistics.median(a[0] / b[0] for a, b in zip(times[1], times[2], strict=True))
    print(
        f"ratio {ratio:.2f}; two idle cores needed, other processes on this machine now: load {os.getloadavg()[0]:.1f}"
    )


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(folder: Path, arguments: argparse.Namespace) -> None:
    for num_segments in (100_000, 1_000_000):
        source = folder / f"in-{num_segments}"
        write_source(source, num_segments, 1)
        command = [sys.executable, __file__, "memory", "--one", str(source), str(folder / f"out-{num_segments}")]
        result = subprocess.run([*command, arguments.tokenizer], check=True, capture_output=True, text=True)
        print(f"{num_segments:>10,} segments  peak {float(result.stdout.split()[-1]):>7.0f} MiB")


def opening(folder: Path, arguments: argparse.Namespace) -> None:
    tokenizer = load("clip") if arguments.tokenizer == "clip" else train_sentencepiece(["a b c " * 200], 400)
    writer = ShardWriter(folder, 0)
    piece = np.arange(20, dtype=np.int32).tobytes()
    for k in range(1_000_000):
        writer.add_texts([piece])
        writer.add_image(k.to_bytes(8, "little"), 1, 1, "PNG")
        writer.add_texts([piece])
        writer.end_document()
    files, counts = writer.finish()
    tokenizer.save(folder / tokenizer.file_name)
    write_manifest(folder, {
        "format_version": FORMAT_VERSION, "source": {}, "counts": counts, "shards": [counts], "files": files,
        "tokenizer": {"file": tokenizer.file_name, "fingerprint": tokenizer.fingerprint,
                      "vocab_size": tokenizer.vocab_size},
    })  # fmt: skip
    before = private()
    start = time.perf_counter()
    corpus = open_corpus(folder)
    documents = corpus[0], corpus[len(corpus) - 1]
    seconds = time.perf_counter() - start
    assert all(len(document.items) == 3 for document in documents)
    print(
        f"{len(corpus):,} documents: first and last in {seconds:.3f} s, {private() - before:.0f} MiB of private memory"
    )


def private() -> float:
    """Private memory of this process, MiB."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(rollup.split(f"{name}:")[1].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


if __name__ == "__main__":
    main()
