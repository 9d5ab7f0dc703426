"""Whole steps on a CUDA device without data, through DeepSpeed as on GPUs: what would fail, and where hosts wait."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from fake_cuda import CUDA, Place, Watch, fake_cuda, fake_processes
from processes import run_processes

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.losses import contrastive
from megatron_lcl.losses.kernels import triton_fault
from megatron_lcl.model import block
from megatron_lcl.objectives import contrast
from megatron_lcl.selftest.cases import Case, make_batches
from megatron_lcl.train.prefetch import Prefetcher
from megatron_lcl.train.simulate import without_others
from megatron_lcl.train.step import StepLoss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(torch.version.cuda), reason="a torch for CUDA asks the driver for the device"),
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "ZeRO-1, two tensor ranks, averages": {"tensor": 2, "data": 2, "averages": True},
    "ZeRO-2, options": {"data": 4, "zero": 2, "options": True},
    "ZeRO-1, float8": {"data": 4, "float8": True},
    "ZeRO-2, Muon, heads of 88": {"data": 4, "zero": 2, "optimizer": "muon", "head_width": 88},
    "ZeRO-1, CoCa": {"data": 4, "objective": "coca"},
    "ZeRO-1, SigLIP": {"data": 4, "objective": "siglip"},
    "pipeline, first stage": {"tensor": 2, "pipeline": 2},
    "ZeRO-3, recompute": {"data": 4, "zero": 3, "strategy": "recompute"},
}
LAST_STAGE = {
    "pipeline, last stage": LAYOUTS["pipeline, first stage"],
    "pipeline, last stage of replicas": {"data": 2, "pipeline": 2},
}
"""of the third of four processes; all others are of the first"""
LOGGED = 1
"""the step that is measured and read; the one before is not"""
KERNELS = ("_forward_kernel", "_backward_kernel", "_statistics_kernel", "_error_kernel")
WITHOUT_KERNELS = {"ZeRO-1, SigLIP": KERNELS, "pipeline, first stage": KERNELS}
"""of the losses; those that a layout does not launch"""


@dataclasses.dataclass
class Found:
    """Of one step."""

    waits: list[Place]
    faults: list[Place]
    kernels: list[str]
    error: str = ""


def waits_for_the_loss(plain: Any) -> Any:
    def planted_waits(self: StepLoss) -> torch.Tensor:
        loss = plain(self)
        loss.detach().item()
        return loss * torch.tensor([2.0], device=CUDA)[0]

    return planted_waits


def multiplies_on_the_host(plain: Any) -> Any:
    def planted_host_tensor(features: torch.Tensor) -> torch.Tensor:
        return plain(features) * torch.ones(features.shape[1])

    return planted_host_tensor


def takes_what_a_mask_says(plain: Any) -> Any:
    def planted_mask(self: Any, out: Any, batch: Any) -> None:
        plain(self, out, batch)
        self.image = self.image[self.image[:, 0] > 0]

    return planted_mask


def multiplies_float32(plain: Any) -> Any:
    def planted_dtype(self: Any, hidden: torch.Tensor, rows: int) -> torch.Tensor:
        return plain(self, hidden.float(), rows)

    return planted_dtype


PLANTED = {
    "planted_waits": (("a number is read", "a copy to the device"), StepLoss, "mean", waits_for_the_loss),
    "planted_host_tensor": (("cuda:0 and cpu",), contrast, "unit_norm", multiplies_on_the_host),
    "planted_mask": (("asked for", "is data"), contrast.Features, "__init__", takes_what_a_mask_says),
    "forward": (("bfloat16 and torch.float32",), block.FeedForward, "forward", multiplies_float32),
}
"""by the function in which it is found, of this file or of the package: what is said of it"""


class Run:
    """A run of a layout, with one block in each encoder, in one of four processes."""

    def __init__(self, mode: Any, layout: dict[str, Any]) -> None:
        from megatron_lcl.train.averages import Averages
        from megatron_lcl.train.engine import build_engine, build_mesh, build_module, build_stepper

        case, float8, head_width = dict(layout), layout.get("float8", False), layout.get("head_width")
        case.pop("float8", None), case.pop("head_width", None)
        config = Case(dtype="bfloat16", **case).config()
        config = configs.replace(config, model__vision__layers=1, model__language__layers=1)
        if head_width:
            widths = {part: head_width * getattr(config.model, part).heads for part in ("vision", "language")}
            config = configs.replace(config, **{f"model__{part}__width": width for part, width in widths.items()})
        if float8:
            config = configs.replace(config, model__vision__width=48, train__compile=True, train__float8=True)
        self.mode, self.config = mode, config
        as_written = mock.patch.object(torch, "compile", lambda function, **_: function)
        with as_written, Watch():  # what is built may wait
            self.mesh = build_mesh(config)
            self.engine = build_engine(build_module(config, self.mesh), config, self.mesh)
            self.stepper = build_stepper(self.engine, config, self.mesh)
            self.averages = Averages(config, self.engine)
            self.stepper.clock.start()

    def step(self, number: int, packs: Sequence[PackedBatch]) -> Found:
        from megatron_lcl.train.broadcast_batches import broadcast_batches

        own = [self._fake(batch) for batch in packs[self.mesh.data.rank :: self.mesh.data.size]]
        with Watch() as watch:
            found = Found(watch.waits, watch.faults, watch.kernels)
            try:
                prefetcher = Prefetcher(iter(own), len(own), self.engine.device)
                prefetcher.begin()
                batches = prefetcher.take().copies
                if self.mesh.loads_data:
                    batches = broadcast_batches(batches, len(own), 1, self.mesh, self.engine.device)
                else:  # as they would come from the first stage, which sends no images
                    batches = [dataclasses.replace(batch, images=batch.images[:0]) for batch in batches]
                pending = self.stepper.start(batches, 1e-3, math.inf, number == LOGGED)
                self.averages.update(number + 1, pending.skipped)
                if number == LOGGED:
                    pending.read()
            except RuntimeError as error:
                found.error = str(error)
        return found

    def _fake(self, batch: PackedBatch) -> PackedBatch:
        values = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        tensors = {name: self.mode.from_tensor(value) for name, value in values.items() if torch.is_tensor(value)}
        return dataclasses.replace(batch, **tensors)


def make_steps(rank: int) -> tuple[dict[str, list[Found]], dict[str, Found], str]:
    """Of each layout the steps; of each planted fault a step; the attention of these."""
    from megatron_lcl.train.engine import choose_run_attention

    layouts = LAST_STAGE if rank else LAYOUTS
    objectives = {layout.get("objective", "lcl") for layout in layouts.values()}
    packs_of = {objective: make_batches(Case(objective=objective).config(), 0) for objective in objectives}
    steps: dict[str, list[Found]] = {}
    planted: dict[str, Found] = {}
    sizes = lambda *arguments: tuple(arguments[-1])  # noqa: E731 - tensor ranks may have one pair more, or one less
    place = fake_processes(4, 2 if rank else 0)
    with without_others(), place, mock.patch.object(contrastive, "_sizes", sizes), fake_cuda() as mode:
        for name, layout in layouts.items():
            packs, run = packs_of[layout.get("objective", "lcl")], Run(mode, layout)
            steps[name] = [run.step(number, packs) for number in range(LOGGED + 1)]
            if not planted and not rank:
                for function, (_, owner, attribute, make) in PLANTED.items():
                    with mock.patch.object(owner, attribute, make(getattr(owner, attribute))):
                        planted[function] = run.step(0, packs)
        return steps, planted, choose_run_attention(run.config).name


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, list[Found]], dict[str, Found], str]:
    """Of both processes; what is planted, and the attention, of the first."""
    (steps, planted, attention), (last_stage, *_) = run_processes(make_steps, 2, timeout=500.0)
    return steps | last_stage, planted, attention


def listed(places: list[Place]) -> str:
    return "\n".join(map(str, places))


def test_steps_go_through(made: Any) -> None:
    """Shapes, dtypes and devices fit, and no size is data; with the attention and the loss kernels of a GPU."""
    steps, _, attention = made
    assert attention == "torch_varlen", "flash-attn is not installed here; this one has a function for fake tensors"
    for name, of_layout in steps.items():
        for found in of_layout:
            assert not found.error, (name, found.error, listed(found.faults))
            assert not found.faults, (name, listed(found.faults))
            if triton_fault() is None:
                assert set(found.kernels) == set(KERNELS) - set(WITHOUT_KERNELS.get(name, ())), name
                if name != "pipeline, first stage":  # its log says so too, of the whole run
                    of_run = Case(objective=(LAYOUTS | LAST_STAGE)[name].get("objective", "lcl")).config()
                    assert bool(found.kernels) == objectives.create(of_run).has_triton, name


def test_the_host_waits_where_the_numbers_are_read_and_nowhere_else(made: Any) -> None:
    for name, of_layout in made[0].items():
        for number, found in enumerate(of_layout):
            ours = [place for place in found.waits if not place.file.startswith("deepspeed/")]
            read = [(place.function, place.what) for place in ours]
            assert read == [("read_results", "a copy from the device")] * (number == LOGGED), (name, listed(ours))


def test_deepspeed_waits_where_the_documentation_says(made: Any) -> None:
    """docs/metrics.md, waits for the device. One micro-batch a step, two parameter groups; by DeepSpeed's function."""
    backward, of_scale = "independent_gradient_partition_epilogue", "_get_fp32_opt_state_partition"
    expected: dict[int, dict[str, int]] = {
        1: {},
        2: {backward: 1},
        3: {backward: 1, of_scale: 4, "get_grad_norm_direct": 2},
    }
    for name, steps in made[0].items():
        waits = Counter(place.function for place in steps[LOGGED].waits if place.file.startswith("deepspeed/"))
        stage = (LAYOUTS | LAST_STAGE)[name].get("zero", 1)
        if stage == 3:
            assert waits.pop("_fetch_sub_module_impl") > 0  # one at most for each module that has parameters
        assert waits == expected[stage], name


@pytest.mark.parametrize("function", PLANTED)
def test_what_is_planted_is_named(made: Any, function: str) -> None:
    found = made[1][function]
    places = [*found.waits, *found.faults]
    for what in PLANTED[function][0]:
        assert [place for place in places if place.function == function and what in place.what], listed(places)
    assert bool(found.error) == bool(found.faults)
