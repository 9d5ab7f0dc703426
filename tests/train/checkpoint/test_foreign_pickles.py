"""A checkpoint from elsewhere whose pickles would run something: it is refused by name, and nothing has run.

That every layout's own checkpoints can be read in the same way is what `test_layouts.py` shows.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from small_runs import FIRST, JOBS, Job, build_config

from megatron_lcl.convert.manifest import fingerprint, manifest_text
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint import reshard, unpickle

JOB, OTHER = JOBS[0], Job("other", 2)
UNIVERSAL = "universal/"
# one of each kind that DeepSpeed or we read: by the process itself, by another, at the same layout and at another
FILES = (
    "state/mp_rank_00_model_states.pt",
    "state/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "state/zero_pp_rank_1_mp_rank_00_optim_states.pt",
    "rng/rank-00001.pt",
    f"{UNIVERSAL}zero/optimizer_state.pt",
    f"{UNIVERSAL}zero/5.log_scale/exp_avg.pt",
    f"{UNIVERSAL}zero/5.log_scale/step.pt",
    f"{UNIVERSAL}mp_rank_00_model_states.pt",
)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def plant(folder: Path, name: str, mark: Path) -> None:
    """The object beside the file's own content, and manifests that say that all is well."""
    file = folder / name
    content = torch.load(file, weights_only=False)
    torch.save({**content, "more": Evil(mark)} if isinstance(content, dict) else [content, Evil(mark)], file)
    top = folder / UNIVERSAL if name.startswith(UNIVERSAL) else folder
    files = json.loads((top / "manifest.json").read_text())["files"]
    files[file.relative_to(top).as_posix()] = fingerprint(file)
    (top / "manifest.json").write_text(manifest_text(files))
    assert checkpoint.verify(top) == []


def load_all(rank: int, folder: str, wanted: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """What loading each checkpoint says, by job: at the layout that wrote it and at another."""
    import torch.distributed as dist

    from megatron_lcl.errors import UserError
    from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
    from megatron_lcl.train.engine import build_engine, build_module, init_processes

    said: dict[str, dict[str, str]] = {job: {} for job in wanted}
    for job in (JOB, OTHER):
        config = build_config(Path(folder), job)
        mesh = init_processes(config)
        engine = build_engine(build_module(config, mesh), config, mesh)
        with Checkpointer(engine, config, mesh, Path(folder) / "new") as checkpoints:
            for name in wanted[job.name]:
                checkpoints.run = Path(folder) / "new" / name.replace("/", "-")  # each as a run of its own
                try:
                    said[job.name][name] = f"loaded {checkpoints.load(Path(folder) / name.replace('/', '-') / 'step')}"
                except UserError as error:
                    said[job.name][name] = str(error)
    dist.destroy_process_group()
    return said


@pytest.fixture(scope="module")
def original(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its universal form."""
    copy = tmp_path_factory.mktemp("whole") / "step"
    shutil.copytree(checkpoint.step_folder(runs / JOB.name, FIRST), copy)
    assert reshard.convert(copy, build_config(runs, JOB).model)
    return copy


@pytest.mark.slow
def test_each_kind_of_file_is_refused_on_all_processes_and_nothing_runs(original: Path, tmp_path: Path) -> None:
    for name in FILES:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(original, folder / "step")
        plant(folder / "step", name, tmp_path / "ran")
    wanted = {job.name: [x for x in FILES if x.startswith(UNIVERSAL) == (job is OTHER)] for job in (JOB, OTHER)}
    first, second = run_processes(load_all, 2, str(tmp_path), wanted)
    assert not (tmp_path / "ran").exists()
    assert first == second
    for name in FILES:
        file = tmp_path / name.replace("/", "-") / "step" / name
        assert first[(OTHER if name.startswith(UNIVERSAL) else JOB).name][name].startswith(
            f"{file} is refused: a checkpoint is data, and this pickle wants to build posix.mkdir;"
        )


@pytest.mark.slow
def test_half_of_a_conversion_keeps_no_run_from_a_checkpoint(original: Path, tmp_path: Path) -> None:
    """Neither what a run has left that was killed, or is writing, nor what a power failure has cut."""
    names = ["half", "cut", "gone"]
    for name in names:
        shutil.copytree(original, tmp_path / name / "step")
    universal = Path(UNIVERSAL, "zero", "5.log_scale", "fp32.pt")
    whole = (original / universal).read_bytes()
    shutil.rmtree(tmp_path / "half" / "step" / UNIVERSAL)
    half = tmp_path / "half" / "step" / "scratch-x-1-y" / universal
    half.parent.mkdir(parents=True)
    half.write_bytes(whole[: len(whole) // 2])
    (half.parent / "exp_avg.pt").touch()
    (half.parent / "exp_avg_sq.pt").symlink_to(tmp_path / "nothing")
    (tmp_path / "cut" / "step" / universal).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "gone" / "step" / UNIVERSAL / "manifest.json").unlink()
    first, second = run_processes(load_all, 2, str(tmp_path), {JOB.name: names, OTHER.name: names})
    assert first == second
    assert first[JOB.name] == dict.fromkeys(names, "loaded []")
    for name in names:
        folder = tmp_path / name / "step"
        assert first[OTHER.name][name].startswith(f"loaded ['converted {folder} from ")
        assert checkpoint.verify(folder / UNIVERSAL), "it is another run's"
        assert checkpoint.verify(folder) == []


@pytest.mark.slow
def test_no_file_of_a_real_checkpoint_is_refused(original: Path) -> None:
    files = sorted(original.rglob("*.pt"))
    assert len(files) > 20
    assert unpickle.refused(files) is None


def test_the_loss_scale_of_float16_can_be_read(tmp_path: Path) -> None:
    """Which DeepSpeed keeps as an object, and which no CPU trains with."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 1)
    torch.save({"loss_scaler": scaler}, tmp_path / "file.pt")
    assert vars(unpickle.load_mapped(tmp_path / "file.pt")["loss_scaler"]) == vars(scaler)


def test_a_save_in_the_background_leaves_the_environment_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads read it at that time, those that ask object storage, and `os.environ.items()` raised a KeyError."""
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **options: (seen.append({**os.environ}), load(*a, **options))[1])
    torch.save({"step": 3}, tmp_path / "file.pt")
    assert unpickle.load_mapped(tmp_path / "file.pt") == {"step": 3}
    assert seen == [{**os.environ}]


@pytest.mark.parametrize("never", [None, "1"], ids=["", "torch told never to restrict"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle 2", "pickle 4", "inside an allowed class"])
def test_what_a_caller_asks_for_does_not_matter(
    how: str, never: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DeepSpeed does where our check has not looked: a file swapped behind it, say."""
    if never:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", never)
    file, mark = tmp_path / "file.pt", tmp_path / "ran"
    evil: Any = {"step": Evil(mark)}
    if how.startswith("pickle"):
        file.write_bytes(pickle.dumps(evil, protocol=int(how[-1])))
    elif how == "inside an allowed class":
        from deepspeed.utils.tensor_fragment import fragment_address

        torch.save({"step": fragment_address(Evil(mark), 1)}, file)  # type: ignore[arg-type]
    else:
        torch.save(evil, file, _use_new_zipfile_serialization=how == "zip")
    with unpickle.restricted(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    said = unpickle.refused([file])
    assert said is not None
    what = "is no checkpoint of DeepSpeed's" if how == "pickle 4" else "wants to build posix.mkdir"
    assert said.startswith(f"{file} is refused: a checkpoint is data, and this pickle {what};")
    assert not mark.exists()
    assert os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD") == never
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert not set(unpickle.deepspeed_types()) & set(torch.serialization.get_safe_globals())
