"""One pool of gloo processes for the tests of the losses over several ranks: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_pool import GlooPool


@pytest.fixture(scope="session")
def pool() -> Iterator[GlooPool]:
    pool = GlooPool()
    yield pool
    pool.close()
