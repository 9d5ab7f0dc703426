"""Training from a corpus in object storage, killed on the way: as from the disk, and no secret is written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, descendants, held_steps, left, losses, train
from s3_fixtures import upload
from s3_server import Proxy

from megatron_lcl.config import load
from megatron_lcl.data.storage.store import Store
from megatron_lcl.train.checkpoint import folder as checkpoint


def planted(rank: int, environment: dict[str, str], mark: str = "") -> None:
    os.environ.update(environment)
    if mark:
        held_steps(rank, mark)


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_as_from_the_disk(
    s3: Proxy, place: str, config_file: str, undisturbed: list[tuple], tmp_path: Path
) -> None:
    upload(Path(load(config_file).data.corpora[0].path), place)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    run, cache = tmp_path / "run", tmp_path / "cache"
    words = ["--config", config_file, "--data.corpora", place, "--data.cache", str(cache), "--data.look_ahead", "1"]
    mark = tmp_path / "hold"
    mark.touch()
    options: dict[str, Any] = {"plant": planted, "planted": (environment, str(mark))}
    s3.latency, s3.unavailable, s3.cut = 0.02, 11, 13
    with Fleet(run, *words, **options) as fleet:
        fleet.wait_for(lambda: bool(checkpoint.list_checkpoints(run)))  # its last process may write later than step 7
        started = [pid for process in fleet.processes for pid in descendants(process.pid)]
        assert started
        fleet.kill()
    assert left(started, 30) == []  # they see by themselves that they are alone
    mark.unlink()
    said = train(run, *words, **options)
    assert "going on from" in said
    assert losses(run) == undisturbed
    secrets = [environment[name].encode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20
    assert [file for file in written if any(secret in file.read_bytes() for secret in secrets)] == []


def command(*words: str, options: dict[str, Any], code: int) -> str:
    with Fleet(size=1, command=words, **options) as fleet:
        assert fleet.wait(120) == [code], fleet.said()
        return fleet.said()


@pytest.mark.slow
def test_commands(s3: Proxy, place: str, config_file: str, tmp_path: Path) -> None:
    corpus = Path(load(config_file).data.corpora[0].path)
    upload(corpus, place)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    options: dict[str, Any] = {"plant": planted, "planted": (environment,), "run": tmp_path / "out"}
    page = tmp_path / "page.html"
    written = tmp_path / "config.yaml"
    written.write_text(Path(config_file).read_text().replace(str(corpus), place))
    command("replay", str(written), "--step", "1", "--output", str(page), options=options, code=0)
    assert place in page.read_text()
    assert "documents" in command("inspect", place, options=options, code=0)
    assert "no fault found" in command("verify", place, options=options, code=0)
    said = command("train", "--config", config_file, "--train.output", f"{place}/run", options=options, code=2)
    assert "checkpoint.mirror=s3://bucket/folder" in said
    said = command("inspect", f"{place}/none", options=options, code=2)
    assert f"{place}/none is not a corpus" in said
    assert not Store(f"{place}/run").list()
