"""`megatron-lcl evaluate` from a checkout that is not installed."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not this folder: its names hide Python's
from megatron_lcl.cli import main

raise SystemExit(main(["evaluate", *sys.argv[1:]]))
