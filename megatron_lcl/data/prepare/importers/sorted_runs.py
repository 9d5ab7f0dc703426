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
from megatron_lcl.filesystem import exists, matching

_RUN = 1 << 21
"""columns sorted together: 16 MiB a row"""


class SortedRuns(ABC):
    """Columns of numbers, of which the first is a hash: in files that all processes map, after `prepare`, else in
    memory; in runs, each sorted by the hash."""

    def __init__(self, files: Sequence[Path], name: str, rows: int) -> None:
        """files: what `columns` reads. name: of the folder with the runs. rows: numbers of a column."""
        self._files, self._name, self._rows = files, name, rows
        self._folder: Path | None = None
        self._runs: list[np.ndarray] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_runs": None}

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
        """The runs, into an empty folder."""
        for number, run in enumerate(self._sorted()):
            save_array(folder / f"{number:06d}.npy", run)

    def read_runs(self, folder: Path) -> list[np.ndarray]:
        """The runs that `write_runs` has written."""
        return [map_array(file) for file in matching(folder, "*.npy")]

    def find(self, digest: int) -> list[list[int]]:
        """The columns of a hash, without it; as they came."""
        if self._runs is None:
            self._runs = list(self._sorted()) if self._folder is None else self.read_runs(self._folder)
        found = []
        for run in self._runs:
            first, last = (int(np.searchsorted(run[0], np.uint64(digest), side)) for side in ("left", "right"))
            found += run[1:, first:last].T.tolist()
        return found

    def _sorted(self) -> Iterator[np.ndarray]:
        """uint64 [rows, up to _RUN] each."""
        run, length = np.empty((self._rows, _RUN), np.uint64), 0
        for column in self.columns():
            run[:, length] = column
            length += 1
            if length == _RUN:
                yield run[:, np.argsort(run[0], kind="stable")]
                length = 0
        yield run[:, np.argsort(run[0, :length], kind="stable")]
