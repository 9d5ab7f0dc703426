"""A stand-in for NVIDIA's apex.optimizers, whose kernels need a GPU: it stores its state as apex's fused_adam.py does.

The count of steps is one whole number of the parameter group; a parameter's state has the two moments and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch


class FusedAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        print("FusedAdam.step")
        for group in self.param_groups:
            if len(group["params"]) == 0:
                continue
            beta1, beta2 = group["betas"]
            if "step" in group:
                group["step"] += 1
            else:
                group["step"] = 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p.data).float()
                    state["exp_avg_sq"] = torch.zeros_like(p.data).float()
                mean = state["exp_avg"].lerp_(p.grad.float(), 1 - beta1)
                square = state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad.float(), p.grad.float(), value=1 - beta2)
                denominator = (square / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, denominator, value=-group["lr"] / (1 - beta1 ** group["step"]))
