"""Imported once by the server from which the tests' processes are forked, after `megatron_lcl.train.preload`: what each
process of a run would import, read or ask for again."""

import gc
import importlib

from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from PIL import Image

from megatron_lcl.train.checkpoint.code_versions import code_versions

for name in ("megatron_lcl.cli.command", "megatron_lcl.objectives.built_in", "sentencepiece"):
    importlib.import_module(name)
code_versions()
Image.preinit()
for name in ("hashes", "packing", "sequence"):
    for function in vars(importlib.import_module(f"megatron_lcl.data.loading.{name}")).values():
        if isinstance(function, Dispatcher) and isinstance(function._cache, FunctionCache):
            for signature, *_ in function._cache._cache_file._load_index():
                function.compile(signature)
gc.freeze()
