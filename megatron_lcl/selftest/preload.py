"""Imported once by the server that the selftest's processes are forked from."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401

import megatron_lcl.train.run  # noqa: F401
