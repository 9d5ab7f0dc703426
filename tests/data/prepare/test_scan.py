"""Protects the passes before the tasks: all workers do them, the bytes stay the same, and bars say how far they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from data.helpers import contents
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.prepare import bars, chosen, importers
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.html import HtmlImporter
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.errors import UserError
from megatron_lcl.processes import NEVER_BEGAN

NUM_PAGES = 70


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages in five groups of the scan and two units: a repeated page, text and images that stand on many."""
    folder = tmp_path_factory.mktemp("site")
    for k in range(NUM_PAGES):
        (folder / f"{k}.png").write_bytes(picture(k, 70, 66))
        body = (
            f"<p>Own words of page {k}, which no other has<img src={k}.png><img src={k // 9}.png><img src=gone{k}.png>"
        )
        (folder / f"p{k:02d}.html").write_text(f"<p>All rights reserved by us{body}<img src=logo.png>")
    (folder / "logo.png").write_bytes(picture(99, 80, 80))
    (folder / "p50.html").write_bytes((folder / "p03.html").read_bytes())
    return folder


def run(site: Path, output: Path, workers: int) -> dict[str, dict[str, bytes]]:
    folders = [output / "training", output / "held-out"]
    preprocess("html", site, folders[0], held_out=folders[1], vocab_size=400, workers=workers, max_bad_fraction=1,
               task_bytes=1)  # fmt: skip
    return {folder.name: contents(folder) for folder in folders}


@pytest.mark.slow
def test_all_passes_use_all_workers_and_give_the_same_bytes(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[tuple[str, int, int]] = []

    def watched(function: Any, shared: Any, items: Any, workers: int, **options: Any) -> Iterator[Any]:
        used.append((function.__name__, len(items), workers))
        return in_order(function, shared, items, workers, **options)

    for module in (preprocess_module, bars, chosen):
        monkeypatch.setattr(module, "in_order", watched)
    one = run(site, tmp_path / "one", 1)
    assert {name for name, _, _ in used} == {"_look_at", "_describe_unit", "run_task"}
    used.clear()
    assert run(site, tmp_path / "two", 2) == one
    assert [workers for _, _, workers in used] == [2] * len(used)
    assert used[:2] == [("_look_at", 5, 2), ("_describe_unit", 2, 2)]


def test_a_scan_in_any_groups_finds_the_same(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process of many knows of images, another one does not."""
    found = []
    for size in (1, 3, 16, 1000):
        monkeypatch.setattr("megatron_lcl.data.prepare.importers.html._PAGES_PER_LOOK", size)
        importer = create("html", site, None, {})
        assert isinstance(importer, HtmlImporter)
        importer.scan(
            lambda function, items: [
                function(create("html", site, None, {}), item) for item in items
            ]  # a copy for each
        )
        repeats = importer._repeats
        assert repeats is not None
        images = [column.tolist() for column in (repeats.images, repeats.num_pages, repeats.last_page)]
        found.append((repeats.original, images, importer._repeated_texts, importer._num_bytes, importer.units()))
    assert all(other == found[0] for other in found[1:])
    original, (_, num_pages, _), repeated, *_ = found[0]
    assert {page: first for page, first in enumerate(original) if page != first} == {50: 3}
    assert len(repeated) == 1
    assert sum(number > 3 for number in num_pages) == 1 + 8  # the logo, and the images of nine pages each


@pytest.mark.usefixtures("no_waiting_lines")
def test_bars_from_the_start(site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["preprocess", "--format", "html", "--input", str(site), "--output", str(tmp_path / "out"),
               "--held-out", str(tmp_path / "held"), "--vocab-size", "400", "--max-bad-fraction", "1"]  # fmt: skip
    assert main(command) == 0
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line]
    assert said[0].startswith("scan:   0%|")
    assert f"0/{NUM_PAGES}" in said[0]
    titles = [line.partition(":")[0] for line in said if " 0%|" in line]
    assert titles == ["scan", "compare images", "read texts", "out", "held"]
    assert all(any(line.startswith(f"{title}: 100%|") for line in said) for title in titles)


def test_a_long_search_for_files_is_said(
    site: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    create_importer = importers.create

    def slowly(*arguments: Any) -> Any:
        deadline = time.monotonic() + 20
        while "looking for" not in capsys.readouterr().err and time.monotonic() < deadline:
            time.sleep(0.01)
        said.append(time.monotonic() < deadline)
        return create_importer(*arguments)

    said: list[bool] = []
    monkeypatch.setattr(importers, "create", slowly)
    monkeypatch.setattr(bars, "_LONG", 0.01)
    with pytest.raises(UserError, match="are bad"):
        preprocess("html", site, tmp_path / "out", tokenizer="clip", max_bad_fraction=0, progress=True)
    assert said == [True]


# --- work in several processes -----------------------------------------------------------------------------------


def square(add: int, number: int) -> tuple[int, int]:
    return add + number**2, os.getpid()


def die(deaths: Path, number: int) -> int:
    """The process that does number 2 is killed, so many times as the file has bytes."""
    if number == 2 and (left := deaths.read_bytes()):
        deaths.write_bytes(left[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.timeout(60)
def test_results_come_in_order_from_other_processes() -> None:
    results, processes = zip(*in_order(square, 3, range(40), 2, ahead=4), strict=True)
    assert list(results) == [3 + k**2 for k in range(40)]
    assert os.getpid() not in processes
    assert {process for _, process in in_order(square, 0, range(3), 1)} == {os.getpid()}


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_a_process_that_dies_had_to_do_is_done_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deaths = tmp_path / "deaths"
    deaths.write_bytes(b"xx")
    assert list(in_order(die, deaths, range(6), 2, ahead=3)) == list(range(6))
    assert caplog.text.count("its work is done again") == 2
    deaths.write_bytes(b"xxx")
    with pytest.raises(UserError, match=r"a worker process died, 3 times now.*--workers") as caught:
        list(in_order(die, deaths, range(6), 2))
    assert caught.value.said(lambda flag: flag != "--workers").endswith("run the same command again")


UNGUARDED = """
from megatron_lcl.data.prepare.workers import in_order
print(list(in_order(divmod, 7, [1, 2], 2)))
"""


GUARDED = """
from megatron_lcl.data.prepare.workers import in_order
if __name__ == "__main__":
    print(list(in_order(divmod, 7, [1, 2], 2)))
"""


@pytest.mark.parametrize(
    ("program", "is_file", "why"),
    [
        (UNGUARDED, True, "before the\n        current process has finished its bootstrapping phase"),
        (GUARDED, False, "FileNotFoundError: [Errno 2] No such file or directory: '{folder}/<stdin>'"),
    ],
    ids=["unguarded", "standard input"],
)
def test_a_script_that_workers_cannot_import_is_told_so(tmp_path: Path, program: str, is_file: bool, why: str) -> None:
    """Python says in each of them what it is; the line below says where to look, and what a script has to be."""
    script = tmp_path / "script.py"
    script.write_text(program)
    command, given = [sys.executable, str(script) if is_file else "-"], None if is_file else program
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    above, line, below = done.stderr.partition(f"\nmegatron_lcl.errors.UserError: {NEVER_BEGAN}\n")
    assert line, done.stderr
    assert why.format(folder=tmp_path) in above
    # Python's tracker warns at the end where a process was ended in the moment in which it made its own pool.
    assert all("resource_tracker" in words or "warnings.warn(" in words for words in below.splitlines()), below
    assert 'a file (not standard input), with the call inside of `if __name__ == "__main__":`' in NEVER_BEGAN
    assert done.stdout == ""
