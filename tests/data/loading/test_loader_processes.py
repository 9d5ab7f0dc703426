"""Loader processes: killed, without shared memory, with errors, signaled, and left by a run that has failed."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import MakeCorpus, random_documents
from forks import fork_context, status_of
from ports import hold_port
from small_loaders import loader_of
from train.resilience import fleet

from megatron_lcl.data.corpus import store
from megatron_lcl.data.loading import ahead, reader, shared_memory
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.loader import LoaderKilled, PackedLoader
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.errors import UserError
from megatron_lcl.train.forks import forkserver


def _slow(seconds: float) -> Any:
    decode = reader.decode_train

    def slow(*arguments: Any) -> np.ndarray:
        time.sleep(seconds)
        return decode(*arguments)

    return slow


def _begun(loader: PackedLoader) -> tuple[Iterator[PackedBatch], BaseProcess]:
    """Its batches but for the first, and its only worker."""
    others, batches = multiprocessing.active_children(), iter(loader)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    return batches, worker


@pytest.mark.slow
def test_a_killed_worker_is_an_error_that_names_the_sample(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus("c", random_documents(50, 5))
    monkeypatch.setattr("megatron_lcl.data.loading.reader.decode_train", _slow(0.2))
    loader = loader_of(corpus.path, data={"workers": 1})
    batches, worker = _begun(loader)
    victim = worker.pid
    deadline = time.monotonic() + 60
    while loader.reader.progress[0] < 0:  # type: ignore[index]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(victim, signal.SIGKILL)  # type: ignore[arg-type]
    time.sleep(0.5)  # it does not break into whatever else the main process is at
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=rf"loader process {victim} was killed \(signal 9\) at pack \d+: document \d+ of "
    ) as caught:
        list(batches)
    assert time.monotonic() - started < 30
    pack = int(str(caught.value).split("at pack ")[1].split(":")[0])
    assert f"document {loader.provenance(pack)[0].document} of" in str(caught.value)


def test_a_worker_that_is_killed_before_its_first_pack(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it reads what the first ones need from object storage, say: an error of the machine, too."""
    corpus = make_corpus("c", random_documents(50, 5))
    monkeypatch.setattr("megatron_lcl.data.loading.ahead.Turns.read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        LoaderKilled,
        match=r"loader process \d+ was killed \(signal 9\) before its next pack\. If the machine is .* fewer",
    ):
        next(iter(loader_of(corpus.path, data={"workers": 1})))


class _EndsItsThreads:
    """Like a process group of gloo, whose destructor waits for its threads, which a forked process does not have."""

    def __init__(self) -> None:
        self.itself, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            os._exit(3)


def test_a_worker_does_not_collect_the_garbage_of_the_main_process(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it starts nor later; it collects its own."""
    corpus, fork, decode = make_corpus("c", random_documents(50, 5)), os.fork, reader.decode_train

    def fork_with_garbage() -> int:
        assert gc.get_threshold()[0] == 0
        _EndsItsThreads()
        child = fork()
        if child == 0:
            gc.enable()  # as DeepSpeed's hook does
        return child

    def collect(*arguments: Any) -> np.ndarray:
        assert gc.get_threshold() == often
        gc.collect()
        return decode(*arguments)

    monkeypatch.setattr(os, "fork", fork_with_garbage)
    monkeypatch.setattr(reader, "decode_train", collect)
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)  # whatever is made starts a full collection
    often = gc.get_threshold()
    try:
        next(iter(loader_of(corpus.path, data={"workers": 1})))
    finally:
        gc.set_threshold(*before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_while_a_worker_starts_is_not_for_it(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    """Nor does the main process get word of it, over the descriptor to which Python writes what comes."""
    corpus, fork = make_corpus("c", random_documents(50, 5)), os.fork

    def fork_signaled() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signum)
        return child

    monkeypatch.setattr(os, "fork", fork_signaled)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    told, ours = socket.socketpair()
    with told, ours:
        told.setblocking(False)
        ours.setblocking(False)
        listened = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        try:
            next(iter(loader_of(corpus.path, data={"workers": 1})))
            with pytest.raises(BlockingIOError):
                ours.recv(1)
        finally:
            signal.set_wakeup_fd(listened)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_worker_that_is_killed_while_it_starts(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is noticed by who asks for a batch, and torch's handler of signals does not stay."""
    corpus, fork = make_corpus("c", random_documents(50, 5)), os.fork

    def fork_killed() -> int:
        child = fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return child

    monkeypatch.setattr(os, "fork", fork_killed)
    handler = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(LoaderKilled, match=r"loader process \d+ was killed \(signal 9\) before its next pack\."):
        next(iter(loader_of(corpus.path, data={"workers": 2})))
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_whose_main_process_ends_while_it_starts_ends_too(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    corpus = make_corpus("c", random_documents(50, 5))
    script = f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
from small_loaders import loader_of

def outlive():
    main = os.getppid()
    os.kill(main, signal.SIGKILL)
    while os.getppid() == main:
        time.sleep(0.01)
    with open({str(tmp_path / "worker")!r}, "w") as file:
        file.write(str(os.getpid()))

os.register_at_fork(after_in_child=outlive)
next(iter(loader_of(__import__("pathlib").Path({str(corpus.path)!r}), data={{"workers": 1}})))
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, check=False, capture_output=True, timeout=120, env=environment)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    worker, deadline = (tmp_path / "worker"), time.monotonic() + 60
    while not worker.exists() or not worker.read_text() or fleet.alive([int(worker.read_text())]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("pymp-")], "of the main process"


def test_a_fork_of_the_main_process_leaves_its_workers_to_it(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(50, 5))
    batches = iter(loader_of(corpus.path, data={"workers": 1}))
    first = next(batches)
    assert status_of(batches.close) == 0  # type: ignore[attr-defined]
    assert [next(batches).packs > first.packs for _ in range(5)] == [True] * 5


@pytest.mark.slow
def test_a_worker_that_hangs_with_pythons_lock_is_killed(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No SIGTERM reaches it; the main process would wait for it when it ends."""
    corpus, read = make_corpus("c", random_documents(50, 5)), ahead.Turns.read
    hangs = fork_context().Event()

    def hang(turns: ahead.Turns, turn: int, num_workers: int) -> PackedBatch:
        if turn:
            time.sleep(0.5)  # while another thread hands over the first one
            hangs.set()
            ctypes.PyDLL(None).sleep(60)
        return read(turns, turn, num_workers)

    monkeypatch.setattr(ahead.Turns, "read", hang)
    batches, worker = _begun(loader_of(corpus.path, data={"workers": 1}))
    assert hangs.wait(60)
    time.sleep(0.5)
    batches.close()  # type: ignore[attr-defined]
    assert worker.exitcode == -signal.SIGKILL


def test_the_end_does_not_wait_for_what_is_to_be_read_ahead(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus("c", random_documents(50, 5))
    monkeypatch.setattr(ahead, "url_of", lambda path: "s3://bucket")
    monkeypatch.setattr(ahead, "_THREADS", 1)
    monkeypatch.setattr(
        ahead.Ahead, "begin", lambda self, turn: [self._pool.submit(time.sleep, 0.1) for _ in range(999)]
    )
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 60.0)  # of a busy machine
    batches, worker = _begun(loader_of(corpus.path, data={"workers": 1}))
    ended: list[int | None] = []
    terminate = worker.terminate
    monkeypatch.setattr(worker, "terminate", lambda: (ended.append(worker.exitcode), terminate()))
    batches.close()  # type: ignore[attr-defined]
    assert ended == [], "it had to be told twice"


def test_a_full_shared_memory_is_an_error_of_one_line(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = make_corpus("c", random_documents(50, 5))
    inherited = torch.Tensor.share_memory_

    def share(tensor: torch.Tensor) -> torch.Tensor:
        if torch.utils.data.get_worker_info():
            raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
        return inherited(tensor)

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    with pytest.raises(UserError, match=r"hand over their batches: .* are free in /dev/shm; .*--shm-size.*workers$"):
        next(iter(loader_of(corpus.path, data={"workers": 1})))


@pytest.mark.timeout(60)
def test_the_path_of_temporary_files_may_be_too_long_for_sockets(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over which a loader process hands over its batches, in a thread that would drop them."""
    corpus, folder = make_corpus("c", random_documents(50, 5)), tmp_path / ("n" * 80)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(vars(multiprocessing.current_process())["_config"], "tempdir", None)
    next(iter(loader_of(corpus.path, data={"workers": 1})))
    assert list(folder.iterdir()) == []


def test_a_lost_shard_is_the_same_error_in_a_loader_process(make_corpus: MakeCorpus) -> None:
    """Its message alone, not torch's report of a process."""
    corpus = make_corpus("c", random_documents(50, 5), num_shards=2)
    loader, other = (loader_of(corpus.path, data={"workers": workers}) for workers in (2, 0))
    for file in corpus.path.glob("images-*"):
        file.unlink()
    said = []
    for each in (loader, other):
        store._opened.clear()
        for source in each.reader.index[0].sources:
            source.corpus._shards.clear()
        with pytest.raises(UserError, match=r"images-\S+ is missing; copy it again") as caught:
            next(iter(each))
        said.append(str(caught.value))
    assert "Traceback" not in said[0]
    assert said[0].count("\n") == 0
    assert said[0].split("images-")[1][6:] == said[1].split("images-")[1][6:]


@pytest.mark.parametrize(
    "error",
    [
        StorageError("s3://bucket/a does not exist", missing=True),
        StorageError("the session token has expired"),
        FileNotFoundError(2, "No such file or directory", "/data/a"),
    ],
)
def test_errors_of_a_loader_process_are_what_they_were_there(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    corpus = make_corpus("c", random_documents(50, 5))

    def fail(*_: Any) -> None:
        raise error

    loader, others = loader_of(corpus.path, data={"workers": 2}), multiprocessing.active_children()
    monkeypatch.setattr(reader.PackReader, "__getitem__", fail)
    with pytest.raises(type(error)) as caught:
        next(iter(loader))
    assert multiprocessing.active_children() == others, "they end with the error, which is still at hand"
    assert str(caught.value) == str(error)
    assert {name: value for name, value in vars(caught.value).items() if name != "__notes__"} == vars(error)
    assert any(note.startswith("In loader process") and "in fail" in note for note in caught.value.__notes__)


READS = """
import sys
import tempfile
from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.loading.loader import PackedLoader
data = Data(corpora=(Corpus(sys.argv[1]),), cache=sys.argv[2], tokens_per_pack=256, images_per_pack=8, workers=2)
list(PackedLoader(data, 4, 224, 96, steps=3))
"""


@pytest.mark.slow
def test_a_small_shared_memory_ends_the_reading(make_corpus: MakeCorpus, tmp_path: Path) -> None:
    """As in a container of docker, only smaller: a batch has more than the whole of it."""
    path = str(make_corpus("c", random_documents(50, 5)).path)
    inside = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if os.geteuid() or not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    list(loader_of(Path(path), steps=1))  # numba compiles
    command = [*inside, sys.executable, "-c", READS, path, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.search(r"UserError: loader processes cannot hand over .* of 1.05 MB are free in /dev/shm", done.stderr)


def _serve(path: str, connection: Any) -> None:
    """A main process that notes SIGTERM and goes on reading batches, as a trainer does that saves first."""
    os.setpgid(0, 0)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    batches = iter(loader_of(Path(path), data={"workers": 2}))
    next(batches)
    connection.send("ready")
    while not told:
        time.sleep(0.01)
    connection.send([next(batches).packs[0] for _ in range(20)])


@pytest.mark.slow
def test_workers_outlive_a_signal_to_the_whole_group(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(50, 6))
    context = forkserver()
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(str(corpus.path), there))
    process.start()
    there.close()
    try:
        assert here.poll(240)
        assert here.recv() == "ready"
        os.killpg(process.pid, signal.SIGTERM)  # type: ignore[arg-type]
        assert here.poll(240)
        assert here.recv() == list(range(1, 21))
        process.join(240)
        assert process.exitcode == 0
    finally:
        process.kill()


def _fails(path: str) -> None:
    """A main process that dies of an error while something still holds its loader."""
    batches = iter(loader_of(Path(path), data={"workers": 2}))
    _fails.held = batches  # type: ignore[attr-defined]
    next(batches)
    raise RuntimeError("the run failed")


@pytest.mark.slow
def test_workers_do_not_keep_a_failed_run_from_ending(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(50, 6))
    process = multiprocessing.get_context("spawn").Process(target=_fails, args=(str(corpus.path),))
    process.start()
    try:
        process.join(240)
        assert process.exitcode == 1
    finally:
        process.kill()


def test_loader_processes_hold_no_connection(make_corpus: MakeCorpus) -> None:
    """The other end of one sees at once when the main process closes it, or ends."""
    own, other = socket.socketpair()
    with own, other, socket.create_server(("127.0.0.1", 0)) as server:
        connection = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
        batches = iter(loader_of(make_corpus("c", random_documents(50, 6)).path, data={"workers": 2}))
        next(batches)
        connection.close()
        peer.settimeout(20)
        with peer:
            assert peer.recv(1) == b""
        own.send(b"x")  # no connection of the network
        assert other.recv(1) == b"x"
        assert next(batches).packs == (1,)


def _leaves(rank: int, path: str, port: int) -> None:
    """Leaves groups in which connections are made on demand, while a loader process is there."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    store = torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    for turn in range(10):
        here = torch.distributed.PrefixStore(str(turn), store)
        torch.distributed.init_process_group("gloo", store=here, rank=rank, world_size=2)
        torch.distributed.barrier()
        batches = iter(loader_of(Path(path), data={"workers": 1}))
        if rank == 0:
            next(batches)
        torch.distributed.barrier()
        time.sleep(0.004 * rank)  # gloo's threads of the first process are ending when the second one leaves
        torch.distributed.destroy_process_group()
        del batches
        store.set(f"{turn} {rank}", "left")
        store.wait([f"{turn} 0", f"{turn} 1"])
    if rank == 1:
        store.set("done", "")
    else:  # it serves the store
        store.wait(["done"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_groups_are_left_while_loader_processes_run(make_corpus: MakeCorpus) -> None:
    """gloo aborted: it was told again of a connection that it had closed, a copy of which a loader process had."""
    path = str(make_corpus("c", random_documents(50, 6)).path)
    context, held = forkserver(), hold_port()
    processes = [context.Process(target=_leaves, args=(rank, path, held.getsockname()[1])) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        held.close()
        for process in processes:
            process.kill()


@pytest.mark.parametrize(("free", "workers"), [(0, 0), (1999, 0), (2000, 1), (5999, 2), (6000, 3), (math.inf, 3)])
def test_as_many_loader_processes_as_have_room(free: float, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: free)
    assert shared_memory.workers_with_room(3, 1000) == workers
