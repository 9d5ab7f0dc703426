"""`megatron-lcl merge` from a checkout that is not installed."""

import os
import sys

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not this folder: its names hide Python's
from megatron_lcl.cli import main

raise SystemExit(main(["merge", *sys.argv[1:]]))
