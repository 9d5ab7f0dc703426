"""Copies of checkpoints in object storage: complete or not there, and enough to go on from without the run folder."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import saved
from fleet import Fleet, losses, train
from s3_fixtures import readable_by_all
from s3_server import Proxy

from megatron_lcl import config as configs
from megatron_lcl.config import Checkpoint, Config
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text, read_manifest, verify
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG, METRICS
from megatron_lcl.train import resume_point
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.folder import list_checkpoints
from megatron_lcl.train.checkpoint.mirror import RUN, Mirror
from megatron_lcl.train.memory import Memory


def planted(rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)


def slow_copies(rank: int, environment: dict[str, str], copied: str) -> None:
    """Copying takes the first process longer than all else that is left to do."""
    planted(rank, environment)
    upload = Mirror.upload

    def slow(self: Mirror, *arguments: Any) -> None:
        time.sleep(4.0)
        upload(self, *arguments)
        Path(copied).touch()

    Mirror.upload = slow  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "background", "code"), [(2, "true", 0), (2, "false", 0), (5000, "true", 75)])
def test_no_process_ends_while_the_first_one_copies(
    steps: int, background: str, code: int, place: str, config_file: str, tmp_path: Path
) -> None:
    """A launcher would end that one too. With 5000 steps a signal ends the run."""
    copied, (environment,) = tmp_path / "copied", fleet_options()["planted"]
    words = ["--config", config_file, "--train.steps", str(steps), "--checkpoint.background", background]
    words += ["--checkpoint.mirror", place, "--checkpoint.every", "5000"]
    with Fleet(tmp_path / "run", *words, plant=slow_copies, planted=(environment, str(copied))) as fleet:
        if code:
            fleet.wait_for_step(1)
            os.kill(fleet.pid(1), signal.SIGTERM)
        assert fleet.wait(ranks=[1])[1] == code, fleet.said()
        assert copied.exists()
        assert fleet.wait() == [code, code]
    assert len(Mirror(place).complete()) == 1


def fleet_options() -> dict[str, Any]:
    return {"plant": planted, "planted": ({name: x for name, x in os.environ.items() if name.startswith("AWS_")},)}


@pytest.mark.slow
def test_a_run_goes_on_from_the_copy(
    s3: Proxy, place: str, config_file: str, undisturbed: list[tuple], tmp_path: Path
) -> None:
    words = ["--config", config_file, "--checkpoint.mirror", place]
    second, mirror = tmp_path / "second", Mirror(place)
    s3.unavailable, s3.latency = 9, 0.01
    with Fleet(second, *words, "--checkpoint.keep_last", "1", **fleet_options()) as fleet:
        fleet.wait_for(lambda: bool(mirror.complete()))
        fleet.kill()
    s3.reset()
    step = int(mirror.complete()[-1].removeprefix("step-"))
    shutil.rmtree(second)  # the machine is gone
    said = train(second, *words, "--checkpoint.keep_last", "2", **fleet_options())
    assert "going on from" in said
    assert losses(second) == [line for line in undisturbed if line[0] > step]
    assert mirror.complete() == ["step-00000008", "step-00000012"]
    assert {name.split("/")[0] for name, _ in Store(place).list()} == {*mirror.complete(), RUN}
    assert mirror.restore(tmp_path / "third") is not None
    restored, own = (tmp_path / run / CHECKPOINTS / "step-00000012" for run in ("third", "second"))
    assert verify(restored) == []
    for file in restored.rglob("*"):
        if file.is_file():
            assert file.read_bytes() == (own / file.relative_to(restored)).read_bytes()
    shutil.rmtree(tmp_path / "third" / CHECKPOINTS)
    branch = [*words, "--resume", str(own), "--train.steps", "16"]
    said = train(tmp_path / "third", *branch, code=2, size=1, **fleet_options())
    assert f"has the copies of the run with train.output = {second}, and this one has" in said
    assert mirror.complete() == ["step-00000008", "step-00000012"]
    shutil.move(second, aside := tmp_path / "aside")
    restored = mirror.restore(second)
    for there in (restored, f"{place}/step-00000012"):
        said = train(second, *words, "--optimizer.lr", "0.5", code=2, size=1, **fleet_options())
        assert f"{there} has made 12 of 12 steps with optimizer.lr = 0.01 where this command has 0.5" in said
        assert "or another train.output and checkpoint.mirror" in said
        shutil.rmtree(second)
    shutil.move(aside, second)
    Store(place).delete([f"step-00000012/{MANIFEST}"])
    for _ in range(2):
        assert "finished: 12 of 12 steps" in train(second, *words, **fleet_options())
        assert mirror.complete() == ["step-00000008", "step-00000012"], "the copy is made up"
    shutil.rmtree(own)
    said = train(second, *words, code=2, size=1, **fleet_options())
    assert f"the copy {place}/step-00000012 is later than {own.with_name('step-00000008')}" in said
    shutil.rmtree(own.parent)
    before = losses(second)
    assert "its lines are now in" not in train(second, *words, **fleet_options())
    assert verify(own) == []
    assert losses(second) == before, "the copies are the same run's"
    for scheme, folder in (("s3", place), ("http", readable_by_all(s3, place))):
        run, resume = tmp_path / scheme, f"{folder}/step-00000008"
        said = train(run, "--config", config_file, "--checkpoint.resume", resume, **fleet_options())
        assert "going on from" in said
        assert losses(run) == [line for line in undisturbed if line[0] > 8], "to the last bit"
    shutil.rmtree(run / CHECKPOINTS)
    said = train(run, "--config", config_file, "--checkpoint.resume", resume, **fleet_options())
    assert "metrics.jsonl tells of a checkpoint of step 12" in said, "what was fetched is another run's"
    assert len(list(run.glob("metrics-*.jsonl"))) == 1


@pytest.mark.slow
def test_a_run_goes_on_without_copies(s3: Proxy, config_file: str, undisturbed: list[tuple], tmp_path: Path) -> None:
    words = ["--config", config_file, "--checkpoint.mirror"]
    said = train(tmp_path / "none", *words, "s3://nowhere/run", code=2, **fleet_options())
    assert "there is no bucket 'nowhere'" in said
    assert not (tmp_path / "none" / CHECKPOINTS).exists()
    said = train(tmp_path / "path", *words, "copies", code=2, **fleet_options())
    assert "give a URL" in said
    assert losses(tmp_path / "none") == []


def test_a_copy_is_complete_or_not_there(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, keep = Mirror(place), Checkpoint(keep_last=2, keep_every=10)
    put, left = Store.put, [0]

    def failing(self: Store, name: str, content: bytes | Path) -> None:
        if not left[0]:
            raise ConnectionError
        left[0] -= 1
        put(self, name, content)

    monkeypatch.setattr(Store, "put", failing)
    for allowed in range(4):
        left[0] = allowed
        folder = saved(tmp_path / str(allowed), 10)
        if allowed < 3:
            with pytest.raises(ConnectionError):
                mirror.upload(folder, keep)
            assert mirror.complete() == []
            assert mirror.restore(tmp_path / "run") is None
        else:
            mirror.upload(folder, keep)
    assert mirror.complete() == ["step-00000010"]
    monkeypatch.setattr(Store, "put", put)
    Store(place).put("step-00000011/model.safetensors", b"of a copy that was interrupted")
    Store(place).put("other", b"no checkpoint")
    for number, step in enumerate((12, 13, 14, 13)):
        mirror.upload(saved(tmp_path / f"{step}-{number}", step), keep, reached=step)
    assert mirror.complete() == ["step-00000010", "step-00000013", "step-00000014"], "the last one may be another's"
    mirror.upload(saved(tmp_path / "back", 13), keep, reached=14)  # the run has gone back from step 14
    assert mirror.complete() == ["step-00000010", "step-00000013"]
    gone: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(type(mirror.store), "delete", lambda self, names: gone.extend(names))
        mirror._delete(["step-00000013"])
    assert gone[0] == "step-00000013/manifest.json" != gone[-1], "what is left of an interrupted deletion is no copy"
    assert {name.split("/")[0] for name, _ in Store(place).list()} == {"other", *mirror.complete()}
    Store(place).put("step-00000013/model.safetensors", b"damaged")
    with pytest.raises(UserError, match=r"step-00000013 is later than .*step-00000010, .* remove .*checkpoints; to go"):
        mirror.restore(saved(tmp_path / "behind" / CHECKPOINTS, 10).parents[1])
    with pytest.raises(RunError, match=r"step-00000013 is damaged \(model.safetensors: 7 bytes"):
        mirror.restore(tmp_path / "run")
    assert not (tmp_path / "run" / CHECKPOINTS / "step-00000013").exists()


def test_a_copy_that_is_replaced_leaves_no_file(place: str, tmp_path: Path) -> None:
    """As after a rewind at another layout, whose state has other files."""
    earlier, other = saved(tmp_path / "earlier", 4), saved(tmp_path, 14)
    (earlier / "state" / "b.pt").write_bytes(b"of another process")
    files = {**read_manifest(earlier), "state/b.pt": fingerprint(earlier / "state" / "b.pt")}
    (earlier / MANIFEST).write_text(manifest_text(files))
    for folder in (earlier, other, saved(tmp_path, 4)):
        Mirror(place).upload(folder, None)
    there = {f"{step}/{name}" for step in ("step-00000004", "step-00000014") for name in read_manifest(other)}
    there |= {f"{step}/{MANIFEST}" for step in ("step-00000004", "step-00000014")}
    assert {name for name, _ in Store(place).list()} == there


@pytest.mark.parametrize("absolute", [True, False])
def test_a_copy_writes_nothing_outside_of_its_folder(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    """Its manifest is somebody else's, and read before anything that is a pickle."""
    mine, run = tmp_path / "mine" / "file", tmp_path / "run"
    folder, name = saved(tmp_path / "steps", 4), str(mine) if absolute else "state/../../../../../mine/file"
    (tmp_path / "theirs").write_bytes(b"theirs")
    files = {**read_manifest(folder), name: fingerprint(tmp_path / "theirs")}
    (folder / MANIFEST).write_text(manifest_text(files))
    for file in (path for path in folder.rglob("*") if path.is_file()):
        Store(place).put(f"{folder.name}/{file.relative_to(folder).as_posix()}", file)
    if absolute:
        Store(place).put(f"{folder.name}{name}", b"theirs")
    config = configs.from_dict({"train": {"output": str(run)}, "checkpoint": {"resume": f"{place}/{folder.name}"}})
    monkeypatch.setattr(resume_point, "_from", lambda *_: pytest.fail("it is not to be resumed from"))
    said = rf"{folder.name} is damaged \({MANIFEST}: names a file outside of its folder \({name}\)\)"
    with pytest.raises(RunError, match=said):
        resume_point._resolve(config, {}, 1, Memory(0, ""))
    assert not mine.parent.exists()
    assert list((run / CHECKPOINTS).iterdir()) == []


def test_a_url_to_go_on_from(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run folder that was copied whole, or one checkpoint; what does not fit the run is not left to it."""
    for step in (4, 8):
        folder = saved(tmp_path / "steps", step)
        for file in (path for path in folder.rglob("*") if path.is_file()):
            Store(f"{place}/{CHECKPOINTS}/{folder.name}").put(file.relative_to(folder).as_posix(), file)

    def config(run: str, resume: str) -> Config:
        return configs.from_dict({"train": {"output": str(tmp_path / run)}, "checkpoint": {"resume": resume}})

    one = f"{CHECKPOINTS}/step-00000004"
    web = f"{readable_by_all(s3, place)}/{one}"
    monkeypatch.setattr(resume_point, "_from", lambda run, *arguments: (list_checkpoints(run), arguments[-1]))
    for run, resume, step in (("newest", place, 8), ("one", f"{place}/{one}", 4), ("web", web, 4)):
        restored = tmp_path / run / CHECKPOINTS / f"step-{step:08d}"
        assert resume_point._resolve(config(run, resume), {}, 1, Memory(0, "")) == ([restored], False)
        assert verify(restored) == []
        again = resume_point._resolve(config(run, place), {}, 1, Memory(0, ""))
        assert again == ([restored], True), "it has one of its own, though the command was killed before a config"

    def refused(run: Path, *_: Any) -> None:
        assert len(list(run.rglob("model.safetensors"))) == 1
        raise UserError(f"{list_checkpoints(run)[0]} is of another model")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(resume_point, "_from", refused)
    fetch = Store.fetch
    monkeypatch.setattr(Store, "fetch", killed)
    with pytest.raises(KeyboardInterrupt):
        resume_point._resolve(config("other", place), {}, 1, Memory(0, ""))
    monkeypatch.setattr(Store, "fetch", fetch)
    for _ in range(2):  # what a fetch leaves that was interrupted, or refused, is no other's
        with pytest.raises(UserError, match=f"{place}/{CHECKPOINTS}/step-00000008 is of another model"):
            resume_point._resolve(config("other", place), {}, 1, Memory(0, ""))
        assert list((tmp_path / "other" / CHECKPOINTS).iterdir()) == []
    (tmp_path / "other" / CONFIG).write_text(configs.to_yaml(config("other", place)))
    (metrics := tmp_path / "other" / METRICS).write_text('{"step": 12, "checkpoint_bytes": 9}\n')
    monkeypatch.setattr(resume_point, "_from", killed)
    for _ in range(2):  # at the second start what was fetched is the run's own
        with pytest.raises(KeyboardInterrupt):
            resume_point._resolve(config("other", place), {}, 1, Memory(0, ""))
        assert not metrics.exists(), "they are another run's"
    assert len(list(metrics.parent.glob("metrics-*.jsonl"))) == 1
    assert capsys.readouterr().err.count("metrics.jsonl tells of a checkpoint of step 12") == 1
    shutil.rmtree(list_checkpoints(tmp_path / "other")[0])
    (tmp_path / "other" / CONFIG).unlink()
    (tmp_path / "other" / CHECKPOINTS / "model.ckpt").touch()
    with pytest.raises(UserError, match="holds other files and no config"):
        resume_point._resolve(config("other", place), {}, 1, Memory(0, ""))


def test_what_is_kept_is_not_listed(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the other copies, thousands may be, it is only asked whether they have a manifest."""
    mirror, keep, ask = Mirror(place), Checkpoint(keep_last=1, keep_every=10), Store._ask
    listed: list[tuple[str, int]] = []

    def counting(self: Store, operation: str, *arguments: Any) -> Any:
        reply = ask(self, operation, *arguments)
        if operation == "list":
            listed.append((arguments[0], len(reply)))
        return reply

    for step in (10, 20, 30, 35):
        mirror.upload(saved(tmp_path, step), keep, step)
    monkeypatch.setattr(Store, "_ask", counting)
    mirror.upload(saved(tmp_path, 40), keep, 40)
    assert listed == [("step-00000040", 0), ("", 5), ("step-00000035", 3)]
    listed.clear()
    assert mirror.restore(tmp_path / "run") is not None
    assert listed == [("", 4)]
    assert mirror.complete() == [f"step-{step:08d}" for step in (10, 20, 30, 40)]


def test_of_older_copies_it_is_asked_once(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of those on which it depends whether another one goes it is asked at every save."""
    mirror, keep, head = Mirror(place), Checkpoint(keep_last=2, keep_every=10), Store.head
    asked: list[str] = []

    def noted(self: Store, names: list[str]) -> list[Any]:
        asked.extend(name[5:13] for name in names)
        return head(self, names)

    for step in (10, 20, 30, 40):
        mirror.upload(saved(tmp_path, step), keep, step)
    monkeypatch.setattr(Store, "head", noted)
    mirror.upload(saved(tmp_path, 45), keep, 45)
    assert sorted(set(asked)) == ["00000030", "00000040", "00000045"]
    store = Store(place)
    for step in (40, 45):  # a person does so to go on from before them
        store.delete([f"step-{step:08d}/{MANIFEST}"])
    store.delete([f"step-00000030/{MANIFEST}"])
    asked.clear()
    mirror.upload(saved(tmp_path, 50), keep, 50)
    assert {"00000020", "00000030"} < set(asked), "of the one that is the second last now, too"
    assert mirror.complete() == ["step-00000010", "step-00000020", "step-00000050"]
    mirror.upload(saved(tmp_path, 15), keep, reached=50)  # the run has gone back
    mirror.upload(saved(tmp_path, 18), keep, reached=50)
    assert mirror.complete() == ["step-00000010", "step-00000015", "step-00000018"]
    store.delete([f"step-00000018/{MANIFEST}"])
    mirror.upload(saved(tmp_path, 25), keep, reached=50)
    assert mirror.complete() == ["step-00000010", "step-00000015", "step-00000025"], "the one before is no copy"
    keep = Checkpoint(keep_last=1, keep_every=10)
    for step in (30, 35):
        mirror.upload(saved(tmp_path / "anew", step), keep, reached=50)
    mirror.delete_later(25)
    store.put("step-00000030/model.safetensors", b"of a copy that was interrupted")
    mirror.upload(saved(tmp_path, 36), keep, reached=50)
    assert {name.split("/")[0] for name, _ in store.list()} == {"step-00000010", "step-00000036"}


def test_a_damaged_checkpoint_is_fetched_again(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than to go on from the one before, if the copy is whole and of this very checkpoint."""
    run, mirror, chosen = tmp_path / "run", Mirror(place), []
    older, newer = (saved(run / CHECKPOINTS, step) for step in (10, 20))
    config = configs.from_dict({"train": {"output": str(run)}, "checkpoint": {"mirror": place}})

    def damage(*folders: Path) -> None:
        for folder in folders:
            (folder / "model.safetensors").write_bytes(b"x" * 2000)

    def choose() -> tuple[Path | None, dict[Path, list[str]]]:
        with pytest.raises(UserError):
            resume_point._resolve(config, {}, 1, Memory(0, ""))
        return chosen.pop()

    def noted(*arguments: Any, **more: Any) -> Any:
        chosen.append(choose_one(*arguments, **more))
        raise UserError("enough")

    choose_one = checkpoint.choose
    monkeypatch.setattr(checkpoint, "choose", noted)
    mirror.upload(newer, None)
    fault = "model.safetensors: changed since it was written"
    damage(older, newer)
    assert choose() == (newer, {newer: [f"its copy in {place} has taken its place", fault]})
    assert verify(newer) == []
    assert checkpoint.clear_leftovers(newer.parent) == []
    assert list_checkpoints(run) == [older, newer] == sorted(newer.parent.iterdir())

    shutil.rmtree(older)
    saved(run / CHECKPOINTS, 10)
    damage(newer)
    for spoil in (
        lambda: (newer / MANIFEST).unlink(),
        lambda: (newer / MANIFEST).write_text("{}"),
        lambda: Store(place).put(f"{newer.name}/model.safetensors", b"y" * 2000),
        lambda: Store(place).delete([f"{newer.name}/model.safetensors"]),
        lambda: Store(place).delete([f"{newer.name}/{MANIFEST}"]),
    ):
        before = (newer / MANIFEST).read_bytes()
        spoil()
        assert choose()[0] == older
        assert (newer / "model.safetensors").read_bytes() == b"x" * 2000, "it stays"
        (newer / MANIFEST).write_bytes(before)
