"""Work of an evaluation in several processes; and many images through an encoder: decoded ahead, in batches."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice, pairwise
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder, check_device
from megatron_lcl.evaluate.image_set import Blob
from megatron_lcl.interrupts import ENDING, end_with_command, holding_interrupts
from megatron_lcl.machine import num_cores
from megatron_lcl.processes import NEVER_BEGAN, importing_first, prepare_sockets

T = TypeVar("T")
Work = Callable[[Encoder, int, torch.Tensor], T]
"""(encoder, index of the first image, prepared images [N, 3, H, W]) → anything"""
Advance = Callable[[int], object]
"""what tells how many more are done"""
Job = Callable[[int, int, Advance], T]
"""(number of the process, its threads, advance) → anything"""


def default_devices() -> list[str]:
    """Every GPU, or the CPU where there is none."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]


def check_workers(processes: int, devices: Sequence[str]) -> None:
    """UserError for a number of processes below 1, or a device that cannot be used."""
    if processes < 1:
        raise UserError(f"{processes} processes; give a number from 1")
    for name in devices:
        check_device(name)


def map_batches(
    encoder: Encoder,
    images: Sequence[Blob],
    work: Work[T],
    batch_size: int,
    processes: int,
    desc: str,
    progress: bool,
) -> list[T]:
    """`work` on every batch of the images, results in order. The batches do not depend on the number of processes; the
    number of threads of each does, which may change last bits.

    With `processes` > 1 each makes its own encoder by `encoder.source` and has an equal number of the cores; `work`
    must pickle. Raises UserError naming an image that does not decode.
    """
    bar = tqdm(total=len(images), unit="images", desc=desc, disable=not progress)
    processes = min(processes, -(-len(images) // batch_size))
    with bar:
        if processes <= 1:
            results = []
            for done, result in run_batches(encoder, images, work, batch_size, 0, num_cores()):
                results.append(result)
                bar.update(done)
            return results
        assert encoder.source is not None, "this encoder cannot be made again in another process"
        batches = -(-len(images) // batch_size)
        bounds = [batch_size * (batches * i // processes) for i in range(processes + 1)]
        jobs: list[Job[list[T]]] = [
            partial(_encode, encoder.source, images[low:high], work, batch_size, low) for low, high in pairwise(bounds)
        ]
        return [result for part in in_processes(jobs, bar, ", or a smaller --batch-size") for result in part]


def in_processes(jobs: Sequence[Job[T]], bar: tqdm, remedy: str = "") -> list[T]:
    """What the jobs give, in order: each has a process of its own, and an equal number of the cores. They must pickle.

    The first that fails ends the others, and its error is raised. remedy: against a want of memory, besides fewer
    --processes.
    """
    processes = len(jobs)
    prepare_sockets()  # one with loader processes would make a folder of its own, and leave it when a signal ends it
    context = get_context("spawn")
    # without locks, which a process that is killed would keep: each counts for itself, and only this one says stop
    done, stop = context.Array("q", processes, lock=False), context.Value("b", lock=False)
    begun = context.Value("b", lock=False)
    try:
        with contextlib.ExitStack() as until_end:
            with holding_interrupts(ENDING):
                start = importing_first(_start, begun, done, stop)
                pool = until_end.enter_context(ProcessPoolExecutor(processes, context, *start))
                until_end.callback(setattr, stop, "value", 1)  # after an error or a signal the others need not go on
                running = [pool.submit(_process, job, i, processes) for i, job in enumerate(jobs)]
            waiting = set(running)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                bar.update(sum(done) - bar.n)
                for job in finished:
                    job.result()
            return [job.result() for job in running]
    except BrokenProcessPool as error:  # also by `submit`, where one has ended by then
        if error.__cause__ is not None:  # what the process said cannot be read here
            raise
        raise UserError(
            NEVER_BEGAN
            if not begun.value
            else "a process that encodes was killed, perhaps out of memory; give fewer --processes" + remedy
        ) from None


_told: list[Any] = []
"""in one of several processes: images or micro-batches done by each, and whether to stop"""


def _start(begun: Any, done: Any, stop: Any) -> None:
    begun.value = 1
    end_with_command()
    _told[:] = done, stop


class _Stopped(Exception):
    """Another process has failed; nobody reads what this one gives."""


def _process(job: Job[T], number: int, processes: int) -> T:
    done, stop = _told

    def advance(count: int) -> None:
        done[number] += count
        if stop.value:
            raise _Stopped

    threads = max(1, num_cores() // processes)
    torch.set_num_threads(threads)
    return job(number, threads, advance)


def _encode(
    source: Callable[[int], Encoder],
    images: Sequence[Blob],
    work: Work[T],
    batch_size: int,
    start: int,
    number: int,
    threads: int,
    advance: Advance,
) -> list[T]:
    results = []
    for count, result in run_batches(source(number), images, work, batch_size, start, threads):
        results.append(result)
        advance(count)
    return results


def run_batches(
    encoder: Encoder, images: Sequence[Blob], work: Work[T], batch_size: int, start: int, threads: int
) -> Iterator[tuple[int, T]]:
    """(images done, result) of each batch; images are decoded ahead by threads."""

    def result(first: int, batch: list[torch.Tensor]) -> tuple[int, T]:
        return len(batch), work(encoder, first, torch.stack(batch))

    # a loop's variable would hold a batch until there is the next one; `map` holds none
    starts = range(start, start + len(images), batch_size)
    return map(result, starts, ahead(partial(load, encoder), images, batch_size, max(2, threads)))


def ahead(work: Callable[[Blob], T], images: Sequence[Blob], size: int, threads: int) -> Iterator[list[T]]:
    """`work` on the images by threads, `size` results at a time and in order; the next two lists are made meanwhile."""
    waiting, queue = iter(images), deque[Future[T]]()
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(0, len(images), size):
            queue.extend(pool.submit(work, blob) for blob in islice(waiting, 3 * size - len(queue)))
            yield [queue.popleft().result() for _ in range(min(size, len(queue)))]


def load(encoder: Encoder, blob: Blob) -> torch.Tensor:
    """The image as the encoder takes it. UserError with its name where it does not decode.

    What `evaluate` encodes was checked before; that this happens there means that the file has changed since.
    """
    try:
        return encoder.prepare(blob.read())
    except BadImage as error:
        raise UserError(f"{blob.name}: {error}") from None
