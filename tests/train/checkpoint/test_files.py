"""What is in a checkpoint's folder: any damage is found, and what DeepSpeed wrote is read as DeepSpeed reads it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_runs import FIRST, JOBS, Job, build_config

from megatron_lcl import load_model
from megatron_lcl.cli import main
from megatron_lcl.config import Checkpoint, Config, Guard, to_yaml
from megatron_lcl.convert import manifest
from megatron_lcl.convert.manifest import fingerprint, manifest_text, verify
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.train.checkpoint import code_versions, reshard
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.code_versions import PACKAGE, source_hash, versions_that_differ
from megatron_lcl.train.checkpoint.inventory import prune
from megatron_lcl.train.checkpoint.state import KEYS, State
from megatron_lcl.train.resilience.bad_steps import BadSteps


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    """A copy of a run with two checkpoints, the second of which may be damaged."""
    return two_checkpoints(runs, tmp_path)


def two_checkpoints(runs: Path, folder: Path) -> Path:
    original = checkpoint.step_folder(runs / "whole", FIRST)
    for step in (3, 4):
        shutil.copytree(original, checkpoint.step_folder(folder / "run", step))
    shutil.copy(original / "config.yaml", folder / "run" / "config.yaml")
    return folder / "run"


OF_OLDER_VERSIONS = """{"step": 3, "packs": 18, "ledger": {"settings": {}, "entries": []},
 "guard": {"in_a_row": 2, "began": [1, 6], "rewinds": 1, "losses": [2.5]},
 "layout": {"tensor": 1, "pipeline": 2, "data": 2, "zero_stage": 1, "dtype": "float32",
  "cuts": [0, 3], "deepspeed": {}},
 "code": {"torch": "2.11.0", "deepspeed": "0.18.0"}}"""


def test_what_older_versions_wrote_is_read(tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(OF_OLDER_VERSIONS)
    progress = checkpoint.read_progress(tmp_path)
    assert progress.layout == checkpoint.Layout(pipeline=2, data=2, partition=(0, 3))
    assert json.loads(json.dumps(asdict(progress.layout)))["partition"] == [0, 3]
    bad = BadSteps(Guard(), progress.guard)
    assert (bad.consecutive, bad.began, bad.rewinds) == (2, (1, 6), 1)


def test_code_that_differs_has_another_hash(tmp_path: Path) -> None:
    """Also where version and commit are the same."""

    def hash_of(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (folder / "train").mkdir(parents=True)
        for name, text in files.items():
            (folder / "train" / f"{name}.py").write_text(text)
        (folder / "train" / f"{folder.name}.pyc").touch()
        (folder / "train" / ".#engine.py").symlink_to(f"someone@{folder.name}")  # as an editor locks what it edits
        (folder / "train" / ".engine.py").write_text(folder.name)
        (folder / "train" / os.fsdecode(b"caf\xe9.py")).touch()  # as a copy from a system of Latin-1 leaves it
        (folder / "train" / "gone.py").symlink_to(folder / "nothing")
        return source_hash(folder)

    written = hash_of(a="x = 1", b="y")
    assert written == hash_of(b="y", a="x = 1")
    others = [hash_of(a="x = 2", b="y"), hash_of(a="x = 1", c="y"), hash_of(a="x = 1y", b=""), hash_of(a="x = 1")]
    assert len({written, *others}) == 5


def test_a_source_that_cannot_be_read_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def vanished(package: Path) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(package / "engine.py"))

    monkeypatch.setattr(code_versions, "source_hash", vanished)
    versions = code_versions.code_versions.__wrapped__()
    assert "source" not in versions
    assert versions["torch"] == torch.__version__


def test_only_versions_that_differ_are_said() -> None:
    now = {"torch": "2.12.0", "deepspeed": "0.19.8", "source": "1f", "megatron_lcl": "0.1", "commit": "b"}
    assert versions_that_differ(now, now) == []
    assert versions_that_differ({"torch": "2.12.0", "deepspeed": "0.19.8"}, now) == [], "of an earlier release"
    assert versions_that_differ(now, {"torch": "2.12.0", "deepspeed": "0.19.8"}) == [], "not known now"
    before = now | {"torch": "2.11.0", "source": "2e", "commit": "a"}
    assert versions_that_differ(before, now) == [
        "torch 2.11.0 (now 2.12.0)",
        "code of megatron_lcl that differs",
        "commit a (now b)",
    ]


@pytest.mark.slow
def test_contents(runs: Path) -> None:
    folder = checkpoint.step_folder(runs / "whole", FIRST)
    progress = checkpoint.read_progress(folder)
    assert (progress.step, progress.packs) == (2, 12)
    assert str(progress.layout) == "2 data, ZeRO-1, float32"
    assert progress.code["torch"] == torch.__version__
    assert progress.code["source"] == source_hash(PACKAGE)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {"model.safetensors", "config.yaml", "progress.json", "manifest.json", "rng/rank-00001.pt"}
    assert names - {"manifest.json"} == json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert load_model(runs / "whole").config == build_config(runs, JOBS[0]).model


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_flipped_bit_of_any_file_is_found(
    data: st.DataObject, runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The damaged checkpoint is refused, by name of the file, and the one before is used."""
    run = two_checkpoints(runs, tmp_path_factory.mktemp("flipped"))
    older, newer = checkpoint.list_checkpoints(run)
    file = data.draw(st.sampled_from(sorted(path for path in newer.rglob("*") if path.is_file())))
    content = bytearray(file.read_bytes())
    position, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    content[position] ^= 1 << bit
    file.write_bytes(content)
    folder, skipped = checkpoint.choose(run, "auto")
    assert folder == older
    assert list(skipped) == [newer]
    assert skipped[newer][0].startswith(file.relative_to(newer).as_posix())
    shutil.rmtree(run)


@pytest.mark.slow
def test_a_file_that_is_missing_shorter_or_longer_is_found(run: Path) -> None:
    newer = checkpoint.step_folder(run, 4)
    for file in sorted(path for path in newer.rglob("*") if path.is_file()):
        content, name = file.read_bytes(), file.relative_to(newer).as_posix()
        for changed in (None, content[:-1], content + b"\0", b""):
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            assert [fault.split(":")[0] for fault in verify(newer, quick=True)] == [name]
            file.write_bytes(content)
    assert verify(newer) == []


@pytest.mark.slow
def test_no_run_begins_anew_over_damaged_checkpoints(run: Path) -> None:
    for folder in checkpoint.list_checkpoints(run):
        (folder / "config.yaml").write_text("")
    with pytest.raises(
        ValueError,
        match=r"no checkpoint in .* is whole \(step-00000004: config.yaml.*or remove them to begin anew$",
    ):
        checkpoint.choose(run, "auto")
    with pytest.raises(
        ValueError, match=r"; restore one, or remove them to go on from the newest whole copy in s3://b/run, "
    ):
        checkpoint.choose(run, "auto", "s3://b/run")


@pytest.mark.slow
def test_a_run_begins_from_another_runs_checkpoint_and_then_goes_on_from_its_own(run: Path, tmp_path: Path) -> None:
    named = str(checkpoint.step_folder(run, 3))
    assert checkpoint.choose(tmp_path / "new", named) == (Path(named), {})
    shutil.copytree(run, tmp_path / "new")
    assert checkpoint.choose(tmp_path / "new", named)[0] == checkpoint.step_folder(tmp_path / "new", 4)


@pytest.mark.slow
def test_a_run_goes_on_from_another_runs_newest_whole_checkpoint(run: Path, tmp_path: Path) -> None:
    third, fourth = (checkpoint.step_folder(run, step) for step in (3, 4))
    for named in (run, run / "checkpoints"):
        assert checkpoint.choose(tmp_path / "new", str(named)) == (fourth, {})
    (fourth / "config.yaml").write_text("")
    folder, rejected = checkpoint.choose(tmp_path / "new", str(run))
    assert (folder, [*rejected]) == (third, [fourth])
    (fourth / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"is not a whole checkpoint: manifest\.json: missing"):
        checkpoint.choose(tmp_path / "new", str(fourth))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no checkpoint; name a run's folder"):
        checkpoint.choose(tmp_path / "new", str(tmp_path))


@pytest.mark.slow
def test_damaged_weights_are_not_loaded(run: Path) -> None:
    weights = checkpoint.step_folder(run, 4) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors: changed since it was written"):
        load_model(run)
    load_model(checkpoint.step_folder(run, 3))


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_parameters_and_moments_are_those_of_deepspeeds_own_converter(
    job: Job, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepspeed.checkpoint import ds_to_universal

    folder, model = checkpoint.step_folder(runs / job.name, FIRST) / "state", build_config(runs, job).model
    arguments = {"input_folder": str(folder), "output_folder": str(tmp_path / "universal"), "keep_temp_folder": False}
    arguments |= {"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True, "strict": False}
    ds_to_universal.main(argparse.Namespace(**arguments))
    ours = State(folder, model)
    for name in ours.shapes:
        for key in KEYS:
            theirs = torch.load(tmp_path / "universal" / "zero" / name / f"{key}.pt", weights_only=False)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs.view(ours.shapes[name])
            assert torch.equal(ours.whole(name, key), theirs), (name, key)


@pytest.mark.slow
def test_a_conversion_is_made_once_unless_it_is_damaged(run: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = checkpoint.step_folder(run, 3), build_config(runs, JOBS[0]).model
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert reshard.convert(folder, model)
    assert synced == [], "all processes wait, and what is not whole after a power failure is written again"
    assert not reshard.convert(folder, model)
    file = folder / "universal" / "zero" / "5.log_scale" / "exp_avg.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    assert reshard.convert(folder, model)
    assert verify(folder / "universal") == []
    assert verify(folder) == [], "the checkpoint itself is as it was"


@pytest.mark.slow
def test_two_runs_may_convert_one_checkpoint(run: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without locks: what one has written, and may be reading, stays as it is when the other comes second."""
    folder, model, write = checkpoint.step_folder(run, 4), build_config(runs, JOBS[0]).model, reshard._write
    others: list[int] = []

    def write_amid_another(state: State, target: Path) -> None:
        monkeypatch.setattr(reshard, "_write", write)
        (target / "zero").mkdir(parents=True)
        assert reshard.convert(folder, model)
        others.append((folder / "universal").stat().st_ino)
        write(state, target)

    monkeypatch.setattr(reshard, "waiting_for_others", contextlib.nullcontext, raising=False)
    monkeypatch.setattr(reshard, "_write", write_amid_another)
    before = {path.name for path in folder.iterdir()}
    assert reshard.convert(folder, model)
    assert verify(folder / "universal") == []
    assert others == [(folder / "universal").stat().st_ino]
    assert {path.name for path in folder.iterdir()} - before == {"universal"}


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_list_verify_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(checkpoint.step_folder(run, 3), checkpoint.step_folder(run, 6))
    file = checkpoint.step_folder(run, 4) / "state" / "mp_rank_00_model_states.pt"
    file.write_bytes(file.read_bytes()[:-2] + b"xy")
    assert main(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "saved", "size", "layout", "state"]
    assert [line.split()[0] for line in lines[1:]] == ["3", "4", "6"]
    saved = os.path.getmtime(checkpoint.step_folder(run, 3) / manifest.MANIFEST)
    assert f"  {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(saved))}  " in lines[1]
    assert lines[1].endswith("2 data, ZeRO-1, float32  verified")
    assert lines[2].endswith("state/mp_rank_00_model_states.pt: changed since it was written")
    assert main(["checkpoint", "verify", str(run)]) == 1
    assert capsys.readouterr().out.startswith("step-00000004/state/mp_rank_00_model_states.pt: changed")
    assert main(["checkpoint", "verify", str(checkpoint.step_folder(run, 3))]) == 0
    assert main(["checkpoint", "verify", str(run / "nothing")]) == 2
    capsys.readouterr()

    prune = ["checkpoint", "prune", str(run), "--keep-last", "1"]
    assert main([*prune, "--dry-run"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.startswith("would delete") for line in said] == [True, True]
    assert len(checkpoint.list_checkpoints(run)) == 3
    assert main([*prune, "--keep-every", "3"]) == 0
    assert "step-00000004 (damaged: state/mp_rank" in capsys.readouterr().out
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [3, 6]
    assert main(prune) == 0
    assert [checkpoint.step_of(f) for f in checkpoint.list_checkpoints(run)] == [6]
    (checkpoint.step_folder(run, 6) / "config.yaml").unlink()
    assert main(prune) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert len(checkpoint.list_checkpoints(run)) == 1


def test_what_cannot_be_read_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The storage fails for a file of step 3; that of step 1 is damaged."""
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    for step in (1, 2, 3):
        folder = checkpoint.step_folder(tmp_path, step)
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x")
        (folder / "manifest.json").write_text(manifest_text({"weights": fingerprint(folder / "weights")}))
    first, second, third = checkpoint.list_checkpoints(tmp_path)
    (first / "weights").write_bytes(b"y")
    failing = [third / "weights"]

    def fail(path: Path) -> str:
        if path in failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return hash_file(path)

    monkeypatch.setattr(manifest, "hash_file", fail)
    assert checkpoint.choose(tmp_path, "auto") == (second, {third: ["weights: Input/output error"]})
    prune = ["checkpoint", "prune", str(tmp_path), "--keep-last", "1"]
    for words in (["--dry-run"], []):
        assert main([*prune, *words]) == 0
        said = capsys.readouterr().out.splitlines()
        assert said[0].endswith(f" {first} (damaged: weights: changed since it was written)")
        assert said[1:] == [f"kept {third}, which cannot be read (weights: Input/output error)"]
    failing.append(second / "weights")
    with pytest.raises(ValueError, match=r"no checkpoint in .* look at the storage: some cannot be read"):
        checkpoint.choose(tmp_path, "auto")
    failing.clear()
    assert main(prune) == 0
    assert checkpoint.list_checkpoints(tmp_path) == [third]


def test_prune_removes_what_an_interrupted_one_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a live run writes; and that run may be removing the same."""
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    for step in (1, 2):
        checkpoint.step_folder(tmp_path, step).mkdir(parents=True)
        (checkpoint.step_folder(tmp_path, step) / "manifest.json").write_text(manifest_text({}))
    live = {tmp_path / "checkpoints" / name for name in (".step-00000003.tmp", ".step-00000002.replaced")}
    remove, both = shutil.rmtree, [False]

    def rmtree(folder: Path, **options: Any) -> None:
        if not both[0]:
            raise KeyboardInterrupt
        remove(folder, ignore_errors=True)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        list(prune(tmp_path, keep_last=1))
    (left,) = (tmp_path / "checkpoints").glob(".step-*")
    for folder in live:
        folder.mkdir()
    both[0] = True
    said = f"{left} (left by a deletion)"
    assert list(prune(tmp_path, keep_last=1, dry_run=True)) == [f"would delete {said}"]
    assert (left / "manifest.json").exists()
    assert list(prune(tmp_path, keep_last=1)) == [f"deleted {said}"]
    assert {*(tmp_path / "checkpoints").iterdir()} == {*live, checkpoint.step_folder(tmp_path, 2)}


@pytest.mark.parametrize(
    ("there", "saved", "keep_last", "back_to", "kept"),
    [
        ((10, 11, 12), 11, 1, None, (11, 12)),  # 12 was rejected when the run went on from 10; a signal came after 11
        ((9, 10, 11, 12, 14), 11, 2, None, (10, 11, 12, 14)),
        ((8, 10, 12), 12, 2, None, (10, 12)),
        ((4, 8, 10, 12), 8, 2, 8, (4, 8)),  # saved again after a rewind, which rejected 10 and 12
        ((4, 8, 10, 12), 10, 2, 8, (8, 10)),  # the save of the rewind had failed
        ((4, 8, 10, 12), 12, 2, 8, (8, 12)),
    ],
)
def test_later_checkpoints_do_not_count(
    there: tuple[int, ...], saved: int, keep_last: int, back_to: int | None, kept: tuple[int, ...], tmp_path: Path
) -> None:
    for step in there:
        checkpoint.step_folder(tmp_path, step).mkdir(parents=True)
    assert checkpoint.tidy(tmp_path, Checkpoint(keep_last=keep_last), saved, back_to) == []
    assert tuple(checkpoint.step_of(f) for f in checkpoint.list_checkpoints(tmp_path)) == kept


def test_what_is_kept() -> None:
    folders = [checkpoint.step_folder(Path("run"), step) for step in range(100, 1100, 100)]
    old = checkpoint.superseded(folders, Checkpoint(keep_last=2, keep_every=400))
    assert [checkpoint.step_of(f) for f in old] == [100, 200, 300, 500, 600, 700]
