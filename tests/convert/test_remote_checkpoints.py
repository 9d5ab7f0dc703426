"""What lies in object storage is read as what lies on the disk: copied whole, once, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from convert.conftest import TINY, random_model
from s3_fixtures import readable_by_all
from s3_server import Proxy

from megatron_lcl import LCL, load_model
from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.convert import remote
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.convert.find import find_average
from megatron_lcl.convert.folder import RECORDS, write_record
from megatron_lcl.convert.manifest import fingerprint, manifest_text
from megatron_lcl.data.corpus import cache_folders, owners
from megatron_lcl.data.storage.store import Store
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.untrained import untrained_model
from megatron_lcl.parallel.mesh import ALONE
from megatron_lcl.run_folder import AVERAGES
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights, load_initial_weights
from megatron_lcl.train.checks import check_beginning


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "megatron_lcl"


def checkpoint(folder: Path, model: LCL) -> Path:
    """As a run writes it, with an average and more that only a resumed run reads."""
    for each in (folder, folder / AVERAGES / "ema_0.9"):
        each.mkdir(parents=True)
        save_checkpoint(model, Config(model=model.config), each)
    (folder / "state").mkdir()
    (folder / "state" / "optimizer.pt").write_bytes(b"state")
    (folder / "progress.json").write_bytes(b"{}")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    (folder / "manifest.json").write_text(manifest_text({name: fingerprint(folder / name) for name in names}))
    return folder


def imported(folder: Path, model: LCL) -> Path:
    folder.mkdir()
    save_checkpoint(model, Config(model=model.config), folder)
    write_record(folder, "import", {})
    return folder


def put(folder: Path, place: str) -> None:
    for file in (path for path in folder.rglob("*") if path.is_file()):
        Store(place).put(file.relative_to(folder).as_posix(), file)


@pytest.fixture
def run(place: str, tmp_path: Path) -> str:
    """The URL of two checkpoints of a run, of seeds 1 and 2, and of one that is not whole."""
    for step in (1, 2, 3):
        folder = checkpoint(tmp_path / "run" / f"step-{step:08d}", random_model(seed=step))
        if step == 3:
            (folder / "manifest.json").unlink()
    put(tmp_path / "run", place)
    shutil.rmtree(tmp_path / "run")
    return place


def same(one: LCL, other: LCL) -> bool:
    others = dict(other.layers.named_parameters())
    return all(torch.equal(value, others[name]) for name, value in one.layers.named_parameters())


def test_a_url_means_what_a_path_does(run: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(load_model(run), random_model(seed=2))
    assert same(load_model(f"{run}/step-00000001"), random_model(seed=1))
    assert len(list(cache.glob("checkpoint-*/step-*"))) == 2
    untrained, config = untrained_model(run, 1)
    assert config.model == TINY, "as a baseline"
    assert same(untrained, LCL(TINY, 1))
    put(imported(tmp_path / "imported", random_model(seed=4)), f"{run}/more")
    assert same(load_model(f"{run}/more"), random_model(seed=4))

    def fetch(*_: object) -> None:
        raise AssertionError("it is there")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "fetch", fetch)
        assert same(load_model(run), random_model(seed=2))
    put(checkpoint(tmp_path / "other", random_model(seed=5)), f"{run}/step-00000001")  # another one at this place
    assert same(load_model(f"{run}/step-00000001"), random_model(seed=5))


def test_of_a_checkpoint_only_the_weights_that_are_wanted_are_fetched(s3: Proxy, run: str) -> None:
    step = f"{run.removeprefix('s3:/')}/step-00000002"

    def asked() -> set[str]:
        paths = {request.path for request in s3.requests if request.path.startswith(f"{step}/")}
        s3.reset()
        return {path.removeprefix(f"{step}/") for path in paths}

    about = {*RECORDS, "config.yaml", "progress.json", f"{AVERAGES}/ema_0.9/config.yaml"}
    s3.reset()
    assert same(load_model(run), random_model(seed=2))
    assert asked() == {*about, "model.safetensors"}
    average = find_average(Path(run), "ema_0.9")
    assert asked() == {*about, f"{AVERAGES}/ema_0.9/model.safetensors"}
    assert average.parts[-3:] == ("step-00000002", AVERAGES, "ema_0.9")
    assert same(load_model(average), random_model(seed=2))
    with pytest.raises(UserError, match=r"has no average ema_0\.5; there are ema_0\.9"):
        find_average(Path(run), "ema_0.5")
    assert asked() == about


def test_a_run_begins_with_the_weights(run: str) -> None:
    config = configs.replace(Config(model=TINY), train__init_from=run)
    weights = find_initial_weights(config)
    assert weights is not None
    assert weights.path == f"{run}/step-00000002", "which other machines fetch, whatever is newest by then"
    model = LCL(TINY, seed=9)
    load_initial_weights(weights, dict(enumerate(model.layers)), ALONE)
    assert same(model, random_model(seed=2))


def missing(place: str) -> None:
    Store(place).delete(["step-00000002/model.safetensors"])


def damaged(place: str) -> None:
    Store(place).put("step-00000002/model.safetensors", b"stale")


def other_manifest(place: str) -> None:
    Store(place).put("step-00000002/manifest.json", b"{}")


def outside(place: str) -> None:
    files = {"../config.yaml": {"bytes": 1, "xxh3": "0"}}
    Store(place).put("step-00000002/manifest.json", manifest_text(files).encode())


def outside_of_an_import(place: str) -> None:
    record = {"format": "import", "files": {"/config.yaml": "0"}}
    Store(place).put("import.json", json.dumps(record).encode())


def nothing(place: str) -> None:
    Store(place).delete([name for name, _ in Store(place).list() if name.endswith("manifest.json")])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (missing, "step-00000002/model.safetensors is missing"),
        (damaged, "step-00000002/model.safetensors is not the file that manifest.json names"),
        (other_manifest, "step-00000002/manifest.json changed since it was written"),
        (outside, r"names a file outside of its folder \(../config.yaml\)"),
        (outside_of_an_import, r"names a file outside of its folder \(/config.yaml\)"),
        (nothing, "holds no complete checkpoint"),
    ],
)
def test_all_or_nothing(run: str, cache: Path, spoil: Callable[[str], None], said: str) -> None:
    spoil(run)
    with pytest.raises(UserError, match=said):
        load_model(run)
    assert [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_machines_that_no_lock_keeps_apart_copy_at_once(run: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, others = Store.fetch, []

    def fetched(store: Store, names: Sequence[str], folder: Path) -> None:
        fetch(store, names, folder)
        if not others:
            others.append(folder)
            with monkeypatch.context() as patch:
                patch.setattr(owners, "machine", lambda: "another")
                others[0] = remote.local_copy(run)

    monkeypatch.setattr(Store, "fetch", fetched)
    monkeypatch.setattr(cache_folders, "lock_descriptor", lambda *_, **__: True)
    assert remote.local_copy(run) == others[0]
    assert same(load_model(others[0]), random_model(seed=2))
    assert not list(cache.rglob("scratch-*"))


def test_old_copies_make_room(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LIMIT", 1)
    first = remote.local_copy(f"{run}/step-00000001")
    second = remote.local_copy(f"{run}/step-00000002")
    assert first.exists(), "somebody has used it today"
    shutil.rmtree(second)
    os.utime(first.parent, times=(time.time() - 2e5,) * 2)
    assert remote.local_copy(f"{run}/step-00000002") == second
    assert second.exists()
    assert not first.exists()


def test_an_old_copy_goes_whole(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LIMIT", 1)
    first = remote.local_copy(f"{run}/step-00000001")
    os.utime(first.parent, times=(time.time() - 2e5,) * 2)

    def killed(folder: Path, **_: object) -> None:
        for weights in Path(folder).rglob("model.safetensors"):
            weights.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remote.local_copy(f"{run}/step-00000002")
    assert same(load_model(f"{run}/step-00000001"), random_model(seed=1))


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "{url}", "--corpus", "nothing"],
        ["export", "{url}", "--format", "timm", "--output", "out"],
    ],
)
def test_refusals_are_one_line(
    place: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([word.format(url=place) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{place} holds no complete checkpoint" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_web_server_lists_nothing(s3: Proxy, run: str) -> None:
    url = readable_by_all(s3, run)
    assert same(load_model(f"{url}/step-00000001"), random_model(seed=1))
    with pytest.raises(UserError, match="name a run's checkpoint itself"):
        load_model(url)


@pytest.mark.parametrize("key", ["train__init_from", "checkpoint__resume"])
def test_a_run_that_would_begin_with_nothing_does_not_start(place: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{place} holds no complete checkpoint"):
        check_beginning(configs.replace(Config(model=TINY), **{key: place}))
    put(imported(tmp_path / "imported", random_model()), place)
    with pytest.raises(
        UserError, match=f"is no checkpoint of a run; begin with its weights by --train.init_from {place}"
    ):
        check_beginning(configs.replace(Config(model=TINY), checkpoint__resume=place))
