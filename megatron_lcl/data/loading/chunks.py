"""What a chunk of the pack index holds: its record, and the entries of its packs (`pack_index.py`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.data.loading import cache
from megatron_lcl.data.loading.sequence import END
from megatron_lcl.data.loading.source import Source

ENTRY = np.dtype([("document", np.int64), ("corpus", np.int32), ("epoch", np.int32), ("part", np.int32)])
"""one sequence: the part'th of a document in an epoch; corpus counts the chunk's corpora"""
RANGED = np.dtype([*ENTRY.descr, ("begin", np.int32), ("until", np.int32)])
"""the part'th of what stands between two positions of a document (`sequence.arrange`)"""


@dataclass(frozen=True)
class Pack:
    """The sequences of one pack: sources, and ENTRY rows whose `corpus` counts them."""

    number: int
    sources: Sequence[Source]
    entries: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """Packs first … stop-1, in `folder`, unless that was deleted; from state `begin` to `end`, the next one's."""

    first: int
    stop: int
    folder: Path
    corpora: tuple[str, ...]
    begin: dict[str, Any]
    end: dict[str, Any]


class Entries:
    """The entries of a chunk, from files that stay open."""

    def __init__(self, folder: Path) -> None:
        self._use = cache.using(folder, cache.RECORD)
        self._entries, self._offsets = (cache.Rows(folder / f"{name}.npy") for name in ("entries", "offsets"))

    def of(self, local: int) -> np.ndarray:
        """Those of the chunk's pack number `local`."""
        self._use.renew()
        return self.between(local, local + 1)[0]

    def between(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of the chunk's packs first … stop-1, and where those of each begin among them and the last's end."""
        offsets = self._offsets.read(first, stop + 1)
        return self._entries.read(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]


def range_of(entry: Any) -> tuple[int, int]:
    """The positions of its document that an entry is cut from: begin and until."""
    return (int(entry["begin"]), int(entry["until"])) if "begin" in entry.dtype.names else (0, END)


def record_in(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / cache.RECORD).read_text(encoding="utf-8"))
    return record
