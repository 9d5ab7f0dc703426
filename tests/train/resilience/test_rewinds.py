"""A run that goes back: from which checkpoint, and that it has one and knows what it skips, whatever comes between."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audit_lines import read_audit
from bad_packs import poison_and_stop, saved_steps
from fleet import losses, train

from megatron_lcl import config as configs
from megatron_lcl.config import Checkpoint, Guard
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.loading.ledger import PLANNED, Ledger
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import CHECKPOINTS, PROGRESS
from megatron_lcl.train import resume_point
from megatron_lcl.train.changes import Changes
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.loop import Training
from megatron_lcl.train.memory import Memory
from megatron_lcl.train.resilience.bad_steps import BadSteps

SETTINGS = dict.fromkeys(PLANNED, 1)


def save(run: Path, step: int, guard: dict[str, Any] | None = None) -> Path:
    """What looks like a checkpoint."""
    folder = checkpoint.step_folder(run, step)
    folder.mkdir(parents=True)
    progress = Progress(step, 4 * step, Ledger(SETTINGS).to_json(), guard or {})
    (folder / PROGRESS).write_text(checkpoint.progress_text(progress))
    (folder / MANIFEST).write_text(manifest_text({PROGRESS: fingerprint(folder / PROGRESS)}))
    return folder


@pytest.mark.slow
def test_a_series_of_bad_steps_goes_on_after_a_resume(
    config_file: str, without: list[tuple[Any, ...]], place: str, tmp_path: Path
) -> None:
    """Steps 7 and 8 are bad. Stopped between them: saved there, counted on, and the checkpoint before them, which alone
    would be kept, is there to go back to. Stopped with the rewind: the packs are skipped all the same."""
    run, mirror = tmp_path / "run", Mirror(place)
    words = ["--config", config_file, "--guard.max_bad_steps", "2", "--checkpoint.keep_last", "1"]
    words += ["--checkpoint.mirror", place]
    storage = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def planted(step: int | None) -> dict[str, Any]:
        return {"plant": poison_and_stop, "planted": ([26, 31], step, storage)}

    train(run, *words, code=75, **planted(7))
    assert saved_steps(run) == [4, 7]
    assert mirror.complete() == ["step-00000004", "step-00000007"]
    said = train(run, *words, code=75, **planted(1))
    assert "steps 7 to 8 were bad: back to" in said
    assert saved_steps(run) == [4]
    assert mirror.complete() == ["step-00000004"]
    saved = checkpoint.read_progress(checkpoint.step_folder(run, 4))
    assert (saved.step, saved.packs, saved.guard["rewinds"], saved.guard["consecutive"]) == (4, 16, 1, 0)
    assert Ledger.from_json(saved.ledger).locate(24) == 32
    train(run, *words, **planted(None))
    assert losses(run) == without
    assert saved_steps(run) == [12]
    assert mirror.complete() == ["step-00000012"]
    events = [(line["event"], line["step"]) for line in read_audit(run)]
    back = [("step skipped", 8), ("rewind", 8), ("stopped", 4)]
    assert events == [("step skipped", 7), ("stopped", 7), *back]


def test_the_checkpoint_that_a_run_goes_back_to(tmp_path: Path) -> None:
    """Steps 7 and 8 are bad; those from between go, but only where there is another."""
    four, six, seven = (save(tmp_path, step) for step in (4, 6, 7))
    assert checkpoint.go_back(tmp_path, 6, seven) == (six, {})
    assert saved_steps(tmp_path) == [4, 6]
    assert checkpoint.go_back(tmp_path / "none", 6, seven) == (None, {}), "what it began with is gone, and no fault"
    seven = save(tmp_path, 7)
    for folder in (four, six):
        (folder / PROGRESS).write_text("damaged")
    eight = save(tmp_path, 8)
    folder, faults = checkpoint.go_back(tmp_path, 6, seven)
    assert (folder, [*faults]) == (eight, [six, four])
    assert saved_steps(tmp_path) == [4, 6, 7, 8]
    (eight / PROGRESS).write_text("damaged")
    assert checkpoint.go_back(tmp_path, 6, None)[0] == seven
    assert saved_steps(tmp_path) == [4, 6, 7]
    (seven / PROGRESS).write_text("damaged")
    folder, faults = checkpoint.go_back(tmp_path, 6, None)
    assert (folder, [*faults]) == (None, [six, four, seven])
    assert saved_steps(tmp_path) == [4, 6, 7]
    other, _ = save(tmp_path / "other", 5), save(tmp_path, 8)
    assert checkpoint.go_back(tmp_path, 6, other)[0] == other, "of another run, but from before them"
    assert saved_steps(tmp_path) == [4, 6]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [10, 12]),
        ({"checkpoint.every": "5"}, [5, 10, 12]),
        ({"guard.every": "3"}, [3, 6, 9, 10, 12]),
        ({"train.evaluate_every": "4"}, [4, 8, 10, 12]),
    ],
)
def test_after_which_steps_a_run_must_know_whether_they_were_applied(
    overrides: dict[str, str], expected: list[int]
) -> None:
    """Those that are logged, here every twelfth; before a phase ends, here with step 10; before anything is saved,
    compared or evaluated."""
    run = Training.__new__(Training)
    run.config = configs.load(None, {"checkpoint.every": "0", "guard.every": "0", **overrides})
    run.phase = SimpleNamespace(stop=10)  # type: ignore[assignment]
    run.heldout = SimpleNamespace()  # type: ignore[assignment]
    run.telemetry = SimpleNamespace(is_logged=lambda step: step % 12 == 0)  # type: ignore[assignment]
    found = []
    for step in range(1, 13):
        run.progress = Progress(step, 4 * step, {})
        if run._must_know():
            found.append(step)
    assert found == expected


@pytest.mark.parametrize("saved", [4, 7])
def test_what_a_rewind_skips_and_saves(saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bad steps 7 to 9 all packs, or, where the only checkpoint is from between, those behind it."""
    bad = BadSteps(Guard(max_bad_steps=3))
    for step in (6, 7, 8):
        if step == saved:
            save(tmp_path, step, bad.state())
        bad.record((step, 4 * step), math.nan, False, None)
    if saved == 4:
        save(tmp_path, saved)
    run, kept, ended = Training.__new__(Training), [], []
    run.config = SimpleNamespace(train=SimpleNamespace(output=str(tmp_path)))  # type: ignore[assignment]
    run.progress, run.ledger, run.bad = Progress(9, 36, {}), Ledger(SETTINGS), bad
    run.watchdog = SimpleNamespace(long_phase=lambda *_: contextlib.nullcontext())  # type: ignore[assignment]
    run.saver = SimpleNamespace(finish_pending=lambda: None, save=kept.append)  # type: ignore[assignment]
    world = SimpleNamespace(broadcast_object=lambda value: value)
    run.mesh = SimpleNamespace(is_first=True, world=world)  # type: ignore[assignment]
    run.point = SimpleNamespace(folder=None)  # type: ignore[assignment]
    run.profile = SimpleNamespace(finish=lambda: ended.append("profile"))  # type: ignore[assignment]
    run.meter = SimpleNamespace(reset=lambda: ended.append("meter"))  # type: ignore[assignment]
    said = SimpleNamespace(say=lambda _: None, rewind=lambda _: None, write=lambda *_, **__: None)
    run.telemetry = run.audit = said  # type: ignore[assignment]
    run.bad_images = SimpleNamespace(write=lambda _: None)  # type: ignore[assignment]

    changes = Changes(new_loss=True)
    monkeypatch.setattr("megatron_lcl.train.loop.changes_since", lambda *_: changes)
    monkeypatch.setattr("megatron_lcl.train.loop.ledger_from", lambda _config, _before, ledger: ledger)

    def go_to(folder: Path, progress: Progress, since: Changes) -> None:
        assert (folder, since) == (checkpoint.step_folder(tmp_path, saved), changes)
        run.progress = progress

    monkeypatch.setattr(run, "_go_to", go_to)
    run._rewind()
    assert ended == ["profile", "meter"]
    (progress,) = kept
    assert (progress.step, progress.packs) == (saved, 4 * saved)
    assert (progress.guard["consecutive"], progress.guard["rewinds"]) == (0, 1)
    first = max(24, 4 * saved)
    (skip,) = Ledger.from_json(progress.ledger).entries
    assert (skip["from_pack"], skip["from_pack"] + skip["skip"]) == (first, 36)


def test_a_copy_of_what_was_gone_back_from_is_not_restored(place: str, tmp_path: Path) -> None:
    mirror, keep = Mirror(place), Checkpoint(keep_last=1)
    mirror.upload(save(tmp_path / "run", 90), keep)
    mirror.upload(save(tmp_path / "run", 103), None)  # between bad steps
    assert mirror.complete() == ["step-00000090", "step-00000103"]
    checkpoint.delete(checkpoint.step_folder(tmp_path / "run", 103))
    mirror.upload(save(tmp_path / "run", 100), keep, reached=103)
    assert mirror.complete() == ["step-00000100"]
    assert mirror.restore(tmp_path / "other") == checkpoint.step_folder(tmp_path / "other", 100)


def test_a_checkpoint_is_replaced_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is saved again; the process is killed, or the name cannot be given, before the new one has it."""
    old, new = save(tmp_path, 4), tmp_path / CHECKPOINTS / ".step-00000004.tmp"
    save(tmp_path / "later", 4, {"rewinds": 1}).rename(new)
    rename = Path.rename

    def failing(error: type[BaseException]) -> None:
        def fail(path: Path, target: Path) -> Path:
            if path == new:
                raise error
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", fail)

    failing(OSError)
    with pytest.raises(OSError):
        checkpoint.give_name(new, old)
    assert saved_steps(tmp_path) == [4]
    failing(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.give_name(new, old)
    assert saved_steps(tmp_path) == []
    monkeypatch.setattr(Path, "rename", rename)

    def resume(run: Path, *_: Any) -> None:
        assert checkpoint.newest(checkpoint.list_checkpoints(run)) == (old, {})
        raise UserError("as it was")

    monkeypatch.setattr(resume_point, "_from", resume)
    monkeypatch.setattr(resume_point, "check_output", lambda *_: None)
    config = SimpleNamespace(
        train=SimpleNamespace(output=str(tmp_path)), checkpoint=SimpleNamespace(mirror=None, resume="auto")
    )
    with pytest.raises(UserError, match="as it was"):
        resume_point._resolve(config, {}, 1, Memory(0, ""))  # type: ignore[arg-type]
    checkpoint.give_name(new, old)
    assert checkpoint.read_progress(old).guard == {"rewinds": 1}
    checkpoint.clear_leftovers(tmp_path / CHECKPOINTS)
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["step-00000004"]


def test_the_only_checkpoint_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails while one is replaced: the new one does not get its name, nor the old one its own again."""
    old, new = save(tmp_path, 4), tmp_path / CHECKPOINTS / ".step-00000004.tmp"
    save(tmp_path / "new", 4).rename(new)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == old:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError):
        checkpoint.give_name(new, old)
    assert saved_steps(tmp_path) == []
    checkpoint.clear_leftovers(tmp_path / CHECKPOINTS)
    assert checkpoint.go_back(tmp_path, 5, None) == (None, {})
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == [".step-00000004.replaced"]
    monkeypatch.setattr(Path, "rename", rename)
    assert checkpoint.leftover_bytes(tmp_path / CHECKPOINTS) == 0
    checkpoint.clear_leftovers(tmp_path / CHECKPOINTS)
    assert checkpoint.newest(checkpoint.list_checkpoints(tmp_path)) == (old, {})
    old.rename(tmp_path / CHECKPOINTS / ".step-00000004.replaced")
    assert checkpoint.go_back(tmp_path, 5, None) == (old, {}), "before the next save"
