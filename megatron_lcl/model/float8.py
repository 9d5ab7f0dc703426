"""Linear layers that multiply in float8: torchao's, with a scale for each row.

The three products of a layer (its output, the gradients of its input and of its weight) are of numbers rounded to e4m3,
four bits of exponent and three of mantissa (Micikevicius et al. 2022, arXiv 2209.05433). Each row of the left factor
and each column of the right one has a scale, a power of two, that brings its largest number below the largest of e4m3.
What is trained, gradients and activations included, stays bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn

MULTIPLE = 16
"""the sizes of factors on a GPU (torch.nn.functional.scaled_mm)"""
CAPABILITY = (8, 9)
"""compute capability of the GPUs that multiply in float8: Ada, Hopper and later"""


def float8_fault(elsewhere: bool = False) -> str | None:
    """Why layers cannot multiply in float8 here; None if they can. elsewhere: the devices are not this machine's."""
    if importlib.util.find_spec("torchao") is None:
        return "torchao, whose layers these are, is not installed; `pip install 'megatron-lcl[float8]'`"
    if elsewhere or not torch.cuda.is_available() or (capability := torch.cuda.get_device_capability()) >= CAPABILITY:
        return None
    return "this GPU has compute capability {}.{}; float8 needs {}.{}".format(*capability, *CAPABILITY)


def use_float8(module: nn.Module, device: torch.device | None = None) -> None:
    """From now on all linear layers in the module multiply in float8; parameters stay the same, and their names.

    Their inputs are [rows, features], any number of rows. device: on which the module will compute; None: where its
    parameters are. On a CPU float8 is emulated: float32 products of the same rounded numbers.
    """
    device = device or next(module.parameters()).device
    with _no_warnings_of("torchao", "torch.utils._pytree"):  # of libraries for other devices
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    rowwise = Float8LinearConfig.from_recipe_name("rowwise")
    config = dataclasses.replace(rowwise, emulate=device.type != "cuda")
    convert_to_float8_training(module, config=config)
    for layer in module.modules():
        if isinstance(layer, nn.Linear):  # of a method a copy of the module has its own
            layer.forward = MethodType(_with_more_rows, layer)  # type: ignore[method-assign]


@contextlib.contextmanager
def _no_warnings_of(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _with_more_rows(self: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    """The layer on rows and rows of zeros: a multiple of 16, and never none, of which the weight's gradient needs a
    largest number."""
    assert rows.dim() == 2, f"rows of shape {tuple(rows.shape)}"
    more = -len(rows) % MULTIPLE if len(rows) else MULTIPLE
    padded: torch.Tensor = type(self).forward(self, F.pad(rows, (0, 0, 0, more)))
    return padded[: len(rows)]
