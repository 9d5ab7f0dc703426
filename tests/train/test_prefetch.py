"""Batches on their way to a device: a stand-in for CUDA, whose streams work only when they are told to."""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train import loop
from megatron_lcl.train.prefetch import Prefetcher

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
STEPS, OTHERS = 3, 77


class Stream:
    """Work that is done in its order, once `work` is called."""

    def __init__(self, *_: Any) -> None:
        self._given: deque[Callable[[], Any]] = deque()
        self.done = 0

    def give(self, work: Callable[[], Any]) -> None:
        self._given.append(work)

    def wait_stream(self, other: Stream) -> None:
        upto = other.done + len(other._given)
        self.give(lambda: other.work(upto - other.done))

    def work(self, most: int | None = None) -> None:
        """What has been given, or no more than so much of it."""
        while self._given and (most is None or most > 0):
            self._given.popleft()()
            self.done += 1
            most = None if most is None else most - 1


class Device:
    """Its memory holds `OTHERS` where nothing was copied to yet, and where a tensor is gone of which the stream that
    made it alone is known: there it may be another's already."""

    def __init__(self) -> None:
        self.computing = self.current = Stream()
        self.copying: list[Stream] = []
        self.memory: dict[int, np.ndarray] = {}
        self.recorded: dict[int, list[Stream]] = {}

    def stream(self, _device: torch.device) -> Stream:
        self.copying.append(Stream())
        return self.copying[-1]

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def copy(self, source: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        assert device == CUDA
        assert non_blocking
        assert getattr(source, "is_locked", False), "the host waits for copies from other memory"
        numbers = np.full(source.shape, OTHERS, dtype=source.numpy().dtype)
        made = torch.from_numpy(numbers)
        key = made.untyped_storage().data_ptr()
        self.memory[key], self.recorded[key] = numbers, []
        self.current.give(lambda: np.copyto(numbers, source.numpy()))
        weakref.finalize(made.untyped_storage(), self.free, key)
        return made

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        self.recorded[tensor.untyped_storage().data_ptr()].append(stream)

    def free(self, key: int) -> None:
        if self.computing not in self.recorded[key]:
            self.memory[key][...] = OTHERS

    def compute(self, batch: PackedBatch, into: list[np.ndarray]) -> None:
        """Reads all of a batch."""
        for tensor in (batch.tokens, batch.images):
            numbers = self.memory[tensor.untyped_storage().data_ptr()]
            self.current.give(lambda numbers=numbers: into.append(numbers.copy()))


def locked(tensor: torch.Tensor) -> torch.Tensor:
    copy: Any = tensor.clone()
    copy.is_locked = True
    return copy


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Stream", device.stream)
    monkeypatch.setattr(torch.cuda, "stream", device.on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", locked)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *place, **how: device.copy(tensor, *place, **how))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.record(tensor, stream))
    return device


@pytest.fixture(scope="module")
def batches() -> list[list[PackedBatch]]:
    return [make_batches(Case().config(), step) for step in range(STEPS)]


def test_a_step_is_copied_while_the_one_before_is_computed(device: Device, batches: list[list[PackedBatch]]) -> None:
    prefetcher = Prefetcher((batch for step in batches for batch in step), len(batches[0]), CUDA)
    (copying,) = device.copying
    for number, step in enumerate(batches):
        seen: list[np.ndarray] = []
        read, copies = prefetcher.take()
        assert all(mine is theirs for mine, theirs in zip(read, step, strict=True))
        for batch in copies:
            device.compute(batch, seen)
        del batch, copies, read  # what is computed is not known to be done
        prefetcher.begin()
        if number:  # at first the device has nothing to do
            copying.work()
            assert not seen
            assert copying.done == min(number + 2, STEPS) * 2 * len(step), "two copies a micro-batch"
        device.computing.work()
        expected = [x for batch in step for x in (torch.cat([*batch.integers().values()]), batch.images)]
        for mine, theirs in zip(seen, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs.numpy())


def failing(batches: list[PackedBatch]) -> Iterator[PackedBatch]:
    yield from batches
    raise RuntimeError("a worker is gone")


def test_a_loader_that_fails_is_told_of_when_its_batches_are_needed(
    device: Device, batches: list[list[PackedBatch]]
) -> None:
    prefetcher = Prefetcher(failing(batches[0]), len(batches[0]), CUDA)
    prefetcher.take()
    prefetcher.begin()
    with pytest.raises(RuntimeError, match="a worker is gone"):
        prefetcher.take()


def test_on_a_cpu_nothing_is_read_ahead(batches: list[list[PackedBatch]]) -> None:
    given = iter([*batches[0], *batches[1]])
    prefetcher = Prefetcher(given, len(batches[0]), CPU)
    assert prefetcher.take().copies == batches[0]
    prefetcher.begin()
    assert not prefetcher.reads_ahead
    assert next(given) is batches[1][0]


@pytest.mark.parametrize("ahead", [True, False])
def test_a_run_reads_ahead_before_it_waits_for_what_a_step_gave(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("num_micro_batches", "learning_rate", "lowerable_scale", "broadcast_batches", "Unread"):
        monkeypatch.setattr(loop, name, mock.Mock())
    monkeypatch.setattr(loop, "replace", mock.Mock())
    training, calls = mock.MagicMock(), mock.Mock()
    training.phase.change = None
    training.profile.ends_after.return_value = False
    training.stepper.start.return_value = SimpleNamespace(
        counts=SimpleNamespace(counts={"num_bad_images": 0}), loss=torch.tensor(1.0), skipped=False
    )
    training.batches.reads_ahead = ahead
    for name, mocked in {
        "take": training.batches.take,
        "start": training.stepper.start,
        "begin": training.batches.begin,
        "read": training._read,
    }.items():
        calls.attach_mock(mocked, name)
    loop.Training._step(training)
    names = [name for name, *_ in calls.mock_calls if name in ("take", "start", "begin", "read")]
    assert names == ["take", "start", *["begin"] * ahead, "read"]
