"""Muon, StableAdamW and AdamW by parts: given equal gradients every layout steps as one process does, by the formulas.

The truth is torch's own optimizers, and formulas in float64, on whole tensors.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from layouts import DECAY, LR, STEPS, Layout, config_of, gradient, run_layouts
from processes import run_processes

from megatron_lcl import LCL
from megatron_lcl.config import Optimizer
from megatron_lcl.config.optimizer import Muon as MuonSettings
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.train.optimizers.muon import newton_schulz
from megatron_lcl.train.optimizers.pieces import Partition, Piece, Tensor
from megatron_lcl.train.optimizers.tensorwise import Rule, Tensorwise
from megatron_lcl.train.parts import called

BETAS, EPS = (0.9, 0.98), 1e-6
LAYOUTS = [Layout("zero1"), Layout("zero3", 3), Layout("tensor", tensor=2)]
MORE = [Layout("zero2", 2), Layout("pipeline", pipeline=2), Layout("bfloat16", dtype="bfloat16")]
"""whose partitions are made as those of the others"""
OF_FOUR = [
    (Layout("tensor and data", tensor=2), "muon"),
    (Layout("tensor and data", tensor=2), "stable_adamw"),
    (Layout("tensor and pipeline", tensor=2, pipeline=2), "muon"),
    (Layout("hierarchical zero3", 3, hierarchical=2), "muon"),
]
"""processes"""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"name": "muon", "muon": {"dtype": "float32"}},
    "muon by heads, bfloat16": {"name": "muon", "muon": {"per_head": True}},
    "stable_adamw": {"name": "stable_adamw"},
    "parts": {
        "parts": {
            "vision": {"lr": 0.1, "layer_decay": 0.5},
            "language": {"layer_decay": 0.7},
            "head": {"weight_decay": 0.0},
        }
    },
}


class Adam:
    """Torch's AdamW, not fused."""

    def __init__(self, parameter: torch.Tensor, decay: float, rate: float = 1.0) -> None:
        self.parameter, self.rate = torch.nn.Parameter(parameter), rate
        self.torch = torch.optim.AdamW([self.parameter], betas=BETAS, eps=EPS, weight_decay=decay, foreach=False)

    def step(self, grad: torch.Tensor, lr: float) -> None:
        self.parameter.grad = grad
        self.torch.param_groups[0]["lr"] = lr * self.rate
        self.torch.step()


class Stable:
    """Algorithm 2 of arXiv 2304.13013 as it is written there, in float64: betas that change with t."""

    def __init__(self, parameter: torch.Tensor, decay: float) -> None:
        self.parameter, self.decay, self.t = parameter.double(), decay, 0
        self.v, self.u = torch.zeros_like(self.parameter), torch.zeros_like(self.parameter)
        self.slowest = 1.0

    def step(self, grad: torch.Tensor, lr: float) -> None:
        self.t += 1
        g, t = grad.double(), self.t
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        self.v = b1 * self.v + (1 - b1) * g
        self.u = b2 * self.u + (1 - b2) * g**2
        rms = math.sqrt(float((g**2 / self.u.clamp(min=EPS**2)).mean()))
        self.slowest = max(self.slowest, rms)
        eta = lr / max(1.0, rms)
        self.parameter = self.parameter - eta * self.decay * self.parameter - eta * self.v / (self.u.sqrt() + EPS)


class Muon:
    """Muon's formula in float64 (arXiv 2502.16982, eq. 1, 2 and 4)."""

    def __init__(self, parameter: torch.Tensor, decay: float) -> None:
        self.parameter, self.decay, self.b = parameter.double(), decay, torch.zeros_like(parameter).double()

    def step(self, grad: torch.Tensor, lr: float) -> None:
        self.b = 0.95 * self.b + 0.05 * grad.double()
        x = 0.05 * grad.double() + 0.95 * self.b
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        self.parameter = self.parameter * (1 - lr * self.decay) - lr * 0.2 * math.sqrt(max(x.shape)) * x


class MuonByHeads:
    """Torch's Muon, which computes in bfloat16, for the rows of each head."""

    def __init__(self, parameter: torch.Tensor, decay: float, heads: int) -> None:
        self.parts = [torch.nn.Parameter(part.clone()) for part in parameter.chunk(heads)]
        self.torch = torch.optim.Muon(self.parts, weight_decay=decay, adjust_lr_fn="match_rms_adamw")

    def step(self, grad: torch.Tensor, lr: float) -> None:
        for part, of_part in zip(self.parts, grad.chunk(len(self.parts)), strict=True):
            part.grad = of_part.clone()
        self.torch.param_groups[0]["lr"] = lr
        self.torch.step()

    @property
    def parameter(self) -> torch.Tensor:
        return torch.cat([part.detach() for part in self.parts])


def truth(optimizer: str) -> dict[str, Any]:
    """The same steps on whole tensors, by parameter; `states`: before them and after each, in float64."""
    config = config_of(Layout("one"), OPTIMIZERS[optimizer])
    steppers: dict[str, Any] = {}
    for name, parameter in LCL(config.model, seed=5).layers.named_parameters():
        own, start = called(name, config.model), parameter.detach().clone()
        decay = DECAY if start.dim() >= 2 else 0.0
        matrix = start.dim() == 2 and (".blocks." in own or own in {f"pool.{x}.weight" for x in ("q", "k", "v", "out")})
        if optimizer == "stable_adamw":
            stepper: Any = Stable(start, decay)
        elif optimizer == "parts":
            lr, of_decay = rates(own)
            stepper = Adam(start, decay * of_decay, lr)
        elif not matrix:
            stepper = Adam(start, decay)
        elif optimizer == "muon":
            stepper = Muon(start, decay)
        else:
            stepper = MuonByHeads(start, decay, 4 if own.split(".")[-2] in ("q", "k", "v") else 1)
        stepper.states = [start.double()]
        for step in range(STEPS):
            stepper.step(gradient(name, start.shape, step), LR * (1 + step))
            stepper.states.append(stepper.parameter.detach().double().clone())
        steppers[name] = stepper
    return steppers


def rates(own: str) -> tuple[float, float]:
    """Multiples of learning rate and decay in `parts`, written out: one vision block, two language blocks."""
    by_depth = {
        "vision.patches": 0.5**2,
        "vision.blocks": 0.5,
        "language.embedding": 0.7**3,
        "language.positions": 0.7**3,
        "language.blocks.0": 0.7**2,
        "language.blocks.1": 0.7,
    }
    lr = next((value for prefix, value in by_depth.items() if own.startswith(prefix)), 1.0)
    return lr * (0.1 if own.startswith("vision.") else 1.0), 0.0 if own.startswith("head.") else 1.0


@pytest.fixture(scope="module")
def stepped() -> dict[tuple[str, str], list[dict[str, np.ndarray]]]:
    cases = {(layout.name, name): (layout, OPTIMIZERS[name]) for layout in LAYOUTS for name in OPTIMIZERS}
    cases |= {(layout.name, "muon"): (layout, OPTIMIZERS["muon"]) for layout in MORE}
    return dict(zip(cases, run_processes(run_layouts, 2, list(cases.values()), timeout=400.0)[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_layout_steps_as_one_process(optimizer: str, stepped: Any) -> None:
    expected = truth(optimizer)
    if optimizer == "stable_adamw":
        assert sum(each.slowest > 1.01 for each in expected.values()) > len(expected) / 2, "updates are clipped"
    for layout in [*LAYOUTS, *MORE] if optimizer == "muon" else LAYOUTS:
        compare(stepped[layout.name, optimizer], expected, layout, optimizer)


@pytest.mark.slow
def test_four_processes() -> None:
    results = run_processes(run_layouts, 4, [(layout, OPTIMIZERS[name]) for layout, name in OF_FOUR], timeout=400.0)[0]
    expected = {name: truth(name) for _, name in OF_FOUR}
    for (layout, name), ours in zip(OF_FOUR, results, strict=True):
        compare(ours, expected[name], layout, name)


RECORDED: dict[tuple[int, int], list[list[float]]] = {
    (4, 6): [
        [-0.03982897, 0.02092877, -0.02046885, 0.05436823, 0.01207392, -0.03577703],
        [0.04203251, -0.00284781, -0.03337524, 0.02546940, -0.01877320, -0.05244213],
        [0.02210245, -0.00786071, 0.05227818, 0.00778137, -0.02785052, 0.03978498],
        [-0.00770002, -0.03717806, 0.02338734, -0.00442610, -0.05385491, 0.01209317],
    ],
    (6, 4): [
        [-0.03807985, 0.02102082, -0.01828365, 0.05189699],
        [0.01157385, -0.03403411, 0.04356164, -0.00765242],
        [-0.03431303, 0.02690436, -0.01808486, -0.05356782],
        [0.02126127, -0.01025959, 0.05178197, 0.00891611],
        [-0.02682515, 0.03828020, -0.00889612, -0.03602397],
        [0.02455297, -0.00669792, -0.05270493, 0.01343507],
    ],
}
"""by shape: after the steps of `test_muon_steps_as_emerging_optimizers_does`, made by its version 0.3.0 (torch 2.11 on
a CPU) with the arguments that are in `test_the_formula_is_that_of_emerging_optimizers`"""


@pytest.mark.parametrize("shape", RECORDED)
def test_muon_steps_as_emerging_optimizers_does(shape: tuple[int, int]) -> None:
    """NVIDIA's package, of which numbers are kept, because it needs Python 3.12."""
    order = torch.arange(24.0)
    start = 0.01 * (7 * order % 11 - 5)
    flat = torch.nn.Parameter(start.clone())
    optimizer = on_one_process(flat, shape, "muon", Optimizer(name="muon", muon=MuonSettings(dtype="float32")))
    for step in range(3):
        flat.grad = (5 + 2 * step) * order % 13 - 6
        optimizer.step()
    theirs = torch.tensor(RECORDED[shape]).flatten()
    assert float((flat.detach() - theirs).norm()) < 1e-5 * float((theirs - start).norm())


@pytest.mark.parametrize("sizes", [(1e-4, 1e-3, 1e-5), (1e-9, 1e-9, 1e-9, 2e-6)])
def test_updates_are_clipped_for_small_gradients(sizes: tuple[float, ...]) -> None:
    """Sizes of training's own gradients, and such that the root of the second moment is below epsilon."""
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(24, generator=generator)
    stable, flat = Stable(start, DECAY), torch.nn.Parameter(start.clone())
    optimizer = on_one_process(flat, (4, 6), "stable_adamw", Optimizer(name="stable_adamw"))
    rounding = 2**-24 * float(start.norm())  # of the weights, in each step
    for step, size in enumerate(sizes, 1):
        flat.grad = size * torch.randn(24, generator=generator)
        stable.step(flat.grad, LR)
        optimizer.step()
        moved = float((stable.parameter - start).norm())
        assert float((flat.detach() - stable.parameter).norm()) < 1e-5 * moved + step * rounding
    assert stable.slowest > 1.01, "an update is clipped"


def on_one_process(flat: torch.nn.Parameter, shape: tuple[int, int], algorithm: Any, settings: Optimizer) -> Tensorwise:
    """The optimizer of one matrix, as DeepSpeed's only partition."""
    piece = Piece("0.matrix", 0, flat.numel(), 0)
    rules = {piece.name: Rule(Tensor(torch.Size(shape), None), algorithm)}
    optimizer = Tensorwise([{"params": [flat], "lr": LR, "weight_decay": DECAY}], settings, rules)
    optimizer.attach([Partition(flat, [piece], [[piece]])], Mesh(ALONE, ALONE))
    return optimizer


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_the_formula_is_that_of_emerging_optimizers(shape: tuple[int, int]) -> None:
    """NVIDIA's package, which Megatron-LM uses; it needs Python 3.12."""
    theirs = pytest.importorskip("emerging_optimizers.orthogonalized_optimizers", exc_type=ImportError)
    generator = torch.Generator().manual_seed(0)
    start = 0.02 * torch.randn(shape, generator=generator)
    formula, parameter = Muon(start, DECAY), torch.nn.Parameter(start.clone())
    optimizer = theirs.Muon(
        [parameter], lr=LR, momentum=0.95, weight_decay=DECAY, nesterov=True, fp32_matmul_prec="highest",
        coefficient_type="simple", scale_mode="spectral", extra_scale_factor=0.2,
    )  # fmt: skip
    for _ in range(3):
        parameter.grad = torch.randn(shape, generator=generator)
        formula.step(parameter.grad, LR)
        optimizer.step()
        moved = float((parameter.detach() - start).norm())
        assert float((parameter.detach() - formula.parameter).norm()) < 1e-5 * moved


def compare(ours: list[dict[str, np.ndarray]], expected: dict[str, Any], layout: Layout, optimizer: str) -> None:
    """Parameters after the last step; in float32 also what each step adds, but for the rounding of the sum."""
    # half precision: of the weights that a run begins with; of the products, which are summed in another order
    half = "bfloat16" in (layout.dtype, *optimizer.split())
    bound = 4e-3 if half else 1e-5
    for state in ours:
        assert state.keys() == expected.keys()
    for name, stepper in expected.items():
        states = [torch.from_numpy(state[name]).double() for state in ours]
        size = float(stepper.states[-1].norm())
        error = float((states[-1] - stepper.states[-1]).norm()) / max(size, 1e-2)
        assert error < bound, f"{name} at {layout}, {optimizer}: {error:.1e}"
        for step in range(0 if half else STEPS):
            update, true = (each[step + 1] - each[step] for each in (states, stepper.states))
            rounding = 4 * float(stepper.states[step].norm()) * 2**-24
            error = (float((update - true).norm()) - rounding) / float(true.norm())
            assert error < 1e-5, f"update {step} of {name} at {layout}, {optimizer}: {error:.1e}"


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_newton_schulz_is_torchs(shape: tuple[int, int]) -> None:
    """In bfloat16, number for number; in float64 it brings singular values near 1 and keeps their vectors."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = matrix.clone()
    torch.optim.Muon([parameter], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    theirs = -parameter.detach() / (0.2 * math.sqrt(max(shape)))
    torch.testing.assert_close(newton_schulz(matrix.bfloat16(), 5).float(), theirs, rtol=1e-5, atol=1e-6)
    u, values, vh = torch.linalg.svd(newton_schulz(matrix.double(), 5), full_matrices=False)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    before_u, _, before_vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    torch.testing.assert_close(u @ u.T @ before_u, before_u)
    torch.testing.assert_close(vh.T @ vh @ before_vh.T, before_vh.T)


@pytest.mark.parametrize("rank", [1, 8, 24])
def test_the_root_mean_square_of_an_update_is_by_the_gradient_s_rank(rank: int) -> None:
    """0.2 √(rank / min(d_out, d_in)) with singular values of 1; the iterations leave them between 0.68 and 1.21."""
    draw = torch.Generator().manual_seed(0)
    gradient = torch.randn(40, rank, generator=draw) @ torch.randn(rank, 24, generator=draw)
    update = 0.2 * math.sqrt(40) * newton_schulz(gradient, 5)
    assert 0.65 < float(update.square().mean().sqrt()) / (0.2 * math.sqrt(rank / 24)) < 1.22


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_does_not_depend_on_the_gradient_s_size(dtype: torch.dtype) -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for factor in (2.0**-24, 2.0**24):  # a power of two: nothing is rounded otherwise
        assert torch.equal(newton_schulz(factor * matrix, 5), newton_schulz(matrix, 5))
    assert not newton_schulz(torch.zeros_like(matrix), 5).any()
