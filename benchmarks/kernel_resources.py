"""What the Triton kernels take of a CUDA device, without one: each variant compiled for a compute capability.

    python benchmarks/kernel_resources.py [80 90 100]

Prints for each kernel: registers of a thread, warps, shared memory of a block, bytes that a thread spills to local
memory (stack frame of the machine code), whether it multiplies on tensor cores, and the blocks that a multiprocessor
can hold at once, by registers and shared memory (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"). Exit code 1 where a kernel does not fit.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from arguments import one_of
from claims import exit_with
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lcl.losses import contrastive_triton, softmax_triton

SHARED = {80: (163, 164), 90: (227, 228), 100: (227, 228)}
"""KiB of shared memory that a block may have, and that a multiprocessor has, by compute capability"""
REGISTERS, REGISTERS_OF_A_THREAD, WARPS = 65536, 255, 64
"""of a multiprocessor, of a thread at most, of a multiprocessor at most; the same for all three"""
_TENSOR_CORES = re.compile(r"mma|tcgen05")


@dataclass(frozen=True)
class Resources:
    name: str
    registers: int
    """32-bit, of a thread"""
    warps: int
    shared: int
    """bytes of a block"""
    spilled: int
    """bytes of local memory of a thread"""
    tensor_cores: bool

    def blocks(self, capability: int) -> int:
        """That a multiprocessor holds at once; 0: the kernel does not start."""
        of_block, of_all = (1024 * size for size in SHARED[capability])
        if self.shared > of_block or self.registers > REGISTERS_OF_A_THREAD:
            return 0
        registers = -(-self.registers // 8) * 8 * 32 * self.warps  # given out to warps in units of 256
        return min(REGISTERS // registers, of_all // (self.shared + 1024), WARPS // self.warps)  # 1 KiB is reserved


def resources(capability: int) -> Iterator[Resources]:
    """Of every variant of every kernel, compiled for the compute capability (major times 10 plus minor)."""
    for name, kernel, pointers, constants, warps, stages in _variants():
        signature: dict[str, str] = {}
        attributes: dict[tuple[int], Any] = {}
        for place, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                continue
            signature[argument] = pointers.get(argument, "i32")
            if argument in pointers or argument == "D" or argument.endswith("stride"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
        registers, spilled = _usage(compiled.asm["cubin"])
        # a block that is specialized by warp has more of them than were asked for
        launched = compiled.metadata.num_warps
        tensor_cores = bool(_TENSOR_CORES.search(compiled.asm["ptx"]))
        yield Resources(name, registers, launched, compiled.metadata.shared, spilled, tensor_cores)


def _variants() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int, int]]:
    """Name, kernel, types of its pointers, constants, warps, stages."""
    for dtype, short in ((tl.float32, "fp32"), (tl.bfloat16, "bf16"), (tl.float16, "fp16")):
        tiles = contrastive_triton.SINGLE_TILES if dtype == tl.float32 else contrastive_triton.HALF_TILES
        weight_dtype = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
        pointers = dict.fromkeys(("image_n", "text_n", "image_N", "text_N"), f"*{short}")
        pointers |= dict.fromkeys(("scale_ptr", "positive_ptr", "lse_ptr", "hardest_ptr"), "*fp32")
        pointers |= dict.fromkeys(("image_lse", "text_lse", "shortfall_ptr", "grad_ptr"), "*fp32")
        for tile in tiles:
            constants = {
                "ROWS": tile.rows, "COLUMNS": tile.columns, "WIDTH": tile.width, "DTYPE": dtype, "PRECISION": "tf32x3",
            }  # fmt: skip
            gradient = {
                "WEIGHT_DTYPE": weight_dtype,
                "GRAD_DTYPE": weight_dtype,
                "GRAD_PRECISION": "tf32" if dtype == tl.float16 else "tf32x3",
            }
            for way, kernel, given in (
                ("forward", contrastive_triton._forward_kernel, constants),
                ("backward", contrastive_triton._backward_kernel, constants | gradient),
            ):
                yield f"contrastive {way} {short} {tile.rows}", kernel, pointers, given, tile.num_warps, tile.num_stages
    block = {"BLOCK": softmax_triton.BLOCK}
    pointers = {"logits": "*fp32", "targets": "*i64", "statistics": "*fp32", "all_max": "*fp32", "all_sum": "*fp32"}
    yield "softmax statistics", softmax_triton._statistics_kernel, pointers, block, 8, 3
    for short in ("fp32", "bf16", "fp16"):
        yield f"softmax error {short}", softmax_triton._error_kernel, pointers | {"error": f"*{short}"}, block, 8, 3


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the machine code says."""
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(dump), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("capabilities", nargs="*", type=one_of(SHARED), help="default: all")
    fits = True
    for capability in parser.parse_args().capabilities or SHARED:
        print(f"compute capability {capability / 10:.1f}, Triton {triton.__version__}")
        print(f"{'kernel':32} {'registers':>9} {'warps':>5} {'shared':>9} {'spilled':>7} {'tensor cores':>12} blocks")
        for found in resources(capability):
            blocks = found.blocks(capability)
            fits &= blocks > 0
            print(
                f"{found.name:32} {found.registers:9} {found.warps:5} {found.shared:9,} {found.spilled:7} "
                f"{'yes' if found.tensor_cores else 'no':>12} {blocks or 'does not fit'}",
                flush=True,
            )
    return 0 if fits else 1


if __name__ == "__main__":
    exit_with(main)
