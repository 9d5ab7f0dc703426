"""The plan of a store: each URL of the input once, in parts no two of which have a host in common.

So whichever process does a part, it alone speaks to the part's hosts and knows when it last did. A part is written
once, in a folder that is renamed into place, and never changes.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_dir

FOLDER = "plan"
ABOUT = "plan.json"
_VERSION = 1
_BUCKETS = 256
_HOST = re.compile(r"https?://(?:[^/\\?#@]*@)?(\[[^\]]*\]|[^/\\:?#]*)", re.I)


@dataclass(frozen=True)
class Plan:
    """A plan as it lies in a store."""

    folder: Path
    parts: tuple[int, ...]
    """number of URLs of each"""
    dropped: dict[str, int]
    """what of the input was no URL, by reason"""

    def urls(self, part: int) -> list[str]:
        """A part's URLs, each once."""
        return read_table(self.folder / _name(part), use_threads=False)["url"].to_pylist()

    def lock(self, part: int) -> Path:
        """The file whose lock the process that does a part holds."""
        return self.folder / f"part-{part:05d}.lock"


def make_plan(
    output: Path, urls: Iterable[list[str]], dropped: dict[str, int], signature: str, settings: Settings
) -> None:
    """Write the plan into the folder `output`. UserError where there is no URL; then nothing is left behind.

    dropped: filled while `urls` is read. Memory: the distinct URLs of the largest part.
    """
    with scratch_folder(output) as scratch:
        _fill_buckets(scratch, urls)
        folder = scratch / FOLDER
        folder.mkdir()
        parts = []
        for part, distinct in enumerate(_parts(scratch, settings.shard_urls)):
            pq.write_table(pa.table({"url": distinct}), folder / _name(part), compression="zstd")
            parts.append(len(distinct))
        if not parts:
            said = ", ".join(f"{count:,} x {reason}" for reason, count in dropped.items())
            raise UserError(
                f"no image URL (http:// or https://) in the input{f' ({said})' if said else ''}: name the column that "
                "has them with --url-column"
            )
        about = {"version": _VERSION, **_fixed(signature, settings), "parts": parts, "dropped": dropped}
        (folder / ABOUT).write_text(json.dumps(about, indent=1))
        # a store whose plan is damaged cannot be gone on with: as put here, it is on the disk before any shard
        put_in_place(folder, output / FOLDER)


def open_plan(output: Path, signature: str, settings: Settings) -> Plan | None:
    """The plan of a store; None where there is none. UserError where it is of another input or other settings."""
    folder = output / FOLDER
    if not is_dir(folder):
        return None
    try:
        about = json.loads((folder / ABOUT).read_text())
        parts, dropped, version = tuple(about["parts"]), about["dropped"], about["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / ABOUT} is damaged: take another --output") from error
    if version != _VERSION:
        raise UserError(f"{output} was written by another release (version {version}): take another --output")
    about.setdefault("store", "tar")  # of plans from before there was another
    for key, value in _fixed(signature, settings).items():
        if about[key] != value:
            given = f"without --{key}" if about[key] is None else f"with --{key} {about[key]}"
            what = "the images of another input" if key == "input" else f"images fetched {given}"
            raise UserError(f"{output} has {what}: take another --output, or the same input and options")
    return Plan(folder, parts, dropped)


def host_of(url: str) -> str:
    """The host that a URL names, as hosts are told apart here."""
    found = _HOST.match(url)
    return found[1].lower() if found else ""


def _fixed(signature: str, settings: Settings) -> dict[str, Any]:
    return {
        "input": signature,
        "max-image-side": settings.max_image_side,
        "shard-urls": settings.shard_urls,
        "store": settings.store,
    }


def _name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def _fill_buckets(scratch: Path, urls: Iterable[list[str]]) -> None:
    """Distribute URLs over files by the hash of their host."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(open(scratch / f"{k}", "wb")) for k in range(_BUCKETS)]
        for some in urls:
            for url in some:
                bucket = xxhash.xxh3_64_intdigest(host_of(url).encode()) % _BUCKETS
                files[bucket].write(msgspec.json.encode(url) + b"\n")


def _parts(scratch: Path, wanted: int) -> Iterator[list[str]]:
    """The distinct URLs of consecutive files, in groups of `wanted` or more, the last perhaps fewer."""
    found: dict[str, None] = {}
    for bucket in range(_BUCKETS):
        with open(scratch / f"{bucket}", "rb") as file:
            for line in file:
                found[msgspec.json.decode(line)] = None
        if len(found) >= wanted:
            yield list(found)
            found = {}
    if found:
        yield list(found)
