"""`train.deterministic`: the same bits from the same numbers, on the same machines and software.

On CPU a run is so without it, at the same number of threads. On CUDA some kernels add in an order that changes from run
to run. Ours do not (no atomics in the Triton kernels); those of torch have another way that does not, which
torch.use_deterministic_algorithms selects (embedding and indexing backward, its attention kernels), or raise; cuBLAS
needs a fixed workspace; flash-attn is asked for its deterministic backward (attention.py); NCCL adds in a fixed order
with the ring algorithm (Megatron-Core's deterministic mode sets the same).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from megatron_lcl.config import Config
from megatron_lcl.errors import UserError

ACCEPTED = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "CollnetDirect", "CollnetChain", "^NVLS"),
}
"""values that keep the promise, by variable; the first is set where there is none"""


def check_determinism(config: Config) -> None:
    """UserError where a variable of the environment forbids what `train.deterministic` asks for."""
    if not config.train.deterministic:
        return
    for name, accepted in ACCEPTED.items():
        if (value := os.environ.get(name)) is not None and value not in accepted:
            raise UserError(
                f"train.deterministic is set, but {name} = {value}; unset it, or set it to {' or '.join(accepted)}"
            )


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """While it is open, and only then, what `train.deterministic` promises; entered before anything touches CUDA.

    Operations of torch that have no deterministic form raise RuntimeError. The variables of the environment stay set,
    for libraries that have read them keep to them.
    """
    if not wanted:
        yield
        return
    before = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
    for name, accepted in ACCEPTED.items():
        os.environ.setdefault(name, accepted[0])
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
