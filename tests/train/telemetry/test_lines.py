"""Lines of metrics.jsonl that a run drops, and those that it reads, when it goes on."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from megatron_lcl.run_folder import METRICS
from megatron_lcl.train.telemetry.lines import (
    keep_lines_before,
    measured_after,
    remove_results_after,
    set_metrics_aside,
)


def line(step: int, length: int = 1_000, **values: object) -> bytes:
    """One of about so many bytes."""
    return json.dumps({"step": step, **values, "text": "x" * length}).encode() + b"\n"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ([line(1), line(2)], [0, 1]),
        ([line(1), line(2), line(3), line(4)], [0, 1]),
        ([line(1), line(3), line(2, 30_000), line(4), line(2, 7)], [0, 2, 4]),  # of saves in the background
        ([line(3), line(1), line(2)], [1, 2]),
        ([line(1), b'{"st\n', b"\xff\xfe\n", b"3\n", b'{"step": null}\n', line(2), b'{"step": 2}'], [0, 5]),
        ([line(4)], []),
        ([], []),
    ],
)
def test_what_is_kept_is_as_it_was(written: list[bytes], kept: list[int], tmp_path: Path) -> None:
    """And whoever has the file open goes on behind it."""
    path = tmp_path / METRICS
    path.write_bytes(b"".join(written))
    with path.open("ab") as file:
        keep_lines_before(path, 2)
        assert path.read_bytes() == b"".join(written[number] for number in kept)
        file.write(line(3))
    assert path.read_bytes() == b"".join([*(written[number] for number in kept), line(3)])


def test_a_long_file_takes_no_memory(tmp_path: Path) -> None:
    """But for buffers. Dropped are one of its first lines and a third of the others, the last line of all is kept."""
    path = tmp_path / METRICS
    with path.open("wb") as file:
        file.writelines([line(0), line(9_001), *(line(step) for step in range(1, 9_000)), line(6_000, heldout=1.0)])
    lines = path.read_bytes().splitlines(keepends=True)
    expected = b"".join(one for one in lines if json.loads(one)["step"] <= 6_000)
    size = path.stat().st_size
    del lines
    tracemalloc.start()
    try:
        keep_lines_before(path, 6_000)
        assert measured_after(tmp_path, 6_000) == {"step", "heldout", "text"}
        assert tracemalloc.get_traced_memory()[1] < size / 50 + 2 * (io.DEFAULT_BUFFER_SIZE - 8192)
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == expected


def test_what_was_measured_after_a_step(tmp_path: Path) -> None:
    """Also where a line of an earlier step, of a save in the background, stands behind it."""
    assert measured_after(tmp_path, 2) == set()
    (tmp_path / METRICS).write_bytes(
        b"".join([line(1, heldout=0.5), line(2, loss=1.0), line(2, labeled=0.5), line(1, checkpoint_bytes=9), b'{"st'])
    )
    assert measured_after(tmp_path, 2) == {"step", "text", "loss", "labeled"}
    assert measured_after(tmp_path, 3) == set()


@pytest.mark.parametrize(("step", "stays"), [("3", False), ("2", True), ("null", True), ('"3"', True)])
def test_results_of_later_steps_go(step: str, stays: bool, tmp_path: Path) -> None:
    """What names no step, or was damaged, stays for its reader to name."""
    files = [tmp_path / f"{name}.json" for name in ("heldout", "heldout_examples", "labeled")]
    for file in files:
        file.write_text(f'{{"step": {step}}}')
    remove_results_after(tmp_path, 2)
    assert [file.exists() for file in files] == 3 * [stays]


@pytest.mark.parametrize(("step", "stays"), [("3", False), ("2", True), ("null", True)])
def test_results_of_evaluate_go_too(step: str, stays: bool, tmp_path: Path) -> None:
    """In the run folder and one inside; pictures of an earlier evaluation stay beside numbers of a later one."""
    (tmp_path / "sketches").mkdir()
    folders = [tmp_path, tmp_path / "sketches"]
    for folder in folders:
        (folder / "results.json").write_text(f'[{{"encoder": "timm:other", "step": null}}, {{"step": {step}}}]')
        (folder / "gallery.json").write_text(f'{{"about": "", "result": {{"step": {step}}}}}')
        for name in ("results.txt", "results.png", "bad_images.txt"):
            (folder / name).touch()
    (tmp_path / "sketches" / "gallery.json").write_text('{"about": "", "result": {"step": 1}}')
    remove_results_after(tmp_path, 2)
    for folder in folders:
        assert [(folder / f"results.{end}").exists() for end in ("json", "txt", "png")] == 3 * [stays]
        assert (folder / "bad_images.txt").exists(), "of the images, not of the model"
    assert [(folder / "gallery.json").exists() for folder in folders] == [stays, True]


def test_results_in_a_folder_of_somebody_else_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keep nothing from being removed, or set aside, that is the run's."""
    for name in ("by-bob", "mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('[{"encoder": "x", "step": 3}]')
    (tmp_path / METRICS).write_bytes(line(3, checkpoint_bytes=9))

    def not_theirs(change: Callable[..., Any]) -> Callable[..., Any]:
        def checked(path: Path, *arguments: Any, **named: Any) -> Any:
            if path.parent.name in ("by-bob", "theirs"):
                raise PermissionError(13, "Permission denied", str(path))
            return change(path, *arguments, **named)

        return checked

    for name in ("unlink", "rename"):
        monkeypatch.setattr(Path, name, not_theirs(getattr(Path, name)))
    assert ", results of evaluations in mine/results-" in set_metrics_aside(tmp_path)
    (tmp_path / "mine" / "results.json").write_text('[{"encoder": "x", "step": 3}]')
    remove_results_after(tmp_path, 2)
    assert [(tmp_path / name / "results.json").exists() for name in ("by-bob", "mine", "theirs")] == [True, False, True]
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=PermissionError(13, "Permission denied")))
    (tmp_path / "labeled.json").write_text('{"step": 3}')
    with pytest.raises(PermissionError):
        remove_results_after(tmp_path, 2)


@pytest.mark.parametrize("names", [[], ["heldout_examples", "heldout", "labeled"], ["labeled"]])
def test_metrics_of_a_run_without_its_checkpoints(names: list[str], tmp_path: Path) -> None:
    """With them the results that they say were measured, all by one time."""
    files = [tmp_path / f"{name}.json" for name in names]
    for file in files:
        file.write_text(file.stem)
    (tmp_path / METRICS).write_bytes(line(1))
    assert set_metrics_aside(tmp_path) == "", "no checkpoint was complete"
    (tmp_path / METRICS).write_bytes(written := line(1) + line(2, checkpoint_bytes=9))
    said = set_metrics_aside(tmp_path)
    (aside,) = tmp_path.glob("metrics-*.jsonl")
    time = aside.stem.removeprefix("metrics-")
    assert {file.name for file in tmp_path.iterdir()} == {aside.name, *(f"{name}-{time}.json" for name in names)}
    assert aside.read_bytes() == written
    assert [(tmp_path / f"{name}-{time}.json").read_text() for name in names] == names
    results = ", ".join(f"{name}-{time}.json" for name in names)
    assert said.endswith(f"its lines are now in {aside}" + (f", results of evaluations in {results}" if names else ""))


def test_metrics_of_one_second_are_all_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.gmtime", lambda: (2026, 10, 25, 1, 2, 3, 6, 298, 0))
    written = [line(step, checkpoint_bytes=9) for step in (1, 2, 3)]
    for lines in written:
        (tmp_path / METRICS).write_bytes(lines)
        set_metrics_aside(tmp_path)
    names = [f"metrics-20261025-010203{number}.jsonl" for number in ("", "-1", "-2")]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict(zip(names, written, strict=True))


def test_results_of_evaluate_are_set_aside_with_the_metrics(tmp_path: Path) -> None:
    """Which a run that begins anew would remove; those of other models, or of an earlier version, stay."""
    for name, step in (("a", 2), ("b", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps([{"encoder": "x", "step": step}]))
    (tmp_path / "gallery.json").write_text('{"result": {"step": 2}}')
    (tmp_path / METRICS).write_bytes(line(2, checkpoint_bytes=9))
    said = set_metrics_aside(tmp_path)
    remove_results_after(tmp_path, 0)
    (gallery,), (results,) = tmp_path.glob("gallery*"), (tmp_path / "a").iterdir()
    assert gallery.name != "gallery.json"
    assert f"results of evaluations in {gallery.name}, a/{results.name}" in said
    assert json.loads(results.read_text())[0]["step"] == 2
    assert (tmp_path / "b" / "results.json").exists()
