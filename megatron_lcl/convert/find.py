"""What a path means where a model, a checkpoint or a run is wanted: one rule, the same for every command.

* a run folder: its newest complete checkpoint (and so does its folder `checkpoints`);
* a checkpoint, or what `import` wrote: itself;
* what `export` wrote: itself, as far as its format holds the model;
* a file: a checkpoint in the reference's format;
* a URL of a folder in object storage: a copy of what is there, on the disk.

Imports neither torch nor numpy, so that listing checkpoints stays fast.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_lcl.config import Config, from_dict
from megatron_lcl.convert.folder import EXPORTS, HAS_RUN, IMPORT, read_record
from megatron_lcl.convert.manifest import MANIFEST
from megatron_lcl.data.corpus.files import CORPUS_MANIFEST
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.fields import read_sections
from megatron_lcl.filesystem import exists, is_dir, is_file, matching
from megatron_lcl.run_folder import AVERAGES, CHECKPOINTS, CONFIG, LOCK, METRICS, WEIGHTS

WHOLE, WHOLE_CONFIG = "lcl.safetensors", "lcl.json"
"""every parameter in the reference's format and the sizes, in an export to open_clip"""


def find_checkpoint(path: Path) -> Path:
    """The folder or file that holds the weights which `path` names. UserError where there are none."""
    if url := url_of(path):
        from megatron_lcl.convert.remote import local_copy

        path = local_copy(url)
    if is_file(path) or _is_checkpoint(path):
        return path
    if kind := export_kind(path):
        return path / WHOLE if is_file(path / WHOLE) else _checked(path, kind)
    complete = [p for p in checkpoints_in(path) if is_file(p / MANIFEST) and is_file(p / WEIGHTS)]
    if complete:
        return complete[-1]
    if not exists(path):
        raise UserError(f"there is no checkpoint {path}")
    if is_file(path / CORPUS_MANIFEST):
        raise UserError(f"{path} is a corpus, not a checkpoint; name a run folder (train.output)")
    raise UserError(
        f"{path} holds no complete checkpoint; it needs {WEIGHTS} and {CONFIG}, "
        f"or {CHECKPOINTS}/step-…/ with these and {MANIFEST}"
        + (f"; evaluate and train.init_from take a Hugging Face model as hf:{path}" if _is_hugging_face(path) else "")
    )


def find_average(path: Path, name: str) -> Path:
    """The folder of an average of the weights, beside the weights that `path` names: itself such a checkpoint.

    UserError where there is none of that name.
    """
    if url := url_of(path):
        from megatron_lcl.convert.remote import local_copy

        checkpoint = local_copy(url, average=name)
    else:
        checkpoint = find_checkpoint(path)
    if is_file(checkpoint / AVERAGES / name / WEIGHTS):
        return checkpoint / AVERAGES / name
    others = [folder.name for folder in matching(checkpoint / AVERAGES, "*")]
    there = f"there are {', '.join(others)}" if others else "it has none (config section `average`)"
    raise UserError(f"{checkpoint} has no average {name}; {there}")


def average_of(checkpoint: Path) -> str | None:
    """The name of the average of the weights that a checkpoint folder is; None where it is the weights."""
    return checkpoint.name if checkpoint.parent.name == AVERAGES else None


def without_average(checkpoint: Path) -> Path:
    """The checkpoint folder that an average of the weights lies in; any other folder or file as it is."""
    return checkpoint.parent.parent if average_of(checkpoint) else checkpoint


def export_kind(path: Path) -> str | None:
    """The format of a folder that `export` wrote; None for another folder."""
    return next((kind for kind in EXPORTS if read_record(path, kind)), None)


def checkpoints_in(path: Path) -> list[Path]:
    """The checkpoints of a run folder or of its folder `checkpoints`, oldest first; or the one that `path` is.

    Under their final names they are complete, unless damage came later.
    """
    if _is_step(path):
        return [path]
    steps = path / CHECKPOINTS if is_dir(path / CHECKPOINTS) else path
    found = [folder for folder in matching(steps, "step-*") if _is_step(folder)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))  # names have 8 digits, or more


def is_run(path: Path) -> bool:
    """Whether a folder has a run's config and anything else that a run writes: a config alone is for runs elsewhere."""
    begun = any(exists(path / name) for name in (METRICS, CHECKPOINTS, LOCK))
    return begun and is_file(path / CONFIG) and not _is_checkpoint(path)


def run_of(path: Path) -> Path:
    """The run folder that `path` is, or lies in. UserError where it is none."""
    for folder in (path, path.absolute().parent, path.absolute().parent.parent):
        inside = folder is path or folder / CHECKPOINTS in (path.absolute(), path.absolute().parent)
        if inside and is_run(folder):
            return folder
    raise UserError(
        f"{path} is not a run folder, which has a {CONFIG} beside {METRICS} or {CHECKPOINTS}/, and is no checkpoint of "
        "a run"
    )


def step_of(checkpoint: Path) -> int | None:
    """Steps that a run had made when it wrote this checkpoint folder; None for a folder that no run wrote."""
    match = re.fullmatch(r"step-(\d+)", without_average(checkpoint).resolve().name)
    return int(match[1]) if match else None


def step_in_run(folder: Path, checkpoint: Path) -> int | None:
    """`step_of` a checkpoint of the run that `folder` is, or lies in; None for any other model."""
    of_run = without_average(checkpoint).absolute()
    run, inside = of_run.parent.parent.resolve(), folder.resolve()
    return step_of(checkpoint) if of_run.parent.name == CHECKPOINTS and run in (inside, *inside.parents) else None


def read_config(checkpoint: Path) -> Config:
    """The config of the run that wrote a checkpoint folder. UserError where there is none, or it is none."""
    file = checkpoint / CONFIG
    if is_file(checkpoint):
        raise UserError(
            f"{checkpoint} is a file without the config that is needed here; run `megatron-lcl import {checkpoint} "
            "--output DIR` first, and name DIR"
        )
    if not is_file(file):
        raise UserError(f"{checkpoint} has no {CONFIG}; name the run, one of its checkpoints, or what `import` wrote")
    tree = read_sections(file, "a config is a mapping of sections")
    if not tree:
        raise UserError(f"{file} is empty; name another checkpoint of the run")
    return from_dict(tree)


def known_config(path: Path) -> Config | None:
    """The config of the run that trained what `path` names; None for what holds none: a file, an export, and an import
    of these."""
    found = find_checkpoint(path)
    if not is_file(found / CONFIG):
        return None
    record = read_record(found, IMPORT)
    return read_config(found) if record is None or record[1].get(HAS_RUN) else None


def one_line(error: BaseException) -> str:
    """An error's text on one line, cut."""
    return " ".join(str(error).split())[:200]


def _is_checkpoint(path: Path) -> bool:
    return is_file(path / WEIGHTS) and is_file(path / CONFIG)


def _is_hugging_face(path: Path) -> bool:
    """Whether a folder's config.json names a type of model, as those do that transformers writes."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def _is_step(path: Path) -> bool:
    return re.fullmatch(r"step-\d+", path.name) is not None and is_dir(path)


def _checked(path: Path, kind: str) -> Path:
    if not is_file(path / WEIGHTS):
        raise UserError(f"{path} is an export to {kind} without {WEIGHTS}; export the run again")
    return path
