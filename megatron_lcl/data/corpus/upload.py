"""Folders into object storage, all or nothing: one that can be opened is complete.

An object is whole or not there. The file of a folder that says what belongs to it is put last: before, there is nothing
to open. While a command's output is put, and where that was interrupted, `_uploading.json` lies beside it; the same
command goes on. Of several processes that are given one URL and one `work`, one is at it, as far as there are locks.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import xxhash

from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.scratch import clear_dead, locked_in, scratch_folder
from megatron_lcl.data.storage.names import SCRATCH, UPLOADING, shortened
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import below, exists, is_dir, is_file

MAX_NAME = 200
"""bytes of a folder's name below `work`; a URL has up to 1,024, and names are put behind it with suffixes"""
_RECORDS = (".json", ".jsonl", ".parquet")
"""what a command looks at to see that its output is finished"""


def put_files(store: Store, folder: Path, names: Iterable[str], last: str | None, prefix: str = "") -> None:
    """Put files of a folder, and the one that says what belongs to it once the others are there."""
    for name in names:
        if name != last:
            store.put(prefix + name, folder / name)
    if last is not None:
        store.put(prefix + last, folder / last)


@contextlib.contextmanager
def uploaded(
    url: str,
    work: Path,
    last: str | None,
    *,
    resumes: bool,
    keep: bool = False,
) -> Iterator[Path]:
    """A folder below `work` for what a command writes, whose files are put below the URL at the end.

    last: name of the file with which the output is complete, which it must have; None: it has no such file. Where it is
    not there at the end, as other jobs are not done, nothing is put. resumes: the command goes on with a folder that it
    finds, and recognizes a finished one; else it wants a new one each time. keep: leave the folder, in which other jobs
    work at the same time; without, a command that resumes waits for another process that has the folder.

    Raises UserError, before the command begins, where the place cannot be reached or written, or holds something else,
    or where a command that does not resume finds another process at work; at the end, where the folder lacks a file
    that its `last` lists.
    """
    if url.startswith("http"):
        raise UserError(f"{url}: outputs are written to a disk or to object storage, as s3://bucket/folder")
    parent, _, name = url.rpartition("/")
    store, folder = Store(url), work / shortened(quote(parent, safe=""), MAX_NAME) / shortened(name, MAX_NAME)
    with contextlib.ExitStack() as alone:
        alone.enter_context(_alone(folder, None if resumes else f"{url}: another process writes this output"))
        found = dict(store.list())
        complete = last in found
        begun = _begun(store, found)
        if not complete and begun is None and found:
            raise UserError(f"{url} holds other objects ({min(found)}, {len(found)} in all); give another place")
        if not resumes:
            if complete:
                if begun is not None:  # the process that put it was killed before it could delete this
                    store.delete([UPLOADING])
                raise UserError(f"{url} holds such an output already (it has {last}); give another place")
            shutil.rmtree(folder, ignore_errors=True)
        brought = complete and not exists(folder)
        if complete:
            assert last is not None
            records = {name: size for name, size in found.items() if name.endswith(_RECORDS) and name != UPLOADING}
            _bring(store, folder, records, last)
        elif begun is None:
            store.put(UPLOADING, _marker(None))  # says now, not after hours of work, if this may not be written
        if keep:
            alone.close()
        try:
            yield folder
        except BaseException as error:
            if brought:  # what is wrong with the folder is so with the place
                error.args = tuple(a.replace(str(folder), url) if isinstance(a, str) else a for a in error.args)
                if not keep and _sizes(folder).keys() <= found.keys():  # else there is work in it to go on with
                    shutil.rmtree(folder, ignore_errors=True)
            elif not complete and not (begun or {}).get("fingerprint"):
                with contextlib.suppress(UserError):
                    store.delete([UPLOADING])
            raise
        if keep:
            alone.enter_context(_alone(folder))
        if is_dir(folder) and (last is None or exists(folder / last)):
            _put_all(store, folder, last)
            if not keep:
                if last is not None:  # first, so that what is left of a folder is not taken for one to go on with
                    (folder / last).unlink()
                shutil.rmtree(folder)


@contextlib.contextmanager
def _alone(folder: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock of a folder, in one that is made for both, and goes at the end where nothing else is in it.

    refusal: what is said, as UserError, where another process holds the lock; None: that one is waited for.
    """
    above, name = folder.parent, f"{folder.name}.lock"
    if refusal is not None:
        refusal = f"{refusal}, in {folder}; wait until it ends, or give another place"
    with locked_in(above, name, refusal):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # another user's
                (above / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                above.rmdir()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files that belong to an output."""
    sizes = {}
    for path in sorted(below(folder)):
        name = path.relative_to(folder).as_posix()
        # its name first: another job may be removing what is in its scratch folder
        if not name.startswith(SCRATCH) and not name.endswith(".lock") and is_file(path):
            sizes[name] = path.stat().st_size
    return sizes


def _bring(store: Store, folder: Path, records: dict[str, int], last: str) -> None:
    """The records of a finished output into a folder that lacks them, so that the command recognizes it.

    records: bytes of each. UserError where the folder has others: what is made in it may not be put among these.
    """
    if exists(folder / last):
        sizes = _sizes(folder)
        if other := [name for name, size in records.items() if sizes.get(name) != size]:
            raise UserError(
                f"{store.url} holds another such output than was begun in {folder} (its {other[0]} differs); remove "
                "that folder to go on with what is there, or give another place"
            )
        return
    names = [*(name for name in records if name != last), last]
    clear_dead(folder.parent)
    with scratch_folder(folder.parent) as scratch:
        for name in names:
            for place in (scratch, folder):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
        store.fetch(names, scratch)
        for name in names:  # each is whole, whoever else reads here
            (scratch / name).replace(folder / name)


def _put_all(store: Store, folder: Path, last: str | None) -> None:
    sizes, found = _sizes(folder), dict(store.list())
    complete = last in found
    if complete:
        assert last is not None
        if store.get(last) != (folder / last).read_bytes():
            raise UserError(f"{store.url} holds another such output (its {last} differs); give another place")
    # one that an earlier release put before it was at its end lacks files
    if not complete or any(found.get(name) != size for name, size in sizes.items()):
        there_or_put = {*sizes, *(found if complete else ())}
        if lacking := [name for name in _listed(folder, last) if name not in there_or_put]:
            raise UserError(
                f"{folder} lacks {lacking[0]} ({len(lacking)} in all), which its {last} lists; remove that folder and "
                "run the same command again"
            )
        own, begun = _fingerprint(folder, sizes), _begun(store, found)
        there = begun["fingerprint"] if begun else None
        if there not in (None, own):
            raise UserError(
                f"an upload of something else to {store.url} was begun and not finished; finish it with the command "
                "that began it, delete the objects there, or give another place"
            )
        store.put(UPLOADING, _marker(own))
        anew = there is None and not complete
        missing = [name for name, size in sizes.items() if anew or found.get(name) != size]
        put_files(store, folder, missing, last)
    store.delete([UPLOADING])


def _listed(folder: Path, last: str | None) -> list[str]:
    """The files of an output that it lists itself, as a corpus and an export do."""
    if last is None:
        return []
    try:
        return [*json.loads((folder / last).read_bytes())["files"]]
    except (ValueError, KeyError, TypeError):  # such as a plan of URLs
        return []


def _fingerprint(folder: Path, names: Iterable[str]) -> str:
    """Of the names and contents of files."""
    digest = xxhash.xxh3_128()
    for name in names:
        digest.update(f"{name}\0{hash_file(folder / name)}\n".encode())
    return digest.hexdigest()


def _marker(fingerprint: str | None) -> bytes:
    """What UPLOADING holds: the fingerprint of all that is being put; none while that is being made."""
    return json.dumps({"fingerprint": fingerprint}).encode()


def _begun(store: Store, found: Iterable[str]) -> dict[str, str | None] | None:
    """What says that an upload was begun; None where nothing does."""
    if UPLOADING not in found:
        return None
    raw = store.get(UPLOADING)
    try:
        return {"fingerprint": json.loads(raw)["fingerprint"]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{store.url}/{UPLOADING} is none of ours; give another place") from None
