"""The join of documents' MinHash signatures by equal bands: ours, DuckDB's, Polars's and Ray Data's; and the signatures
themselves beside datasketch's and rensa's.

Signatures are made up: a fifth of the rows are near-duplicates of an earlier one, of a similarity drawn from 0.5 to 1.
Each way of grouping starts from the same band keys in mapped files, one band after another, runs in a process of its
own (for its peak of memory, to which the peaks of what it starts are added), and gives its groups to the same
comparison and union-find, so that all must find the same clusters. DuckDB, Polars and Ray Data, which sorts by key, may
use all cores. Time is of grouping and joining, without the start of the process and of Ray; ratios are to ours.

    pip install -e ".[benchmarks]" pandas "ray[data]"
    python benchmarks/duplicates.py [--rows 100000 1000000] [--rounds 3]

Peers that are not installed are left out.
"""

from __future__ import annotations

import argparse
import functools
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from arguments import positive
from claims import exit_with
from measuring import resident, versions

from megatron_lcl.curate.duplicates.clusters import equal_keys, find, unite_alike
from megatron_lcl.curate.duplicates.minhash import choose_bands, shingle_hashes, signature, word_hashes
from megatron_lcl.data.corpus.files import new_array
from megatron_lcl.data.loading.hashes import mix

PERMUTATIONS, THRESHOLD = 112, 0.75
WORDS = 5
INSTALL = 'pip install -e ".[benchmarks]" pandas "ray[data]"'
Groups = Iterator[tuple[np.ndarray, np.ndarray]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=positive, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--documents", type=positive, default=300, help="for the speed of signatures")
    arguments = parser.parse_args()
    engines = [name for name, (_, *needs) in ENGINES.items() if installed(name, *needs)]
    bands, per_band = choose_bands(THRESHOLD, PERMUTATIONS)
    print(f"{PERMUTATIONS} permutations, threshold {THRESHOLD}: {bands} bands of {per_band} rows")
    print(versions("numpy", "duckdb", "polars", "ray", "datasketch", "rensa"))
    print(f"{'rows':>10} {'grouped by':<12}{'seconds':>10}{'of ours':>9}{'peak GB':>9}{'clusters':>10}")
    agree = True
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), rows, bands, per_band)
            seconds: dict[str, list[float]] = {name: [] for name in engines}
            peaks, clusters = dict.fromkeys(engines, 0.0), {}
            for _ in range(arguments.rounds):
                for name in engines:  # by turns
                    with get_context("spawn").Pool(1) as pool:
                        spent, peak, clusters[name] = pool.apply(join, (name, Path(folder), bands))
                    seconds[name].append(spent)
                    peaks[name] = max(peaks[name], peak)
            ours = seconds["numpy"]
            for name, times in seconds.items():
                ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
                middle = statistics.median(times)
                print(f"{rows:>10} {name:<12}{middle:>10.2f}{ratio:>9.2f}{peaks[name]:>9.2f}{clusters[name][0]:>10}")
            agree &= len(set(clusters.values())) == 1
    signatures(arguments.documents, arguments.rounds)
    return int(not agree)


def make(folder: Path, num: int, bands: int, per_band: int) -> None:
    rng = np.random.default_rng(0)
    described = new_array(folder / "signature.npy", np.uint32, (num, PERMUTATIONS))
    described[:] = rng.integers(0, 2**32, described.shape, np.uint32)
    for row in rng.choice(np.arange(1, num), num // 5, replace=False):
        source = described[rng.integers(0, row)]
        kept = rng.random(PERMUTATIONS) < rng.uniform(0.5, 1)
        described[row, kept] = source[kept]
    for band in range(bands):
        keys = np.zeros(num, np.uint64)
        for column in range(band * per_band, (band + 1) * per_band):
            keys = _mixing()(keys, described[:, column].astype(np.uint64))
        np.save(folder / f"band-{band}.npy", keys)


@functools.cache
def _mixing() -> Any:
    import numba

    return numba.vectorize(["uint64(uint64, uint64)"])(mix)


def join(name: str, folder: Path, bands: int) -> tuple[float, float, tuple[int, int]]:
    """Seconds, peak of memory in GB, and (clusters of several rows, a hash of all clusters)."""
    group, *_ = ENGINES[name]
    described = np.load(folder / "signature.npy", mmap_mode="r")
    parent = np.arange(len(described))
    limit = int(PERMUTATIONS * (1 - THRESHOLD))
    np.save(folder / "few.npy", np.arange(4, dtype=np.uint64) // 2)
    for rows, starts in group(folder / "few.npy", folder):  # imported and compiled
        unite_alike(rows, starts, described, False, 0, parent.copy())
    start = time.perf_counter()
    for band in range(bands):
        for rows, starts in group(folder / f"band-{band}.npy", folder):
            unite_alike(rows, starts, described, False, limit, parent)
    seconds = time.perf_counter() - start
    roots = np.array([find(parent, row) for row in range(len(parent))])
    several = int((np.bincount(roots) > 1).sum())
    own = psutil.Process()
    peak = sum(resident("VmHWM", process.pid) for process in (own, *own.children(recursive=True)))
    return seconds, peak * 2**20 / 1e9, (several, hash(roots.tobytes()))


def by_numpy(file: Path, folder: Path) -> Groups:
    keys = np.load(file, mmap_mode="r")
    return equal_keys(lambda start, stop: (keys[start:stop], np.arange(start, stop)), len(keys), folder / "keys")


def by_duckdb(file: Path, folder: Path) -> Groups:
    import duckdb
    import pyarrow as pa

    keys = np.load(file, mmap_mode="r")
    table = pa.table({"key": pa.array(keys), "row": pa.array(np.arange(len(keys)))})
    query = "SELECT list(row ORDER BY row) AS rows FROM keyed GROUP BY key HAVING count(*) > 1 ORDER BY key"
    with duckdb.connect(config={"temp_directory": str(folder)}) as connection:
        found = connection.register("keyed", table).sql(query).to_arrow_table()
    yield _of_lists(found["rows"].combine_chunks())


def by_polars(file: Path, folder: Path) -> Groups:
    import polars as pl

    keys = np.load(file, mmap_mode="r")
    frame = pl.LazyFrame({"key": np.asarray(keys), "row": np.arange(len(keys))})
    grouped = frame.group_by("key").agg(pl.col("row").sort()).filter(pl.col("row").list.len() > 1).sort("key")
    yield _of_lists(grouped.collect(engine="streaming")["row"].to_arrow())


def by_ray(file: Path, folder: Path) -> Groups:
    import pyarrow as pa
    import ray

    if not ray.is_initialized():
        ray.init(address="local", include_dashboard=False, configure_logging=False, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    keys = np.load(file, mmap_mode="r")
    table = pa.table({"key": pa.array(keys), "row": pa.array(np.arange(len(keys)))})
    parts = [table.slice(start, 1 << 17) for start in range(0, len(table), 1 << 17)]
    blocks = ray.get(ray.data.from_arrow(parts).sort(["key", "row"]).to_arrow_refs())
    found = pa.concat_tables(blocks)
    ordered, rows = found["key"].to_numpy(), found["row"].to_numpy()
    same = ordered[1:] == ordered[:-1]
    grouped = np.r_[same, False] | np.r_[False, same]
    ordered, rows = ordered[grouped], rows[grouped]
    yield rows, np.flatnonzero(np.r_[len(rows) > 0, ordered[1:] != ordered[:-1], True])


def _of_lists(lists: object) -> tuple[np.ndarray, np.ndarray]:
    return lists.flatten().to_numpy(), np.asarray(lists.offsets, np.int64)  # type: ignore[attr-defined]


ENGINES: dict[str, tuple[Any, ...]] = {
    "numpy": (by_numpy,),
    "DuckDB": (by_duckdb, "duckdb"),
    "Polars": (by_polars, "polars"),
    "Ray Data": (by_ray, "ray", "pandas"),
}
"""f(keys, folder) -> Groups of each, and the modules that it needs"""


def installed(name: str, *modules: str) -> bool:
    """Whether a peer is; says where it is not."""
    absent = [module for module in modules if find_spec(module) is None]
    if absent:
        print(f"{name} is left out, without {' and '.join(absent)}: {INSTALL}")
    return not absent


def signatures(num: int, rounds: int) -> None:
    """Documents a second, of 500 words each: shingles and signature."""
    rng = np.random.default_rng(0)
    vocabulary = [f"word{k}" for k in range(5000)]
    texts = [" ".join(rng.choice(vocabulary, 500)) for _ in range(num)]

    def shingles(text: str) -> list[str]:
        words = text.split()
        return [" ".join(words[k : k + WORDS]) for k in range(len(words) - WORDS + 1)]

    def ours(text: str) -> object:
        return signature(shingle_hashes(word_hashes(text), WORDS), PERMUTATIONS)

    def by_datasketch(text: str) -> object:
        import datasketch

        sketch = datasketch.MinHash(PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        return sketch.digest()

    def by_rensa(text: str) -> object:
        import rensa

        sketch = rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(shingles(text))
        return sketch.digest()

    ways = {"ours": ours}
    ways |= {name: way for name, way in (("datasketch", by_datasketch), ("rensa", by_rensa)) if installed(name, name)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(texts[0])
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            for text in texts:
                way(text)
            times[name].append(time.process_time() - start)
    print(f"\n{'signatures by':<14}{'documents a CPU second':>24}{'of ours':>9}")
    for name, spent in times.items():
        ratio = statistics.median(o / t for t, o in zip(spent, times["ours"], strict=True))
        print(f"{name:<14}{num / statistics.median(spent):>24.0f}{ratio:>9.2f}")


if __name__ == "__main__":
    exit_with(main)
