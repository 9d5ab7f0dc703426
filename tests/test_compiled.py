"""What numba compiles is kept where it can be, and compiled where it cannot."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from numba.core.caching import IndexDataCacheFile

from megatron_lcl.compiled import compiled

PROGRAM = """
import numpy as np
import megatron_lcl.data.loading.sequence
from megatron_lcl.data.loading.hashes import mix
print(mix(np.uint64(1), np.uint64(2)))
"""


def run(cache: str) -> str:
    """With that folder as the only place for numba's cache; "": with none, as where neither the package's folder nor
    the home folder can be written."""
    environment = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator", "NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout


@pytest.mark.slow
def test_functions_are_compiled_where_they_cannot_be_kept(tmp_path: Path) -> None:
    assert run("") == run(str(tmp_path))
    assert [*tmp_path.glob("*/hashes.mix-*.nbc")], "else each process would compile again"


def twice(number: int) -> int:
    return 2 * number


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def hits() -> int:
    """How often a new process's `twice` is found compiled."""
    function = compiled(twice)
    assert function(2) == 4
    return sum(function.stats.cache_hits.values())


def test_a_cache_without_room_is_none(cache: Path) -> None:
    """Numba makes an empty file to see whether it can write, which a full disk lets it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert hits() == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert [hits(), hits()] == [0, 1]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, -1])
def test_what_a_power_failure_left_is_made_again(kind: str, left: int, cache: Path) -> None:
    assert hits() == 0
    (file,) = cache.rglob(f"*.{kind}")
    file.write_bytes(file.read_bytes()[:left])
    assert [hits(), hits()] == [0, 1]


def test_an_index_does_not_outlive_a_file_that_has_no_room(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would name the file of that name that an older source has left."""

    def full(self: Any, name: str, data: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(IndexDataCacheFile, "_save_data", full)
        assert hits() == 0
    assert not [*cache.rglob("*.nbi")]
    assert [hits(), hits()] == [0, 1]


def test_an_index_that_another_machine_replaces(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS its reader gets ESTALE."""

    def stale(self: Any) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    assert hits() == 0
    with monkeypatch.context() as patched:
        patched.setattr(IndexDataCacheFile, "_load_index", stale)
        assert hits() == 0
    assert [hits(), hits()] == [0, 1]
