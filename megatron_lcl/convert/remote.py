"""Weights in object storage, of runs' checkpoints, imports and exports: copied to the disk, as they say of themselves.

    <user's cache>/checkpoint-<hash of the URL, of the record, of an average's name>/step-00001000/…

Of a run's checkpoint only the weights that are wanted are copied, with the config and the progress: the optimizer's
state is larger. The record is the file that is put last and names all others with their hashes: a checkpoint's
manifest, an export's certificate, an import's record. What another process deletes of the cache, or replaces in the
storage, is fetched anew.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path, PurePosixPath

import xxhash

from megatron_lcl.convert.folder import EXPORTS, IMPORT, RECORDS, read_record
from megatron_lcl.convert.manifest import MANIFEST, read_manifest
from megatron_lcl.data.corpus.cache_folders import locked, make_room, user_cache
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.scratch import clear_dead, put_in_place, scratch_folder
from megatron_lcl.data.storage.names import is_within
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.run_folder import AVERAGES, CHECKPOINTS, CONFIG, PROGRESS, WEIGHTS

LIMIT = 100e9
"""bytes that all copies take, but for those that somebody has used within a day"""
PREFIX = "checkpoint-"
_STEP = re.compile(rf"(?:{CHECKPOINTS}/)?step-(\d+)/{re.escape(MANIFEST)}")


def pinned(url: str) -> str:
    """What a URL names: of a run, or of a run's copies (`checkpoint.mirror`), the newest complete checkpoint; else
    itself. UserError where there is none, or the storage cannot be reached."""
    store = Store(url)
    if any(store.head(RECORDS)):
        return url
    if url.startswith("http"):
        raise UserError(
            f"{url} holds no complete checkpoint: none of {', '.join(RECORDS)} is there; a web server lists nothing, "
            "so name a run's checkpoint itself, as …/step-00001000"
        )
    names = [name for name, _ in store.list()]
    steps = {int(found[1]): name for name in names if (found := _STEP.fullmatch(name))}
    if not steps:
        raise UserError(
            f"{url} holds no complete checkpoint: none of {', '.join(RECORDS)} and no step-…/{MANIFEST} is there; "
            "files of other formats are read from a disk"
        )
    return f"{url}/{steps[max(steps)].rpartition('/')[0]}"


def local_copy(url: str, average: str | None = None) -> Path:
    """A folder with what is needed for the weights at a URL, or in the newest checkpoint of the run there: complete,
    and of the bytes that its record names. UserError where it is not, or cannot be had.

    average: of a checkpoint the weights of this average, as far as it has one, in place of its own."""
    url = pinned(url)
    store, name = Store(url), PurePosixPath(url).name
    at = next(k for k, about in enumerate(store.head(RECORDS)) if about)
    record = store.get(RECORDS[at])
    of = url.encode() + record + (average or "").encode()
    holder = user_cache() / f"{PREFIX}{xxhash.xxh3_128_hexdigest(of)}"
    holder.mkdir(parents=True, exist_ok=True)
    with locked(holder.with_name(f"{holder.name}.lock")):
        if not exists(holder / name):
            _fetch(store, RECORDS[at], record, holder, name, average)
        with contextlib.suppress(OSError):  # another user's
            os.utime(holder)
    return holder / name


def _fetch(store: Store, record_name: str, record: bytes, holder: Path, name: str, average: str | None) -> None:
    """What is needed of what the record names into a folder of that name, all or nothing."""
    clear_dead(holder)
    with scratch_folder(holder) as temporary:
        folder = temporary / name
        folder.mkdir()
        (folder / record_name).write_bytes(record)
        hashes = _needed(folder, store.url, average)
        sizes = dict(zip(hashes, store.head(list(hashes)), strict=True))
        if missing := [file for file, about in sizes.items() if about is None]:
            raise UserError(f"{store.url}/{missing[0]} is missing; copy the folder there again")
        make_room(holder, LIMIT - sum(about[0] for about in sizes.values() if about), PREFIX)
        for file in hashes:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        store.fetch(list(hashes), folder)
        if changed := [file for file, digest in hashes.items() if hash_file(folder / file) != digest]:
            raise UserError(f"{store.url}/{changed[0]} is not the file that {record_name} names; copy it there again")
        put_in_place(folder, holder / name)


def _needed(folder: Path, url: str, average: str | None) -> dict[str, str]:
    """The files with their hashes: all that the record of an import or export names; of a checkpoint those of the
    weights."""
    for kind in (IMPORT, *EXPORTS):
        if found := read_record(folder, kind):
            if strange := [name for name in found[1]["files"] if not is_within(name)]:
                raise UserError(f"{url} names a file outside of its folder ({strange[0]}), and is not copied")
            return {name: str(digest) for name, digest in found[1]["files"].items()}
    weights = f"{AVERAGES}/{average}/{WEIGHTS}" if average else WEIGHTS
    try:
        return {
            name: str(file["xxh3"])
            for name, file in read_manifest(folder).items()
            if name == weights or PurePosixPath(name).name in (CONFIG, PROGRESS)
        }
    except UserError as error:
        raise UserError(f"{url}/{MANIFEST} {error}; copy the checkpoint there again") from None
    except OSError:  # a certificate or a record that is none
        raise UserError(f"{url} is no checkpoint, import or export of megatron_lcl") from None
