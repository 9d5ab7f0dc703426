"""What a simulated step counts, against sums on paper."""

from __future__ import annotations

import ctypes
import importlib
import platform
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import run_processes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_lcl import config as configs
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train import heap
from megatron_lcl.train.engine import (
    KEPT,
    build_engine,
    build_module,
    build_stepper,
    init_processes,
    keep_freed_memory,
    quiet_deepspeed,
)
from megatron_lcl.train.fits import DOUBT, check_step
from megatron_lcl.train.forks import forkserver
from megatron_lcl.train.memory import Memory, largest_estimate
from megatron_lcl.train.simulate import _processes, _simulate, num_in_flight, simulate
from megatron_lcl.train.storages import Storages

BIG = KEPT // 4 * 2
"""numbers of a tensor of 64 MiB, float32, whose memory is given back"""


@pytest.fixture(autouse=True)
def no_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heap of this process has holes of other tests."""
    monkeypatch.setattr(heap, "_GLIBC", None)


@pytest.fixture
def storages() -> Iterator[Storages]:
    with FakeTensorMode(), Storages() as storages:
        yield storages


def test_of_a_buffer_what_is_written_counts(storages: Storages) -> None:
    buffer = torch.empty(BIG)
    assert (storages.peak, storages.touched) == (4 * BIG, 0)
    buffer[: BIG // 4].fill_(1.0)
    buffer[BIG // 8 : BIG // 2].fill_(1.0)
    assert storages.touched == 4 * BIG // 2
    buffer.add_(1.0)
    assert storages.touched == 4 * BIG


def test_small_ones_stay_when_they_are_freed(storages: Storages) -> None:
    small = torch.zeros(BIG // 4)
    del small
    large = torch.zeros(BIG)
    assert storages.now == storages.peak == 4 * BIG
    del large
    assert storages.now == 0
    assert storages.touched == storages.process == pytest.approx(4 * BIG + BIG, rel=1e-5)


def growth_of_heap(_: int) -> int:
    """Bytes by which a heap grows for blocks of which few are kept, among small objects that stay."""
    keep_freed_memory()
    malloc, blocks = ctypes.CDLL(None).malloc, heap.Heap()
    for _ in range(50_000):  # all free places of such sizes, as in a long step
        malloc(24)
        malloc(32)

    def take(size: int) -> heap.Place:
        place = blocks.take(size)
        assert place is not None
        return place

    for _ in range(40):
        first, second = take(3 << 20), take(3 << 20)
        for place in (first, second):
            blocks.give(place, 3 << 20)
            for _ in range(8):
                malloc(32)
            if place is first:
                take(768 << 10)
    return blocks.size


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates in its own way")
def test_what_lies_between_blocks_is_lost() -> None:
    """The places of freed ones do not take the next of the same size, nor are they one with their neighbors."""
    (size,) = run_processes(growth_of_heap, 1)
    assert size > 2 * (40 * (768 << 10) + 2 * (3 << 20)), "twice what is in use at most"


def places_of_blocks(_: int) -> list[bool]:
    """Whether a block is in the heap: a small one, a large one, and a small one where addresses are limited."""
    keep_freed_memory()
    blocks, limits = heap.Heap(), resource.getrlimit(resource.RLIMIT_AS)
    found = [blocks.take(size) is not None for size in (1 << 20, 2 * KEPT)]
    resource.setrlimit(resource.RLIMIT_AS, (1 << 20, limits[1]))
    try:
        *_, last = [blocks.take(KEPT // 2) for _ in range(40)]  # the first may find a free place
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return [*found, last is not None]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates in its own way")
def test_the_allocator_says_what_the_heap_takes() -> None:
    assert run_processes(places_of_blocks, 1) == [[True, False, False]]


def test_shapes_alone_are_no_memory(storages: Storages) -> None:
    kept = torch.zeros(BIG, device="meta")
    assert storages.peak == storages.touched == 0, kept.shape


def test_gloo_copies_what_it_gathers_and_scatters() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with FakeTensorMode(), Storages() as storages:
            whole, half = torch.zeros(BIG), torch.zeros(BIG // 2)
            held = whole.nbytes + half.nbytes
            dist.all_reduce(whole)
            assert storages.touched == pytest.approx(held, rel=1e-5)
            dist.all_gather_into_tensor(whole, half)
            assert storages.touched == pytest.approx(held + whole.nbytes, rel=1e-5)
            larger = torch.zeros(2 * BIG)
            held += larger.nbytes
            dist.reduce_scatter_tensor(whole, larger)
            assert storages.touched == pytest.approx(held + larger.nbytes, rel=1e-5)
            assert storages.peak == held, "a GPU's library copies nothing"
    finally:
        dist.destroy_process_group()


def test_what_is_sent_counts_while_it_is_there_but_for_what_stays() -> None:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with FakeTensorMode(), Storages() as storages:
            weights, computed = torch.zeros(BIG), torch.zeros(BIG)
            assert storages.begin_step() == 2 * weights.nbytes
            dist.all_reduce(weights)
            assert storages.network == 0, "it stays from step to step"
            del computed
            whole, half = torch.zeros(BIG), torch.zeros(BIG // 2)
            dist.all_gather_into_tensor(whole, half)
            assert storages.network == whole.nbytes + half.nbytes
            del whole
            dist.all_reduce(half)
            dist.all_reduce(other := torch.zeros(BIG))
            assert storages.network == other.nbytes + half.nbytes, "no more than before at one time"
    finally:
        dist.destroy_process_group()


def test_losses_count_what_they_compute_with() -> None:
    rows, width, vocabulary = 300, 64, 1000
    with FakeTensorMode(), Storages() as storages:
        hidden = torch.zeros(rows, width, requires_grad=True)
        weight = torch.zeros(vocabulary, width, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64)
        storages.begin_step()
        with storages.watching_losses():
            beside = torch.zeros(BIG)
            generation_loss(hidden, weight, targets, agreed=True).backward()
        least = 4 * (rows * vocabulary + rows * width + vocabulary * width)
        assert least <= storages.losses < 1.6 * least, "logits, and the gradients of both"
        assert storages.losses < beside.nbytes


def shared_memory_op(_: int, accelerator: str) -> list[bool]:
    """Whether DeepSpeed is free to compile it, asked when a simulated process on a GPU machine makes its process group;
    or, on a GPU, at once."""
    import deepspeed
    from deepspeed.accelerator import set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    backend: Any = importlib.import_module("deepspeed.comm.torch")  # `deepspeed.comm` has torch itself by this name
    asked: list[bool] = []
    ops = deepspeed.ops.__compatible_ops__
    ops["deepspeed_shm_comm"] = True  # as where there is a C++ compiler
    torch.cuda.is_available = lambda: True
    backend.build_shm_op = lambda: asked.append(ops["deepspeed_shm_comm"])
    if accelerator == "cuda":
        set_accelerator(CUDA_Accelerator())
        quiet_deepspeed()
        return [ops["deepspeed_shm_comm"]]
    with _processes(1, 0):
        return asked


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_nothing_is_compiled_for_a_simulated_process(accelerator: str) -> None:
    """For a GPU's DeepSpeed has no such operation, and what it has is left as it is."""
    assert run_processes(shared_memory_op, 1, accelerator) == [[accelerator == "cuda"]]


SMALL = {"width": 64, "layers": 1, "heads": 2, "mlp_width": 128}
TREE: dict[str, Any] = {
    "model": {
        "vision": {**SMALL, "image_size": 32, "patch_size": 8},
        "language": {**SMALL, "context_length": 64, "vocab_size": 403},
        "pool_heads": 2,
    },
    "data": {"tokens_per_pack": 256, "images_per_pack": 8},
    "train": {"dtype": "float32", "global_batch": 4},
}


def test_a_model_on_one_process() -> None:
    """Weights, AdamW's float32 state, images and their integers: all of it follows from the config."""
    config = configs.replace(configs.from_dict(TREE), train__global_batch=3)
    usage, numbers = simulate(config, 1, 8), num_parameters(config.model)
    assert usage.parameters == 4 * numbers
    assert 4 * 3 * numbers <= usage.optimizer < 4 * 3 * numbers + 1000, "master weights and two moments"
    images = 3 * 8 * 3 * 32 * 32
    assert images < usage.batches < images + 3 * 4 * 10_000
    rows = 3 * (256 + 8 * 16)
    assert usage.graphs > rows * 4 * (8 * 64 + 2 * 128), "of every block of every row, as memory.py counts"
    assert usage.peak >= usage.parameters + usage.optimizer + usage.batches + usage.graphs
    assert 4 * 403 * 64 < usage.losses < usage.peak - usage.parameters - usage.optimizer


def test_without_targets_nothing_is_multiplied_with_the_vocabulary() -> None:
    """Its loss has neither logits nor the vocabulary's gradients, whose size is that of its parameters."""
    changes = {"objective__name": "clip", "model__language__vocab_size": 8403, "train__global_batch": 1}
    assert simulate(configs.replace(configs.from_dict(TREE), **changes), 1, 8).losses < 4 * 8403 * 64


@pytest.mark.slow
def test_averages_count_and_what_needs_a_gpu_is_simulated_without_one() -> None:
    config = configs.replace(configs.from_dict(TREE), train__global_batch=1)
    usage, numbers = simulate(config, 1, 8), num_parameters(config.model)
    averaged = configs.replace(config, average__ema=(0.9,), average__tail=(0.1,))
    assert simulate(averaged, 1, 8).optimizer - usage.optimizer == pytest.approx(4 * 2 * numbers, abs=1000)
    of_apex = configs.replace(config, optimizer__name="apex_fused_adam", train__apex_layer_norm=True)
    assert simulate(of_apex, 1, 8) == usage, "whose kernels are of CUDA alone"
    half = configs.replace(config, train__dtype="float16")
    assert simulate(half, 1, 8).parameters == 2 * numbers, "which few CPUs compute in"


class Patient(Storages):
    """After a collective it gives gloo's thread time to let go of the tensors: else the load decides how many count."""

    def __init__(self) -> None:
        super().__init__()
        self._after_collective = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._after_collective:
            time.sleep(0.001)
        self._after_collective = func.namespace == "c10d"
        return super().__torch_dispatch__(func, types, args, kwargs)


def held(rank: int, tree: dict[str, Any]) -> tuple[int, int, int, int]:
    """What tensors of a real process hold between steps and at most, what of it is sent or received and what
    losses take, counted in the same way: the least of three equal steps, as gloo may hold some for longer in one."""
    config = configs.from_dict(tree)
    mesh = init_processes(config)
    packs, length = config.train.micro_batch, 64
    special = SpecialTokens.of(config.model.language.vocab_size)
    image = [special.soi, *[special.placeholder] * config.model.vision.num_patches, special.eoi]
    head = [special.sot, 5, *image, 6, *image]
    row = torch.tensor([*head, *[7] * (length - len(head) - 1), special.eot])

    def batches() -> list[PackedBatch]:
        pixels = [torch.zeros(packs * 8, 3, 32, 32, dtype=torch.uint8) for _ in range(4 // packs // mesh.data.size)]
        rows = torch.full((packs * 4,), length)
        return [pack_padded(row.repeat(packs * 4, 1), rows, images, config.model) for images in pixels]

    try:
        with Patient() as storages:
            stepper = build_stepper(build_engine(build_module(config, mesh), config, mesh), config, mesh)
            stepper.run(batches(), 1e-3)
            steps = []
            for _ in range(3):
                next_batches = batches()  # as in training: what attention makes of a batch goes with it
                between = storages.begin_step()
                with storages.watching_losses():
                    stepper.run(next_batches, 1e-3)
                steps.append((between, storages.peak, storages.network, storages.losses))
            between, peak, network, losses = (min(numbers) for numbers in zip(*steps, strict=True))
            return between, peak, network, losses
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel": {"tensor": 2}},
        {"parallel": {"pipeline": 2}},
        {"zero": {"stage": 3}, "contrast": {"strategy": "recompute"}},
    ],
    ids=["tensor", "pipeline", "ZeRO-3"],
)
def test_tensors_hold_what_those_of_real_processes_hold(layout: dict[str, Any]) -> None:
    config = configs.from_dict(TREE | layout)
    (*_, (*real, network, losses)) = run_processes(held, 2, configs.to_dict(config))
    usage = simulate(config, 2, 8, rank=1)
    between = usage.parameters + usage.optimizer + usage.batches
    assert [between, usage.peak, usage.network] == pytest.approx([*real, network], rel=0.01)
    assert usage.losses == pytest.approx(losses, rel=0.1), "the real rows have fewer targets"


@pytest.mark.slow
def test_many_micro_batches_from_few() -> None:
    """Of four the most is there when gradients are summed, of twelve while the graphs are."""
    wide = {"layers": 1, "width": 768, "heads": 4, "mlp_width": 3072}
    model = {name: {**part, **wide} for name, part in TREE["model"].items() if name != "pool_heads"}
    model["language"]["vocab_size"] = 8003
    data = {"tokens_per_pack": 64, "images_per_pack": 2}
    train = {"dtype": "bfloat16", "activation_checkpointing": "full", "global_batch": 12}
    config = configs.from_dict({"model": model, "data": data, "train": train})
    with ProcessPoolExecutor(2, forkserver(), max_tasks_per_child=1) as pool:
        asked = [configs.replace(config, train__global_batch=number) for number in (4, 12)]
        few, whole = pool.map(_simulate, asked, [1, 1], [2, 2], [0, 0])
    assert few.before.tensors < few.after.tensors
    assert few.before.small < few.kept_built
    assert whole.before.tensors > 1.1 * whole.after.tensors
    usage = simulate(config, 1, 2)
    for name in ("peak", "touched", "kept", "graphs"):
        assert getattr(usage, name) == pytest.approx(getattr(whole, name), rel=0.01), name


def test_stages_of_a_run_with_a_frozen_tower_are_simulated() -> None:
    """As the run divides its layers: three of seven in the first stage would leave it nothing to train."""
    changes = {"model__vision__layers": 2, "model__language__layers": 2, "train__freeze": ("vision.*",)}
    config = configs.replace(configs.from_dict(TREE), parallel__pipeline=2, **changes)
    bound = largest_estimate(config, 2, [8], False).total
    assert check_step(config, 2, Memory(0.9 * DOUBT * 2 * bound, "", False), [8]), "it was simulated"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_keeps_no_more_micro_batches_than_are_in_flight() -> None:
    """The third of four keeps two at once, however many a step has."""
    changes = {"parallel__pipeline": 4, "train__global_batch": 12, "contrast__strategy": "recompute"}
    config = configs.replace(configs.from_dict(TREE), **changes)
    assert [num_in_flight(config, stage, 12) for stage in range(4)] == [4, 3, 2, 1]
    assert [num_in_flight(config, stage, 3) for stage in range(4)] == [3, 3, 2, 1]
    retain = configs.replace(config, contrast__strategy="retain")
    assert [num_in_flight(retain, stage, 12) for stage in range(4)] == [12] * 4
    with ProcessPoolExecutor(1, forkserver(), max_tasks_per_child=1) as pool:
        whole = pool.submit(_simulate, config, 4, 8, 2).result()
    assert simulate(config, 4, 8, rank=2).peak == pytest.approx(whole.peak, rel=0.01)
