"""Runs that have made all their steps: a command that is given again makes what is missing, with the same settings."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.results import NO_RESULT, ROUNDING
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.blend import blend_of, has_shares_of
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.changes import changed_parts, changed_settings, text_of
from megatron_lcl.train.checkpoint.folder import Progress, last_checkpoint, read_progress
from megatron_lcl.train.checkpoint.mirror import Mirror
from megatron_lcl.train.telemetry.lines import measured_after

_CORPUS = re.compile(r"data\.corpora\.\d+\.(path|weight)")
_MOVABLE = ("evaluate.corpus", "evaluate.labeled", "train.init_from")
"""paths of which nothing is recorded but their text"""


def is_finished(config: Config, output: str = "train.output") -> bool:
    """Whether nothing is left to do in the run folder, which users name by `output`. UserError as `has_all_steps`
    raises it."""
    folder = last_checkpoint(Path(config.train.output))
    if folder is None or not has_all_steps(folder, config, output=output) or not has_last_evaluation(config):
        return False
    return config.checkpoint.mirror is None or Mirror(config.checkpoint.mirror).has(folder)


def has_all_steps(folder: Path, config: Config, is_own: bool = True, output: str = "train.output") -> bool:
    """Whether all steps are done in a checkpoint. UserError where they were made with settings that give another
    result, for nothing is ever trained with those of `config`; and where the run would have no checkpoint of its own.

    is_own: it is the run's, not what `checkpoint.resume` names. output: by which users name the run folder.
    """
    progress = read_progress(folder)
    if progress.step < config.train.steps:
        return False
    if not is_own:
        raise UserError(
            f"checkpoint.resume = {config.checkpoint.resume} is at step {progress.step}, and has all steps of "
            f"train.steps = {config.train.steps}; raise that"
        )
    made = configs.load(folder / CONFIG)
    changed = dict(_changed(made, config, progress))
    if not changed:
        return True
    remedy = f"give the settings of that run again, or another {output}"
    remedy += " and checkpoint.mirror" * (config.checkpoint.mirror is not None)
    if all(name.startswith(("evaluate.", "train.evaluate_every")) for name in changed):
        remedy = f"evaluate it by `megatron-lcl evaluate {folder} …`, or {remedy}"
    raise UserError(
        f"{folder} has made {progress.step} of {made.train.steps} steps with {', '.join(changed.values())}; {remedy}"
    )


def _changed(made: Config, now: Config, progress: Progress) -> Iterator[tuple[str, str]]:
    """The settings that differ from those of a checkpoint and give another result, and how they do."""
    blends = [entry["blend"] for entry in progress.ledger.get("entries", ()) if "blend" in entry]
    blend = blends[-1] if blends else []
    same_shares = bool(blend) and has_shares_of(blend_of(now.data)[0], blend)
    for name, (before, value) in (changed_settings(made, now) | changed_parts(made, now, progress)).items():
        if name.startswith((*NO_RESULT, *ROUNDING)) or name.endswith(".micro_batch"):
            continue
        if _CORPUS.fullmatch(name) and (same_shares or name.endswith(".path")):
            continue
        if not (name in _MOVABLE and _may_have_moved(before, value)):
            yield name, f"{name} = {text_of(before)} where this command has {text_of(value)}"
    if same_shares:
        return
    read_by_run = {read["fingerprint"] for read in blend}
    for number, (corpus, read) in enumerate(zip(now.data.corpora, blend, strict=False)):
        if open_corpus(corpus.path, now.data.cache).fingerprint not in read_by_run:
            what = f"the documents of {read['path']} where this command has those now in {corpus.path}"
            yield f"data.corpora.{number}.path", what


def _may_have_moved(before: Any, now: Any) -> bool:
    """Whether two paths of a file system are of the same file, or nothing is at the first one any more, as on another
    machine."""
    if before is None or now is None or ":" in before + now:  # of URLs and models of libraries
        return False
    return not os.path.exists(before) or (os.path.exists(now) and os.path.samefile(before, now))


def has_last_evaluation(config: Config) -> bool:
    """Whether what is to be measured after the last step has been."""
    own = config.evaluate
    wanted = {name for name, data in (("heldout", own.corpus), ("labeled", own.labeled)) if data is not None}
    if not config.train.evaluate_every:
        return True
    measured = measured_after(Path(config.train.output), config.train.steps)
    return wanted <= {name.partition("/")[0] for name in measured}
