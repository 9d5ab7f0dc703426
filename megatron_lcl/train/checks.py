"""What is checked before anything is built. Each check raises UserError with one line that says what to set instead."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.config import Config, load
from megatron_lcl.config.phases import phases_of
from megatron_lcl.convert.folder import IMPORT, read_record
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.contrast import corpora_without_pairs
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.loading.pack_index import PackIndex
from megatron_lcl.data.loading.source import rules_of_kinds
from megatron_lcl.data.storage.store import to_show
from megatron_lcl.errors import UserError, free_space, nearest_folder
from megatron_lcl.filesystem import exists, is_dir
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG
from megatron_lcl.train.apex import check_apex
from megatron_lcl.train.averages import average_names, check_averages
from megatron_lcl.train.changes import Changes, changed_settings
from megatron_lcl.train.checkpoint.folder import (
    Layout,
    last_checkpoint,
    last_progress,
    leftover_bytes,
    list_checkpoints,
    read_progress,
    resumable,
)
from megatron_lcl.train.checkpoint.initial_weights import find_initial_weights
from megatron_lcl.train.checkpoint.mirror import Mirror, resumed
from megatron_lcl.train.checkpoint.reshard import UNIVERSAL
from megatron_lcl.train.determinism import check_determinism
from megatron_lcl.train.fits import check_memory
from megatron_lcl.train.heldout import check_heldout
from megatron_lcl.train.kernels import check_kernels
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import available
from megatron_lcl.train.optimizer import check_optimizer
from megatron_lcl.train.parts import check_freeze, check_frozen_have_weights, frozen_parameters, frozen_patterns
from megatron_lcl.train.precision import DTYPES, check_dtype, resolve_dtype
from megatron_lcl.train.settings import check_quantized, deepspeed_config
from megatron_lcl.train.telemetry.lines import has_steps
from megatron_lcl.train.telemetry.profile import check_profile
from megatron_lcl.train.telemetry.sinks import check_trackers
from megatron_lcl.units import in_bytes

TRAINED_ONLY = tuple(f"model.vision.{x}" for x in ("patch_dropout", "patch_dropout_places", "unmasked_steps"))
"""settings of the model that say how it is trained, and may change in a run"""


def check(config: Config, processes: int, local: int | None = None, elsewhere: bool = False) -> dict[str, Any]:
    """Everything that can be known to be wrong before anything is built; DeepSpeed's config, derived and checked.

    local: processes on a machine; None: all. elsewhere: the run's devices are not this machine's, as where a dry run is
    made on a login node.
    """
    objectives.create(config)
    if not config.data.corpora:
        raise UserError("data.corpora is empty; name a corpus that `megatron-lcl preprocess` wrote: --data.corpora DIR")
    check_phases(config, processes)
    settings = deepspeed_config(config, processes)
    check_apex(config)
    check_kernels(config, elsewhere)
    check_determinism(config)
    check_optimizer(config)
    check_freeze(config)
    check_averages(config)
    if not elsewhere:
        check_dtype(config)
        check_quantized(config)
        check_memory(config, processes, available(local or processes))
    check_tokenizers(config)
    check_heldout(config)
    check_trackers(config)
    check_profile(config, processes)
    without_pairs(config)
    run = Path(config.train.output)
    check_output(run, config)
    if not elsewhere:
        check_space(config, processes, leftover_bytes(run / CHECKPOINTS))
    if config.checkpoint.mirror is not None:
        Mirror(config.checkpoint.mirror).check_owner(config.train.output)
    if not list_checkpoints(run):
        check_beginning(config)
    return settings


def check_phases(config: Config, processes: int) -> None:
    """The phases fit the run and the model; each one's weights leave something to train, its global batch divides among
    the processes, and its sequences have room for an image."""
    for phase in phases_of(config):
        data, model = phase.config.data, phase.config.model
        try:
            with phase.naming_fields():
                sequences = objectives.create(phase.config).sequences
                check_layout(phase.config, processes)
                rules_of_kinds(data, model.vision.num_placeholders, model.language.context_length, 1, sequences)
        except UserError as error:
            where = f"in phase {phase.number + 1}, " if phase.stop < config.train.steps else ""
            raise UserError(f"{where}{error}") from None
    weighted = "contrastive_weight" in objectives.objective_class(config.objective.name).published
    for name in ("contrastive_weight", "contrastive_weight_change"):
        if not weighted and any(getattr(phase, name) is not None for phase in config.schedule.phases):
            raise UserError(
                f"schedule.phases give a {name}, which objective.name = {config.objective.name} does not have; "
                "remove it"
            )


def check_tokenizers(config: Config) -> None:
    """The corpora's files have their sizes, and the model's vocabulary is that of their tokenizers."""
    for corpus in config.data.corpora:
        opened = open_corpus(corpus.path, config.data.cache)
        opened.check_sizes()
        tokenizer = opened.tokenizer
        if tokenizer.vocab_size != config.model.language.vocab_size:
            raise UserError(
                f"model.language.vocab_size is {config.model.language.vocab_size}, but the tokenizer of {corpus.path} "
                f"has {tokenizer.vocab_size} ids; set model.language.vocab_size to {tokenizer.vocab_size}"
            )


def check_beginning(config: Config) -> None:
    """What a run that has no checkpoint of its own goes on from, or begins with, is there, and its weights fit."""
    if config.train.init_from is None:
        if config.checkpoint.resume != "auto":
            if resumed(config.checkpoint.resume) is None:
                resumable(config.checkpoint.resume)
        else:
            check_frozen_have_weights(config, None)
        return
    if config.checkpoint.resume != "auto":
        raise UserError(
            f"checkpoint.resume = {to_show(config.checkpoint.resume)} and train.init_from = "
            f"{to_show(config.train.init_from)}: a run goes on from the one or begins with the weights of the other; "
            "give one of the two"
        )
    weights = find_initial_weights(config, verify=False)
    check_frozen_have_weights(config, weights.missing if weights else None)


def without_pairs(config: Config) -> dict[str, str]:
    """The corpora that give the objective's contrast no pair, each with how a sentence ends that says so: nothing where
    it is so in all phases, else ` in some phase`. UserError for a phase without any pair."""
    phases, found = phases_of(config), Counter[str]()
    for phase in phases:
        model, data = phase.config.model, phase.config.data
        paths = corpora_without_pairs(
            data,
            model.vision.num_placeholders,
            model.language.context_length,
            objectives.create(phase.config).sequences,
            config.objective.name,
        )
        found.update(dict.fromkeys(paths, 1))
    return {path: " in some phase" * (num < len(phases)) for path, num in found.items()}


def check_output(run: Path, config: Config) -> None:
    """A run folder is new, empty, or holds the same run. Of a run that made no step nothing is compared; whether it is
    just beginning, its lock says (`resume_point`)."""
    saved = run / CONFIG
    if exists(run) and not is_dir(run):
        raise UserError(f"train.output = {run} is a file; name a folder")
    if read_record(run, IMPORT):
        raise UserError(f"train.output = {run} is an import; name another folder, and this one as train.init_from")
    folder = run / CHECKPOINTS
    if folder.is_symlink() and not exists(folder):
        raise UserError(
            f"{folder} is a link to {folder.readlink()}, which is not there; make it reachable again, or remove the "
            "link to begin anew"
        )
    if not exists(saved):
        if exists(run) and not all(_is_of_no_run(path) for path in run.iterdir()):
            own, remedy = list_checkpoints(run), "name a new or an empty folder"
            if own:  # every checkpoint has it
                remedy = f"if it is this run's, copy that back from its newest checkpoint: cp {own[-1] / CONFIG} {run}"
            raise UserError(f"train.output = {run} holds other files and no {CONFIG}; {remedy}")
        return
    if list_checkpoints(run) or has_steps(run):  # else it ended before its first step, and nothing of its model is kept
        check_model(saved, config)


def _is_of_no_run(path: Path) -> bool:
    """Whether a file of a run folder without a config.yaml is hidden, or what a fetched checkpoint left, which comes
    before that (`Mirror.restore`)."""
    fetched = path.name == CHECKPOINTS and is_dir(path)
    return path.name.startswith(".") or (
        fetched and all(x.name.startswith(("step-", ".step-")) for x in path.iterdir())
    )


def check_space(config: Config, processes: int, removable: int = 0) -> None:
    """The disk of the run folder has room for one more checkpoint, where steps are left to make.

    removable: bytes there that will be removed before the first save.
    """
    run = Path(config.train.output)
    if (progress := last_progress(run)) is not None and progress.step >= config.train.steps:
        return
    of_checkpoint, of_universal = space_needed(config, processes)
    needed = of_checkpoint + of_universal
    try:
        free = shutil.disk_usage(nearest_folder(run)).free
    except OSError:
        return
    if free + removable < needed:
        raise UserError(
            f"train.output = {run}: a checkpoint of this model takes at least {in_bytes(of_checkpoint)}, "
            + (f"the last one, converted to another layout, {in_bytes(of_universal)} more, " if of_universal else "")
            + "and "
            f"{free_space(run)}; make room, or name another folder"
        )


def space_needed(config: Config, processes: int) -> tuple[int, int]:
    """Bytes that the next checkpoint of a run takes, and those of the last one's universal form, which lies beside it
    where the run goes on at another layout and it has none yet; what is in them besides numbers is not counted.

    Of a parameter that was frozen at an earlier resume, averages of its own are not counted: it may have none.
    """
    model, frozen = config.model, frozen_parameters(config)
    whole, trained, averages = num_parameters(model), num_parameters(model, frozen), len(average_names(config))
    # weights and averages as files; of the optimizer the float32 weights, two moments, and averages
    needed = 4 * ((1 + averages) * whole + (3 + averages) * trained)
    # the weights that the model computes with, but with ZeRO-3; and what is frozen once more from ZeRO-2 on, in
    # DeepSpeed's own entry, and once more in half precision, in ours (checkpoint/frozen.py)
    dtype, stage = resolve_dtype(config), config.zero.stage
    copies = (whole if stage < 3 else 0) + (whole - trained) * ((stage > 1) + (dtype != "float32"))
    needed += DTYPES[dtype].itemsize * copies
    last = last_checkpoint(Path(config.train.output))
    if last is None:
        return needed, 0
    before = read_progress(last)
    frozen_before = frozen_parameters(configs.replace(config, train__freeze=before.layout.frozen))
    frozen_since = frozen - frozen_before
    own = before.averaged.keys() & average_names(config).keys()
    needed += 4 * len(own) * (whole - num_parameters(model, frozen_since))
    if not is_other_layout(before.layout, config, processes) or is_dir(last / UNIVERSAL):
        return needed, 0
    entries = 2 * (before.layout.zero_stage == 2)  # DeepSpeed's, in each of the two files of counts (`reshard`)
    in_entries = entries * DTYPES[before.layout.dtype].itemsize * (whole - num_parameters(model, frozen_before))
    return needed, 4 * (3 + len(before.averaged)) * whole + in_entries


def is_other_layout(before: Layout, config: Config, processes: int) -> bool:
    """Whether a run on so many processes has another layout; where its pipeline is cut is not known yet."""
    now = replace(
        before,
        tensor=config.parallel.tensor,
        pipeline=config.parallel.pipeline,
        data=check_layout(config, processes),
        zero_stage=config.zero.stage,
        dtype=resolve_dtype(config),
        deepspeed=json.loads(json.dumps(config.deepspeed)),
        frozen=frozen_patterns(config),
    )
    return now != before


def check_model(saved: Path, config: Config) -> None:
    """The model is that of a saved config; UserError names the fields that differ."""
    changes = Changes(changed_settings(load(saved), config))
    if changed := [name for name in changes.settings if name.startswith("model.") and name not in TRAINED_ONLY]:
        what = ", ".join(map(changes.said, changed))
        raise UserError(f"{saved.parent} holds a run of another model ({what}); name another folder")


def check_corpora(ledger: Ledger, config: Config) -> None:
    """The corpora are those that the run last read, by fingerprint, or `data.allow_change` is set."""
    before = {c["fingerprint"]: c["path"] for c in ledger.blends()[-1]["blend"]}
    now = {open_corpus(c.path, config.data.cache).fingerprint: c.path for c in config.data.corpora}
    if config.data.allow_change or before.keys() == now.keys():
        return
    gone, new = (", ".join(a[f] for f in a.keys() - b.keys()) for a, b in ((before, now), (now, before)))
    raise UserError(
        f"the corpora are not those that this run has read ({gone or 'nothing'} is missing, {new or 'nothing'} is new "
        "or has changed); put them back, or go on with these from the next window of documents on, up to which the "
        "former ones have to be there too: --data.allow-change"
    )


def check_readable(ledger: Ledger, config: Config, consumed: int) -> None:
    """The corpora that the window of documents is of in which a run goes on behind `consumed` packs can be opened:
    where they are by now, or where they were."""
    index = PackIndex(config.data, ledger)
    for corpus in _with_recorded_states(index, consumed).read_at(consumed):
        wanted = corpus["fingerprint"]
        if index.corpus(wanted) is None:
            raise UserError(
                f"this run is in a window of documents of {corpus['path']} (fingerprint {wanted}), which is gone, has "
                "changed or may not be read, and reads that to its end also with --data.allow-change; put it back "
                "there and name other corpora by other paths, or begin a new run with the weights: --train.init_from"
            )


def _with_recorded_states(index: PackIndex, consumed: int) -> Ledger:
    """An index's ledger with the states of the first segment that the cache's records say, too: checkpoints of earlier
    versions have none, but the packs are found by these as well."""
    ledger = index.ledger
    last = min([ledger.locate(consumed), *(segment.first_pack - 1 for segment in ledger.segments[1:])])
    return replace(ledger, states=(*ledger.states, *index.ledger_at(last).states))
