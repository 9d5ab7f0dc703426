"""Protects: what is known under a hash is found in one of the sorted files, whatever wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lcl.data.prepare.importers import sorted_runs


class Listed(sorted_runs.SortedRuns):
    """Columns that are given."""

    def __init__(self, listed: list[tuple[int, ...]], name: str = "runs") -> None:
        super().__init__([Path("any")], name, 2)
        self.listed = listed

    def columns(self) -> Iterator[tuple[int, ...]]:
        return iter(self.listed)


@pytest.mark.parametrize("number", [0, 3, 8, 60, 64])
def test_a_hash_is_looked_for_in_one_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of MMC4 there are 272. What is found is the same, in the same order, in memory and in an earlier release's
    files, each of which has any hashes."""
    monkeypatch.setattr(sorted_runs, "_RUN", 8)
    rng = np.random.default_rng(number)
    hashes = rng.integers(0, 1 << 64, max(1, number // 3), np.uint64)
    listed = [(int(digest), k) for k, digest in enumerate(rng.choice(hashes, number))]
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for k in range(0, number + 1, 8):
        part = sorted(listed[k : k + 8])
        np.save(earlier / f"{k:06d}.npy", np.array(part, np.uint64).reshape(-1, 2).T)
    kinds = [Listed(listed), Listed(listed, "earlier"), Listed(listed)]
    for kind in kinds[1:]:
        kind.prepare(tmp_path)
    assert not any(path.suffix != ".npy" for path in (tmp_path / "runs").iterdir())
    searches = []

    def searched(*arguments: Any) -> Any:
        searches.append(arguments)
        return searchsorted(*arguments)

    searchsorted = np.searchsorted
    for digest in [*dict.fromkeys(hashes.tolist()), 0, (1 << 64) - 1]:
        expected = [[k] for of, k in listed if of == digest]
        assert [kind.find(digest) for kind in kinds[:2]] == [expected] * 2
        with monkeypatch.context() as patch:
            patch.setattr(np, "searchsorted", searched)
            searches.clear()
            assert kinds[2].find(digest) == expected
        assert len(searches) <= 2
