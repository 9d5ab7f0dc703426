"""AdamW, StableAdamW and Muon, tensor by tensor, on DeepSpeed's flat partitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim.adamw import adamw

from megatron_lcl.config import Optimizer
from megatron_lcl.model.transfer import from_host
from megatron_lcl.parallel.mesh import ALONE, Mesh
from megatron_lcl.train.optimizers.muon import MatrixExchange, matrix_update
from megatron_lcl.train.optimizers.pieces import Partition, Piece, Tensor
from megatron_lcl.train.uncompiled import uncompiled

Algorithm = Literal["adamw", "stable_adamw", "muon"]


@dataclass(frozen=True)
class Rule:
    """How a tensor is stepped."""

    tensor: Tensor
    algorithm: Algorithm = "adamw"
    lr: float = 1.0
    """multiple of its group's learning rate"""
    weight_decay: float = 1.0
    """multiple of its group's weight decay"""
    heads: int = 1
    """Muon: equal parts of the rows that are orthogonalized each by itself"""


@uncompiled
class Tensorwise(torch.optim.Optimizer):
    """Steps each tensor by its rule, whatever data or tensor rank holds which part of it.

    DeepSpeed puts flat partitions in place of the parameters. `attach` says which tensors lie in them; until then they
    cannot be stepped. States are Adam's, as long as the partition: `step`, `exp_avg` (of Muon: its momentum) and
    `exp_avg_sq`; no process keeps more of them than of the parameters.
    """

    def __init__(self, groups: list[dict[str, Any]], config: Optimizer, rules: Mapping[str, Rule]) -> None:
        # `fused` says, as in torch's, that the count of steps lies on the parameters' device
        super().__init__(groups, {"lr": config.lr, "weight_decay": 0.0, "fused": True})
        self._config = config
        self._rules = rules
        self._pieces: dict[torch.Tensor, list[Piece]] = {}
        self._exchanges: dict[torch.Tensor, MatrixExchange] = {}
        self._stable: dict[torch.Tensor, list[str]] = {}
        self._axis, self._tensor_rank = ALONE, 0
        self.found_inf: torch.Tensor | None = None
        """a scalar on the parameters' device, 1 where the step is to change nothing; None: all steps are good"""

    def attach(self, partitions: Sequence[Partition], mesh: Mesh) -> None:
        """Say what lies in the partitions."""
        self._axis, self._tensor_rank = mesh.data_tensor, mesh.tensor.rank
        tensors = {name: rule.tensor for name, rule in self._rules.items()}
        for partition in partitions:
            flat = partition.flat
            self._pieces[flat] = partition.pieces
            muon = [[piece for piece in theirs if self._is(piece, "muon")] for theirs in partition.of_ranks]
            if any(muon):  # of the axis's processes the tensor ranks are next to each other
                holders = [(rank, theirs) for theirs in muon for rank in range(mesh.tensor.size)]
                self._exchanges[flat] = MatrixExchange(holders, tensors, self._axis)
            names = {p.name for theirs in partition.of_ranks for p in theirs if self._is(p, "stable_adamw")}
            self._stable[flat] = sorted(names)

    @property
    def exchanges(self) -> list[MatrixExchange]:
        """Of the partitions that hold a matrix of Muon's."""
        return list(self._exchanges.values())

    @property
    def sums(self) -> list[int]:
        """Of how many tensors a sum travels, by partition: those whose updates are clipped."""
        return [len(names) for names in self._stable.values()]

    def _is(self, piece: Piece, algorithm: Algorithm) -> bool:
        return self._rules[piece.name].algorithm == algorithm

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every partition that has a gradient."""
        assert closure is None, "DeepSpeed gives none"
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step(flat, group)

    def _step(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        pieces, state = self._pieces[flat], self.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        state["step"] += 1 if self.found_inf is None else 1 - self.found_inf
        clipped = [piece for piece in pieces if self._is(piece, "stable_adamw")]
        slower = self._clipping(flat, clipped) if self._stable[flat] else {}
        self._adamw(flat, group, [piece for piece in pieces if not self._is(piece, "muon")], slower)
        if flat in self._exchanges:
            self._muon(flat, group, [piece for piece in pieces if self._is(piece, "muon")])

    def _adamw(
        self, flat: torch.Tensor, group: Mapping[str, Any], pieces: Sequence[Piece], slower: Mapping[str, torch.Tensor]
    ) -> None:
        """Torch's fused AdamW, once for each pair of rates; neighbors of the same rates are one tensor to it.

        slower: by what the learning rates of some tensors are divided, scalars on the device; once for each of these.
        """
        runs: dict[tuple[float, float, str], list[tuple[int, int]]] = defaultdict(list)
        for piece in (piece for piece in pieces if piece.length):
            rule, end = self._rules[piece.name], piece.start + piece.length
            alone = piece.name if piece.name in slower else ""
            of_rates = runs[group["lr"] * rule.lr, group["weight_decay"] * rule.weight_decay, alone]
            if of_rates and of_rates[-1][1] == piece.start:
                of_rates[-1] = (of_rates[-1][0], end)
            else:
                of_rates.append((piece.start, end))
        assert flat.grad is not None
        state, (beta1, beta2) = self.state[flat], self._config.betas
        for (lr, weight_decay, alone), bounds in runs.items():
            weights, grads, first, second = (
                [x[start:end] for start, end in bounds]
                for x in (flat.detach(), flat.grad, state["exp_avg"], state["exp_avg_sq"])
            )
            adamw(
                weights,
                grads,
                first,
                second,
                [],
                [state["step"] - 1 for _ in bounds],  # torch counts them up
                found_inf=self.found_inf,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=beta1,
                beta2=beta2,
                eps=self._config.eps,
                lr=lr / slower[alone] if alone else lr,
                weight_decay=weight_decay,
            )

    def _clipping(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> dict[str, torch.Tensor]:
        """StableAdamW's update clipping (arXiv 2304.13013, algorithm 2): max(1, RMS_t) of each tensor.

            eta_t = lr / max(1, RMS_t),  RMS_t = sqrt(mean(g_t² / max(u_t, eps²)))

        The mean is over the whole tensor: each process adds up what it holds, and the sums travel together. u is Adam's
        second moment with its bias corrected, which the paper's betas that change with t do too.
        """
        assert flat.grad is not None
        beta2, eps, names = self._config.betas[1], self._config.eps, self._stable[flat]
        unbiased = 1 - beta2 ** self.state[flat]["step"]
        sums = torch.zeros(len(names), device=flat.device)
        for piece in pieces:
            # what every tensor rank holds is counted once
            if self._tensor_rank == 0 or self._rules[piece.name].tensor.partition_dim is not None:
                square = piece.of(flat.grad).square()
                second = piece.of(self.state[flat]["exp_avg_sq"]).lerp(square, 1 - beta2)
                sums[names.index(piece.name)] = (square / second.div_(unbiased).clamp_(min=eps**2)).sum()
        self._axis.all_reduce(sums)
        sizes = from_host([self._rules[name].tensor.shape.numel() for name in names], flat.device)
        return dict(zip(names, (sums / sizes).sqrt().clamp(min=1), strict=True))

    def _muon(self, flat: torch.Tensor, group: Mapping[str, Any], pieces: Sequence[Piece]) -> None:
        """Muon (Jordan et al. 2024) with AdamW's learning rate and decay (arXiv 2502.16982, eq. 4).

            B_t = mu B_(t-1) + (1 - mu) G_t
            W_t = W_(t-1) - lr (0.2 sqrt(max(d_out, d_in)) NewtonSchulz(G_t (1 - mu) + B_t mu) + decay W_(t-1))

        which gives updates an RMS of about 0.2, AdamW's; of a gradient of rank r, 0.2 sqrt(r / min(d_out, d_in)).

        Momentum is kept in pieces; only the matrix to be orthogonalized comes together, at one process.
        """
        assert flat.grad is not None
        settings, momentum = self._config.muon, self.state[flat]["exp_avg"]
        blended = []
        for piece in pieces:
            grad, buffer = piece.of(flat.grad), piece.of(momentum)
            self._put(buffer, buffer.lerp(grad, 1 - settings.momentum))
            blended.append(grad.lerp(buffer, settings.momentum))
        dtype = getattr(torch, settings.dtype)

        def update(name: str, matrix: torch.Tensor) -> torch.Tensor:
            return matrix_update(matrix, settings.newton_schulz_steps, self._rules[name].heads)

        results = self._exchanges[flat].through(blended, dtype, flat.device, update)
        for piece, orthogonal in zip(pieces, results, strict=True):
            rule = self._rules[piece.name]
            lr, weight_decay = group["lr"] * rule.lr, group["weight_decay"] * rule.weight_decay
            rows, columns = rule.tensor.shape
            scale = 0.2 * max(rows // rule.heads, columns) ** 0.5
            weights = piece.of(flat.detach())
            self._put(weights, (weights * (1 - lr * weight_decay)).add_(orthogonal, alpha=-lr * scale))

    def _put(self, values: torch.Tensor, new: torch.Tensor) -> None:
        """New values in place of those before, in a step that is to change something."""
        values.copy_(new if self.found_inf is None else torch.where(self.found_inf > 0, values, new))
