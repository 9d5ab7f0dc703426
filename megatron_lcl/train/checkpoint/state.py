"""Reads what DeepSpeed wrote, at any layout, as whole parameters and optimizer states.

A parameter lies in DeepSpeed's files in pieces: a tensor-parallel rank holds a shard of it (`partition_dim`), and the
data-parallel ranks hold consecutive runs of that shard, flattened. The files are mapped, not read: only the piece that
is asked for is in memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import torch.utils.serialization.config  # `torch.save` does, in a thread; a process forked meanwhile would hang in it
import xxhash

from megatron_lcl.config import Model
from megatron_lcl.convert.weights import write_safetensors
from megatron_lcl.model.layers import parameter_shapes
from megatron_lcl.train.checkpoint.unpickle import load_mapped

MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("fp32", *MOMENTS)
"""what there is of every parameter: its float32 value and Adam's two moments; beside them there may be averages"""
PARTITION_DIMS = "partition_dims"
"""key under which `Checkpointer` adds to every process's file which parameters tensor parallelism splits, and where"""
FROZEN = "frozen"
"""key under which it adds what the process holds of the parameters that are not trained, and these parameters' shapes
on its tensor rank"""
FROZEN_AVERAGES = "frozen_averages"
"""key under which it adds averages of such parameters from when they were trained, by parameter and average: flattened,
float32; absent where there are none"""

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")

Piece = Callable[[str], torch.Tensor]
"""a key of KEYS → a run of elements of the flattened shard"""


class State:
    """The content of a checkpoint's `state` folder."""

    def __init__(self, folder: Path, model: Model) -> None:
        self.shapes = parameter_shapes(model)
        """whole, unpadded"""
        self.partition_dims: dict[str, int] = {}
        self._local_shapes: dict[int, dict[str, torch.Size]] = {}
        self._pieces: dict[str, dict[int, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        for (data_rank, tensor_rank), file in sorted(_numbered(folder, _MODEL)):
            common = load_mapped(file)
            of_frozen = common.get(FROZEN_AVERAGES, {})
            for name, (held, shape) in common.get(FROZEN, {}).items():
                self._local_shapes.setdefault(tensor_rank, {})[name] = shape
                self._pieces[name][tensor_rank].append(_frozen(held, of_frozen.get(name, {})))
            if data_rank > 0:  # ZeRO-3's other processes
                continue
            self.common: dict[str, Any] = common
            """what DeepSpeed keeps beside the parameters: step counts and the like"""
            self._local_shapes.setdefault(tensor_rank, {}).update(
                (n, shape) for group in self.common["param_shapes"] for n, shape in group.items()
            )
            self.partition_dims |= self.common[PARTITION_DIMS]
        for (_rank, tensor_rank), file in sorted(_numbered(folder, _OPTIMIZER)):
            loaded = load_mapped(file)
            self.optimizer: dict[str, Any] = loaded["optimizer_state_dict"]
            """DeepSpeed's optimizer object, as one process wrote it"""
            self.version: str = loaded["ds_version"]
            zero3 = "fp32_flat_groups" in self.optimizer
            pieces = _pieces_zero3 if zero3 else _pieces_zero12
            for name, piece in pieces(self.optimizer, self.common["param_shapes"]):
                self._pieces[name][tensor_rank].append(piece)
        assert self._pieces.keys() == self.shapes.keys(), "the files do not hold this model"
        self.base: dict[str, Any] = self.optimizer["optimizer_state_dict" if zero3 else "base_optimizer_state"]
        """torch's optimizer, as one process wrote it"""
        self._of_first: dict[str, Any] = next(iter(self.base["state"].values()), {})
        """its state of one flattened group; empty where it has not stepped"""
        self.averages = [key for key in self._of_first if is_average(key)]
        """of the weights, by the names of `train.averages`"""

    @property
    def keys(self) -> tuple[str, ...]:
        """What `whole` gives of every parameter."""
        return (*KEYS, *self.averages)

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A parameter's value, moment or average, whole, unpadded, on the CPU.

        Of one that is not trained, the value and moments of zeros; its averages are the value, if it has none from when
        it was trained. Moments are also zeros where the optimizer has not stepped: every step so far was skipped, and
        the host knew (train/skipping.py).
        """
        shards = []
        for tensor_rank, pieces in sorted(self._pieces[name].items()):
            shape = self._local_shapes[tensor_rank][name]
            shards.append(torch.cat([piece(key) for piece in pieces])[: shape.numel()].view(shape))
        shape = self.shapes[name]
        if name not in self.partition_dims:  # every tensor-parallel rank has the same
            return shards[0].view(shape)
        dim = self.partition_dims[name]
        return torch.cat(shards, dim).narrow(dim, 0, shape[dim]).contiguous()

    @property
    def step(self) -> torch.Tensor:
        """Adam's count of steps, as torch keeps it; 0 where the optimizer has not stepped."""
        if "step" in self._of_first:
            return self._of_first["step"]
        # where apex keeps it, and earlier versions of this package did
        return torch.tensor(float(self.base["param_groups"][0].get("step", 0)))

    def write_weights(self, path: Path, key: str = "fp32") -> dict[str, Any]:
        """All parameters, float32, as a safetensors file, one after another; its entry in the manifest.

        key: "fp32", or one of `averages`.
        """
        tensors = {name: (torch.float32, shape) for name, shape in self.shapes.items()}
        return write_hashed(path, lambda file: write_safetensors(file, tensors, lambda name: [self.whole(name, key)]))


def is_average(key: str) -> bool:
    """Whether a state of the optimizer is an average of the weights."""
    return key.startswith(("ema_", "tail_"))


def _numbered(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[tuple[int, ...], Path]]:
    for file in sorted(folder.iterdir()):
        if match := pattern.fullmatch(file.name):
            yield tuple(int(number or 0) for number in match.groups()), file


def _pieces_zero12(optimizer: dict[str, Any], _shapes: Any) -> Iterator[tuple[str, Piece]]:
    """ZeRO-1 and 2: this process's run of the flattened group; which parameters lie in it is written beside it."""
    states = optimizer["base_optimizer_state"]["state"]
    for group, fp32 in enumerate(optimizer["single_partition_of_fp32_groups"]):
        flat = {"fp32": fp32, **states.get(group, {})}
        for name, address in optimizer["param_slice_mappings"][group].items():
            yield name, _run(flat, address.start, address.numel)


def _pieces_zero3(optimizer: dict[str, Any], shapes: Any) -> Iterator[tuple[str, Piece]]:
    """ZeRO-3: of every parameter an equal run, the last one padded."""
    states, num_ranks = optimizer["optimizer_state_dict"]["state"], optimizer["partition_count"]
    for group, fp32 in enumerate(optimizer["fp32_flat_groups"]):
        flat, start = {"fp32": fp32, **states.get(group, {})}, 0
        for name, shape in shapes[group].items():
            length = -(-shape.numel() // num_ranks)
            yield name, _run(flat, start, length)
            start += length


def _frozen(held: torch.Tensor, averages: dict[str, torch.Tensor]) -> Piece:
    def piece(key: str) -> torch.Tensor:
        return torch.zeros(held.numel()) if key in MOMENTS else averages.get(key, held).flatten().float()

    return piece


def _run(flat: dict[str, torch.Tensor], start: int, length: int) -> Piece:
    def piece(key: str) -> torch.Tensor:
        if key in MOMENTS and key not in flat:
            return torch.zeros(length)
        return flat[key].narrow(0, start, length)

    return piece


class _Hashed:
    """A file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = xxhash.xxh3_128()
        self.size = 0

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += memoryview(data).nbytes
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write_hashed(path: Path, write: Callable[[Any], None]) -> dict[str, Any]:
    """Write a file by a function that gets it open; its entry in the manifest. OSError where that fails."""
    with path.open("wb") as file:
        hashed = _Hashed(file)
        try:
            write(hashed)
        except RuntimeError as error:  # torch.save raises its own error over the disk's
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return {"bytes": hashed.size, "xxh3": hashed.digest.hexdigest()}


def save_hashed(path: Path, content: Any) -> dict[str, Any]:
    """`torch.save`; the file's entry in the manifest."""
    return write_hashed(path, lambda file: torch.save(content, file))
