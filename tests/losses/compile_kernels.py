"""Compiles every variant of the kernels for a compute capability (80, 90) without a device.

Prints for each: name, shared memory in bytes, whether the code uses tensor cores.
"""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_lcl.losses import contrastive_triton, softmax_triton


def compile_kernel(name: str, kernel, pointers: dict[str, str], constants: dict, num_warps: int, num_stages: int = 3):
    signature, attributes = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = pointers.get(argument, "i32")
        if argument in pointers or argument == "D" or argument.endswith("stride"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", int(sys.argv[1]), 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    print(name, compiled.metadata.shared, "mma" in compiled.asm["ptx"])


for dtype, short in ((tl.float32, "fp32"), (tl.bfloat16, "bf16"), (tl.float16, "fp16")):
    tiles = contrastive_triton.SINGLE_TILES if dtype == tl.float32 else contrastive_triton.HALF_TILES
    weight_dtype = tl.bfloat16 if dtype == tl.bfloat16 else tl.float32
    pointers = dict.fromkeys(("image_n", "text_n", "image_N", "text_N"), f"*{short}")
    pointers |= dict.fromkeys(("scale_ptr", "positive_ptr", "lse_ptr", "hardest_ptr"), "*fp32")
    pointers |= dict.fromkeys(("image_lse", "text_lse", "grad_ptr"), "*fp32")
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
            name = f"contrastive_{way}_{short}_{tile.rows}"
            compile_kernel(name, kernel, pointers, given, tile.num_warps, tile.num_stages)

BLOCK = {"BLOCK": softmax_triton.BLOCK}
pointers = {"logits": "*fp32", "targets": "*i64", "statistics": "*fp32", "all_max": "*fp32", "all_sum": "*fp32"}
compile_kernel("softmax_statistics", softmax_triton._statistics_kernel, pointers, BLOCK, 8)
for short in ("fp32", "bf16", "fp16"):
    compile_kernel(f"softmax_error_{short}", softmax_triton._error_kernel, pointers | {"error": f"*{short}"}, BLOCK, 8)
