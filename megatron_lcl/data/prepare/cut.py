"""How an input is cut into tasks: how large they are, and that all who work in one folder have the same ones.

Every process cuts for itself, by sizes that include those of images which no signature covers. With two cuts some of
the input would be written twice or never. So the first that comes leaves a hash of its cut in the work folder, and who
has another cut is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import xxhash

from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, matching

MOST_TASKS = 1 << 14
"""of a large input, about: some for each of a thousand processes; more would only be more files, as each task writes a
shard of six at least, and every process that trains opens all shards"""
FOLDER = "tasks"
"""in the work folder"""
_HASH = "tasks.xxh3"


def task_size(total: int, least: int, shard_bytes: int) -> int:
    """Bytes of a task of an input of `total` bytes: `least`, or what makes MOST_TASKS of them, up to a shard."""
    return max(least, min(total // MOST_TASKS, shard_bytes))


def cut(units: Iterable[Unit], size: int) -> list[list[Unit]]:
    """Runs of consecutive units of at least `size` bytes."""
    tasks: list[list[Unit]] = []
    so_far = size
    for unit in units:
        if so_far >= size:
            tasks.append([])
            so_far = 0
        tasks[-1].append(unit)
        so_far += unit.size
    return tasks


def check_cut(
    work: Path, tasks: Iterable[Sequence[str]], finished: str, as_before: bool, to_remove: Sequence[Path]
) -> None:
    """UserError where the tasks of the work folder are others; the first that comes records which they are.

    tasks: of each, the names of what it consists of, in order. finished: pattern of the names of what tasks leave.
    as_before: earlier releases, which recorded no tasks, had the same ones. to_remove: the work folders to begin anew.
    FileNotFoundError where another process has finished and cleared up.
    """
    begun = bool(matching(work, finished))  # looked for first: this release records the tasks before any is done
    folder = work / FOLDER
    digest = xxhash.xxh3_128()
    for names in tasks:
        digest.update(json.dumps([*names]).encode() + b"\n")
    if not exists(folder) and (as_before or not begun):
        with scratch_folder(work) as scratch:
            own = scratch / FOLDER
            own.mkdir()
            (own / _HASH).write_text(digest.hexdigest(), "ascii")
            put_in_place(own, folder)
    remedy = f"remove {' and '.join(map(str, to_remove))} and run the same command again"
    try:
        known = (folder / _HASH).read_text("ascii")
    except FileNotFoundError:
        if exists(work.parent / MANIFEST):
            raise
        raise UserError(
            f"{work} was begun by another release and cannot be resumed; {remedy}, or finish it with that release"
        ) from None
    if known != digest.hexdigest():
        raise UserError(
            f"the input, images beside it included, has changed since the work in {work} began, and would now be cut "
            f"into other tasks; restore the input, or {remedy}"
        )
