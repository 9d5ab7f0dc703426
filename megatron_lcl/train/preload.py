"""Imported once by the server of `forks.py`: whatever a run imports sooner or later."""

import atexit
import contextlib
import gc
import importlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["DS_ACCELERATOR"] = "cpu"  # CUDA does not survive a fork

gc.disable()  # what is imported stays; looked at for garbage again and again it takes a fifth longer
importlib.import_module("megatron_lcl.train.uncompiled").import_deepspeed()
for name in (
    "megatron_lcl.train.run",
    "megatron_lcl.train.pipeline.engine",
    "megatron_lcl.objectives.built_in",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._inductor.compile_fx",
    "tensorboard.summary.writer.record_writer",
    "scipy.linalg",
):
    importlib.import_module(name)
with contextlib.suppress(ImportError):  # not in all versions; DeepSpeed's engine imports it, whoever uses it
    importlib.import_module("deepspeed.module_inject.auto_ep_layer")

importlib.import_module("numba").njit(lambda: 0)()  # numba sets itself up with the first function that it runs
importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 - found out when they are first asked for
gc.collect()
gc.enable()
gc.freeze()  # the garbage collector of a forked process has only that process's own objects to look at,
gc.set_threshold(20_000)  # and not after every 700 new ones, as in the command itself
atexit.register(gc.unfreeze)  # or some libraries report leaks when the server ends
