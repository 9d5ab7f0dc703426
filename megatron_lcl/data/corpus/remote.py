"""A corpus in object storage: its small files on the local disk, its tokens and images by ranges.

    <cache>/corpora-<HASH>/          the manifest, whose bytes' hash it is, the tokenizer, `.idx`, `.arrow` and names,
                                     each as its hash in the manifest says; `.bin` and `.bin.have` as
                                     `data.storage.blocks` keeps them
    <cache>/corpora-<HASH>/objects-… the objects' sizes and ETags at a URL, for processes that open it at the same time;
                                     locked by the one that asks for them
    <cache>/corpora-<HASH>/scratch-… small files that a process copies, until they are whole
    <cache>/corpora-<HASH>.lock      held by that process, as far as there are locks

A file stands under its name once it is whole. Whoever reads from a folder holds a shared lock on its manifest, looks at
the folder's time every hour and sets it where it is older than that. Folders that nobody has read from for a day go,
longest unused first, once there is no more room for what is read; none goes where there are no locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash
from filelock import lock_descriptor

from megatron_lcl.data.corpus.cache_folders import Use, locked, make_room, not_writable, user_cache
from megatron_lcl.data.corpus.files import hash_file, replace_bytes, sync
from megatron_lcl.data.corpus.scratch import clear_dead, scratch_folder
from megatron_lcl.data.storage.blocks import Blocks, Room
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import About, Store
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists

LIMIT = 100e9
"""bytes that the blocks of all corpora take, where no config says it"""
BATCH = 16
"""files that are copied at once"""
RENEW_SECONDS = 3600.0
"""how often a process that reads from a folder looks at its time, which it sets where it is older: locks may not show
other machines that it reads"""
_PREFIX = "corpora-"


@lru_cache(maxsize=64)  # a corpus does not change, and a run opens one often
def open_remote(url: str, cache: str | Path | None, manifest_name: str) -> Remote:
    """The corpus at a URL, with its manifest on the disk. UserError where there is none."""
    return Remote(url, user_cache(cache), manifest_name)


class Remote:
    """Where the files of a corpus are. Opened once in a process and those that it forks."""

    def __init__(self, url: str, cache: Path, manifest_name: str) -> None:
        self.url = url
        self.store = Store(url)
        try:
            raw = self.store.get(manifest_name)
        except StorageError as error:
            if error.missing:
                raise UserError(f"{url} is not a corpus: it has no {manifest_name}") from None
            raise
        self.folder = cache / f"{_PREFIX}{xxhash.xxh3_128_hexdigest(raw)}"
        self.room = Room(cache, f"{_PREFIX}*", LIMIT, self._clear)
        """its limit is `data.storage_cache_gb`, which whoever opens a source of sequences sets"""
        self.files: dict[str, Any] = {}
        """of the manifest: sizes and hashes"""
        self._objects: dict[str, About | None] = {}
        self._blocks: dict[str, Blocks] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            kept = self.folder / manifest_name
            if not exists(kept) or kept.read_bytes() != raw:  # damaged since
                replace_bytes(kept, raw)
            os.utime(self.folder)
            self._use = Use(self.folder, manifest_name, RENEW_SECONDS)
        except OSError as error:
            raise not_writable(f"{url} cannot be kept in", cache, error) from None

    def prepare(self, manifest: dict[str, Any]) -> None:
        """What all shards need on the disk, and the sizes of all objects; each once."""
        self.files = manifest["files"]
        small = [*(name for name in self.files if name.endswith((".idx", ".arrow"))), manifest["tokenizer"]["file"]]
        if self._objects:
            self.copy(small)
            return
        with self._looked_up() as self._objects:
            self.copy(small)

    def _clear(self, limit: float) -> bool:
        return make_room(self.folder, limit - sum(info["size"] for info in self.files.values()), _PREFIX)

    @contextlib.contextmanager
    def _looked_up(self) -> Iterator[dict[str, About | None]]:
        """(bytes, ETag) of each object, None where it is not there, as they are now. Processes that come to this before
        it is left wait, and get the same: all of a run begin at once, and each would ask for all objects."""
        with open(self.folder / f"objects-{xxhash.xxh3_128_hexdigest(self.url.encode())}", "a+b", buffering=0) as file:
            waited = False
            with contextlib.suppress(OSError):  # no locks here
                waited = not lock_descriptor(file.fileno(), blocking=False)
                if waited:
                    lock_descriptor(file.fileno())
            found: Any = None
            if waited:
                file.seek(0)
                with contextlib.suppress(ValueError):  # the other has failed
                    found = json.loads(file.read())
            if found is None:
                file.truncate(0)
                found = self._look_up()
                with contextlib.suppress(OSError):  # a full disk: the others ask themselves
                    file.write(json.dumps(found).encode())
            else:
                file.close()  # the next one need not wait for what follows
            yield {name: about and tuple(about) for name, about in found.items()}

    def _look_up(self) -> dict[str, About | None]:
        listed: dict[str, About] = {}
        if not self.url.startswith("http"):  # which has no list
            with contextlib.suppress(StorageError):  # some may read a bucket and not list it
                listed = self.store.versions(deep=False)
        others = [name for name in self.files if name not in listed]
        found = {**listed, **dict(zip(others, self.store.head(others), strict=True))}
        return {name: found[name] for name in self.files}

    def size(self, name: str) -> int:
        """Bytes of an object. FileNotFoundError where there is none."""
        about = self._objects.get(name)
        if about is None:
            raise FileNotFoundError(f"{self.url}/{name}")
        return about[0]

    def blocks(self, name: str) -> Blocks:
        """The bytes of a `.bin`."""
        if name not in self._blocks:
            about = self._objects[name]
            assert about is not None, name
            self._blocks[name] = Blocks(self.store, name, *about, self.folder, self.room, self._use.renew)
        return self._blocks[name]

    def copy(self, names: Sequence[str]) -> None:
        """Have whole files on the disk, as the manifest says them. UserError where one is another."""
        missing = [name for name in names if not exists(self.folder / name)]
        if not missing:
            return
        with locked(self.folder.with_name(self.folder.name + ".lock")):
            clear_dead(self.folder)
            missing = [name for name in missing if not exists(self.folder / name)]
            with scratch_folder(self.folder) as scratch:
                for first in range(0, len(missing), BATCH):
                    some = missing[first : first + BATCH]
                    self._fetch(some, scratch)
                    for name in some:
                        (scratch / name).replace(self.folder / name)

    def download(self, name: str, target: Path) -> None:
        """A whole file to a place outside the cache, as the manifest says it. UserError where it is another."""
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".copy-") as scratch:
            self._fetch([name], Path(scratch))
            (Path(scratch) / name).replace(target)

    def _fetch(self, names: Sequence[str], scratch: Path) -> None:
        known = [self._objects.get(name) for name in names]
        for name, about in zip(names, known, strict=True):
            if about and name in self.files and about[0] != self.files[name]["size"]:
                raise self._other(name, f"{about[0]:,} bytes, not {self.files[name]['size']:,}")
        self.store.fetch(names, scratch, known)
        for name in names:
            size, digest = (scratch / name).stat().st_size, hash_file(scratch / name)
            listed = self.files.get(name, {"size": size, "xxh3": digest})  # a tokenizer has its own fingerprint
            if (size, digest) != (listed["size"], listed["xxh3"]):
                raise self._other(name, f"{size:,} bytes, XXH3 {digest}")
            sync(scratch / name)

    def _other(self, name: str, found: str) -> UserError:
        return UserError(f"{self.url}/{name} is not the file that the manifest names ({found}); copy the corpus again")
