"""What a computation did: the operators it ran and the largest tensor it made."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.largest = 0
        """numbers in the largest tensor"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket._qualified_op_name] += 1
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return result

    @property
    def matrix_products(self) -> int:
        return sum(self.calls[f"aten::{name}"] for name in ("mm", "addmm", "addmm_"))

    @property
    def messages(self) -> Counter[str]:
        return Counter({name: count for name, count in self.calls.items() if name.startswith("c10d::")})
