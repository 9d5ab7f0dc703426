"""`megatron-lcl verify` from a checkout that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_lcl.cli import main

if __name__ == "__main__":  # worker processes import this file too
    sys.argv.insert(1, "verify")
    raise SystemExit(main())
