"""What numba compiles is kept where it can be, and compiled where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
