"""The page of a long run: what it takes to make, how large it is, how long headless Chromium takes to load it.

    python benchmarks/report_million.py [--lines 100000 1000000] [--loads 3]

A run folder gets a metrics.jsonl of so many lines, one a step, of 22 numbers with all their digits (drawn at random;
they repeat after 4,096 lines), and the page is written as `megatron-lcl report` does. Seconds to make are processor
time. Loads are medians: by the page's own clock from the navigation to the end of its load event, and in processor time
of all of the browser's processes, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from report.browser import Browser
from report.conftest import line

from megatron_lcl import config as configs
from megatron_lcl.report.page import write_report
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.telemetry import METRICS

REPEATS = 4096
NUMBERS = 22
LOADED = "performance.getEntriesByType('navigation')[0].loadEventEnd"


def make_run(run: Path, steps: int) -> Path:
    """A run folder with a line for each step; returns it."""
    run.mkdir()
    settings = {"train.output": str(run), "train.steps": str(steps), "data.corpora": "/nowhere"}
    (run / CONFIG).write_text(configs.to_yaml(configs.load(None, settings)))
    names = [name for name in line(1) if name != "step"][:NUMBERS]
    values = np.random.default_rng(0).lognormal(size=(REPEATS, NUMBERS)).tolist()
    rests = [", ".join(f'"{n}": {v!r}' for n, v in zip(names, row, strict=True)) + "}\n" for row in values]
    with (run / METRICS).open("w") as file:
        file.writelines(f'{{"step": {s}, {rest}' for s, rest in zip(range(1, steps + 1), itertools.cycle(rests)))
    return run


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def family(first: int) -> Iterator[int]:
    """Ids of a process and of all that come from it."""
    yield first
    for task in Path(f"/proc/{first}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def cpu_seconds_of(first: int) -> float:
    """Processor time of a process and all that come from it, those included that have ended."""
    found = 0
    for process in family(first):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        found += sum(map(int, fields[11:15]))
    return found / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--loads", type=int, default=3)
    options = parser.parse_args()
    print("| lines | metrics, MB | to make, CPU s | page, kB | to load, s | to load, CPU s |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder, Browser(Path(folder) / "chromium") as browser:
        for lines in options.lines:
            run = make_run(Path(folder) / str(lines), lines)
            before = cpu_seconds()
            page = write_report(run)
            made, size = cpu_seconds() - before, (run / METRICS).stat().st_size
            (run / METRICS).unlink()
            loads, spent = [], []
            for _ in range(options.loads):
                before = cpu_seconds_of(browser.process.pid)
                browser.open(page.as_uri())
                spent.append(cpu_seconds_of(browser.process.pid) - before)
                loads.append(browser.evaluate(LOADED) / 1000)
            assert browser.evaluate("document.querySelectorAll('svg.chart path.line').length") >= NUMBERS - 4
            assert browser.complaints() == []
            numbers = [f"{lines:,}", f"{size / 1e6:.0f}", f"{made:.1f}", f"{page.stat().st_size / 1e3:.0f}"]
            numbers += [f"{statistics.median(values):.2f}" for values in (loads, spent)]
            print("| " + " | ".join(numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
