"""Which kernels a run uses, and saying so: in its first lines, in metrics.jsonl, in the dry run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_lcl import objectives
from megatron_lcl.attention import Attention, load_fault
from megatron_lcl.config import Config
from megatron_lcl.errors import UserError
from megatron_lcl.losses.kernels import triton_fault
from megatron_lcl.model.float8 import MULTIPLE, float8_fault
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.train.engine import choose_run_attention
from megatron_lcl.train.precision import resolve_dtype
from megatron_lcl.units import listed


@dataclass(frozen=True)
class Kernels:
    """Names of what computes, and why something faster that is installed does not."""

    attention: str
    losses: str
    blocks: str
    passed_over: tuple[str, ...]

    def lines(self) -> list[str]:
        """The kernels in one line, then one for each that is skipped."""
        return [f"attention {self.attention}, losses {self.losses}, blocks {self.blocks}", *self.passed_over]

    def facts(self) -> dict[str, Any]:
        """The same for metrics.jsonl."""
        return {
            "attention": self.attention,
            "loss_kernels": self.losses,
            "blocks": self.blocks,
            "kernels_passed_over": list(self.passed_over),
        }


def choose_kernels(config: Config) -> Kernels:
    """What a process of the run uses on this machine. UserError where `train.attention` cannot be used."""
    attention: Attention = choose_run_attention(config)
    losses, passed_over = "torch", attention.passed_over
    has_cuda = torch.cuda.is_available()
    if has_cuda and objectives.has_triton(config):
        fault = triton_fault()
        losses = "torch" if fault else "triton"
        passed_over += (fault,) if fault else ()
    return Kernels(attention.name, losses, kernels_of_blocks(config, has_cuda), passed_over)


def kernels_of_blocks(config: Config, has_cuda: bool) -> str:
    """How the encoders' blocks are computed: `eager`, `compiled`, or `compiled in float8`. has_cuda: on the run's
    devices, else float8 is emulated."""
    if not config.train.compile:
        return "eager"
    return "compiled" + (" in float8" + " (emulated)" * (not has_cuda)) * config.train.float8


def check_kernels(config: Config, elsewhere: bool) -> None:
    """UserError where `train.attention`, `train.compile` or `train.float8` cannot be used.

    elsewhere: the run's devices are not this machine's.
    """
    check_compile(config, elsewhere)
    if config.train.float8 and (fault := _float8_fault(config, elsewhere)):
        raise UserError(f"train.float8 is set, but {fault}; or leave train.float8 unset")
    if config.train.attention == "auto":
        return
    if not elsewhere:
        choose_run_attention(config)
    elif fault := load_fault(config.train.attention):
        raise UserError(f"train.attention = {config.train.attention}, but {fault}; set train.attention to auto")


def check_compile(config: Config, elsewhere: bool) -> None:
    """UserError where blocks are to be compiled and cannot be. elsewhere: as of `check_kernels`."""
    if config.train.compile and (fault := compile_fault(config, elsewhere)):
        raise UserError(f"train.compile is set, but {fault}; or leave train.compile unset")


def compile_fault(config: Config, elsewhere: bool = False) -> str | None:
    """Why blocks cannot be compiled; None if they can. elsewhere: as of `check_kernels`."""
    if config.parallel.tensor > 1:
        return f"parallel.tensor is {config.parallel.tensor}, whose collectives are overlapped by hand"
    if config.zero.stage == 3:
        return "zero.stage is 3, which gathers each layer's weights in between"
    if config.train.apex_layer_norm:
        return "train.apex_layer_norm is set, which is not compiled"
    if elsewhere:
        return None
    if torch.cuda.is_available():
        return triton_fault()
    return None if has_compiler() else "there is no C++ compiler for this CPU; install g++, or name one in CXX"


def _float8_fault(config: Config, elsewhere: bool) -> str | None:
    if not config.train.compile:
        fault = compile_fault(config, elsewhere)
        return fault or "train.compile is not: rounding would take longer than float8 saves; set both"
    if not (elsewhere and config.train.dtype == "auto") and (dtype := resolve_dtype(config)) != "bfloat16":
        return f"the run is in {dtype}; set train.dtype to bfloat16"
    sizes = {
        f"model.{name}.{field}": getattr(getattr(config.model, name), field)
        for name in ("vision", "language")
        for field in ("width", "mlp_width")
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            return f"{name} is {size}; float8 needs multiples of {MULTIPLE}"
    return float8_fault(elsewhere)


def has_compiler() -> bool:
    """Whether torch.compile finds what compiles for a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name)


def describe(kernels: Kernels, mesh: Mesh) -> Iterator[str]:
    """Lines for the person who watches; where processes use different kernels, those of each. All call it together."""
    everyone = mesh.world.gather_objects(kernels)
    for one in dict.fromkeys(everyone):
        ranks = [rank for rank, other in enumerate(everyone) if other == one]
        where = "" if len(ranks) == len(everyone) else f" on {listed(ranks, 'process')}"
        first, *more = one.lines()
        yield f"kernels{where}: {first}"
        yield from more
