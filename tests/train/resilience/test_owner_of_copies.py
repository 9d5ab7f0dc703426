"""Copies of checkpoints are those of one run: which one that is, on this machine and on others."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import saved, with_config

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.manifest import verify
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG
from megatron_lcl.train import resume_point
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
from megatron_lcl.train.checkpoint.folder import list_checkpoints
from megatron_lcl.train.checkpoint.mirror import RUN, Mirror, Owner
from megatron_lcl.train.memory import Memory


def claim(place: str, output: str) -> None:
    """As a start does, which has made its folder."""
    Path(output).mkdir(parents=True, exist_ok=True)
    Mirror(place).claim(output)


def test_copies_are_of_one_run(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run would go on from them, whatever it is to resume, and delete them. The own one may be elsewhere."""
    monkeypatch.chdir(tmp_path)

    def config(output: str, **fields: str) -> Config:
        return configs.from_dict({"train": {"output": output}, "checkpoint": {"mirror": place, **fields}})

    mirror, trunk = Mirror(place), config("runs/trunk")
    folder = saved(tmp_path, 4)
    mirror.upload(folder, None)
    assert mirror.owner() is None, "nothing says whose it is"
    mirror.upload(with_config(folder, trunk), None)
    said = f"{place} has the copies of the run with train.output = runs/trunk, and this one has .*cooled: give"
    for known in ("by the copy's config, as of earlier versions", "by what was noted"):
        for output in ("runs/trunk", "runs/trunk/"):
            mirror.check_owner(output)
        with pytest.raises(UserError, match=said) as refusal:
            mirror.check_owner("runs/cooled")
        assert "delete" not in str(refusal.value), "on a new machine there may be no other checkpoints"
        with pytest.raises(UserError, match=said):
            resume_point._resolve(config(str(tmp_path / "cooled"), resume=str(folder)), {}, 1, Memory(0, ""))
        assert mirror.complete() == [folder.name], known
        claim(place, "runs/trunk")
    remedy = str(refusal.value).partition("if this is that run under another name, write ")[2].rpartition(" to ")
    assert remedy[2] == f"{place}/{RUN}"
    Store(place).put(RUN, remedy[0].encode())
    assert mirror.check_owner("runs/cooled") == Owner("runs/cooled")
    claim(place, "runs/cooled")
    assert mirror.owner() == Owner.of("runs/cooled"), "what the text alone did not say"
    claim(f"{place}/new", "runs/a")
    with pytest.raises(UserError, match=rf"of the run with train\.output = runs/a, .* delete {place}/new/{RUN}"):
        claim(f"{place}/new", "runs/b")  # before either has a checkpoint


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((RUN, content) for content in (b"[]", b"\xff", b"{", b'{"train.output": null}', b'{"name": "run"}')),
        (RUN, b'{"train.output": "runs/a", "inode": "1"}'),
        *((f"step-00000004/{CONFIG}", content) for content in (b"[]", b"\xff", b"{", b"train:", b"train: {output: 5}")),
    ],
)
def test_copies_that_do_not_say_whose_they_are(place: str, tmp_path: Path, name: str, content: bytes) -> None:
    Mirror(place).upload(saved(tmp_path, 4), None)
    Store(place).put(name, content)
    with pytest.raises(UserError, match=rf"{place}/{name} does not say of which run .* to {place}/{RUN}, with"):
        Mirror(place).check_owner("runs/a")


def test_a_run_keeps_its_copies_under_another_name(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that has been renamed, or by another path to it; a copy of it, and a branch, are other runs."""
    monkeypatch.chdir(tmp_path)
    mirror = Mirror(place)

    def fits(run: Path, config: Config, *_: Any) -> None:
        (run / CONFIG).write_text(configs.to_yaml(config))

    monkeypatch.setattr(resume_point, "_from", fits)

    def begin(output: str) -> str:
        """As a start does, which fits the run."""
        Path(output).mkdir(parents=True, exist_ok=True)
        config = configs.from_dict({"train": {"output": output}, "checkpoint": {"mirror": place}})
        resume_point._resolve(config, {}, 1, Memory(0, ""))
        owner = mirror.owner()
        assert owner == Owner.of(output)
        return owner.output

    assert begin("runs/lcl") == "runs/lcl"
    trunk = configs.from_dict({"train": {"output": "runs/lcl"}})
    newest = with_config(saved(tmp_path / "runs" / "lcl" / CHECKPOINTS, 4), trunk)
    mirror.upload(newest, None)
    Path("link").symlink_to("runs/lcl")
    for output in (str(tmp_path / "runs" / "lcl"), "link", "runs/lcl"):
        assert begin(output) == output
    shutil.copytree("runs/lcl", "copied")
    another = pytest.raises(UserError, match=r"of the run with train\.output = runs/lcl, and this one has")
    with another:
        begin("copied")
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")  # from where the text names nothing
    shutil.copytree("../runs/lcl", "copied")
    with another:
        begin("copied")
    assert mirror.check_owner(str(tmp_path / "runs" / "lcl")) is not None, "from anywhere"
    monkeypatch.chdir(tmp_path)
    shutil.move("runs", "unmounted")
    for there in ((), ("runs",)):  # the empty folder to which it is mounted
        for folder in there:
            Path(folder).mkdir()
        with another:
            begin("copied")
    Path("runs").rmdir()
    shutil.move("unmounted", "runs")
    shutil.move("runs/lcl", "runs/final")
    with monkeypatch.context() as on_another_machine:
        on_another_machine.setattr(socket, "gethostname", lambda: "another")
        with another:
            begin("runs/final")
    (branch := Path("branch") / CHECKPOINTS).mkdir(parents=True)
    shutil.copytree(Path("runs", "final", CHECKPOINTS, newest.name), branch / newest.name)
    Path("branch", CONFIG).write_text(configs.to_yaml(configs.replace(trunk, train__output="branch")))
    changed = shutil.copytree(Path("runs/final"), Path("changed"))
    with_config(changed / CHECKPOINTS / newest.name, configs.replace(trunk, train__steps=5))
    for output in ("branch", "changed", "empty"):
        with another:
            begin(output)
    Path("recycled").mkdir()
    noted = json.loads(Store(place).get(RUN))
    Store(place).put(RUN, json.dumps({**noted, "inode": Path("recycled").stat().st_ino}).encode())
    with another:
        begin("recycled")
    Store(place).put(RUN, json.dumps({"train.output": noted["train.output"]}).encode())  # as earlier versions did
    with another:
        begin("runs/final")
    Store(place).put(RUN, json.dumps(noted).encode())
    put = Store.put

    def no_answer(self: Store, *arguments: Any) -> None:
        monkeypatch.setattr(Store, "put", put)
        raise StorageError(f"{self.url} does not answer")

    monkeypatch.setattr(Store, "put", no_answer)
    with pytest.raises(StorageError, match="does not answer"):
        begin("runs/final")
    assert begin("runs/final") == "runs/final"


def test_what_was_fetched_outlives_storage_that_does_not_answer(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fits the run, and is found by the next start."""
    Mirror(place).upload(saved(tmp_path / "steps", 4), None)
    config = configs.from_dict({"train": {"output": str(tmp_path / "run")}, "checkpoint": {"mirror": place}})
    monkeypatch.setattr(resume_point, "_from", lambda run, *_: list_checkpoints(run))
    put = Store.put

    def no_answer(self: Store, *arguments: Any) -> None:
        raise StorageError(f"{self.url} does not answer")

    monkeypatch.setattr(Store, "put", no_answer)
    with pytest.raises(StorageError, match="does not answer"):
        resume_point._resolve(config, {}, 1, Memory(0, ""))
    (fetched,) = list_checkpoints(tmp_path / "run")
    assert verify(fetched) == []
    monkeypatch.setattr(Store, "put", put)
    monkeypatch.setattr(Store, "fetch", lambda *_: pytest.fail("it is there"))
    assert resume_point._resolve(config, {}, 1, Memory(0, "")) == [fetched]


def test_a_start_that_is_refused_leaves_the_place_to_others(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(run: str) -> Config:
        (tmp_path / run).mkdir()
        return configs.from_dict({"train": {"output": str(tmp_path / run)}, "checkpoint": {"mirror": place}})

    def refused(*_: Any) -> None:
        raise UserError("no room for the model")

    monkeypatch.setattr(resume_point, "_from", refused)
    with pytest.raises(UserError, match="no room"):
        resume_point._resolve(config("a"), {}, 1, Memory(0, ""))
    assert Mirror(place).owner() is None
    monkeypatch.chdir(tmp_path)

    def another_begins(*_: Any) -> None:
        claim(place, "runs/quicker")

    monkeypatch.setattr(resume_point, "_from", another_begins)
    with pytest.raises(UserError, match=r"of the run with train\.output = runs/quicker, which has none there yet"):
        resume_point._resolve(config("b"), {}, 1, Memory(0, ""))
    put = Store.put

    def overtaken(self: Store, name: str, content: bytes | Path) -> None:
        put(self, name, content)
        put(self, name, b'{"train.output": "runs/slower"}')

    monkeypatch.setattr(Store, "put", overtaken)
    with pytest.raises(UserError, match=r"of the run with train\.output = runs/slower"):
        claim(f"{place}/other", "runs/b")


def test_nothing_is_copied_over_the_copies_of_another_run(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that began at once both may have believed that the place is theirs."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    checkpointer = object.__new__(Checkpointer)
    checkpointer.config = configs.from_dict({"train": {"output": str(run)}, "checkpoint": {"mirror": place}})
    checkpointer._reached = 4
    folder, mirror = saved(run / CHECKPOINTS, 4), Mirror(place)
    claim(place, "runs/other")
    said = checkpointer._copy(folder, None)
    assert (
        f"the run with train.output = runs/other, which has none there yet, and this one has train.output = {run}"
        in said
    )
    assert mirror.complete() == []
    Store(place).delete([RUN])
    assert checkpointer._copy(folder, None) == ""
    assert mirror.complete() == [folder.name]
