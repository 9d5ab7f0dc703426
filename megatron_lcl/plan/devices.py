"""What devices can do by their makers' data sheets, and how much of it a run is assumed to get.

None of the GPUs has been measured here. The assumed shares are round and the same for all devices: they serve to rank
layouts, and how far off a run's time is, nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_lcl.errors import UserError
from megatron_lcl.train.telemetry.devices import PEAKS, Peak, find_peak

MATMUL, ATTENTION, MEMORY, NETWORK = 0.65, 0.35, 0.75, 0.75
"""assumed shares: of peak in large matrix products; of peak in attention, forward and backward, masked pairs not
counted; of the memory's and of the network's bandwidth"""
KERNEL, COLLECTIVE = 6e-6, 15e-6
"""assumed seconds: of the host to start a kernel; that a collective takes beside its bytes"""


@dataclass(frozen=True)
class Device:
    """A GPU as published: dense numbers, without sparsity."""

    label: str
    peak: Peak
    """of matrix products: the same as a run's MFU is taken of"""
    memory: float
    """bytes"""
    bandwidth: float
    """bytes/s of its memory"""
    intra: float
    """bytes/s that it sends to GPUs of its node, one direction"""
    inter: float
    """bytes/s of its own network adapter, one direction"""


PCIE, ETHERNET = 32e9, 1.25e9
"""bytes/s in one direction, for cards without NVLink: of PCIe 4.0 x16, 64 GB/s both ways by the L40S data sheet; of a
10 Gb/s network, which is assumed, as no data sheet of a card names an adapter"""
DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100 data
    # sheet: an adapter of 400 Gb/s for each GPU
    "h100": Device("NVIDIA H100 SXM, 80 GB", PEAKS["H100",], 80e9, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 data sheet, SXM: as H100, 141 GB, 4.8 TB/s; DGX H200: 400 Gb/s for each GPU
    "h200": Device("NVIDIA H200 SXM, 141 GB", PEAKS["H200",], 141e9, 4.8e12, 450e9, 50e9),
    # NVIDIA HGX B200 data sheet, of 8 GPUs: 1.44 TB; DGX B200: 64 TB/s, NVLink 14.4 TB/s both ways, 400 Gb/s
    # for each GPU
    "b200": Device("NVIDIA B200 SXM, 180 GB", PEAKS["B200",], 180e9, 8e12, 900e9, 50e9),
    # NVIDIA A100 80GB data sheet, SXM: 80 GB, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100 data sheet: 200 Gb/s
    # for each GPU
    "a100": Device("NVIDIA A100 SXM, 80 GB", PEAKS["A100",], 80e9, 2.039e12, 300e9, 25e9),
    # the same data sheet's 2020 edition, SXM: 40 GB, 1,555 GB/s, NVLink and adapters as with 80 GB
    "a100-40gb": Device("NVIDIA A100 SXM, 40 GB", PEAKS["A100", "40GB"], 40e9, 1.555e12, 300e9, 25e9),
    # AMD Instinct MI300X data sheet: 192 GB, 5.3 TB/s; MI300X Platform data
    # sheet: 7 links of 128 GB/s both ways; adapters of 400 Gb/s, as systems with it have
    "mi300x": Device("AMD MI300X, 192 GB", PEAKS["MI300X",], 192e9, 5.3e12, 448e9, 50e9),
    # NVIDIA L40S data sheet: 48 GB, 864 GB/s, no NVLink
    "l40s": Device("NVIDIA L40S, 48 GB", PEAKS["L40S",], 48e9, 864e9, PCIE, ETHERNET),
    # the whitepapers of their peaks: 48 GB, 768 GB/s; 24 GB, 1,008 GB/s; 24 GB, 936 GB/s. The NVLink bridge of A6000
    # and 3090 joins two cards of a node: a group of more goes through PCIe
    "a6000": Device("NVIDIA RTX A6000, 48 GB", PEAKS["RTX", "A6000"], 48e9, 768e9, PCIE, ETHERNET),
    "rtx4090": Device("NVIDIA GeForce RTX 4090, 24 GB", PEAKS["RTX", "4090"], 24e9, 1.008e12, PCIE, ETHERNET),
    "rtx3090": Device("NVIDIA GeForce RTX 3090, 24 GB", PEAKS["RTX", "3090"], 24e9, 936e9, PCIE, ETHERNET),
}
NAMES = (*DEVICES, "cpu")


@dataclass(frozen=True)
class Rates:
    """What a process gets of its device: FLOP/s, bytes/s, seconds."""

    matmul: Mapping[str, float]
    """FLOP/s of matrix products of `vision`, `language` and `vocabulary`"""
    attention: Mapping[str, float]
    """of attention of `vision` and `language`: forward 1, backward 2, without the masked half of causal pairs"""
    elements: float
    """bytes/s of norms, GELU and sums of activations"""
    memory: float
    """bytes/s of what is too large for caches"""
    intra: float
    inter: float
    """bytes/s to processes of the node; of the process's own network adapter"""
    collective: float
    """seconds of a collective beside its bytes"""
    kernel: float
    """seconds of the host to start an operation"""
    waits: bool
    """the host computes itself: starting operations adds to their time, else they are started ahead; and nothing hides
    the network, whose bytes its cores move"""
    peak: float
    """FLOP/s that MFU is a share of"""
    assumed: tuple[str, ...] = ()
    """of rates that are not measured: what they are assumed to be"""


def check_name(name: str) -> str:
    """The name of a device in lower case. UserError for one that is not known, with all that are and their memory: the
    nearest name may be that of a device with twice the memory."""
    if name.lower() in NAMES:
        return name.lower()
    known = ", ".join(f"{key} ({device.memory / 1e9:.0f} GB)" for key, device in DEVICES.items())
    raise UserError(
        f"--gpu {name} is not known; known are {known}, and cpu. For another GPU name one that has at most its memory: "
        "what fits into that fits; times are those of the one that is named"
    )


def name_of(device: str) -> str | None:
    """The name here of a device that its driver calls so; None for one that is not here, as a slower make of one."""
    peak = find_peak(device)
    return next((name for name, known in DEVICES.items() if known.peak is peak), None)


def assumed_rates(device: Device, dtype: str) -> Rates:
    """What a process is assumed to get of a device that has not been measured."""
    peak = device.peak.of(dtype)
    matmul, attention = peak * MATMUL, peak * ATTENTION
    return Rates(
        matmul=dict.fromkeys(("vision", "language", "vocabulary"), matmul),
        attention=dict.fromkeys(("vision", "language"), attention),
        elements=device.bandwidth * MEMORY,
        memory=device.bandwidth * MEMORY,
        intra=device.intra * NETWORK,
        inter=device.inter * NETWORK,
        collective=COLLECTIVE,
        kernel=KERNEL,
        waits=False,
        peak=peak,
        assumed=(
            f"{MATMUL:.0%} of peak in matrix products, {ATTENTION:.0%} in attention,",
            f"{MEMORY:.0%} of the memory's and {NETWORK:.0%} of the network's bandwidth "
            f"({device.intra / 1e9:g} GB/s in a node, {device.inter / 1e9:g} between nodes),",
            f"{KERNEL * 1e6:.0f} µs to start a kernel, {COLLECTIVE * 1e6:.0f} µs a collective beside its bytes",
        ),
    )
