"""Pack index of 10^5, 10^6 and 10^7 documents: seconds on one core, peak memory, how full the packs are, and what it
costs to go on at the last pack with an empty cache: from a checkpoint's state, and from pack 0.

Documents are resampled from real MMC4 annotations (a shard `docs_*.jsonl`, CLIP tokens, 49 patches an image): their
segments, image matches and similarities. One shard of 100,000 documents is written and linked as often as needed, so
the whole path is measured: reading the corpus, selection, shuffling, blending, packing, writing the index.

Claim: 10 million documents, or fewer, take under 60 s and under 2 GiB, mapped files included; else the exit code is 1.

    python benchmarks/packing_scale.py docs_no_face_shard_151_v3.jsonl [--tokens 2048] [--documents 100000 1000000]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from arguments import existing_file, positive
from claims import exit_unless, exit_with
from measuring import resident

SHARD = 100_000
DOCUMENTS, SECONDS, MEBIBYTES = 10_000_000, 60, 2048


def shards(text: str) -> int:
    """A number of documents that whole shards have."""
    if (number := positive(text)) % SHARD:
        raise argparse.ArgumentTypeError(f"{text} documents are no multiple of {SHARD:,}, the documents of a shard")
    return number


def write_corpus(folder: Path, annotations: Path, num_documents: int, image: bytes = b"-") -> None:
    """A corpus of resampled documents: sizes are real, all token ids are 0, all images the same."""
    from megatron_lcl.data.corpus.corpus_manifest import total, write_manifest
    from megatron_lcl.data.corpus.drops import Drops
    from megatron_lcl.data.corpus.store import ShardWriter
    from megatron_lcl.data.corpus.tokenizer import load

    tokenizer = load("clip")
    documents = []
    for line in annotations.read_text().splitlines():
        record = json.loads(line)
        lengths = [len(ids) for ids in tokenizer.encode_batch(record["text_list"])]
        images = [(i["matched_sim"], i["matched_text_index"]) for i in record["image_info"]]
        documents.append(([np.zeros(n, np.int32).tobytes() for n in lengths], images))
    folder.mkdir()
    tokenizer.save(folder / tokenizer.file_name)
    writer = ShardWriter(folder, 0)
    for d in np.random.default_rng(0).integers(0, len(documents), SHARD):
        texts, images = documents[d]
        writer.add_texts(texts)
        for similarity, matched in images:
            writer.add_image(image, 1, 1, "JPEG", similarity, matched)
        writer.end_document()
    files, counts = writer.finish()
    for name in list(files):
        for k in range(1, num_documents // SHARD):
            again = name.replace("00000", f"{k:05d}")
            os.link(folder / name, folder / again)
            files[again] = files[name]
    shards = [counts] * (num_documents // SHARD)
    write_manifest(folder, {
        "format_version": 1, "source": {"format": "mmc4"}, "drops": Drops().to_dict(),
        "shards": shards, "counts": total(shards), "files": files,
        "tokenizer": {"file": tokenizer.file_name, "fingerprint": tokenizer.fingerprint,
                      "vocab_size": tokenizer.vocab_size},
    })  # fmt: skip


def build(folder: str, cache: str, num_documents: int, tokens_per_pack: int) -> dict[str, Any]:
    """One epoch's index, in a process of its own so that its peak memory is its own."""
    from megatron_lcl.config import Corpus, Data
    from megatron_lcl.data.loading.ledger import open_ledger
    from megatron_lcl.data.loading.pack_index import PackIndex

    data = Data(corpora=(Corpus(folder),), tokens_per_pack=tokens_per_pack, cache=cache)
    started = time.perf_counter()
    ledger = open_ledger(data, 49, tokens_per_pack)
    measured = time.perf_counter()
    index, packs = PackIndex(data, ledger), 0
    while True:
        index.prepare(packs)
        chunk = index.chunks[-1]
        packs = chunk.stop
        if chunk.end["positions"][chunk.corpora[0]][0] == 1:
            break
    ended = time.perf_counter()
    records = [json.loads((c.folder / "chunk.json").read_text()) for c in index.chunks]
    slots = packs * index.images_per_pack
    fresh = dataclasses.replace(data, cache=f"{cache}-again")
    resumed = time.perf_counter()
    PackIndex(fresh, index.ledger_at(packs - 1)).prepare(packs - 1)
    going_on = time.perf_counter() - resumed
    return {
        "documents": num_documents,
        "images_per_pack": index.images_per_pack,
        "measure": measured - started,
        "pack": ended - measured,
        "peak": resident("VmHWM"),
        "packs": packs,
        "going_on": going_on,
        "chunks_mb": megabytes(cache, "packs-*"),
        "going_on_mb": megabytes(f"{cache}-again", "packs-*"),
        "sizes_mb": megabytes(cache, "documents-*"),
        "tokens": sum(r["tokens"] for r in records) / (packs * tokens_per_pack),
        "images": sum(r["images"] for r in records) / slots,
    }


def megabytes(cache: str, names: str) -> float:
    """What the folders of these names hold."""
    return sum(file.stat().st_size for folder in Path(cache).glob(names) for file in folder.glob("*.npy")) / 1e6


def run(folder: Path, cache: Path, num_documents: int, tokens_per_pack: int) -> dict[str, Any]:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(build, str(folder), str(cache), num_documents, tokens_per_pack).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=existing_file)
    parser.add_argument("--tokens", type=positive, default=2048, help="T")
    parser.add_argument("--documents", type=shards, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    arguments = parser.parse_args()
    print(
        "documents      I   sizes s   packs s   total s   s per 10^6   peak MiB       packs   tokens   images"
        "   sizes MB  chunks MB   going on: s  chunks MB"
    )
    claims = {}
    with tempfile.TemporaryDirectory() as temporary:
        for number, num_documents in enumerate([SHARD, *arguments.documents]):  # the first run compiles
            folder = Path(temporary) / f"corpus{number}"
            write_corpus(folder, arguments.annotations, num_documents)
            r = run(folder, Path(temporary) / f"cache{number}", num_documents, arguments.tokens)
            total = r["measure"] + r["pack"]
            if number:
                print(
                    f"{r['documents']:>10,}  {r['images_per_pack']:>4}  {r['measure']:8.2f}  {r['pack']:8.2f}"
                    f"  {total:8.2f}  {total / num_documents * 1e6:11.2f}  {r['peak']:9.0f}  {r['packs']:>10,}"
                    f"  {r['tokens']:.2%}"
                    f"  {r['images']:.2%}"
                    f"  {r['sizes_mb']:9.1f}  {r['chunks_mb']:9.1f}  {r['going_on']:12.2f}  {r['going_on_mb']:9.1f}",
                    flush=True,
                )
            if number and num_documents <= DOCUMENTS:
                claims[f"{num_documents:,} documents in under {SECONDS} s"] = total < SECONDS
                claims[f"{num_documents:,} documents in under {MEBIBYTES:,} MiB"] = r["peak"] < MEBIBYTES
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
