"""How long commands take to start: `--help`, and `train` to its first step with a built index; what they import.

    python benchmarks/start.py [--config CONFIG] [--processes 2] [--repeats 5] [--packages 12]

Without --config it is the quickstart's model for pages, on 24 documents that are made here. The first run, which is not
counted, builds the index. Seconds are medians, with the least and the most; `CPU` is that of all processes of a command
to its end. Imports are those of one more run, by package: seconds in its own modules, over all processes.

Claims, for medians: `--help` in under 0.3 s, and (without --config) the first step in under 10 s; else the exit code is
1.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from claims import exit_unless, exit_with
from PIL import Image

from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.demo.train import packaged_config, write_config
from megatron_lcl.run_folder import CONFIG, METRICS

HELP, FIRST_STEP = 0.3, 10.0
"""seconds at most"""
COMMAND = [sys.executable, "-m", "megatron_lcl"]
IMPORT = re.compile(r"import time: +(\d+) \| +\d+ \| +([\w.]+)")
"""a line of `python -X importtime`: microseconds in the module itself, in all that it imports, and its name"""


def made_config(folder: Path) -> Path:
    """The quickstart's config for pages, on documents of random words and pixels."""
    draw, lines = random.Random(0), []
    for document in range(24):
        items = []
        for image in range(3):
            picture, name = io.BytesIO(), f"{document}-{image}.png"
            Image.frombytes("RGB", (24, 20), draw.randbytes(24 * 20 * 3)).save(picture, "PNG")
            (folder / name).write_bytes(picture.getvalue())
            words = ("".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(30))
            items += [{"text": " ".join(words)}, {"image": name}]
        lines.append(json.dumps({"items": items}))
    (folder / "documents.jsonl").write_text("\n".join(lines))
    preprocess("jsonl", folder / "documents.jsonl", folder / "corpus", images=folder, vocab_size=400)
    config = packaged_config("megatron_lcl.quickstart", "manual.yaml", {"manual": folder / "corpus"}, folder, None)
    write_config(config, folder / CONFIG)
    return folder / CONFIG


def run(arguments: Sequence[str], metrics: Path | None = None) -> tuple[float, float]:
    """Seconds to the command's first line of metrics, or to its end, and of CPU."""
    began, first = time.monotonic(), None
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL) as process:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if first is None and metrics is not None and metrics.exists() and '"loss"' in metrics.read_text():
                first = time.monotonic()
            if pid:
                break
            time.sleep(0.005)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (metrics is not None and first is None):
        raise SystemExit(f"{' '.join(arguments)} ended with exit code {process.returncode}")
    return (first or time.monotonic()) - began, usage.ru_utime + usage.ru_stime


def row(name: str, times: Sequence[tuple[float, float]]) -> str:
    """A line of the table."""
    seconds, cpu = zip(*times, strict=True)
    between = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return f"| {name} | {statistics.median(seconds):.2f} ({between}) | {statistics.median(cpu):.2f} |"


def imports(arguments: Sequence[str]) -> Counter[str]:
    """Seconds by package."""
    profiled = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([*COMMAND, *arguments], env=profiled, capture_output=True, text=True, check=True)
    found: Counter[str] = Counter()
    for microseconds, module in IMPORT.findall(done.stderr):
        found[module.split(".")[0]] += int(microseconds)
    return Counter({package: number / 1e6 for package, number in found.items()})  # type: ignore[misc]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="of the run")
    parser.add_argument("--processes", type=int, default=2, help="of the run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--packages", type=int, default=12, help="so many that take most (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = options.config or made_config(folder)
        given = [
            "train",
            "--config",
            str(config),
            "--processes",
            str(options.processes),
            "--data.cache",
            f"{folder}/cache",
        ]
        given += ["--train.steps", "1", "--train.log_every", "1"]

        def train(number: int) -> tuple[float, float]:
            output = folder / f"run-{number}"
            return run([*given, "--train.output", str(output)], output / METRICS)

        train(0)
        print("| | seconds | CPU |\n| --- | --- | --- |")
        helped = [run(["--help"]) for _ in range(options.repeats)]
        print(row("`--help`", helped), flush=True)
        trained = [train(n + 1) for n in range(options.repeats)]
        print(row("`train`, first step", trained), flush=True)
        found = imports([*given, "--train.output", str(folder / "imports")])
    print(f"\n| package | seconds, of {sum(found.values()):.2f} |\n| --- | --- |")
    for package, seconds in found.most_common(options.packages):
        print(f"| {package} | {seconds:.2f} |")
    claims = {f"--help in under {HELP} s": statistics.median(seconds for seconds, _ in helped) < HELP}
    if not options.config:
        reached = statistics.median(seconds for seconds, _ in trained)
        claims[f"the first step in under {FIRST_STEP:g} s"] = reached < FIRST_STEP
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
