"""`megatron-lcl demo NAME`: from packages to documents, corpora and labeled pictures."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_lcl.demo import emoji, manual, things
from megatron_lcl.demo.packages import fetch
from megatron_lcl.demo.write import is_written, summary, write
from megatron_lcl.errors import UserError
from megatron_lcl.machine import num_cores

SOURCE = "source"
"""the folder of the output with the packages as they were fetched"""
_SETS = {"emoji": emoji, "things": things}
NAMES = (*_SETS, "manual")


def demo(name: str, output: Path, given: Path | None = None, html: Path | None = None) -> None:
    """Make the data set `name` (one of NAMES) in `output`, and say what it holds.

    given: an offline folder of the packages. html: for `manual`, a folder of pages in place of the GIMP manual. Run
    again it goes on where it stopped. UserError, in one line with the remedy, where something is missing.
    """
    started = time.monotonic()
    workers = min(2, num_cores())
    if html is not None and (name != "manual" or given is not None):
        raise UserError("--html takes pages in place of the GIMP manual: give it with `demo manual`, without --from")
    if name == "manual":
        print(manual.make(output, output / SOURCE, given, html, workers))
    else:
        source = _SETS[name]
        packages = fetch(source.PACKAGES, output / SOURCE, given)
        if not is_written(output, packages):
            write(source.data_set(packages, output / SOURCE, workers), packages, output, workers)
        print(summary(output))
    print(f"{output}: done in {time.monotonic() - started:.0f} s")
