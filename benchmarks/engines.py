"""What an engine costs: the same `preprocess` by `--workers 2`, and as jobs, two at a time, here, on Ray and on Slurm.

Each ends with the same bytes, which is checked. Seconds are of a whole command, from its start (imports, the start of
Ray) to its end, the median of `--rounds`, in which the engines take turns; "a job" is what it takes longer than
`--workers 2`, divided by the number of jobs. A job of Slurm waits for the scheduler, too; `--slurm` starts a Slurm of
two nodes on this machine, as the tests do (root, Debian's slurm-wlm and munge).

    python benchmarks/engines.py [--documents 4000] [--jobs 8] [--rounds 3] [--slurm]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import local_slurm
from claims import exit_with
from data.helpers import TOKENIZER, contents
from data.writers import picture, write_jsonl
from measuring import versions

from megatron_lcl.data.corpus.document import Document, Image, Text

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.jobs import preprocess_in_jobs
from megatron_lcl.data.prepare.preprocess import preprocess
name, jobs, folder, output = sys.argv[1:]
slurm = {"timeout_min": 10, "mem_gb": 1, "slurm_array_parallelism": 2}
parameters = {"local": {}, "ray": {"address": "local"}, "slurm": slurm}
if __name__ == "__main__":
    options = {"tokenizer": f"{folder}/t.model", "max_image_side": 300, "task_bytes": 1}
    if name == "workers":
        preprocess("jsonl", f"{folder}/in", output, workers=2, **options)
    else:
        preprocess_in_jobs("jsonl", f"{folder}/in", output, Engine(name, int(jobs), parameters[name]), **options)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=4000, help="each of a text and a JPEG of 640 x 480")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slurm", action="store_true")
    given = parser.parse_args()
    names = ["workers", "local", "ray", *(["slurm"] if given.slurm else [])]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as made, contextlib.ExitStack() as stack:
        folder = Path(made)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if given.slurm:
            short = stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp"))
            slurm = stack.enter_context(local_slurm.start(Path(short)))
            environment |= {name: slurm.environment[name] for name in ("SLURM_CONF", "PATH")}
        pictures = [Image(picture(seed, 640, 480, "JPEG")) for seed in range(16)]
        for number in range(given.jobs):
            here = range(number, given.documents, given.jobs)
            write_jsonl([Document((Text(f"document {k}"), pictures[k % 16])) for k in here], folder / "in")
            (folder / "in/documents.jsonl").rename(folder / f"in/{number}.jsonl")
        TOKENIZER.save(folder / "t.model")
        (folder / "program.py").write_text(PROGRAM)
        for turn in range(given.rounds):
            for name in names:
                output = folder / f"{name}-{turn}"
                command = [sys.executable, *map(str, (folder / "program.py", name, given.jobs, folder, output))]
                start = time.perf_counter()
                subprocess.run(command, env=environment, check=True)
                seconds[name].append(time.perf_counter() - start)
                assert contents(output) == contents(folder / "workers-0"), name
    least = statistics.median(seconds["workers"])
    print(f"{given.documents:,} documents, {given.jobs} jobs, median of {given.rounds}; load {os.getloadavg()[0]:.1f}")
    print(versions("ray"))
    for name in names:
        median = statistics.median(seconds[name])
        said = f"{name:8} {median:7.1f} s  {median / least:5.2f} x"
        print(said if name == "workers" else f"{said}  {(median - least) / given.jobs:+6.2f} s a job")


if __name__ == "__main__":
    exit_with(main)
