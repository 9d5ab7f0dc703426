"""`megatron-lcl demo NAME`: from packages to documents, corpora and labeled pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
from megatron_lcl.demo import emoji, manual, things
from megatron_lcl.demo.packages import fetch
from megatron_lcl.demo.write import CORPORA, DOCUMENTS, EVALUATE, SOURCES, is_written, summary, write
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_dir
from megatron_lcl.machine import num_cores
from megatron_lcl.run_folder import CHECKPOINTS, METRICS

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
    check_is_own(output, (DOCUMENTS, CORPORA, EVALUATE, SOURCES))
    if name == "manual":
        print(manual.make(output, output / SOURCE, given, html, workers))
    else:
        source = _SETS[name]
        packages = fetch(source.PACKAGES, output / SOURCE, given)
        if not is_written(output, packages):
            write(source.data_set(packages, output / SOURCE, workers), packages, output, workers)
        print(summary(output))
    print(f"{output}: done in {time.monotonic() - started:.0f} s")


def check_is_own(output: Path, own: Sequence[str]) -> None:
    """UserError for an output that is a run or a corpus itself, or that holds files and nothing of `own`, paths in it
    that the command makes; packages that it has fetched say nothing."""
    if not is_dir(output):
        return
    for name in (METRICS, CHECKPOINTS, MANIFEST):
        if exists(output / name):
            what = "corpus" if name == MANIFEST else "run"
            raise UserError(f"{output} is a {what}, as its {name} says; give a new folder")
    others = [path.name for path in output.iterdir() if path.name != SOURCE and not path.name.startswith(".")]
    if others and not any(exists(output / name) for name in own):
        raise UserError(f"{output} is not empty ({min(others)}) and not of this command; give a new folder")
