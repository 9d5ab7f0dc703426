"""Between two logged steps nothing is read from the device, by us or by DeepSpeed; a logged step is read once."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
WAITING = (
    "_local_scalar_dense",
    "nonzero.default",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave.Tensor",
)
"""operations whose result the host must know, or its size"""


@contextlib.contextmanager
def reads() -> Iterator[Counter[str]]:
    """Counts, while inside, what the host would wait for if tensors lay on a device: by whose code.

    Numbers and sizes that are read, tensors made of the host's numbers where a device is named (the copy is waited
    for), and waits for all of the device.
    """
    from deepspeed.accelerator import get_accelerator

    found: Counter[str] = Counter()
    inside = [False]

    def note(device: object = None) -> None:
        frames = [f for f in traceback.extract_stack() if "/megatron_lcl/" in f.filename or "/deepspeed/" in f.filename]
        ours = "/megatron_lcl/" in frames[-1].filename
        # what we name in text is host memory, the model's device is no text; DeepSpeed names its accelerator in text
        # the header of the losses lies in host memory, as `GlobalCounts` do
        if not (ours and device == "cpu") and not frames[-1].filename.endswith("/losses/group.py"):
            found["ours" if ours else "deepspeed"] += 1
            found[f"{frames[-1].filename}:{frames[-1].lineno}"] += 1

    class Scalars(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function).removeprefix("aten.")
            if not inside[0] and (name.startswith(WAITING) or (name == "index.Tensor" and _masks(args[1]))):
                note()
            return function(*args, **(kwargs or {}))

    def counted(name: str) -> Any:
        plain = getattr(torch.Tensor, name)

        def read(self: torch.Tensor, *args: Any) -> Any:
            if inside[0]:
                return plain(self, *args)
            inside[0] = True
            try:
                note()
                return plain(self, *args)
            finally:
                inside[0] = False

        return patch.object(torch.Tensor, name, read)

    make = torch.tensor

    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            note(kwargs["device"])
        return make(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "tensor", made))
        stack.enter_context(patch.object(get_accelerator(), "synchronize", lambda *_: note()))
        for name in READS:
            stack.enter_context(counted(name))
        stack.enter_context(Scalars())
        yield found


def _masks(indices: Any) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


def count(rank: int, layouts: list[dict[str, Any]]) -> list[list[Counter[str]]]:
    """Of each layout, by step: what is read while steps are made, of which the last is measured and read."""
    import torch.distributed as dist

    from megatron_lcl import config as configs
    from megatron_lcl.objectives.base import GlobalCounts
    from megatron_lcl.selftest.cases import Case, make_batches
    from megatron_lcl.train.averages import Averages
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.resilience.bad_steps import SpikeLimit

    result = []
    of_host = GlobalCounts.of
    for layout in layouts:
        asks, ema, sigmas = layout.pop("asks", False), layout.pop("ema", ()), layout.pop("spike_sigmas", None)
        case = Case(**layout)
        config = configs.replace(case.config(), train__attention="dense")  # the one for CPU reads where sequences begin
        config = configs.replace(config, model__vision__layers=1, model__language__layers=1)
        config = configs.replace(config, average__ema=ema, guard__spike_sigmas=sigmas, guard__spike_window=4)
        mesh = init_processes(config)
        with contextlib.ExitStack() as stack:
            if asks:
                stack.enter_context(patch("megatron_lcl.train.engine.skips_on_device", lambda _: False))
            engine = build_engine(build_module(config, mesh), config, mesh)
        stepper, averages = build_stepper(engine, config, mesh), Averages(config, engine)
        spikes = SpikeLimit(config.guard, engine.device)
        stepper.clock.start()
        steps = []
        for step in range(3):
            packs = make_batches(config, step)[mesh.data.rank :: mesh.data.size]
            num = config.train.global_batch // mesh.data.size
            batches = broadcast_batches(packs if mesh.loads_data else None, num, 1, mesh, engine.device)
            counts = of_host(batches, mesh, torch.device("cpu"))
            with patch.object(GlobalCounts, "of", lambda *_, counts=counts: counts), reads() as found:
                pending = stepper.start(batches, 1e-3, spikes.limit(), step == 2)
                averages.update(step + 1, pending.skipped)
                spikes.add(pending.loss, pending.skipped)
                if step == 2:
                    assert not found["ours"], f"before it is read: {found}"
                    pending.read()
            steps.append(found)
        stepper.clock.take()
        result.append(steps)
    dist.destroy_process_group()
    return result


@pytest.mark.slow
def test_only_a_logged_step_is_read_and_once() -> None:
    """On real processes, all ZeRO stages, tensor parallel, pipeline. What hosts tell each other lies in host memory."""
    layouts: list[dict[str, Any]] = [
        {"data": 2},
        {"data": 2, "dtype": "bfloat16"},
        {"data": 2, "zero": 2, "optimizer": "muon"},
        {"data": 2, "optimizer": "stable_adamw", "ema": (0.9,), "spike_sigmas": 6.0},
        {"data": 2, "zero": 2, "dtype": "bfloat16", "options": True},
        {"data": 2, "zero": 3, "strategy": "recompute"},
        {"tensor": 2},
        {"pipeline": 2, "strategy": "recompute"},
        {"data": 2, "asks": True},
    ]
    for of_rank in run_processes(count, 2, layouts, timeout=400.0):
        for layout, steps in zip(layouts, of_rank, strict=True):
            assert [found["ours"] for found in steps[:2]] == [0, 0], (layout, steps)
            assert 0 < steps[2]["ours"] <= 3, (layout, steps)  # one copy, from which the rest is taken on the host
            deepspeed = [found["deepspeed"] for found in steps]
            if layout.get("asks"):
                assert min(deepspeed) > 0, "is a gradient not finite?"
            elif layout.get("zero") == 3:  # at first it notes what is gathered when; then a number goes to the device
                assert deepspeed[2] == 2, (layout, steps)  # for each parameter group
            else:
                assert deepspeed == [0, 0, 0], (layout, steps)


OUTER = ("/torch/", "/deepspeed/accelerator/", "warnings.py")  # `_py_warnings.py` from Python 3.14 on
"""files whose callers wait"""


@contextlib.contextmanager
def functions_that_wait() -> Iterator[list[str]]:
    """Names of the functions in which the host waits while inside: where torch warns of it, and for the whole device,
    of which it does not warn."""
    found: list[str] = []

    def note(*_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if f.name not in ("note", "warned")]
        found.append([f.name for f in frames if not any(outer in f.filename for outer in OUTER)][-1])

    def warned(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing" in str(message):
            note()

    with warnings.catch_warnings(), patch.object(torch.cuda, "synchronize", note):
        warnings.simplefilter("always")
        warnings.showwarning = warned
        yield found


def test_functions_that_wait_are_named() -> None:
    """As torch warns on CUDA, and where DeepSpeed calls the accelerator of CUDA."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    def reads() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    def for_all() -> None:
        CUDA_Accelerator().synchronize()

    with functions_that_wait() as found:
        for function in (reads, for_all, reads):
            function()
    assert found == ["reads", "for_all", "reads"]


def waits_on_cuda(layout: dict[str, Any]) -> tuple[Counter[str], list[str], float]:
    """The functions in which a step waits that is logged; those in which reading it does; the seconds of all phases."""
    from megatron_lcl.selftest.cases import Case, make_batches
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes, leave_processes

    config = Case(**layout).config()
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    assert engine.device.type == "cuda"
    stepper = build_stepper(engine, config, mesh)
    stepper.clock.start()
    packs = make_batches(config, 0)
    for logged in (False, True, False, False):  # the first ones compile and allocate
        batches = broadcast_batches(packs, len(packs), 1, mesh, engine.device)
        pending = stepper.start(batches, 1e-3, float("inf"), logged)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    found = []
    for logged in (False, True):
        with functions_that_wait() as in_step:
            pending = stepper.start(batches, 1e-3, float("inf"), logged)
        found.append(Counter(in_step))
    assert found[0] == found[1], found
    with functions_that_wait() as in_reading:
        pending.read()
    torch.cuda.set_sync_debug_mode("default")
    seconds = sum(stepper.clock.take().values())
    leave_processes(others_wait=False)
    return found[1], in_reading, seconds


BACKWARD = "independent_gradient_partition_epilogue"
OF_GATHERS = ("_fetch_sub_module_impl", "_allgather_params_sequential", "__reduce_and_partition_ipg_grads", "wait")
"""of ZeRO-3, in which it waits as often as it has modules"""
LAYOUTS_ON_CUDA: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "ZeRO-1, bfloat16": ({"dtype": "bfloat16"}, {}),
    "ZeRO-1, float32": ({}, {BACKWARD: 1}),
    "ZeRO-2": ({"dtype": "bfloat16", "zero": 2}, {BACKWARD: 4}),
    "ZeRO-3": (
        {"dtype": "bfloat16", "zero": 3, "strategy": "recompute"},
        {BACKWARD: 4, "_get_fp32_opt_state_partition": 4, "get_grad_norm_direct": 2},
    ),
}
"""in one process, of four micro-batches: the waits of a step by DeepSpeed's function. Derived: of one micro-batch in
bfloat16 they are counted on the simulated device (test_fake_cuda.py); ZeRO-2 and 3 wait in the backward of each of the
four, ZeRO-1 in float32 in that of the last, as docs/metrics.md says"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS_ON_CUDA)
def test_on_cuda_a_step_waits_where_the_documentation_says(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Under torch's own watch, in a process that has its GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    layout, expected = LAYOUTS_ON_CUDA[name]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        in_step, in_reading, seconds = pool.submit(waits_on_cuda, layout).result(timeout=300)
    of_gathers = OF_GATHERS if layout.get("zero") == 3 else ()
    assert {function: number for function, number in in_step.items() if function not in of_gathers} == expected
    assert in_reading == ["read_results"]
    assert seconds > 0
