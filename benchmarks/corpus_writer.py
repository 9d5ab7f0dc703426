"""Writing given tokens beside megatron-core's IndexedDatasetBuilder. Claim: at least as fast, the same bytes; else the
exit code is 1.

python benchmarks/corpus_writer.py
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from arguments import positive
from claims import exit_unless, exit_with
from measuring import versions

from megatron_lcl.data.corpus.store import ShardWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pieces", type=positive, default=200_000)
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, arguments.pieces)
    pieces = [rng.integers(0, 50_000, n, dtype=np.int32) for n in lengths]
    tensors = [torch.from_numpy(piece) for piece in pieces]
    documents = [slice(k, k + 4) for k in range(0, len(pieces), 4)]
    times: dict[str, list[float]] = {"megatron-core, add_item": [], "megatron_lcl, one text": [], "a document": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.int32, multimodal=True)
            for document in documents:
                for tensor in tensors[document]:
                    builder.add_item(tensor)
                builder.end_document()
            builder.finalize(str(folder / "theirs.idx"))
            times["megatron-core, add_item"].append(time.perf_counter() - start)
            for key in ("megatron_lcl, one text", "a document"):
                start = time.perf_counter()
                writer = ShardWriter(folder, 0)
                for document in documents:
                    if key == "a document":
                        writer.add_texts([piece.tobytes() for piece in pieces[document]])
                    else:
                        for piece in pieces[document]:
                            writer.add_texts([piece.tobytes()])
                    writer.end_document()
                writer.finish()  # fsyncs and hashes, which the other does not
                times[key].append(time.perf_counter() - start)
        same = all(
            (folder / f"tokens-00000.{s}").read_bytes() == (folder / f"theirs.{s}").read_bytes() for s in ("bin", "idx")
        )
    size = 4 * int(lengths.sum()) / 1e6
    theirs = times["megatron-core, add_item"]
    print(f"{len(pieces):,} pieces, {size:.0f} MB; same bytes: {same}; medians of {arguments.rounds} rounds")
    print(versions("megatron-core"))
    claims = {"the same bytes": same}
    for key, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(theirs, values, strict=True))
        claims[f"{key}: at least as fast"] = ratio >= 1
        print(f"{key:<26}{size / statistics.median(values):>8.1f} MB/s{ratio:>8.2f}x")
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
