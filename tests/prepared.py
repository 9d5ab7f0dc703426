"""Imported once by the server from which the tests' processes are forked, after `megatron_lcl.train.preload`: what each
process of a run would import, read or ask for again."""

import gc
import importlib
import signal

from PIL import Image

from megatron_lcl.train.checkpoint.code_versions import code_versions

for name in ("megatron_lcl.cli.command", "sentencepiece"):
    importlib.import_module(name)
code_versions()
Image.preinit()
gc.freeze()
signal.pthread_sigmask(signal.SIG_SETMASK, ())  # a test may hold signals back when the server begins
