"""Every attention back-end and loss kernel that can run here against the plain formula in float64, on the device.

The layouts' cases in float32 do not reach them: on CUDA flash-attn, torch's variable-length kernel and half-precision
products run in training only. On CPU the Triton kernels run under Triton's interpreter, where triton is installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F

from megatron_lcl.attention import NAMES, choose_attention, find_fault, full_attention
from megatron_lcl.losses import contrastive_tiles, softmax_torch
from megatron_lcl.losses.contrastive import contrastive_loss
from megatron_lcl.losses.generation import generation_loss
from megatron_lcl.losses.kernels import import_fault, triton_fault
from megatron_lcl.losses.sigmoid import sigmoid_loss

# Relative, of the norm of what a kernel gives, forward and gradients. Measured on CPU: in float32 at most 3e-7 and
# 4e-7. Attention in bfloat16 rounds its result and its gradients (by 2⁻⁹ at most): 2.1e-3 and 3.4e-3; flash kernels
# round the probabilities between their two products as well, so about five times that is allowed, and float16 rounds an
# eighth of it. Losses compute in float32 from the rounded features: 1.4e-7 forward; gradients are rounded: 3.2e-3 in
# bfloat16 (weights and result), 2.1e-4 in float16, for which devices multiply as TF32 (2⁻¹¹). A single row of the 473
# that is wrong is off by 5e-2, a wrong mask or scale by 1e-1 and more.
ATTENTION = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2), torch.float16: (2e-3, 4e-3)}
LOSSES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-5, 1e-2), torch.float16: (1e-5, 2e-3)}

LENGTHS = (1, 37, 0, 130, 5, 0, 300)
"""of the sequences: one token, empty ones, longer than a kernel's block"""


@dataclass(frozen=True)
class Kernel:
    """A kernel's largest relative differences, or why there are none."""

    name: str
    forward: float = math.nan
    gradient: float = math.nan
    bounds: tuple[float, float] = (math.inf, math.inf)
    absent: str = ""
    error: str = ""
    """what it has raised"""

    @property
    def fault(self) -> str:
        """Empty where it computes what the formula says, or is absent."""
        if self.absent or (self.forward <= self.bounds[0] and self.gradient <= self.bounds[1]):
            return ""
        off = f"off by {self.forward:.1e} and {self.gradient:.1e} (gradients)"
        return f"{self.name}: {self.error or off}"

    def row(self) -> str:
        """One line of the table."""
        if self.absent or self.error:
            return f"{self.name:<64}  {'':20}  " + (
                f"not here: {self.absent}" if self.absent else f"WRONG: {self.error}"
            )
        numbers = f"{self.forward:9.1e}  {self.gradient:9.1e}"
        return f"{self.name:<64}  {numbers}  {'WRONG' if self.fault else 'equal'}"


LEGEND = "Every kernel against its formula: the largest relative difference of what it gives, and of its gradients.\n"
HEADER = f"{'kernel':<64}  {'forward':>9}  {'gradients':>9}"


@dataclass(frozen=True)
class KernelCase:
    """The comparison as a case of the selftest; `processes`: of which each has a device, or a machine, of its own."""

    processes: int = 1

    name: str = "kernels"

    def run(self, rank: int, prepare: Callable[[int], None] | None = None) -> list[Kernel]:
        """In one process: all kernels on its device. On any but the first a wrong one is a RuntimeError."""
        if prepare is not None:
            prepare(rank)
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
            torch.cuda.set_device(device)
        kernels = compare_kernels(device)
        if rank and (faults := [kernel.fault for kernel in kernels if kernel.fault]):
            raise RuntimeError("; ".join(faults))
        return kernels


def compare_kernels(device: torch.device) -> list[Kernel]:
    """All of them on one device."""
    torch.set_float32_matmul_precision("highest")
    return [*_attention(device), *_losses(device)]


# --- attention ---------------------------------------------------------------------------------------------------


def _attention(device: torch.device) -> Iterator[Kernel]:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if device.type == "cuda" else [])]
    for name in NAMES:
        if fault := find_fault(name, device, torch.bfloat16, capability):
            yield Kernel(f"attention {name}", absent=fault)
            continue
        for dtype in dtypes:
            if find_fault(name, device, dtype, capability):  # has no float32
                continue
            for deterministic in (False, True) if name in ("flash_attn_3", "flash_attn") else (False,):
                attend = choose_attention(device, dtype, name, deterministic=deterministic).attend
                packed = _Packed(device, dtype)
                title = f"attention {name}{' deterministic' * deterministic}, {_name(dtype)}"
                yield _compare(title, packed.inputs, packed.on(attend), packed.plain, ATTENTION[dtype])
    for dtype in dtypes:
        qkv = _draw(device, dtype, *[(3, 2, 50, 64)] * 3)
        yield _compare(f"attention of images, {_name(dtype)}", qkv, full_attention, _softmax_product, ATTENTION[dtype])


class _Packed:
    """Sequences one after another, with heads of 64 features."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        ends = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
        self.bounds = torch.tensor([*ends, ends[-1]], dtype=torch.int32, device=device)  # its end repeated, as padding
        self.inputs = _draw(device, dtype, *[(ends[-1], 2, 64)] * 3)

    def on(self, attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda q, k, v: attend(q, k, v, self.bounds, max(LENGTHS))

    def plain(self, *qkv: torch.Tensor) -> torch.Tensor:
        sequences = zip(*(x.split(list(LENGTHS)) for x in qkv), strict=True)
        parts = [[x.transpose(0, 1) for x in sequence] for sequence in sequences]
        return torch.cat([_softmax_product(q, k, v, causal=True).transpose(0, 1) for q, k, v in parts])


def _softmax_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """softmax(q·k/√K) v, as it is written."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -math.inf)
    return logits.softmax(-1) @ v


# --- losses ------------------------------------------------------------------------------------------------------


def _losses(device: torch.device) -> Iterator[Kernel]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    yield from _both_losses("torch", device, dtypes, contrastive_tiles, softmax_torch)
    for dtype in dtypes:
        inputs = [*_pairs(device, dtype), torch.tensor([-5.0], device=device)]
        yield _compare(f"sigmoid loss torch, {_name(dtype)}", inputs, _sigmoid, _all_pairs, LOSSES[dtype])
    interpreted = device.type == "cpu"
    fault = triton_fault() if not interpreted else import_fault()
    if interpreted and not fault and os.environ.get("TRITON_INTERPRET") != "1":
        fault = "without TRITON_INTERPRET=1 there is no interpreter"
    if fault:
        yield Kernel("losses triton", absent=fault)
        return
    from megatron_lcl.losses import contrastive_triton, softmax_triton

    title = "triton, interpreted" if interpreted else "triton"
    yield from _both_losses(title, device, dtypes, contrastive_triton, softmax_triton)


def _both_losses(
    title: str, device: torch.device, dtypes: Sequence[torch.dtype], contrast: ModuleType, softmax: ModuleType
) -> Iterator[Kernel]:
    for dtype in dtypes:

        def contrastive(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
            return contrastive_loss(image, text, log_scale, kernels=contrast).loss

        yield _compare(
            f"contrastive loss {title}, {_name(dtype)}", _pairs(device, dtype), contrastive, _info_nce, LOSSES[dtype]
        )
        # more than a block of the vocabulary, padding at its end
        hidden, weight = _draw(device, dtype, (20, 24), (5000, 24))
        targets = torch.arange(20, device=device) * 249

        def generation(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor = targets) -> torch.Tensor:
            return generation_loss(hidden, weight, targets, vocab_size=4990, kernels=softmax)

        def entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor = targets) -> torch.Tensor:
            return F.cross_entropy(hidden @ weight[:4990].t(), targets, reduction="sum")

        yield _compare(f"generation loss {title}, {_name(dtype)}", [hidden, weight], generation, entropy, LOSSES[dtype])


def _pairs(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Features of images and of texts, of unit norm, and a log scale."""
    features = (F.normalize(x, dim=1).to(dtype) for x in _draw(device, torch.float32, *[(70, 40)] * 2))
    return [*features, torch.tensor([2.6], device=device)]


def _sigmoid(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return sigmoid_loss(image, text, log_scale, bias).loss


def _all_pairs(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The sigmoid loss as SigLIP's paper writes it."""
    signs = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    return -F.logsigmoid(signs * (log_scale.exp() * image @ text.t() + bias)).sum() / len(image)


def _info_nce(image: torch.Tensor, text: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    logits = log_scale.exp() * image @ text.t()
    pairs = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.t(), pairs)) / 2


# --- comparing ---------------------------------------------------------------------------------------------------


def _draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare(
    name: str,
    inputs: Sequence[torch.Tensor],
    kernel: Callable[..., torch.Tensor],
    formula: Callable[..., torch.Tensor],
    bounds: tuple[float, float],
) -> Kernel:
    """A kernel and the formula in float64 on the same numbers, and their gradients for the same random weights."""
    try:
        off = _differences(inputs, kernel, formula)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or somebody's kernel raises; others follow
        return Kernel(name, error=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    return Kernel(name, off[0], max(off[1:]), bounds)


def _differences(
    inputs: Sequence[torch.Tensor], kernel: Callable[..., torch.Tensor], formula: Callable[..., torch.Tensor]
) -> list[float]:
    """Of the result, then of the gradient of each input."""
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, truth = kernel(*ours), formula(*exact)
    (weights,) = _draw(out.device, out.dtype, tuple(out.shape))
    weights = weights if out.dim() else torch.ones_like(out)
    gradients = torch.autograd.grad(out, ours, weights)
    true_gradients = torch.autograd.grad(truth, exact, weights.double())
    return [_distance(a, b) for a, b in zip((out, *gradients), (truth, *true_gradients), strict=True)]


def _distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    distance = float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm())
    return distance if math.isfinite(distance) else math.inf
