"""A CUDA device whose tensors have no data, on a machine that has none: there the host does what it does on a GPU.

torch's FakeTensorMode computes shapes, dtypes and devices only. DeepSpeed is told of the device by its own accelerator
for CUDA. Kernels of Triton are not run; what they are given is looked at. `Watch` notes where the host would wait for
the device, and what would fail there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

try:
    from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError as DeviceMismatch
except ImportError:  # torch 2.11 has no error of its own for it
    DeviceMismatch = RuntimeError

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
H100 = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)


# --- the device --------------------------------------------------------------------------------------------------


def register_cuda() -> None:
    """Let autograd go backward through CUDA tensors in this process, if it could not; before its first backward.

    torch does so by itself where it is built for CUDA and there is no device (`_ensureCUDADeviceGuardSet`). Where it is
    built for CPUs there is no entry in its table of devices which that could replace, and autograd asks whether CUDA is
    built in. So an entry is made that says it has no devices, and the answers are replaced.
    """
    libraries = Path(torch.__file__).parent / "lib"
    table = (ctypes.c_void_p * 2).in_dll(
        ctypes.CDLL(str(libraries / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    if table[1]:
        return
    # C++ objects begin with a pointer to their virtual functions; of these one is asked, `deviceCount`
    zero = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _: 0)
    functions = (ctypes.c_void_p * 64)(*[ctypes.cast(zero, ctypes.c_void_p).value] * 64)
    no_devices = ctypes.c_void_p(ctypes.addressof(functions))
    table[1] = ctypes.addressof(no_devices)
    torch._C._ensureCUDADeviceGuardSet()
    assert table[1] != ctypes.addressof(no_devices), "torch has not put its own in"

    get_hooks = ctypes.CDLL(str(libraries / "libtorch_cpu.so"))["_ZN2at6detail12getCUDAHooksEv"]
    get_hooks.restype = ctypes.POINTER(ctypes.c_void_p)
    hooks = get_hooks()
    before = ctypes.cast(hooks[0], ctypes.POINTER(ctypes.c_void_p))
    yes = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(lambda _: True)
    answers = (ctypes.c_void_p * 64)(*[before[n] for n in range(-2, 62)])
    for n in (2, 4):  # isBuilt, hasPrimaryContext: AcceleratorHooksInterface.h, after two for the destructor
        answers[2 + n] = ctypes.cast(yes, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(answers) + 2 * ctypes.sizeof(ctypes.c_void_p)
    _KEPT.extend([yes, answers])
    assert torch.device("cuda") == torch.accelerator.current_accelerator(), "it is no accelerator yet"


_KEPT: list[Any] = []
"""what C++ goes on using"""


class Stream:
    """In place of torch.cuda.Stream; none is ever done with its work by the time that it is asked."""

    device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        _waits("Stream.synchronize")


class Event:
    """In place of torch.cuda.Event; none has been reached by the time that it is asked."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        _waits("Event.synchronize")


_STREAM = Stream()


def _pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    """A copy in page-locked memory; FakeTensorMode knows none."""
    copy = tensor if is_pinned(tensor) else tensor.clone()
    copy.page_locked = True  # type: ignore[attr-defined]
    return copy


def is_pinned(tensor: torch.Tensor, *_: Any) -> bool:
    """Whether it was made by `pin_memory`."""
    return getattr(tensor, "page_locked", False)


def _launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
    """In place of what Triton compiles and launches."""
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    for tensor in tensors:
        assert tensor.device == CUDA, f"{kernel.__name__} is given a tensor on {tensor.device}"
    assert all(isinstance(number, int) for number in grid if number), grid
    if Watch.active is not None:
        Watch.active.kernels.append(kernel.__name__)


@torch.no_grad()
def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
    """In place of nn.Module._apply: parameters are changed in place, as they are where they have data."""
    for child in module.children():
        child._apply(function)
    for parameter in module._parameters.values():
        if parameter is not None:
            moved = function(parameter.data)
            parameter.data = moved
            parameter.fake_device = moved.fake_device  # type: ignore[attr-defined] # which `data` leaves as it was
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


class _Mode(FakeTensorMode):
    avoid_device_init = property(lambda _: True)  # type: ignore[assignment]


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Tensors that are made inside have no data, and there is one CUDA device, an H100 by what it says of itself."""
    register_cuda()
    nothing = lambda *_, **__: None  # noqa: E731
    in_cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "get_device_capability": lambda *_: (H100.major, H100.minor),
        "get_device_properties": lambda *_: H100,
        "get_device_name": lambda *_: H100.name,
        "device": lambda *_: contextlib.nullcontext(),
        "device_of": lambda *_: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: _STREAM,
        "default_stream": lambda *_: _STREAM,
        "synchronize": lambda *_: _waits("torch.cuda.synchronize"),
        "empty_cache": nothing,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "reset_peak_memory_stats": nothing,
    }
    of_tensors = {"pin_memory": _pinned, "is_pinned": is_pinned, "record_stream": nothing}
    mode = _Mode()  # which imports parts of torch that keep what they find in torch.cuda
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # DeepSpeed's alignment check
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch.cuda, **in_cuda))
        stack.enter_context(mock.patch.multiple(torch.Tensor, **of_tensors))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.multiple(torch.cuda.nvtx, range_push=nothing, range_pop=nothing))
        with contextlib.suppress(ImportError):
            from triton.runtime.jit import JITFunction

            stack.enter_context(mock.patch.object(JITFunction, "run", _launch))
        yield stack.enter_context(mode)


@contextlib.contextmanager
def fake_processes(processes: int, rank: int = 0) -> Iterator[None]:
    """DeepSpeed on the fake device, in a group of so many processes of which this is one and the others do nothing."""
    import deepspeed
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.accelerator.real_accelerator import set_accelerator
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_lcl.train.engine import quiet_deepspeed

    set_accelerator(CUDA_Accelerator())
    launched = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in launched.items()}):
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        try:
            quiet_deepspeed()
            deepspeed.init_distributed("nccl", verbose=False)
            yield
        finally:
            dist.destroy_process_group()


# --- what is looked for ------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where something happens, and what."""

    what: str
    file: str
    """of this package or its tests below the checkout, of DeepSpeed from its package on"""
    function: str
    line: int
    ours: str = ""
    """of DeepSpeed's places: this package's function that called"""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}: {self.what}" + f", called by {self.ours}" * bool(self.ours)


SIZES = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
"""operations whose result's size is data"""
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "convolution", "linear", "native_layer_norm")
"""operations whose floating-point tensors must be of one dtype"""


class Watch(TorchDispatchMode):
    """Notes where the host waits for the device, and what would fail there.

    A number that is read is 1. What fails (a tensor on another device, dtypes in one product, a size that is data) is
    noted and raised.
    """

    active: Watch | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Place] = []
        self.faults: list[Place] = []
        self.kernels: list[str] = []
        """of Triton, as they are launched"""
        self.copies: list[Place] = []
        """between host and device, whether the host waits or not"""

    def __enter__(self) -> Watch:
        Watch.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Watch.active = None
        super().__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = any(tensor.is_cuda for tensor in tensors)
        if on_device:
            self._look_at(name, function, args, kwargs, tensors)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], kwargs) if name == "_to_copy" else (args[1], args[0])
            self._copied(source, target)
        try:
            return function(*args, **kwargs)
        except DataDependentOutputException:
            if name == "equal":
                return True
            return True if tensors[0].dtype == torch.bool else 1.0 if tensors[0].is_floating_point() else 1
        except DynamicOutputShapeException:
            self.faults.append(place(f"the size of what {name} gives is data"))
            raise
        except DeviceMismatch as error:
            self.faults.append(place(str(error)))
            raise

    def _look_at(self, name: str, function: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> None:
        if name in ("_local_scalar_dense", "equal"):
            self.waits.append(place("a number is read"))
        elif name in SIZES or (name == "repeat_interleave" and function._overloadname == "Tensor"):
            self.waits.append(place(f"{name} asks for a size"))
        elif name.startswith(("index", "_index_put")) and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            filled = len(args) > 2 and args[2].numel() == 1 and not args[2].is_cuda  # torch makes masked_fill of it
            if masks and not filled:
                self.waits.append(place("a mask's size is asked for"))
        elif name.startswith("_fused_"):
            if {tensor.device for tensor in tensors} != {CUDA}:
                self._fail(f"{name} needs all on one device")
        elif name in PRODUCTS:
            wanted = {argument for argument in (*args, *kwargs.values()) if isinstance(argument, torch.dtype)}
            dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - wanted
            if len(dtypes) > 1:
                self._fail(f"{name} of {' and '.join(sorted(map(str, dtypes)))}")

    def _fail(self, what: str) -> None:
        self.faults.append(place(what))
        raise RuntimeError(what)

    def _copied(self, source: torch.Tensor, target: Any) -> None:
        """A copy; target: a tensor, or the arguments of `Tensor.to`."""
        if isinstance(target, torch.Tensor):
            device, without_wait = target.device, False
        else:
            device, without_wait = target.get("device") or source.device, target.get("non_blocking", False)
        if {source.device.type, device.type} != {"cpu", "cuda"}:
            return
        to_device = device.type == "cuda"
        found = place("a copy to the device" if to_device else "a copy from the device")
        self.copies.append(found)
        if to_device:
            without_wait = without_wait and is_pinned(source)
        if not without_wait:
            self.waits.append(found)


def _waits(what: str) -> None:
    if Watch.active is not None:
        Watch.active.waits.append(place(what))


def place(what: str) -> Place:
    """Where the innermost function of this package, its tests or DeepSpeed is that is running."""
    found = None
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        file = _below(frame)
        if file is None:
            continue
        if found is None:
            found = Place(what, file, frame.f_code.co_name, line)
        if not file.startswith("deepspeed/"):
            return found if found.file == file else found._replace(ours=frame.f_code.co_name)
    return found or Place(what, "autograd", "", 0)


def _below(frame: FrameType) -> str | None:
    file = Path(frame.f_code.co_filename)
    if file == Path(__file__):
        return None
    if any(file.is_relative_to(ROOT / folder) for folder in ("megatron_lcl", "tests")):  # not .venv
        return str(file.relative_to(ROOT))
    _, found, inside = str(file).rpartition("/site-packages/deepspeed/")
    return f"deepspeed/{inside}" if found and not inside.startswith(("accelerator/", "comm/")) else None
