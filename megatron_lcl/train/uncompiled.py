"""What torch and DeepSpeed import of torch.compile, kept out of runs that compile nothing: two seconds of each start.
So is MLflow, where it is installed, which DeepSpeed imports for its autotuner: another two.

torch wraps methods of its optimizers so that torch.compile leaves them alone, and the wrappers import its machinery
when they are first called. DeepSpeed's ZeRO optimizers import its Muon, whose functions are compiled, whoever uses it.
(torch's activation checkpointing imports it as well, and cannot do without.)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar
from unittest import mock

import torch

C = TypeVar("C", bound=type[torch.optim.Optimizer])


def uncompiled(optimizer: C) -> C:
    """An optimizer's class with its methods as they are without those wrappers, and steps that record no gradient."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        setattr(optimizer, name, inspect.unwrap(getattr(optimizer, name)))
    optimizer.step = torch.no_grad()(inspect.unwrap(optimizer.step))  # type: ignore[method-assign]
    return optimizer


def import_deepspeed() -> None:
    """Import it without MLflow, and its Muon uncompiled: nothing here calls its autotuner or its Muon."""
    modules: dict[str, Any] = sys.modules
    spared = {"mlflow"} - modules.keys()
    modules |= dict.fromkeys(spared)  # None there: an ImportError, which DeepSpeed expects
    try:
        from deepspeed.runtime import compiler
    finally:
        for name in spared:
            del modules[name]

    def as_it_is(*_: Any, **__: Any) -> Callable[[Any], Any]:
        return lambda function: function

    with mock.patch.object(compiler, "compile", as_it_is):
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
