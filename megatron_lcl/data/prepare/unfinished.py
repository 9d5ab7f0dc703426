"""The folder of a corpus that is not complete: whose it is, what in it is unfinished, and how it is cleared up."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megatron_lcl.data.corpus.corpus_manifest import MANIFEST, read_manifest
from megatron_lcl.data.corpus.drops import LOG
from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.scratch import clear_dead, is_scratch, is_used, scratch_folder, waiting_for_others
from megatron_lcl.data.prepare.cut import FOLDER as TASKS
from megatron_lcl.errors import UserError, free_space, is_full
from megatron_lcl.filesystem import GONE, exists, is_dir, matching

WORK = "_unfinished"
_RECORD = "recipe.json"
_LOCK = "lock"
_VERSION = "unfinished"
"""key of the record: version of the layout of unfinished work"""
logger = logging.getLogger(__name__)


def is_finished_corpus(folder: Path, recipe: Mapping[str, Any], version: int, new: Sequence[str] = ()) -> bool:
    """Whether the folder holds this very corpus, rather than nothing, or an unfinished run. UserError for all else.

    version: of the layout of unfinished work, which a run shares with the one that it resumes. new: keys that the
    recipes of earlier releases lack: their finished corpora are recognized without, with a warning.
    """
    ours = json.loads(json.dumps(recipe))
    work = folder / WORK
    try:  # before the manifest: the record is deleted once that is there
        record = json.loads((work / _RECORD).read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        record = None
    if exists(folder / MANIFEST):
        theirs = read_manifest(folder).get("recipe", {})
        unknown = [key for key in new if key not in theirs]
        different = [key for key in ours if key not in unknown and (key not in theirs or theirs[key] != ours[key])]
        if different == ["rules"]:  # whoever trains from it goes on with it
            logger.warning(
                "%s was made by another version's rules for %s and stays as it is; give a new folder for today's",
                folder,
                recipe.get("format", "curate"),
            )
        elif different:
            raise UserError(
                f"{folder} holds another corpus (its {', '.join(different)} differ); give a new folder, and join "
                "corpora with `megatron-lcl merge`"
            )
        elif unknown:
            logger.warning(
                "%s was made by an earlier release, which did not record the %s of its source, and stays as it is; if "
                "they have changed, give a new folder",
                folder,
                ", ".join(unknown),
            )
        return True
    if record is not None:
        theirs = record.pop(_VERSION, None)
        other = [key for key in record | ours if key not in record or key not in ours or record[key] != ours[key]]
        if other == ["rules"]:
            raise UserError(
                f"{folder} holds an unfinished corpus by another version's rules; finish it with the release that "
                "began it, remove it, or give a new folder"
            )
        if other:
            raise UserError(
                f"{folder} holds another unfinished corpus (different: {', '.join(other)}); remove it or give a new "
                "folder"
            )
        if theirs != version:
            raise UserError(
                f"{work} was begun by another release and cannot be resumed; remove it and run the same command again, "
                "or finish it with that release"
            )
    elif exists(folder):
        if not is_dir(folder):
            raise UserError(f"{folder} is a file; give a new folder")
        if others := sorted(p.name for p in folder.iterdir() if p.name not in (WORK, LOG)):
            raise UserError(
                f"{folder} holds other files ({others[0]}, {len(others)} in all); give a new or an empty folder"
            )
    return False


@contextmanager
def work_folder(
    folder: Path, recipe: Mapping[str, Any], version: int, is_useless: Callable[[BaseException], bool]
) -> Iterator[Path]:
    """A scratch folder in the folder of unfinished work, which is claimed for the recipe (`claim`).

    The work goes once the corpus is finished, and where the last process in it fails and leaves nothing of use: else a
    command with other options would be refused. is_useless: says so, given the error. UserError where the disk is full
    or the folder cannot be written. What fails because another process has finished and cleared up is no error.
    """
    work = folder / WORK
    created = [path for path in (folder, *folder.parents) if not exists(path)]
    entered = False
    while not entered:  # again where another process has finished, and cleared up, before this one was in
        try:
            with clear_errors(folder), in_work_folder(work) as scratch:
                claim(work, recipe, version, scratch)
                entered = True
                yield scratch
        except BaseException as error:
            is_gone = isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno in GONE)
            if not (is_gone and exists(folder / MANIFEST)):
                clear_dead(work)
                if is_useless(error) and not is_used(work):
                    remove_work(folder, created)
                raise
        finally:
            if exists(folder / MANIFEST):
                clear_up(folder)


@contextmanager
def in_work_folder(work: Path) -> Iterator[Path]:
    """A scratch folder in the work folder, which is made if need be."""
    work.mkdir(parents=True, exist_ok=True)
    clear_dead(work)
    with scratch_folder(work) as scratch:
        yield scratch


def claim(work: Path, recipe: Mapping[str, Any], version: int, scratch: Path) -> None:
    """Record which corpus the work folder is for, unless that is recorded: of several processes at once one does.

    version: of the layout of what will be in it.
    Without a record, what is in the folder is what `remove_work` left when it was interrupted, of whatever input and
    options, and goes.
    """
    if _unrecorded(work):
        _clear_unrecorded(work)
    own = scratch / _RECORD
    write_file(own, json.dumps({**recipe, _VERSION: version}).encode())
    _put_record(own, work)


def _put_record(own: Path, work: Path) -> None:
    """Make a file the work folder's record, unless there is one."""
    try:
        os.link(own, work / _RECORD)
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not exists(work / _RECORD):
            os.replace(own, work / _RECORD)


def _unrecorded(work: Path) -> list[Path]:
    """What is in a work folder that has no record."""
    found = [path for path in work.iterdir() if not is_scratch(path) and path.name != _LOCK]
    return [] if exists(work / _RECORD) else found  # looked for last: what is found was there before any record


def _clear_unrecorded(work: Path) -> None:
    with waiting_for_others(work / _LOCK), scratch_folder(work) as gone:
        for path in _unrecorded(work):
            with suppress(FileNotFoundError):  # where there are no locks, another process was faster
                path.rename(gone / path.name)


def holds_work(work: Path) -> bool:
    """Whether there is something in a work folder that took time to make: indexes, what was chosen, finished parts."""
    quick = (_RECORD, TASKS)
    found = (path for path in matching(work, "*") if not is_scratch(path) and not path.name.startswith(_LOCK))
    return any(path.name not in quick and (not is_dir(path) or matching(path, "*")) for path in found)


def clear_up(folder: Path) -> None:
    """Once the manifest is written nothing else is needed.

    The work folder is moved away first, at once: while it is removed file by file, another process could find a folder
    without finished parts, and begin anew there. The next one removes what is left where this is killed.
    """
    clear_dead(folder)
    if exists(folder / WORK):
        try:
            with scratch_folder(folder) as gone:
                (folder / WORK).rename(gone / WORK)
        except OSError:  # a full disk, for one, which this makes room on; or another process was first
            shutil.rmtree(folder / WORK, ignore_errors=True)


@contextmanager
def clear_errors(folder: Path, remedy: str = "free some and run the same command again") -> Iterator[None]:
    """A full disk, or a folder that cannot be written, as one line. remedy: of a full disk. An error that names a file
    neither in the folder nor above it is of the input, and stays as it is."""
    try:
        yield
    except OSError as error:
        named = [os.fsdecode(n) for n in (error.filename, error.filename2) if n is not None and not isinstance(n, int)]
        ours, places = folder.absolute(), [Path(name).absolute() for name in named]
        if places and not any(path.is_relative_to(ours) or ours.is_relative_to(path) for path in places):
            raise
        if is_full(error):
            raise UserError(f"no space left for {folder}, {free_space(folder)}; {remedy}") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"cannot write {folder}: {error.strerror}") from None
        raise


def remove_work(folder: Path, created: list[Path]) -> None:
    """Remove what a failed run wrote, and the folders that were made for it, the innermost first; nothing where another
    process has come meanwhile.

    The record first: where this is interrupted, `claim` removes the rest.
    """
    work = folder / WORK
    with suppress(OSError):
        old = work / f"old-{_RECORD}"
        os.replace(work / _RECORD, old)
        sync(work)
        if is_used(work):  # by one that may have found the record; one that comes later does not
            _put_record(old, work)
            old.unlink(missing_ok=True)
        _clear_unrecorded(work)
    if not is_used(work):
        shutil.rmtree(work, ignore_errors=True)
    for path in created:
        try:
            path.rmdir()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            if path == folder:  # in those above it other corpora may lie
                logger.warning("%s is left, as it is not empty", path)
            break
