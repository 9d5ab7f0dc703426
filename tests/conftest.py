"""Fixtures shared by all tests, and the options `--soak` and `--shared`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["local_slurm"]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # oversubscribed cores crawl
os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the long soaks")
    parser.addoption(
        "--shared", default=None, help="folder with reference/ and samples/ (default: ../shared beside the checkout)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long; run with --soak"))


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder with the reference numbers and real samples; tests that need it skip where it is absent."""
    given = request.config.getoption("--shared")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    if not (path / "reference").is_dir():
        pytest.skip(f"no reference numbers and samples at {path}")
    return path
