"""Any LCL checkpoint as a model: a training run's, an imported one, or a file in the reference's format."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megatron_lcl.config import Model
from megatron_lcl.convert import hf, timm
from megatron_lcl.convert.find import export_kind, find_checkpoint, one_line, read_config, without_average
from megatron_lcl.convert.folder import CERTIFICATE, IMPORT, read_record
from megatron_lcl.convert.libraries import foreign_objects, usual_defaults
from megatron_lcl.convert.manifest import verify
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_dir, is_file
from megatron_lcl.model.lcl import LCL
from megatron_lcl.model.reference_format import load_open_clip, model_config, name_faults, published_config, some
from megatron_lcl.run_folder import CONFIG, PROGRESS, WEIGHTS


def load_model(path: str | Path, config: Mapping[str, Any] | str | Path | None = None) -> LCL:
    """The model of a checkpoint, in float32 on the CPU, its weights mapped from the file where the format allows.

    While it lives, that file must not be written to: a file that is cut short under its mapping ends the process
    (SIGBUS). To save over it, write another file and rename that (`os.replace`). Changes of the model stay in memory.

    `path`: a run folder, whose newest complete checkpoint is taken; a checkpoint; what `import` or `export` wrote; or a
    file (.pt, .pth, .bin, .safetensors) in the reference's open_clip format (`find.find_checkpoint`). Exports to hf and
    timm hold the vision encoder and the pool: their model encodes images, and raises UserError where it is to read
    text. For a file, `config` is a dict as in the reference's `model_configs/*.json`, or the path of such a file; None
    takes the .json of the checkpoint's own name beside it, or the published models' sizes where the shapes are theirs.
    Pickles are read with `weights_only=True`. Raises UserError, in one line, for whatever is not such a checkpoint.
    """
    path = Path(path)
    if is_dir(path) and config is not None:
        raise UserError(f"{path} is a folder with a config of its own; `config` is for open_clip files")
    path = find_checkpoint(path)
    if kind := export_kind(path):
        return _load_export(path, kind)
    if is_dir(path):
        return _load_ours(path)
    state = read_state_dict(path)
    with torch.device("meta"):
        model = LCL(model_config(open_clip_sizes(path, state, config)), seed=None)
    try:
        load_open_clip(model.layers, model.config, state, assign=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return model


def from_open_clip(state_dict: Mapping[str, torch.Tensor], config: Model | Mapping[str, Any]) -> LCL:
    """The model with the parameters of a state dict in the reference's format.

    `config`: a model's (`LCL.config`), or a dict as in the reference's `model_configs/*.json`. Raises ValueError naming
    tensors that are missing, unknown, or of the wrong shape.
    """
    model = LCL(config if isinstance(config, Model) else model_config(config), seed=None)
    load_open_clip(model.layers, model.config, state_dict)
    return model


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a file in the reference's format, without the wrappings of training checkpoints.

    Takes off the keys `state_dict` and `model` and the prefix `module.`; floats of any precision stay as they are.
    """
    loaded = read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a state dict of named tensors")
    strange = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise UserError(f"{path} is no state dict: {strange[0]!r} is a {type(loaded[strange[0]]).__name__}")
    if unnamed := [name for name in loaded if not isinstance(name, str)]:
        raise UserError(f"{path} is no state dict: it has a tensor under {unnamed[0]!r}, which is no name")
    prefix = "module." if all(name.startswith("module.") for name in loaded) else ""
    return {name.removeprefix(prefix): value for name, value in loaded.items()}


def check_whole(checkpoint: Path) -> None:
    """UserError where a folder's weights are not those that a run or `import` wrote into it."""
    of_run = without_average(checkpoint)
    if is_file(of_run / PROGRESS):
        inside = checkpoint.relative_to(of_run)
        damage = verify(of_run, only=[(inside / name).as_posix() for name in (WEIGHTS, CONFIG)])
        if damage:
            raise UserError(f"{checkpoint} is damaged ({'; '.join(damage)}); name another of the run's checkpoints")
    record = read_record(checkpoint, IMPORT)
    if record and hash_file(checkpoint / WEIGHTS) != record[1]["files"].get(WEIGHTS):
        raise UserError(f"{checkpoint / WEIGHTS} is not what `import` wrote; import the checkpoint again")


def _load_ours(checkpoint: Path) -> LCL:
    check_whole(checkpoint)
    with torch.device("meta"):
        model = LCL(read_config(checkpoint).model, seed=None)
    state = read_safetensors(checkpoint / WEIGHTS)
    expected = {name: p.shape for name, p in model.layers.named_parameters()}
    if faults := name_faults(expected, state):
        raise UserError(f"{checkpoint / WEIGHTS} {faults}; does {CONFIG} belong to it?")
    model.layers.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
    return model


def _load_export(folder: Path, kind: str) -> LCL:
    """The vision encoder and the pool of an export to hf or timm."""
    record = read_record(folder, kind)
    assert record is not None
    for name, digest in record[1]["files"].items():
        if name.endswith((".safetensors", "config.json")) and hash_file(folder / name) != digest:
            raise UserError(f"{folder / name} is not what `export` wrote ({CERTIFICATE}); export the run again")
    return {"hf": hf.read, "timm": timm.read}[kind](folder)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, mapped. UserError where it is none."""
    try:
        with usual_defaults():  # safetensors before 0.8 reads to torch's default device
            return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {one_line(error)}") from None


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UnpicklingError as error:
        held = foreign_objects(path, error)
        if held:
            raise UserError(
                f"{path} is refused: a checkpoint is data, and this pickle wants to build {some(held)}; "
                "save its state dict alone, or as safetensors"
            ) from None
        raise UserError(f"{path} is not a PyTorch checkpoint") from None  # torch would advise to run what is in it
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a PyTorch checkpoint: {one_line(error)}") from None  # a damaged file


def open_clip_sizes(
    path: Path, state: Mapping[str, torch.Tensor], config: Mapping[str, Any] | str | Path | None = None
) -> Mapping[str, Any]:
    """The model config of a file in the reference's format, as `load_model` finds it."""
    if isinstance(config, Mapping):
        return config
    beside = path.with_suffix(".json")
    if config is None and not is_file(beside):
        return published_config(path, state)
    file = beside if config is None else Path(config)
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the model config {file} cannot be read: {one_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"the model config {file} holds a {type(loaded).__name__}, not a mapping")
    return loaded
