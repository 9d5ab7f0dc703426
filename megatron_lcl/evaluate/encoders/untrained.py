"""An LCL model as it is before training, of a config: a baseline for every evaluation."""

from __future__ import annotations

import difflib
from pathlib import Path

import megatron_lcl
from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.find import find_checkpoint, read_config
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_dir, is_file, matching
from megatron_lcl.model.lcl import LCL
from megatron_lcl.run_folder import CONFIG


def untrained_model(name: str, seed: int) -> tuple[LCL, Config]:
    """The model whose parameters are drawn from `seed`, and its config.

    name: a config file, the folder or URL of a run or checkpoint, or a name of `configs/` of the checkout.
    """
    config = _find_config(name)
    return LCL(config.model, seed, config.initial_log_scale), config


def _find_config(name: str) -> Config:
    path = Path(name)
    if url_of(name) or is_dir(path):
        return read_config(path if is_file(path / CONFIG) else find_checkpoint(path))
    if is_file(path):
        return configs.load(path)
    ours = {file.stem: file for file in matching(Path(megatron_lcl.__file__).parents[1] / "configs", "*.yaml")}
    if name in ours:
        return configs.load(ours[name])
    near = difflib.get_close_matches(name, ours, 1, 0.5)
    raise UserError(
        f"random:{name}: there is no config file {name}; give a YAML file, a run's folder"
        + (f", or a name of configs/, such as {near[0] if near else min(ours)}" if ours else "")
    )
