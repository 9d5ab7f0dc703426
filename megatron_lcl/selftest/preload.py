"""Imported once by the server that the selftest's processes are forked from: whatever a run imports sooner or later."""

import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

for name in (
    "megatron_lcl.train.run",
    "deepspeed.runtime.pipe.engine",
    "deepspeed.runtime.zero.stage3",
    "torch._inductor.compile_fx",
):
    importlib.import_module(name)
