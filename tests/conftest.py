"""Fixtures shared by all tests, the options `--soak` and `--shared`, and how the tests are divided among processes."""

from __future__ import annotations

import atexit
import gc
import os
import pickle
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

pytest_plugins = ["local_slurm", "s3_fixtures"]

# an example takes longer than usual where another test needs the machine
hypothesis.settings.register_profile("soak", deadline=None)
# examples change with the code, not from one run to the next: no change fails for a fault that was there before
hypothesis.settings.register_profile("shared", deadline=None, derandomize=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more threads than cores are slower
os.environ.setdefault("DS_ACCELERATOR", "cpu")

LONGEST = (
    "test_selftest.py",
    "test_manual.py",
    "test_training_on_slurm.py",
    "test_layouts.py",
    "test_sbatch.py",
    "test_training_runs.py",
    "test_killed.py",
    "test_quickstart.py",
    "test_ray_cluster.py",
    "test_lost_processes.py",
    "test_signals.py",
    "test_bad_steps.py",
    "test_launchers.py",
    "test_loss_kernels.py",
    "test_recipe_states.py",
    "test_untrained_states.py",
    "test_fetch.py",
    "test_claim.py",
    "test_sweep.py",
)
"""the files that take longest, longest first: one that began last would keep a single process busy at the end"""
MEMORY_PER_WORKER = 3 * 2**30
"""what a process with the models of its tests, and the processes that a test starts, need at most"""
MAX_WORKERS = 12


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="also run the long soaks, and properties on new examples")
    parser.addoption(
        "--shared", default=None, help="folder with reference/ and samples/ (default: ../shared beside the checkout)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` sees a machine's GPUs: other tests are of processes on CPUs, of more than it may have GPUs."""
    hypothesis.settings.load_profile("soak" if config.option.soak else "shared")
    # what else each process forked from a server would import (it finds the second where tests run in the checkout)
    preload = ForkServerContext.set_forkserver_preload
    ForkServerContext.set_forkserver_preload = lambda self, names: preload(self, [*names, "pytest", "tests.prepared"])
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of `bash launch/test.sh &` in a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Of `pytest -n auto`: twice as many as there are cores, if memory allows.

    Some tests wait, others start processes: on two cores six take 4 % longer than four.
    """
    by_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MEMORY_PER_WORKER
    return max(1, min(2 * len(os.sched_getaffinity(0)), by_memory, MAX_WORKERS))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported while tests are collected stays: Python's garbage collector does not look at it again and again,
    which takes a fifth longer, nor later, whenever a test, or what it tests, collects garbage; and that is not after
    every 700 new objects, which takes a tenth longer, but as seldom as in the command itself."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or some libraries report leaks at the end
        gc.enable()
        gc.set_threshold(20_000)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # one process of several, which take file after file: the longest first
        weights = Counter(_file(item) for item in items if item.get_closest_marker("slow"))
        rank = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: (rank.get(_file(item), len(rank)), -weights[_file(item)]))
    if not config.getoption("--soak"):
        for item in items:
            if item.get_closest_marker("soak"):
                item.add_marker(pytest.mark.skip(reason="long; run with --soak"))


@pytest.fixture(scope="session")
def shared(request: pytest.FixtureRequest) -> Path:
    """The folder with the reference numbers and real samples; tests that need it skip where it is absent."""
    given = request.config.getoption("--shared")
    path = Path(given) if given else Path(__file__).resolve().parents[2] / "shared"
    if not (path / "reference").is_dir():
        pytest.skip(f"no reference numbers and samples at {path}")
    return path


@pytest.fixture
def other_torch_defaults() -> Iterator[None]:
    """Where nothing else is said, torch makes tensors without data, in bfloat16."""
    import torch

    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def launched_by_none() -> Iterator[None]:
    """A process in which a test has trained keeps a launcher's variables. They are hidden from a test whose fixtures
    have trained, and from the fixtures of the next module, which are set up before this one."""

    def forget() -> None:
        of_processes = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
        for name in (*of_processes, "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME"):
            os.environ.pop(name, None)

    forget()
    yield
    forget()


@pytest.fixture
def left_by_killed(tmp_path: Path) -> Path:
    """In `tmp_path`, the scratch folder of a process that another machine ran long ago."""
    folder = tmp_path / f"scratch-{'f' * 32}-1-{'0' * 32}"
    folder.mkdir()
    (folder / "file").touch()
    for path in (folder / "file", folder):
        os.utime(path, times=(1, 1))
    return folder


def _file(item: pytest.Item) -> str:
    return item.path.name


@pytest.fixture(scope="session")
def once(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Callable[[Path], Any]], Any]:
    """once(name, make): what make(folder) returned, called once in the whole run though the tests run in several
    processes. It is pickled for the others; what it wrote into the folder is not to be changed."""
    base = tmp_path_factory.getbasetemp()
    if hasattr(pytestconfig, "workerinput"):
        base = base.parent

    def once(name: str, make: Callable[[Path], Any]) -> Any:
        folder, made = base / f"once-{name}", base / f"once-{name}.pickle"
        with FileLock(base / f"once-{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of one that failed
                folder.mkdir()
                made.write_bytes(pickle.dumps(make(folder)))
            return pickle.loads(made.read_bytes())

    return once
