"""`preprocess` divided into jobs, which an engine runs (`data/engines`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
from megatron_lcl.data.engines import Engine, run_jobs
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.filesystem import exists


def preprocess_in_jobs(
    format: str,
    input: str | Path,
    output: str | Path,
    engine: Engine,
    *,
    workers: int = 1,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """`preprocess` in `engine.jobs` jobs on folders that all machines see; waits, and returns its summary.

    The corpus is the same, byte for byte, as from one process. workers: processes, and so CPUs, of a job. options:
    those of `preprocess`. Raises UserError as `engines.run_jobs` and `preprocess` do.
    """
    output = Path(output).resolve()
    arguments = {**options, "format": format, "input": input, "output": output, "workers": workers}
    reads = []
    for name in ("input", "images", "held_out", "tokenizer"):
        value = arguments.get(name)
        if isinstance(value, str | Path) and str(value) != "clip" and url_of(value) is None:
            arguments[name] = Path(value).resolve()
            if name != "held_out":
                reads.append(arguments[name])
    folders = [output, *(Path(held) for held in [arguments.get("held_out")] if held is not None)]
    finished = all(exists(folder / MANIFEST) for folder in folders)
    run_jobs(preprocess, arguments, engine, output=output, reads=reads, cpus=workers, progress=progress)
    return replace(preprocess(**arguments), reused=finished)  # only reads the summary
