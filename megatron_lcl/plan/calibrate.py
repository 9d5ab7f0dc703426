"""What the CPU at hand gives: a short measurement of products, attention and passes over memory, in a run's shapes.

As many processes measure at the same time as will train at the same time. Each measurement is the median of a few,
which take turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_lcl.config import Config, Language, Vision
from megatron_lcl.interrupts import end_with_command
from megatron_lcl.losses.generation import rows_of_chunk
from megatron_lcl.machine import num_cores
from megatron_lcl.parallel.mesh import Axis
from megatron_lcl.plan.devices import Rates
from megatron_lcl.plan.work import BLOCK_BACKWARD, BLOCK_FORWARD
from megatron_lcl.train.engine import keep_freed_memory
from megatron_lcl.train.forks import forkserver
from megatron_lcl.train.launch_store import LOOPBACK, gloo_on_loopback
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.simulate import sizes_of

ROUNDS = 5
_ROWS, _IMAGES, _FLOATS, _MESSAGE = 2048, 8, 6 << 20, 1 << 21
"""at most: rows of a product, images of an attention; numbers of a copy; and of one process's part of a message"""

Measurement = tuple[float, Callable[[], object]]
"""operations or bytes, and what does them"""


def calibrate(config: Config, processes: int, images: int) -> Rates:
    """Rates of one of so many processes of this machine, each with its share of the cores. images: slots of a pack."""
    threads = max(1, num_cores() // processes)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, forkserver(), end_with_command) as pool,
    ):
        where = f"file://{Path(folder) / 'meet'}"
        tasks = [pool.submit(_of_process, config, images, threads, where, rank, processes) for rank in range(processes)]
        return rates_of([task.result() for task in tasks])


class Calibration:
    """What this process measures, in rounds; the median of them counts."""

    def __init__(self, config: Config, images: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """images: slots of a pack; clock: seconds."""
        self._clock = clock
        self._measurements = {name: (size, function) for name, size, function in _measurements(config, images)}
        self._seconds: dict[str, list[float]] = {name: [] for name in self._measurements}
        for _, function in self._measurements.values():  # the first time warms up
            function()

    def round(self) -> None:
        """Measure everything once."""
        for name, (_, function) in self._measurements.items():
            started = self._clock()
            function()
            self._seconds[name].append(self._clock() - started)

    def found(self) -> dict[str, float]:
        """Rates by name: FLOP/s, bytes/s; of `kernel`, operations/s."""
        return {name: self._measurements[name][0] / statistics.median(of) for name, of in self._seconds.items()}


def rates_of(processes: Sequence[tuple[dict[str, float], float, float]]) -> Rates:
    """The medians of what each process has found (`Calibration.found`, and of `network` bytes/s and seconds)."""
    rates, intras, collectives = zip(*processes, strict=True)
    found = {name: statistics.median(of[name] for of in rates) for name in rates[0]}
    matmul = {part: found[f"matmul {part}"] for part in ("vision", "language", "vocabulary")}
    intra = statistics.median(intras)
    return Rates(
        matmul=matmul,
        attention={part: found[f"attention {part}"] for part in ("vision", "language")},
        elements=found["elements"],
        memory=found["memory"],
        intra=intra,
        inter=intra,
        collective=statistics.median(collectives),
        kernel=1 / found["kernel"],
        waits=True,
        peak=max(matmul.values()),
    )


def _of_process(
    config: Config, images: int, threads: int, where: str, rank: int, processes: int
) -> tuple[dict[str, float], float, float]:
    torch.set_num_threads(threads)
    keep_freed_memory()
    gloo_on_loopback(LOOPBACK)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=processes)
    try:
        dist.barrier()
        calibration = Calibration(config, images)
        for _ in range(ROUNDS):
            calibration.round()
        found = calibration.found()
        intra, collective = network() if processes > 1 else (found["memory"], 0.0)
        return found, intra, collective
    finally:
        dist.destroy_process_group()


def network() -> tuple[float, float]:
    """Bytes/s of each process, and seconds of a collective beside its bytes, among all processes; all call it.

    By what tensor ranks and replicas do: a reduce-scatter, and the gather of what it gives.
    """
    axis = Axis.of_group(dist.group.WORLD)
    large, small = (_there_and_back(torch.zeros(axis.size, numbers), axis) for numbers in (_MESSAGE, 64))
    sent = 2 * 4 * _MESSAGE * (axis.size - 1)
    # on a busy machine a short message may take as long as a large one by chance
    return sent / max(large - small, large / 10), small / 2


def _there_and_back(rows: torch.Tensor, axis: Axis) -> float:
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        axis.all_gather(axis.reduce_scatter(rows))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _measurements(config: Config, images: int) -> Iterator[tuple[str, float, Callable[[], object]]]:
    """Name, operations or bytes, and what does them."""
    dtype, model = DTYPES[resolve_dtype(config)], config.model
    vision, language, sizes = model.vision, model.language, sizes_of(config, images, config.train.micro_batch)
    rows = {"vision": vision.num_prefix * sizes.images + sizes.patches, "language": sizes.rows}
    encoders: dict[str, Vision | Language] = {"vision": vision, "language": language}
    for part, encoder in encoders.items():
        yield f"matmul {part}", *_linear(min(rows[part], _ROWS), encoder.width, encoder.mlp_width, dtype)
    chunk = min(rows_of_chunk(language.vocab_size, language.width), max(1, sizes.targets))
    yield "matmul vocabulary", *_logits(chunk, language.width, language.vocab_size)
    longest = min(language.context_length, config.data.tokens_per_pack)
    count = min(_IMAGES, sizes.images)
    yield "attention vision", *_attention(vision, count, vision.num_prefix + vision.num_kept, False, dtype)
    yield "attention language", *_attention(language, 1, longest, True, dtype)
    yield "elements", *_elements(language, min(rows["language"], _ROWS), dtype)
    copied = [torch.ones(_FLOATS) for _ in range(4)]  # into memory that the process has: see keep_freed_memory
    yield "memory", 8.0 * _FLOATS * len(copied), lambda: [x.clone() for x in copied]
    yield "kernel", 200.0, _tiny


def _linear(rows: int, width: int, wide: int, dtype: torch.dtype) -> Measurement:
    """The two layers of a feed-forward network, forward and backward."""
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    up = torch.randn(wide, width, dtype=dtype, requires_grad=True)
    down = torch.randn(width, wide, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, width, dtype=dtype)

    def run() -> None:
        F.linear(F.linear(x, up), down).backward(gradient)
        x.grad = up.grad = down.grad = None

    return 12.0 * rows * width * wide, run


def _logits(rows: int, width: int, vocabulary: int) -> Measurement:
    """A chunk's three products, in float32, as losses/generation.py does them on a CPU."""
    x, weight = torch.randn(rows, width), torch.randn(vocabulary, width)
    logits, gradient = torch.empty(rows, vocabulary), torch.zeros(vocabulary, width)

    def run() -> None:
        torch.matmul(x, weight.t(), out=logits)
        torch.matmul(logits, weight)
        gradient.addmm_(logits.t(), x)

    return 6.0 * rows * width * vocabulary, run


def _attention(encoder: Vision | Language, count: int, length: int, causal: bool, dtype: torch.dtype) -> Measurement:
    shape = (count, encoder.heads, length, encoder.width // encoder.heads)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=causal).backward(gradient)
        q.grad = k.grad = v.grad = None

    return 12.0 * count * length**2 * encoder.width / (2 if causal else 1), run


def _elements(encoder: Language, rows: int, dtype: torch.dtype) -> Measurement:
    """What of a block is no product: norms, sums, GELU, forward and backward."""
    width, wide = encoder.width, encoder.mlp_width
    x = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    up = torch.randn(rows, wide, dtype=dtype, requires_grad=True)
    weight, bias = (torch.ones(width, dtype=dtype, requires_grad=True) for _ in range(2))
    gradient, of_wide = torch.randn(rows, width, dtype=dtype), torch.randn(rows, wide, dtype=dtype)

    def run() -> None:
        y = x + F.layer_norm(x, (width,), weight, bias)
        y = y + F.layer_norm(y, (width,), weight, bias)
        torch.autograd.backward([y, F.gelu(up)], [gradient, of_wide])
        x.grad = up.grad = weight.grad = bias.grad = None

    counts = [sum(pair) for pair in zip(BLOCK_FORWARD, BLOCK_BACKWARD, strict=True)]
    return dtype.itemsize * rows * float(counts[0] * width + counts[1] * wide), run


def _tiny() -> None:
    x = torch.ones(8)
    for _ in range(200):
        x = x + 1
