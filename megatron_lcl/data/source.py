"""A corpus as a source of sequences: the size of every document, kept in the cache folder.

    <cache>/documents-<hash>/   tokens.npy, images.npy int32 [D], placements.npy int64 [D], source.json: see `Source`

The hash is over all that the files depend on, so a changed corpus or config never meets old ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.config import Data
from megatron_lcl.data.sequence import Rules, arranged_sizes, measure, mix, rules_for
from megatron_lcl.data.store import Corpus, open_corpus
from megatron_lcl.errors import UserError

VERSION = 1


def key(*values: int) -> Any:
    """A 64-bit hash of some integers (np.uint64), for whatever is random."""
    result = np.uint64(0)
    for value in values:
        result = np.uint64(mix(result, np.uint64(int(value) % (1 << 64))))
    return result


# --- cache -------------------------------------------------------------------------------------------------------


def cache_folder(data: Data) -> Path:
    """`data.cache`, or megatron_lcl in the user's cache folder."""
    if data.cache is not None:
        return Path(data.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_lcl"


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Have `folder` built by one process while others wait for it; complete or not there.

    The lock is the kernel's, so a builder that dies frees it. UserError where the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_name(folder.name + ".lock"), "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(
            f"the pack index cannot be written to {folder.parent} ({error.strerror}); set data.cache to another folder"
        ) from None
    with lock:
        while not folder.is_dir():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)
                continue
            except OSError as error:
                raise UserError(
                    f"{folder.parent} is on a file system without locks ({error.strerror}); set data.cache to another"
                ) from None
            if not folder.is_dir():
                for left_over in folder.parent.glob(folder.name + ".*.tmp"):
                    shutil.rmtree(left_over, ignore_errors=True)
                _build(folder, build)
    return folder


def _build(folder: Path, build: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".tmp", dir=folder.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """XXH3-128 of plain values."""
    return xxhash.xxh3_128_hexdigest(json.dumps(inputs, sort_keys=True).encode())


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file and fsync it."""
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


# --- sources -----------------------------------------------------------------------------------------------------


def plain(array: np.ndarray) -> np.ndarray:
    """The array aligned and read-only, whatever it was: compiled functions then see one type and compile once."""
    view = np.require(array, requirements=["A", "C"]).view(np.ndarray)
    view.flags.writeable = False
    return view


class Source:
    """A corpus with the rules for its sequences, and the size of each document (D documents), memory-mapped.

    tokens int32 [D]: token places were the document one sequence, 0 if it is left out; images int32 [D]: images that
    stay; placements int64 [D]: number, in its shard, of its first placement.
    """

    def __init__(self, corpus: Corpus, rules: Rules, seed: int, cache: Path) -> None:
        self.corpus, self.rules = corpus, rules
        self.key = key(seed, int(corpus.fingerprint[:16], 16))
        whole = rules._replace(max_images=0)  # sizes of whole documents do not depend on it
        inputs = {"version": VERSION, "corpus": corpus.fingerprint, "rules": whole._asdict()}
        folder = build_once(cache / f"documents-{fingerprint(inputs)}", self._measure)
        self.rules = rules._replace(selects=json.loads((folder / "source.json").read_text())["selects"])
        self.tokens, self.images, self.placements = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("tokens", "images", "placements")
        )

    def _measure(self, folder: Path) -> None:
        arrays = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, (len(self.corpus),))
            for name, dtype in (("tokens", np.int32), ("images", np.int32), ("placements", np.int64))
        }
        pieces = (self.pieces(k) for k in range(self.corpus.num_shards))
        selects = any(bool((similarity >= -np.inf).any()) for _, _, _, similarity, _ in pieces)
        rules = self.rules._replace(selects=selects)
        for k, (start, stop) in enumerate(
            zip(self.corpus.document_starts, self.corpus.document_starts[1:], strict=False)
        ):
            sizes = (a[start:stop] for a in arrays.values())
            measure(*self.pieces(k), rules, *sizes)  # type: ignore[call-arg]
        for array in arrays.values():
            array.flush()
        (folder / "source.json").write_text(json.dumps({"selects": selects}))

    def pieces(self, k: int) -> Any:
        """Shard k's lengths, modes, document offsets, similarities and matched texts."""
        shard = self.corpus.shard(k)
        arrays = shard.lengths, shard.modes, shard.document_offsets, shard.similarity, shard.matched_text
        return tuple(map(plain, arrays))

    def document_key(self, document: int, epoch: int) -> Any:
        """What the selection and placement of a document in an epoch are drawn from."""
        return key(int(self.key), epoch, document)

    def sizes(self, documents: np.ndarray, epoch: int) -> np.ndarray:
        """Sizes of sequences, int32 [N, 4]: rows (document's place in the list, part, tokens, images).

        documents: int64, numbers in the corpus; those left out give no row.
        """
        tokens, images = self.tokens[documents], self.images[documents]
        rules = self.rules
        several = (tokens > rules.max_tokens) | (images > rules.max_images) | ((rules.num_patches == 0) & (images > 1))
        whole = np.flatnonzero((tokens > 0) & ~several)
        blocks = [np.stack([whole, np.zeros_like(whole), tokens[whole], images[whole]], 1).astype(np.int32)]
        places = np.flatnonzero(several)
        shards = np.searchsorted(self.corpus.document_starts, documents[places], "right") - 1
        for k in np.unique(shards):
            mine = places[shards == k]
            start = self.corpus.document_starts[k]
            keys = np.array([self.document_key(int(d), epoch) for d in documents[mine]], np.uint64)
            placements = self.placements[start : self.corpus.document_starts[k + 1]]
            local = documents[mine] - start
            rows = arranged_sizes(*self.pieces(k), placements, local, keys, rules)  # type: ignore[call-arg]
            first = np.searchsorted(rows[:, 0], np.arange(len(mine)))
            part = np.arange(len(rows)) - first[rows[:, 0]]
            blocks.append(np.stack([mine[rows[:, 0]], part, rows[:, 1], rows[:, 2]], 1).astype(np.int32))
        return np.concatenate(blocks)


def open_source(
    path: str | Path,
    data: Data,
    num_patches: int,
    context_length: int,
    images_per_pack: int,
    contrast_only: bool = False,
    carry_text: bool = False,
) -> Source:
    """Open the corpus in folder `path` as a source of sequences."""
    corpus = open_corpus(path)
    rules = rules_for(
        data,
        num_patches,
        context_length,
        images_per_pack,
        pairs=corpus.manifest.get("source", {}).get("format") == "webdataset",
        contrast_only=contrast_only,
        carry_text=carry_text,
    )
    return Source(corpus, rules, data.seed, cache_folder(data))
