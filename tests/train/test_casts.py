"""Changes of dtype in a step in bfloat16, counted: each goes through memory once more, so each has its reason here."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from processes import run_processes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_lcl
from megatron_lcl.selftest.cases import Case, make_batches

OURS = os.path.dirname(megatron_lcl.__file__) + os.sep
Casts = Counter[tuple[str, str, str]]
"""numbers that are cast, by (place, from, to): the innermost function of ours, or DeepSpeed, which calls autograd"""


class CastMode(TorchDispatchMode):
    """Counts casts to and from floating-point numbers: copies, and operations on tensors of several such dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.casts: Casts = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel() > 1]
        dtypes = {tensor.dtype for tensor in given if tensor.dtype.is_floating_point}
        out = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[0] if name == "_to_copy" else args[1]
            if source.numel() > 1 and source.dtype != out.dtype and out.dtype.is_floating_point:
                self._count(source.numel(), source.dtype, out.dtype)
        elif len(dtypes) > 1 and "attention" not in name:  # whose backward takes log-sum-exps
            self._count(max(tensor.numel() for tensor in given), *sorted(dtypes, key=lambda dtype: dtype.itemsize))
        return out

    def _count(self, number: int, before: torch.dtype, after: torch.dtype) -> None:
        files = ((frame.f_code.co_filename, frame.f_code.co_name) for frame, _ in traceback.walk_stack(sys._getframe()))
        file, name = next((f, name) for f, name in files if f.startswith(OURS) or "/deepspeed/" in f)
        place = name if file.startswith(OURS) else "DeepSpeed"
        self.casts[place, *(str(dtype).removeprefix("torch.") for dtype in (before, after))] += number


def nothing() -> None: ...


def feed_forward_of_float32() -> None:
    from megatron_lcl.model.block import FeedForward

    forward = FeedForward.forward

    def scaled(self: Any, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return forward(self, (hidden * torch.ones(hidden.shape[1])).bfloat16(), rows)

    FeedForward.forward = scaled  # type: ignore[method-assign]


def count(rank: int, strategies: list[str], plant: Callable[[], None]) -> list[tuple[Casts, int]]:
    """Of each strategy the casts of a step that is not the first, and how many numbers the model has."""
    import torch.distributed as dist

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    plant()
    found = []
    for strategy in strategies:
        config = Case(dtype="bfloat16", strategy=strategy).config()
        mesh = init_processes(config)
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)
        stepper.run(make_batches(config, 0), 1e-3)
        batches = make_batches(config, 1)
        with CastMode() as mode:
            stepper.start(batches, 1e-3)
        found.append((mode.casts, sum(parameter.numel() for parameter in engine.module.parameters())))
    dist.destroy_process_group()
    return found


def test_nothing_is_cast_but_images_features_logits_and_weights_once() -> None:
    (of_strategies,) = run_processes(count, 1, ["retain", "recompute"], nothing)
    for passes, (casts, numbers) in enumerate(of_strategies, 1):
        config = Case(dtype="bfloat16").config()
        batches, language = make_batches(config, 1), config.model.language
        images = sum(batch.images.numel() for batch in batches)
        features = sum(len(batch.images) for batch in batches) * language.width
        # a CPU has no product of bfloat16 numbers with a float32 result
        targets = sum(batch.num_targets for batch in batches)
        logits = (targets + len(batches) * language.vocab_size) * language.width
        # the gradients of rows that are looked up are summed in float32
        looked_up = 2 * sum(len(batch.tokens) for batch in batches) * language.width
        tables = len(batches) * (language.vocab_size + language.context_length) * language.width
        weights = casts.pop(("DeepSpeed", "float32", "bfloat16")) - 2 * features  # of features it is the gradients
        assert numbers <= weights < numbers + 4, "once a step; partitions are filled up"
        assert casts == {
            ("normalize", "uint8", "float32"): passes * images,
            ("encode", "float32", "bfloat16"): passes * images,
            ("_outputs", "bfloat16", "float32"): passes * features,
            ("_contexts", "bfloat16", "float32"): passes * features,
            ("_chunked", "bfloat16", "float32"): logits,
            ("<genexpr>", "float32", "bfloat16"): logits,
            ("error", "bool", "float32"): targets,
            ("backward", "bfloat16", "float32"): looked_up,
            ("backward", "float32", "bfloat16"): tables,
            ("DeepSpeed", "bfloat16", "float32"): len(batches) * (numbers - 1),  # gradients; the log scale is float32
        }


def test_a_cast_in_a_block_is_seen() -> None:
    ((casts, _),) = run_processes(count, 1, ["retain"], feed_forward_of_float32)[0]
    batches, model = make_batches(Case().config(), 1), Case().config().model
    rows = sum(len(batch.images) * (1 + batch.num_patches) for batch in batches), sum(len(b.tokens) for b in batches)
    numbers = sum(n * part.width * part.layers for n, part in zip(rows, (model.vision, model.language), strict=True))
    for dtypes in (("bfloat16", "float32"), ("float32", "bfloat16")):
        assert casts["_feed_forward", *dtypes] == numbers
