"""Numbers of the host on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def from_host(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the numbers on the device.

    For `torch.tensor(numbers, device=device)` the host waits until the device has done all that it was given before;
    a copy from page-locked memory takes its turn.
    """
    tensor = torch.tensor(numbers, dtype=dtype, device="cpu")  # whatever torch's default device is
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
