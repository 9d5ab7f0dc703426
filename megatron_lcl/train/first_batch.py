"""What a run measures before its first step, on its first micro-batch: kernels, and where a pipeline's stages begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config, run_yaml
from megatron_lcl.config.phases import Phase, phases_of
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.ledger import Ledger, open_run_ledger
from megatron_lcl.data.loading.loader import PackedLoader, loader_of
from megatron_lcl.parallel.mesh import Mesh, local_device
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.checkpoint.folder import Progress
from megatron_lcl.train.engine import specs_of
from megatron_lcl.train.fastest import Fastest, choose_fastest
from megatron_lcl.train.parts import frozen_patterns
from megatron_lcl.train.pipeline.partition import choose_partition
from megatron_lcl.train.precision import DTYPES, resolve_dtype
from megatron_lcl.train.resume_point import ResumePoint


def pipeline_partition(config: Config, mesh: Mesh, point: ResumePoint) -> tuple[int, ...]:
    """Where the stages of the pipeline begin: as in the checkpoint, otherwise by measurement on the first packs.

    Measured again where other parameters are frozen: what a stage has to train is then another, and what it takes.
    """
    layout, pipeline = point.progress.layout, mesh.pipeline.size
    if pipeline == 1:
        return (0,)
    if layout.pipeline == pipeline and {*layout.frozen} == {*frozen_patterns(config)}:
        return layout.partition
    sample, place = sample_batch(config, mesh, point), (local_device(), DTYPES[resolve_dtype(config)])
    return choose_partition(specs_of(config, mesh.tensor), sample, config, mesh, *place)


def measure_kernels(point: ResumePoint, mesh: Mesh) -> tuple[Fastest, ResumePoint]:
    """What `train.measure_kernels` finds on the first packs, and the run with it."""
    config = point.config
    found = choose_fastest(config, sample_batch(config, mesh, point), mesh, local_device())
    config = found.chosen.applied(config)
    if mesh.is_first:
        replace_text(Path(config.train.output) / CONFIG, run_yaml(config))
    return found, replace(point, config=config)


def sample_batch(config: Config, mesh: Mesh, point: ResumePoint) -> PackedBatch:
    """The first micro-batch, the same on every process; all processes call it.

    Of a run with phases it is one of the phase that reads most packs, as if the run began with it.
    """
    progress, ledger = point.progress, Ledger.from_json(point.progress.ledger)
    phases, sample = phases_of(config), None
    phase = max(phases, key=_packs_of)
    if mesh.is_first:
        if len(phases) > 1:
            progress = replace(progress, step=0, packs=0)
            version = ledger.settings["version"]
            ledger = open_run_ledger(phase.config, objectives.create(config).sequences, version=version)
        packs = tuple(ledger.locate(progress.packs + i) for i in range(phase.config.train.micro_batch))
        reader = build_loader(config, mesh, phase, progress, ledger).reader
        sample = reader[packs]
        reader.index.close()  # loader processes are forked after this
    batch = mesh.world.broadcast_object(sample)
    assert batch is not None, "the first process has read it"
    return batch


def _packs_of(phase: Phase) -> int:
    return (phase.stop - phase.first) * phase.config.train.global_batch


def build_loader(config: Config, mesh: Mesh, phase: Phase, progress: Progress, ledger: Ledger) -> PackedLoader:
    """This process's batches of a phase, from where the run stands on; all later ones come from other loaders."""
    reading, _ = ledger.reading_at(progress.step, phase.config)
    return loader_of(
        reading,
        config.data,
        objectives.create(config).sequences,
        rank=mesh.data.rank,
        world_size=mesh.data.size,
        global_batch=reading.global_batch,
        micro_batch=phase.config.train.micro_batch,
        first_pack=progress.packs,
        steps=phase.stop - progress.step,
        ledger=ledger,
        pin_memory=torch.cuda.is_available(),
    )
