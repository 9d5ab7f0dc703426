"""Runs that have made all their steps: a command that is given again makes what is missing, with the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.results import NO_RESULT
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.changes import changed_settings, text_of
from megatron_lcl.train.checkpoint.folder import last_checkpoint, read_progress
from megatron_lcl.train.telemetry.lines import measured_after


def is_finished(config: Config) -> bool:
    """Whether nothing is left to do in the run folder. UserError as `has_all_steps` raises it."""
    folder = last_checkpoint(Path(config.train.output))
    return folder is not None and has_all_steps(folder, config) and has_last_evaluation(config)


def has_all_steps(folder: Path, config: Config) -> bool:
    """Whether all steps are done in a checkpoint. UserError where they were made with settings that give another
    result, for nothing is ever trained with those of `config`."""
    if read_progress(folder).step < config.train.steps:
        return False
    made = configs.load(folder / CONFIG)
    changed = [
        f"{name} = {text_of(before)} where this command has {text_of(now)}"
        for name, (before, now) in changed_settings(made, _as_chosen(config, made)).items()
        if not name.startswith(NO_RESULT)
    ]
    if changed:
        raise UserError(
            f"{config.train.output} is finished, with {', '.join(changed)}; name another train.output, or delete that "
            "folder"
        )
    return True


def _as_chosen(config: Config, made: Config) -> Config:
    """With what a run chose that was left to it, as its checkpoints have it."""
    chosen: dict[str, Any] = {}
    if config.contrast.strategy == "auto":
        chosen["contrast__strategy"] = made.contrast.strategy
    if config.train.measure_kernels and made.train.measure_kernels:
        chosen |= {"train__attention": made.train.attention, "train__compile": made.train.compile}
    return configs.replace(config, **chosen)


def has_last_evaluation(config: Config) -> bool:
    """Whether what is to be measured after the last step has been."""
    own = config.evaluate
    wanted = {name for name, data in (("heldout", own.corpus), ("labeled", own.labeled)) if data is not None}
    if not config.train.evaluate_every:
        return True
    measured = measured_after(Path(config.train.output), config.train.steps)
    return wanted <= {name.partition("/")[0] for name in measured}
