"""What is known under a name, of many more names than each process has memory for: by the name's hash, sorted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.data.corpus.files import save_array
from megatron_lcl.data.corpus.indexed import map_array
from megatron_lcl.data.corpus.scratch import put_in_place, scratch_folder
from megatron_lcl.data.prepare.sorting import sorted_rows
from megatron_lcl.filesystem import exists, matching

_RUN = 1 << 21
"""columns sorted together: 16 MiB a row"""


class SortedRuns(ABC):
    """Columns of numbers, of which the first is a hash: in files that all processes map, after `prepare`, else in
    memory; in runs, each sorted by the hash. In files each run has hashes of its own, so that one is looked into for a
    hash; earlier releases' runs, and those in memory, each have any."""

    def __init__(self, files: Sequence[Path], name: str, rows: int) -> None:
        """files: what `columns` reads. name: of the folder with the runs. rows: numbers of a column."""
        self._files, self._name, self._rows = files, name, rows
        self._folder: Path | None = None
        self._runs: list[np.ndarray] | None = None
        self._bounds: np.ndarray | None = None
        """uint64 [runs, 2]: the first and the last hash of each"""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": None, "_bounds": None}

    @abstractmethod
    def columns(self) -> Iterator[tuple[int, ...]]:
        """All columns, in any order, of numbers below 2^64."""

    def prepare(self, folder: Path) -> None:
        """Write the runs into a folder below `folder`, unless it is there."""
        if not self._files:
            return
        self._folder = folder / self._name
        if not exists(self._folder):
            with scratch_folder(folder) as scratch:
                unfinished = scratch / self._name
                unfinished.mkdir()
                self.write_runs(unfinished)
                put_in_place(unfinished, self._folder)

    def write_runs(self, folder: Path) -> None:
        """The runs, into an empty folder, which meanwhile takes twice their size."""
        for number, part in enumerate(sorted_rows(self._blocks(), _RUN, folder / "unsorted")):
            save_array(folder / f"{number:06d}.npy", np.ascontiguousarray(part.T))

    def read_runs(self, folder: Path) -> list[np.ndarray]:
        """The runs that `write_runs` has written."""
        return [map_array(file) for file in matching(folder, "*.npy")]

    def find(self, digest: int) -> list[list[int]]:
        """The columns of a hash, without it; as they came."""
        if self._runs is None or self._bounds is None:
            runs = self._in_memory() if self._folder is None else self.read_runs(self._folder)
            self._runs = [run for run in runs if run.shape[1]]
            self._bounds = np.array([run[0, [0, -1]] for run in self._runs], np.uint64).reshape(-1, 2)
        wanted, found = np.uint64(digest), []
        for k in np.flatnonzero((self._bounds[:, 0] <= wanted) & (wanted <= self._bounds[:, 1])):
            run = self._runs[k]
            first, last = (int(np.searchsorted(run[0], wanted, side)) for side in ("left", "right"))
            found += run[1:, first:last].T.tolist()
        return found

    def _in_memory(self) -> Iterator[np.ndarray]:
        """Runs, uint64 [rows, up to _RUN] each."""
        for block in self._blocks():
            yield np.ascontiguousarray(block[np.argsort(block[:, 0], kind="stable")].T)

    def _blocks(self) -> Iterator[np.ndarray]:
        """All columns as they come, uint64 [up to _RUN, rows]."""
        block, length = np.empty((_RUN, self._rows), np.uint64), 0
        for column in self.columns():
            block[length] = column
            length += 1
            if length == _RUN:
                yield block
                block, length = np.empty_like(block), 0
        yield block[:length]
