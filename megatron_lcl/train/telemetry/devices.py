"""Dense peaks of devices, from their makers' data sheets, by the names that drivers give.

Operations per second of matrix products without sparsity, with float32 accumulation. Where a sheet gives the sparse
number only, half of it is meant. float32 is that of the ordinary units: torch does not use TF32 unless it is told to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Of one device, in operations per second."""

    half: float
    """bfloat16 and float16"""
    single: float
    """float32"""
    source: str

    def of(self, dtype: str) -> float:
        """Of the type in which a run computes."""
        return self.single if dtype == "float32" else self.half


PEAKS = {
    # the first whose words are all in the device's name counts; a make that `plan` has no data of has a row of its own
    ("A100", "PCIe"): Peak(312e12, 19.5e12, "NVIDIA A100 Tensor Core GPU data sheet, 2021: A100 40GB and 80GB PCIe"),
    ("A100", "40GB"): Peak(312e12, 19.5e12, "NVIDIA A100 Tensor Core GPU data sheet, 2021: A100 40GB SXM"),
    ("A100",): Peak(312e12, 19.5e12, "NVIDIA A100 Tensor Core GPU data sheet, 2021: A100 80GB SXM"),
    ("H100", "PCIe"): Peak(756e12, 51e12, "NVIDIA H100 Tensor Core GPU data sheet, 2023: H100 PCIe"),
    ("H100", "NVL"): Peak(835.5e12, 60e12, "NVIDIA H100 Tensor Core GPU data sheet, 2024: H100 NVL"),
    ("H100",): Peak(989.5e12, 67e12, "NVIDIA H100 Tensor Core GPU data sheet, 2024: H100 SXM"),
    ("H200", "NVL"): Peak(835.5e12, 60e12, "NVIDIA H200 Tensor Core GPU data sheet, 2024: H200 NVL"),
    ("H200",): Peak(989.5e12, 67e12, "NVIDIA H200 Tensor Core GPU data sheet, 2024: H200 SXM"),
    ("B200",): Peak(2250e12, 75e12, "NVIDIA HGX B200 data sheet, 2025: an eighth of the board's"),
    ("L40S",): Peak(362e12, 91.6e12, "NVIDIA L40S data sheet, 2023"),
    ("RTX", "A6000"): Peak(154.8e12, 38.7e12, "NVIDIA Ampere GA102 whitepaper, 2.0, 2021, appendix C"),
    ("RTX", "4090"): Peak(165.2e12, 82.6e12, "NVIDIA Ada GPU architecture whitepaper, 2.01, 2023, appendix A"),
    ("RTX", "3090"): Peak(71e12, 35.6e12, "NVIDIA Ampere GA102 whitepaper, 2.0, 2021, appendix A"),
    ("MI300X",): Peak(1307.4e12, 163.4e12, "AMD Instinct MI300X accelerator data sheet, 2023"),
}
_OTHERS = {"mig", "laptop", "ti", "d"}
"""words that make a name another device's: of a part of one, or of a make of other speed ("4090 D", "3090 Ti")"""


def find_peak(device: str) -> Peak | None:
    """The dense peaks of a device by its name (`torch.cuda.get_device_name()`); None for one that is not known, and for
    a part (MIG) or another make of one."""
    named = {word.lower() for word in re.findall(r"\w+", device)}
    if named & _OTHERS:
        return None
    return next((peak for words, peak in PEAKS.items() if named.issuperset(word.lower() for word in words)), None)


def peak_of(device: str, dtype: str) -> float | None:
    """The same in one type."""
    peak = find_peak(device)
    return peak.of(dtype) if peak else None


def hardware(nodes: Sequence[str]) -> dict[str, str | int]:
    """On what a run computes, for the metrics: this process's device by its driver's name, or `cpu`; how many
    processes and nodes. nodes: of each process."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "processes": len(nodes), "nodes": len(set(nodes))}


def own_peak(dtype: str) -> float | None:
    """Of this process's device; None on a CPU."""
    return peak_of(torch.cuda.get_device_name(), dtype) if torch.cuda.is_available() else None
