"""Memory and disk that the join of documents' duplicates takes, by the number of documents.

Facts are made up: signatures at random, a fifth of the documents with the same one as an earlier document, and half of
these with the same digest. Memory is the peak of what Python and numpy allocate (tracemalloc); what is mapped from the
disk is not in it.

    python benchmarks/join_memory.py [--rows 40000 80000 160000] [--memory 1000000]
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from arguments import positive
from claims import exit_with

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from data.corpora import write_corpus

from megatron_lcl.curate.duplicates.join import join_documents
from megatron_lcl.curate.duplicates.settings import DocumentDuplicates

TASK = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", default=[40_000, 80_000, 160_000])
    parser.add_argument("--memory", type=positive, default=1_000_000, help="bytes that sorting may take")
    arguments = parser.parse_args()
    rule = DocumentDuplicates(action="keep-one")
    print(f"{'documents':>10} {'removed':>9} {'peak MB':>9} {'disk B a document':>18} {'CPU s':>7}")
    for turn, num in enumerate([TASK, *arguments.rows]):  # the first loads what is compiled
        with tempfile.TemporaryDirectory() as folder:
            files = make(Path(folder), num, rule.permutations)
            (scratch := Path(folder) / "scratch").mkdir()
            before = resource.getrusage(resource.RUSAGE_SELF)
            tracemalloc.start()
            removed = sum(len(part) for part in join_documents(files, rule, scratch, memory=arguments.memory))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            after = resource.getrusage(resource.RUSAGE_SELF)
            disk = sum(file.stat().st_size for file in scratch.iterdir()) / num
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            if turn:
                print(f"{num:>10} {removed:>9} {peak / 1e6:>9.1f} {disk:>18.0f} {spent:>7.1f}", flush=True)


def make(folder: Path, num: int, permutations: int) -> list[Path]:
    """Files of facts, as `document_facts` gives them, of documents that are not there."""
    corpus = write_corpus(folder / "corpus", [[[1]]]).path
    rng, files = np.random.default_rng(0), []
    pool, of_pool = np.empty((0, permutations), np.uint32), np.empty((0, 4), np.uint32)
    for start in range(0, num, TASK):
        count = min(TASK, num - start)
        signature = rng.integers(0, 2**32, (count, permutations), np.uint32)
        digest = rng.integers(0, 2**32, (count, 4), np.uint32)
        if len(pool):
            again = rng.choice(count, count // 5, replace=False)
            of = rng.integers(0, len(pool), len(again))
            signature[again] = pool[of]
            digest[again[::2]] = of_pool[of[::2]]
        pool, of_pool = signature[: TASK // 2], digest[: TASK // 2]
        files.append(folder / f"{start:09d}.npz")
        np.savez(
            files[-1],
            corpus=np.array(str(corpus)),
            document=np.arange(start, start + count),
            digest=digest,
            signature=signature,
            shingles=np.full(count, 9, np.int32),
        )
    return files


if __name__ == "__main__":
    exit_with(main)
