"""Protects that nothing is lost or doubled where an input changes amid the work, and that a large input has no more
tasks, and so files, than it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.helpers import contents
from data.writers import picture

from megatron_lcl.data.prepare import cut
from megatron_lcl.data.prepare import preprocess as preprocess_module
from megatron_lcl.data.prepare.importers import Unit, html
from megatron_lcl.data.prepare.preprocess import WORK, preprocess
from megatron_lcl.data.prepare.preprocess_task import parts_of
from megatron_lcl.data.prepare.unfinished import holds_work
from megatron_lcl.errors import UserError

OPTIONS: dict[str, Any] = {"tokenizer": "clip", "max_bad_fraction": 1}
TASK_BYTES = 25_000
"""more than one of the images, less than two"""


@pytest.fixture(autouse=True)
def _a_page_is_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_PAGES_PER_UNIT", 1)


@pytest.fixture(scope="module")
def six_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for k in range(6):
        (folder / f"{k}.html").write_text(f"<p>Words of page {k}</p><img src={k}.png>")
        (folder / f"{k}.png").write_bytes(picture(k, 80, 70))
    return folder


@pytest.fixture
def site(six_pages: Path, tmp_path: Path) -> Path:
    """A copy, of which files may be moved."""
    return Path(shutil.copytree(six_pages, tmp_path / "site"))


@pytest.fixture(scope="module")
def expected(six_pages: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(html, "_PAGES_PER_UNIT", 1)
        preprocess("html", six_pages, folder, **OPTIONS, task_bytes=TASK_BYTES)
    return contents(folder)


def interrupted_after(num: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> None:
    """Run until so many tasks are done."""
    original, begun = preprocess_module.run_task, 0

    def run_task(*arguments: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun > num:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_module, "run_task", run_task)
        with pytest.raises(KeyboardInterrupt):
            run()


@pytest.mark.parametrize("in_jobs", [True, False])
def test_where_an_image_has_gone_since_the_work_began_is_refused(
    site: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_jobs: bool
) -> None:
    """Without it the third page would be in the first task, which is done, and no longer in the second."""
    output = tmp_path / "out"

    def run(job: tuple[int, int] | None) -> object:
        return preprocess("html", site, output, **OPTIONS, task_bytes=TASK_BYTES, job=job)

    if in_jobs:
        run((0, 2))
    else:
        interrupted_after(1, monkeypatch, lambda: run(None))
    (site / "0.png").rename(tmp_path / "0.png")
    said = f"the input, .* has changed since the work in {output / WORK} began.* restore the input, or remove {output}"
    with pytest.raises(UserError, match=said):
        run((1, 2) if in_jobs else None)
    assert not (output / "corpus.json").exists()
    (tmp_path / "0.png").rename(site / "0.png")
    run((1, 2) if in_jobs else None)
    assert contents(output) == expected


def test_of_two_cuts_at_once_the_first_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no locks, too: each has found none, and one is sooner to put its own in place."""
    original = cut.put_in_place

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(cut, "put_in_place", original)
        cut.check_cut(tmp_path, [["a", "b"], ["c"]], "part-*", True, [tmp_path])
        original(*arguments)

    monkeypatch.setattr(cut, "put_in_place", overtaken)
    with pytest.raises(UserError, match="would now be cut into other tasks"):
        cut.check_cut(tmp_path, [["a"], ["b", "c"]], "part-*", True, [tmp_path])
    cut.check_cut(tmp_path, [["a", "b"], ["c"]], "part-*", True, [tmp_path])
    assert not holds_work(tmp_path), "a run that fails with no more than that leaves nothing"


@pytest.mark.parametrize(
    ("total", "least", "shard_bytes", "size"),
    [
        (512 << 30, 32 << 20, 4 << 30, 32 << 20),
        (1 << 40, 32 << 20, 4 << 30, 64 << 20),
        (1 << 50, 32 << 20, 4 << 30, 4 << 30),
        (1 << 50, 32 << 20, 1 << 20, 32 << 20),
    ],
    ids=["as before", "twice as much", "a shard at most", "unless it was more"],
)
def test_size_of_a_task(total: int, least: int, shard_bytes: int, size: int) -> None:
    assert cut.task_size(total, least, shard_bytes) == size


def test_a_large_input_has_larger_tasks(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "MOST_TASKS", 3)
    preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=1, job=(0, 9))
    preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=1, job=(1, 9))
    records = (tmp_path / "out" / WORK).glob("part-*/part.json")
    assert sorted(json.loads(record.read_text())["documents_read"] for record in records) == [2, 2]


@pytest.mark.parametrize("cut_otherwise", [True, False])
def test_work_that_an_earlier_release_began_is_gone_on_with_if_it_had_the_same_tasks(
    site: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_otherwise: bool
) -> None:
    """Earlier releases did not record them; of a large input theirs were smaller."""
    work = tmp_path / "out" / WORK
    preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=TASK_BYTES, job=(0, 2))
    shutil.rmtree(work / "tasks")
    if cut_otherwise:
        monkeypatch.setattr(cut, "MOST_TASKS", 2)
        for _ in range(2):
            with pytest.raises(UserError, match=f"{work} was begun by another release.* remove {work} and run"):
                preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=TASK_BYTES)
    else:
        preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=TASK_BYTES)
        assert contents(tmp_path / "out") == expected


def test_a_job_reads_no_records_of_others_while_a_task_is_not_finished(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a task that is not begun, or not done to its end."""
    work, read = tmp_path / "out" / WORK, set()

    def noted(folder: Path, task: int) -> Any:
        read.add(task)
        return parts_of(folder, task)

    def run(job: int) -> object:
        return preprocess("html", site, tmp_path / "out", **OPTIONS, task_bytes=TASK_BYTES, job=(job, 3))

    run(0)
    monkeypatch.setattr(preprocess_module, "parts_of", noted)
    run(1)
    assert read == {1}
    shutil.copytree(work / "part-000001-0000", work / "part-000002-0000")
    record = work / "part-000002-0000/part.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "task": 2, "last": False}))
    run(1)
    assert read == {1, 2}


def test_tasks_of_units() -> None:
    units = [Unit(f"{k}", size) for k, size in enumerate((5, 20, 20, 20, 20, 20))]
    assert [[unit.name for unit in task] for task in cut.cut(units, 32)] == [["0", "1", "2"], ["3", "4"], ["5"]]
    assert cut.cut([], 32) == []
