"""A run that goes back: from which checkpoint, and that it has one and knows what it skips, whatever comes between."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from audit_lines import read_audit
from bad_packs import poison, poison_and_stop, saved_steps
from fleet import losses, train

from megatron_lcl import config as configs
from megatron_lcl.config import Checkpoint, Guard
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.loading.ledger import PLANNED, Ledger
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG, PROGRESS
from megatron_lcl.train import resume_point
from megatron_lcl.train.changes import Changes
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer, SaveError
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.checkpoint.saver import Saver
from megatron_lcl.train.loop import Training
from megatron_lcl.train.memory import Memory
from megatron_lcl.train.resilience.bad_steps import BadSteps
from megatron_lcl.train.resilience.signals import Stopped

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


@pytest.mark.slow
def test_a_branch_that_was_stopped_between_bad_steps_goes_back_to_where_it_began(
    config_file: str, without: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    """It begins with step 4 of another run; steps 7 and 8 are bad, and it is stopped after step 7."""
    words, trunk, run = ["--config", config_file], tmp_path / "trunk", tmp_path / "run"
    train(trunk, *words, code=75, plant=poison_and_stop, planted=([], 4, {}))
    began = checkpoint.step_folder(trunk, 4)
    words += ["--guard.max_bad_steps", "2", "--checkpoint.resume", str(began)]
    train(run, *words, code=75, plant=poison_and_stop, planted=([26, 31], 3, {}))
    assert saved_steps(run) == [7]
    said = train(run, *words, plant=poison, planted=([26, 31], "nan"))
    assert f"steps 7 to 8 were bad: back to {began}" in said
    assert losses(run) == without[4:]
    assert saved_steps(run) == [4, 8, 12]
    assert saved_steps(trunk) == [4]


def test_where_a_branch_began(tmp_path: Path) -> None:
    """Only with what `checkpoint.resume` named from the beginning, and from before the bad steps, 7 and 8."""
    trunk, later, seven = save(tmp_path / "trunk", 4), save(tmp_path / "trunk", 7), save(tmp_path / "run", 7)
    last = save(tmp_path / "trunk", 6)

    def back(resume: Path, written: Path) -> Path | None:
        (seven / CONFIG).write_text(configs.to_yaml(configs.load(None, {"checkpoint.resume": str(written)})))
        files = {name: fingerprint(seven / name) for name in (PROGRESS, CONFIG)}
        (seven / MANIFEST).write_text(manifest_text(files))
        return checkpoint.go_back(tmp_path / "run", 6, seven, str(resume))[0]

    assert back(trunk, trunk) == trunk
    assert back(trunk, Path("auto")) == seven, "it began with nothing"
    assert back(later, later) == seven
    assert back(last, last) == last
    assert back(trunk.parents[1], trunk.parents[1]) == seven, "which of that run's is not known"
    five = save(tmp_path / "run", 5)
    shutil.copy(seven / CONFIG, five)
    assert back(trunk, trunk) == five
    (trunk / PROGRESS).write_text("damaged")
    shutil.rmtree(five)
    assert back(trunk, trunk) == seven


def test_the_checkpoint_that_a_run_goes_back_to(tmp_path: Path) -> None:
    """Steps 7 and 8 are bad; nothing is deleted before the run has saved again."""
    four, six, seven = (save(tmp_path, step) for step in (4, 6, 7))
    assert checkpoint.go_back(tmp_path, 6, seven) == (six, {})
    for gone in (seven, tmp_path / "gone"):
        assert checkpoint.go_back(tmp_path / "none", 6, gone) == ((gone, {}) if gone == seven else (None, {}))
    for folder in (four, six):
        (folder / PROGRESS).write_text("damaged")
    eight = save(tmp_path, 8)
    folder, faults = checkpoint.go_back(tmp_path, 6, seven)
    assert (folder, [*faults]) == (eight, [six, four])
    (eight / PROGRESS).write_text("damaged")
    assert checkpoint.go_back(tmp_path, 6, None)[0] == seven
    (seven / PROGRESS).write_text("damaged")
    folder, faults = checkpoint.go_back(tmp_path, 6, None)
    assert (folder, [*faults]) == (None, [six, four, eight, seven])
    other = save(tmp_path / "other", 5)
    assert checkpoint.go_back(tmp_path, 6, other)[0] == other, "of another run, but from before them"
    assert saved_steps(tmp_path) == [4, 6, 7, 8]


def rewinding(run: Path, bad: BadSteps, mirror: str | None = None) -> Any:
    """A run of 9 steps in its rewind, as far as that asks which checkpoint it goes back to."""
    training: Any = Training.__new__(Training)
    settings = SimpleNamespace(mirror=mirror, resume="auto")
    training.config = SimpleNamespace(train=SimpleNamespace(output=str(run)), checkpoint=settings)
    training.progress, training.ledger, training.bad = Progress(9, 36, {}), Ledger(SETTINGS), bad
    training.watchdog = SimpleNamespace(long_phase=lambda *_: contextlib.nullcontext())
    training.mesh = SimpleNamespace(is_first=True, world=SimpleNamespace(broadcast_object=lambda value: value))
    training.point = SimpleNamespace(folder=None)
    training.profile = SimpleNamespace(finish=lambda: None)
    training.bad_images = SimpleNamespace(write=lambda _: None)
    training.saver = SimpleNamespace(finish_pending=lambda: None)
    training.averages = SimpleNamespace(short_tails=lambda averaged, step: [f"{step}: {averaged}"])
    training.telemetry = training.audit = SimpleNamespace(say=lambda _: None, write=lambda *_, **__: None)
    return training


def test_a_run_goes_back_to_the_copy_of_a_damaged_checkpoint(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is none, to an earlier one; where that is damaged too, the run ends, and says of each why."""

    class Reached(Exception):
        pass

    def back(folder: Path) -> None:
        raise Reached(folder)

    four, six = save(tmp_path, 4), save(tmp_path, 6)
    Mirror(place).upload(six, None)
    bad = BadSteps(Guard(), {"consecutive": 3, "began": [6, 24]})
    monkeypatch.setattr("megatron_lcl.train.loop.changes_since", lambda *_: Changes())
    monkeypatch.setattr(checkpoint, "read_progress", back)
    (six / PROGRESS).write_text("damaged")
    with pytest.raises(Reached, match=six.name):
        rewinding(tmp_path, bad, place)._rewind()
    assert checkpoint.verify(six) == []
    (six / PROGRESS).write_text("damaged")
    for mirror in (None, f"{place}/nothing", "s3://no-such-bucket/run"):
        with pytest.raises(Reached, match=four.name):
            rewinding(tmp_path, bad, mirror)._rewind()
    (four / PROGRESS).write_text("damaged")
    said = rf"no checkpoint before them to go back to \({six.name}: {PROGRESS}: .*; {four.name}: {PROGRESS}: .*\); a"
    with pytest.raises(RunError, match=said):
        rewinding(tmp_path, bad)._rewind()
    assert Mirror(place).complete() == [six.name]


def test_copies_of_what_a_run_goes_back_from_are_deleted_before_the_others(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two, the run goes on from the later one, and back again; no copy is later than all."""
    Path(tmp_path / "run").mkdir()
    mirror, there = Mirror(place), []
    for step in (4, 7, 8):
        mirror.upload(save(tmp_path / "run", step), None, reached=step)
    checkpointer: Any = Checkpointer.__new__(Checkpointer)
    checkpointer.config = configs.from_dict(
        {"train": {"output": str(tmp_path / "run")}, "checkpoint": {"mirror": place, "keep_last": 1}}
    )
    mirror.claim(str(tmp_path / "run"))
    checkpointer.run, checkpointer.back_to = tmp_path / "run", 4
    tidy = checkpoint.tidy

    def watched(*arguments: Any) -> list[str]:
        there.append((saved_steps(tmp_path / "run"), mirror.complete()))
        return tidy(*arguments)

    monkeypatch.setattr(checkpoint, "tidy", watched)
    for guard in ({}, {"consecutive": 1}):
        checkpointer._tidy(Progress(4, 16, {}, guard))
    assert there[0] == ([4, 7, 8], ["step-00000004"])
    assert there[1] == ([4], ["step-00000004"])
    save(tmp_path / "run", 5)
    checkpointer._tidy(Progress(4, 16, {}))
    assert saved_steps(tmp_path / "run") == [4, 5], "of a rewind one save is the first"


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
    run.heldout, run.save_due = SimpleNamespace(), False  # type: ignore[assignment]
    run.telemetry = SimpleNamespace(is_logged=lambda step: step % 12 == 0)  # type: ignore[assignment]
    found = []
    for step in range(1, 13):
        run.progress = Progress(step, 4 * step, {})
        if run._must_know():
            found.append(step)
    assert found == expected
    run.save_due, run.progress = True, Progress(1, 4, {})
    assert run._must_know(), "after each step until the state may be saved"


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
    run, kept, ended = rewinding(tmp_path, bad), [], []
    run.saver.save, run.saver.go_back_to = kept.append, lambda *back: ended.append(back)
    run.profile = SimpleNamespace(finish=lambda: ended.append("profile"))
    run.meter = SimpleNamespace(reset=lambda: ended.append("meter"))
    run.telemetry.rewind, run.telemetry.say = lambda _: None, ended.append

    changes = Changes(new_loss=True)
    monkeypatch.setattr("megatron_lcl.train.loop.changes_since", lambda *_: changes)
    monkeypatch.setattr("megatron_lcl.train.loop.ledger_from", lambda _config, _before, ledger: ledger)

    def go_to(folder: Path, progress: Progress, since: Changes) -> None:
        assert (folder, since) == (checkpoint.step_folder(tmp_path, saved), changes)
        run.progress = progress

    monkeypatch.setattr(run, "_go_to", go_to)
    run._rewind()
    assert ended.pop(1).startswith("steps 7 to 9 were bad: back to")
    assert ended == ["profile", f"{saved}: {{}}", "meter", (checkpoint.step_folder(tmp_path, saved), saved)]
    (progress,) = kept
    assert (progress.step, progress.packs) == (saved, 4 * saved)
    assert (progress.guard["consecutive"], progress.guard["rewinds"]) == (0, 1)
    first = max(24, 4 * saved)
    (skip,) = Ledger.from_json(progress.ledger).entries
    assert (skip["from_pack"], skip["from_pack"] + skip["skip"]) == (first, 36)


def test_a_stop_saves_what_a_rewind_could_not(tmp_path: Path) -> None:
    """Which packs it skips, and how many rewinds there were: no step has counted since."""
    run, there, saved = rewinding(tmp_path, BadSteps(Guard(), {"rewinds": 1})), save(tmp_path, 4), []

    def write(progress: Progress, _since: float) -> Path:
        saved.append(progress)
        if len(saved) == 1:
            raise SaveError("no space")
        return there

    checkpoints: Any = SimpleNamespace(save=write, wait=lambda: None, finished=lambda: [], wait_for_all=lambda: None)
    run.saver, run.checkpoints = Saver(checkpoints, Checkpoint(), run.telemetry, run.audit), checkpoints
    run.progress, run.loader, run.signals = Progress(4, 16, {}), None, SimpleNamespace()
    run.meter = SimpleNamespace(waiting=contextlib.nullcontext)
    run._stop_requested, run._compare_replicas, run.unread = lambda: 15, lambda: None, []
    run.saver.go_back_to(there, 4)
    assert checkpoints.back_to == 4
    run.saver.save(replace(run.progress, guard=run.bad.state()))
    run.saver.finish_pending()
    with pytest.raises(Stopped):
        run._stop_if_requested()
    assert [(progress.step, progress.guard["rewinds"]) for progress in saved] == [(4, 1), (4, 1)]
    with pytest.raises(Stopped):
        run._stop_if_requested()
    assert len(saved) == 2, "it is saved now"


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
