"""Saves that fail: on all processes together, with nothing left behind, and training goes on undisturbed."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_lines import read_audit
from processes import run_processes
from small_runs import GLOBAL_BATCH, LR, Job, build_config, pack

from megatron_lcl import config as configs
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.snapshot import Snapshot


def failing_saves(rank: int, folder: str, background: bool) -> dict[str, Any]:
    """Process 1 cannot write files of more than 4 kB; then it can."""
    import torch.distributed as dist

    from megatron_lcl.train.checkpoint.checkpointer import Checkpointer, SaveError
    from megatron_lcl.train.checkpoint.folder import Progress
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = configs.replace(build_config(Path(folder), Job("run", 3)), checkpoint__background=background)
    mesh = init_processes(config)
    own = range(rank, GLOBAL_BATCH, 2)

    def prepare() -> tuple[Any, Callable[[int], tuple[float, float]]]:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)

        def run_step(step: int) -> tuple[float, float]:
            result = stepper.run([pack(step, number, config) for number in own], LR[step])
            return result.loss, result.grad_norm

        return engine, run_step

    _, undisturbed = prepare()
    expected = [undisturbed(step) for step in range(3)]
    engine, run_step = prepare()
    run, rows, said = Path(config.train.output), [], []
    leftovers = run / "checkpoints" / ".step-00000099.tmp" / "state"  # of a run that was killed
    if mesh.is_first:
        leftovers.mkdir(parents=True)
    with Checkpointer(engine, config, mesh, run) as checkpoints:
        for step in range(3):
            rows.append(run_step(step))
            if rank == 1:
                soft = 4096 if step == 1 else resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
            try:
                checkpoints.save(Progress(step + 1, (step + 1) * GLOBAL_BATCH, {}))
                checkpoints.wait()
            except SaveError as error:
                said.append((step + 1, str(error)))
                dist.barrier()
                said.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
                dist.barrier()
    dist.destroy_process_group()
    return {"rows": rows, "expected": expected, "said": said}


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_a_process_that_cannot_write(background: bool, tmp_path: Path) -> None:
    first, second = run_processes(failing_saves, 2, str(tmp_path), background)
    assert first["said"] == second["said"], "all processes raise the same, together"
    (step, message), left = first["said"]
    assert step == 2
    assert message.startswith(f"process 1 could not write the checkpoint: {tmp_path / 'run'}: File too large")
    assert left == ["step-00000001"], "nothing of the save that failed, nor of the one that was killed"
    saved = checkpoint.list_checkpoints(tmp_path / "run")
    assert [f.name for f in saved] == ["step-00000001", "step-00000003"]
    assert all(checkpoint.verify(f) == [] for f in saved)
    assert first["rows"] == first["expected"], "training has not noticed"


def life(rank: int, folder: str) -> dict[str, Any]:
    """Saves of one run in the background: what was drawn after the first, before and after going back to it; how long
    training stood still for the third, which has to wait for the second; who would be named for a hang while the first
    process finishes the second, beside training and while all wait for it; how the fourth is judged, which goes wrong.
    """
    import random

    import numpy as np
    import torch.distributed as dist

    from megatron_lcl.train.checkpoint import checkpointer
    from megatron_lcl.train.checkpoint.folder import Progress
    from megatron_lcl.train.checkpoint.saver import Saver
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.resilience import watchdog as watchdogs
    from megatron_lcl.train.resilience.audit import Audit
    from megatron_lcl.train.resilience.watchdog import Watchdog, suspects

    class Log:
        def __init__(self) -> None:
            self.lines: list[dict[str, Any]] = []
            self.write = self.lines.append

        def say(self, message: str) -> None:
            pass

    class Gone(BaseException):
        pass

    def draw() -> list[float]:  # of each pair of normal numbers the second is kept in the generator's state
        return [random.gauss(0, 1), np.random.randn(), np.random.rand(), *torch.randn(3).tolist()]

    def seed(number: int) -> None:
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    def finish_late(*arguments: Any) -> Any:
        finishing.set()
        assert go_on.wait(60)
        return finish(*arguments)

    def sequences() -> dict[str, int]:
        watchdog._publish()
        return watchdog._state.sequences

    def look_at_waits(found: list[dict[str, int]]) -> None:
        """Once this process waits for the save; it ends when all have waited for more than a second."""
        while not checkpoints._awaited:
            time.sleep(0.01)
        found.append(sequences())
        (Path(folder) / f"waits {rank}").touch()
        if mesh.is_first:
            while not all((Path(folder) / f"waits {each}").exists() for each in range(mesh.world.size)):
                time.sleep(0.01)
            time.sleep(1.1)
            go_on.set()

    def behind(own: dict[str, int]) -> list[int]:
        return suspects(dict(enumerate(mesh.world.gather_objects(own))))

    def go_wrong(*_: Any) -> Any:
        raise Gone("no more")

    config = build_config(Path(folder), Job("run"))
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    own = range(rank, GLOBAL_BATCH, 2)
    build_stepper(engine, config, mesh).run([pack(0, number, config) for number in own], LR[0])
    run, log, sync, finish = Path(config.train.output), Log(), checkpointer.sync, checkpointer.Checkpointer._finish
    synced: list[str] = []

    def noted(path: Path) -> None:
        sync(path)
        synced.append(path.name)

    checkpointer.sync = noted
    finishing, go_on = threading.Event(), threading.Event()  # the first process's
    watchdog = Watchdog(mesh.world, 60.0, 60.0, dist.HashStore())
    leftovers = (".step-00000002.tmp", ".step-00000099.old")  # links to folders are nothing that rmtree would remove
    (Path(folder) / "elsewhere" / "state").mkdir(parents=True, exist_ok=True)
    if mesh.is_first:
        (run / "checkpoints").mkdir(parents=True)
        (run / "metrics.jsonl").touch()
        for name in leftovers:
            (run / "checkpoints" / name).symlink_to(Path(folder) / "elsewhere")
    with checkpointer.Checkpointer(engine, config, mesh, run) as checkpoints:
        watchdog.leave_out(checkpoints.background_group)
        saver = Saver(checkpoints, config.checkpoint, log, Audit(run, mesh.is_first))  # type: ignore[arg-type]
        seed(rank)
        draw()
        before = set(sys.modules)
        saver.save(Progress(1, 6, {}))
        drawn = draw()
        saver.finish_pending()
        imported = set(sys.modules) - before
        seed(99)
        draw()
        checkpoints.load(checkpoint.step_folder(run, 1))
        again = draw()
        checkpointer.Checkpointer._finish = finish_late  # type: ignore[method-assign]
        saver.save(Progress(2, 12, {}))
        deadline = time.monotonic() + 60
        while not any(mesh.world.gather_objects(finishing.is_set())) or behind(watchdogs._sequences(None)) != [0]:
            assert time.monotonic() < deadline
        beside, awaited = behind(sequences()), []
        threading.Thread(target=look_at_waits, args=(awaited,), daemon=True).start()
        started = time.perf_counter()
        saver.save(Progress(3, 18, {}))
        waited = time.perf_counter() - started
        held = {"beside training": beside, "all wait": behind(awaited[0])}
        saver.finish_pending()
        checkpoints._write = go_wrong  # type: ignore[method-assign]
        saver.save(Progress(4, 24, {}))
        saver.finish_pending()
    audited = read_audit(run) if mesh.is_first else []
    dist.destroy_process_group()
    stalls = {line["step"]: line["checkpoint_stall_seconds"] for line in log.lines}
    values = {"held": held, "drawn": drawn, "again": again, "waited": waited, "stalls": stalls, "audited": audited}
    values |= {"synced": synced, "imported": imported}
    return {**values, "fault": saver.fault, "step": saver.step, "failures": saver.failures}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("life")
    return folder, run_processes(life, 2, str(folder))


@pytest.mark.slow
def test_generators_go_on_where_they_were(lives: tuple[Path, list[dict[str, Any]]]) -> None:
    """Each process's own."""
    first, second = lives[1]
    assert (first["again"], second["again"]) == (first["drawn"], second["drawn"])
    assert not set(first["drawn"]) & set(second["drawn"])


@pytest.mark.slow
def test_a_save_imports_nothing(lives: tuple[Path, list[dict[str, Any]]]) -> None:
    """A process that is forked while a thread imports a module waits for ever where it imports that, too."""
    for own in lives[1]:
        assert own["imported"] == set()


@pytest.mark.slow
def test_the_metrics_up_to_a_checkpoint_are_on_the_disk_before_it_has_its_name(
    lives: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Else a run that goes on from it after a power failure lacks their lines for ever."""
    ends = [name for name in lives[1][0]["synced"] if name in ("metrics.jsonl", "checkpoints")]
    assert ends == ["metrics.jsonl", "checkpoints"] * 3


@pytest.mark.slow
def test_the_stall_that_is_logged_is_all_the_time_that_training_waited(
    lives: tuple[Path, list[dict[str, Any]]],
) -> None:
    for own in lives[1]:
        assert own["stalls"].keys() == {1, 2, 3}
        assert 1.0 < own["stalls"][3] <= own["waited"]


@pytest.mark.slow
def test_a_save_in_the_background_holds_up_nobody_until_all_wait_for_it(
    lives: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Beside a hang in training the process that finishes a save was named, and its node excluded."""
    for own in lives[1]:
        assert own["held"] == {"beside training": [], "all wait": [0]}


@pytest.mark.slow
def test_whatever_goes_wrong_in_the_background_is_a_failed_save(lives: tuple[Path, list[dict[str, Any]]]) -> None:
    for own in lives[1]:
        assert (own["step"], own["failures"]) == (3, 1)
        assert own["fault"] == "the checkpoint was not written: Gone: no more"
    assert lives[1][0]["audited"][-1]["event"] == "checkpoint failed"


@pytest.mark.slow
def test_what_cannot_be_deleted_is_audited_and_spoils_no_save(lives: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, (first, _) = lives
    saved = checkpoint.list_checkpoints(folder / "run")
    assert [f.name for f in saved] == ["step-00000001", "step-00000002", "step-00000003"]
    assert all(checkpoint.verify(f) == [] and not f.is_symlink() for f in saved)
    assert [path.name for path in (folder / "elsewhere").rglob("*")] == ["state"], "a link is not followed"
    events = [(line["event"], line["step"], len(line["files"])) for line in first["audited"][:-1]]
    assert events == [("not deleted", step, 2) for step in (1, 2, 3)]
    assert ".step-00000099.old: Cannot call rmtree on a symbolic link" in " ".join(first["audited"][0]["files"])


def test_saves_in_the_background_share_the_memory_of_one_copy() -> None:
    """Which is not that of the weights: training changes them while the copy is written."""
    snapshot, weights, places = Snapshot(copies=True), torch.arange(3.0), set()
    for step in range(3):
        weights.fill_(step)
        snapshot.save({"weights": weights}, "file")
        ((_, content),) = snapshot.take()
        assert torch.equal(content["weights"], weights)
        places.add(content["weights"].data_ptr())
    assert len(places) == 1
    assert weights.data_ptr() not in places
