"""The end of `preprocess`: finished parts, compared with their records, become a corpus.

Everything here may be interrupted and repeated, and two processes may do it at the same time: both write the same.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.corpus_manifest import (
    KIND,
    MANIFEST,
    manifest_of,
    read_manifest,
    shard_files,
    total,
    write_manifest,
)
from megatron_lcl.data.corpus.drops import LOG, NAMES_KEPT, Drops
from megatron_lcl.data.corpus.files import hash_file, sync
from megatron_lcl.data.corpus.indexed import FileInfo, write_file
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.prepare.budget import Budget, nothing_left
from megatron_lcl.data.prepare.holdout import groups_hash
from megatron_lcl.data.prepare.preprocess_task import DIGESTS, Part, TaskSettings, check_parts
from megatron_lcl.data.prepare.sorting import sorted_rows
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists

_THREADS = 4
"""files that are read at once, at least: while one waits for the disk, another is hashed"""
_AT_ONCE = 1 << 23
"""documents whose hashes are compared in memory together"""
GROUPS_KEY = "held_out_groups"
"""of a recipe: what tells which documents were held out"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _File:
    part: Path
    """folder"""
    source: Path
    target: Path
    info: dict[str, Any]


def finish(
    folder: Path,
    recipe: Mapping[str, Any],
    settings: TaskSettings,
    parts: list[Part],
    max_bad_fraction: float,
    source: dict[str, Any],
    scratch: Path,
    workers: int,
) -> None:
    """Give the parts' shards their numbers and write the manifest.

    scratch: a folder of this process alone, on the same file system. Raises UserError where a file is not what its
    record says, where parts were written by another choice (`check_parts`), or where too much of the input was bad;
    FileNotFoundError where another process has finished meanwhile.
    """
    work = settings.folder
    check_parts(settings, parts)
    drops = Drops()
    for part in parts:
        drops.add(Drops.from_dict(part.drops))
    if not settings.is_held_out:  # once, as what the importer drops
        settings.importer.count_others(drops)
    drops.rename(settings.importer.place)
    counts = total(part.counts for part in parts)
    budget = Budget(max_bad_fraction)
    if settings.training is None:
        budget.add(drops, [part.seen for part in parts])
    else:  # what the other half has counted is known by now
        manifest = read_manifest(settings.training)
        bad = Drops.from_dict(manifest["drops"])
        bad.add(drops)
        budget.add(bad, [manifest["counts"], counts])
    budget.check(at_least=1)
    filled = [(part, shard) for part in parts for shard in part.shards]
    if not filled:
        raise nothing_left(drops)
    repeated = _num_repeated(work, parts, scratch)
    if repeated:
        drops.note("document", "duplicate of another (kept)", count=repeated)
    unsaid = "matched" if any(s["has_similarities"] for _, s in filled if s["kind"] is None) else "natural"
    assemble(
        folder, work, parts, settings.tokenizer, drops, scratch, workers,
        {
            "source": {"format": recipe["format"], **source},
            "shards": [{**shard["counts"], KIND: shard["kind"] or unsaid} for _, shard in filled],
            "recipe": {**recipe, GROUPS_KEY: groups_hash(settings.groups)} if settings.groups else recipe,
        },
    )  # fmt: skip


def assemble(
    folder: Path,
    work: Path,
    parts: list[Part],
    tokenizer: Tokenizer,
    drops: Drops,
    scratch: Path,
    workers: int,
    manifest: Mapping[str, Any],
    more: Mapping[str, FileInfo] | None = None,
) -> None:
    """Make the parts in `work` the corpus `folder`: shards in their order, tokenizer, list of drops, manifest last.

    manifest: its `source`, its `shards` (counts and kind of each), its `recipe`, and what else it is to say.
    more: other files of the corpus, which lie in `scratch`. Raises as `finish`.
    """
    filled = [(part, shard) for part in parts for shard in part.shards]
    moves = [
        _File(work / part.name, work / part.name / name, folder / target, shard["files"][name])
        for number, (part, shard) in enumerate(filled)
        for name, target in zip(shard_files(shard["number"]), shard_files(number), strict=True)
    ]
    with ThreadPoolExecutor(max(workers, _THREADS)) as pool:
        for file, fault in zip(moves, pool.map(_fault, moves), strict=True):
            if fault:
                if exists(folder / MANIFEST):
                    raise FileNotFoundError(file.source)
                raise UserError(f"{fault}; remove {file.part} and run the same command again")
    files: dict[str, FileInfo] = {}
    for file in moves:
        if exists(file.source):  # else it was renamed before an interruption, or by another process
            _replace(file.source, file.target)
        files[file.target.name] = file.info
    for name, content in ((tokenizer.file_name, tokenizer.content), (LOG, drops.log())):
        files[name] = write_file(scratch / name, content)
    files |= more or {}
    for name in (tokenizer.file_name, LOG, *(more or {})):
        os.replace(scratch / name, folder / name)
    sync(folder)
    write_manifest(
        scratch, manifest_of(tokenizer=tokenizer.entry, drops=drops.to_dict(NAMES_KEPT), files=files, **manifest)
    )
    os.replace(scratch / MANIFEST, folder / MANIFEST)
    sync(folder)
    for row in drops.rows():
        logger.info("%s: %s %d (%s)", row["what"], row["reason"], row["count"], "; ".join(row["names"][:NAMES_KEPT]))


def _fault(file: _File) -> str:
    """What is wrong with a file, in its part or already in the corpus; "" if nothing is."""
    for path in (
        file.source,
        file.target,
        file.source,
        file.target,
    ):  # another process may rename it meanwhile
        try:
            size, digest = path.stat().st_size, hash_file(path)
        except FileNotFoundError:
            continue
        if size != file.info["size"]:
            return f"{path} has {size:,} bytes, but was written with {file.info['size']:,}"
        return "" if digest == file.info["xxh3"] else f"{path} has changed since it was written"
    return f"{file.source} is missing"


def _replace(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
    except FileNotFoundError:
        if not exists(target):
            raise


def _num_repeated(work: Path, parts: list[Part], scratch: Path) -> int:
    """Documents that repeat an earlier one."""
    hashes = (np.fromfile(work / part.name / DIGESTS, np.uint64)[:, None] for part in parts)
    parts_of_all = sorted_rows(hashes, _AT_ONCE, scratch / DIGESTS)
    return sum(int(np.count_nonzero(rows[1:] == rows[:-1])) for rows in parts_of_all)
