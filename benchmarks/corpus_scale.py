"""Workers, memory, opening, and names of documents. Claims: two workers at least 1.7 times one; under 600 MiB a worker
at 1e5 and 1e6 segments; a corpus of 1,000,000 documents opens, and gives its first and last, in under 1 s and 200 MiB
of private memory; the names of 1,000,000 documents take under 10 bytes each where they are files and places in them.
Exit code 1 if one of them does not hold.

    python benchmarks/corpus_scale.py workers|memory|open|names [--tokenizer clip|FILE.model]
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
from claims import exit_unless, exit_with
from measuring import resident

from megatron_lcl.data.corpus.corpus_manifest import FORMAT_VERSION, write_manifest
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.names import Names, NamesWriter
from megatron_lcl.data.corpus.store import ShardWriter, open_corpus
from megatron_lcl.data.corpus.tokenizer import load
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["workers", "memory", "open", "names"])
    parser.add_argument("--tokenizer", default="clip")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        source, target, tokenizer = arguments.one
        preprocess("jsonl", source, target, tokenizer=tokenizer)
        return print(resident("VmHWM"))
    with tempfile.TemporaryDirectory() as folder:
        what = {"workers": workers, "memory": memory, "open": opening, "names": names}[arguments.what]
        what(Path(folder), arguments)


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
    exit_unless({"two workers at least 1.7 times one": ratio >= 1.7})


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory(folder: Path, arguments: argparse.Namespace) -> None:
    claims = {}
    for num_segments in (100_000, 1_000_000):
        source = folder / f"in-{num_segments}"
        write_source(source, num_segments, 1)
        command = [sys.executable, __file__, "memory", "--one", str(source), str(folder / f"out-{num_segments}")]
        result = subprocess.run([*command, arguments.tokenizer], check=True, capture_output=True, text=True)
        most = float(result.stdout.split()[-1])
        print(f"{num_segments:>10,} segments  peak {most:>7.0f} MiB")
        claims[f"{num_segments:,} segments: under 600 MiB"] = most < 600
    exit_unless(claims)


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
        "drops": Drops().to_dict(),
        "tokenizer": {"file": tokenizer.file_name, "fingerprint": tokenizer.fingerprint,
                      "vocab_size": tokenizer.vocab_size},
    })  # fmt: skip
    before = private()
    start = time.perf_counter()
    corpus = open_corpus(folder)
    documents = corpus[0], corpus[len(corpus) - 1]
    seconds = time.perf_counter() - start
    assert all(len(document.items) == 3 for document in documents)
    taken = private() - before
    print(f"{len(corpus):,} documents: first and last in {seconds:.3f} s, {taken:.0f} MiB of private memory")
    exit_unless({"opens in under 1 s": seconds < 1, "and under 200 MiB": taken < 200})


def names(folder: Path, _: argparse.Namespace) -> None:
    """Bytes a document, and seconds to write, to read one and to search them all, of names as the importers give."""
    rng, num = random.Random(0), 1_000_000
    words = ["".join(rng.choices("etaoinshrdlcumwfgypbvk", k=rng.randint(3, 9))) for _ in range(5000)]
    offsets = np.cumsum([rng.randint(500, 5000) for _ in range(num)])
    urls = [
        f"https://www.{rng.choice(words)}.com/{rng.choice(words)}/{'-'.join(rng.choices(words, k=4))}"
        for _ in range(num)
    ]
    claims = {}
    for what, made in (
        ("jsonl: file and first byte", [f"part-{k // 50_000:05d}.jsonl@{offsets[k]}" for k in range(num)]),
        ("parquet: file and row", [f"train-{k // 50_000:05d}-of-00020.parquet:{k % 50_000}" for k in range(num)]),
        ("tar: file and key", [f"{k // 10_000:05d}.tar:{k:09d}" for k in range(num)]),
        ("html: page", sorted(f"{a}/{b}-{k}.html" for k, (a, b) in enumerate(zip(urls, words * 200, strict=True)))),
        ("tar: file, key, URL", [f"{k // 10_000:05d}.tar:{k:09d} {urls[k]}" for k in range(num)]),
    ):
        start = time.perf_counter()
        writer = NamesWriter(folder / "names-00000.bin")
        writer.extend(made)
        size = int(writer.finish()["size"])
        written = time.perf_counter()
        found = Names(folder / "names-00000.bin", num)
        assert found[num - 1] == made[-1]
        opened = time.perf_counter()
        assert list(found.find(made[num // 2]))[:1] == [num // 2]
        searched = time.perf_counter()
        print(
            f"{what:<28}{sum(map(len, made)) / num:>8.1f} characters{size / num:>8.2f} bytes a document"
            f"{written - start:>8.2f} s to write{1e3 * (opened - written):>8.2f} ms to read the last"
            f"{searched - opened:>8.2f} s to search"
        )
        if what.startswith(("jsonl", "parquet", "tar: file and key")):
            claims[f"{what}: under 10 bytes a document"] = size < 10 * num
    exit_unless(claims)


def private() -> float:
    """Private memory of this process, MiB."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(rollup.split(f"{name}:")[1].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


if __name__ == "__main__":
    exit_with(main)
