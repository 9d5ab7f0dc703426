"""`train.measure_kernels`: the kernels with which a run's layers are fastest on its devices, found by measurement.

Candidates are the variable-length attentions that can be used (where `train.attention` is auto), and blocks as they are
and compiled (where `train.compile` does not ask for compiled ones). As for a pipeline's partition, layers of each kind
work on the run's own first micro-batch, the candidates in turns, all processes at the same time. What was measured is
kept beside the pack indices, for the same devices, software and shapes. A candidate that fails on a process, because it
cannot be compiled for its device, say, is left out on all, and the reason is printed. Kernels differ in rounding, so
what was chosen stands in the config of the run's checkpoints, and a run that goes on keeps it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_lcl import config as configs
from megatron_lcl.attention import VARLEN
from megatron_lcl.config import Config
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.data.loading.cache import cache_folder, fingerprint
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.parallel.mesh import Mesh
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.engine import choose_run_attention, specs_of
from megatron_lcl.train.kernels import check_kernels, compile_fault
from megatron_lcl.train.pipeline.partition import REPEATS, WARM_UPS, LayerSamples, agree_on_costs
from megatron_lcl.train.precision import DTYPES, resolve_dtype

GAIN = 0.03
"""part of the time that another candidate than the first must save: measurements scatter by as much"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Kernels that can be used together."""

    attention: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.attention}, compiled blocks" if self.compiled else self.attention

    def applied(self, config: Config) -> Config:
        """The config that asks for them."""
        return configs.replace(config, train__attention=self.attention, train__compile=self.compiled)


@dataclass(frozen=True, slots=True)
class Fastest:
    """What was measured, and what came of it."""

    chosen: Candidate
    seconds: Mapping[str, float]
    """of all layers, forward and backward, for a micro-batch, by candidate; empty where there is one only"""
    faults: Mapping[str, str] = field(default_factory=dict)
    """why others failed"""

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.chosen} (nothing else can be used)"
        measured = [f"{name} {1e3 * seconds:.1f} ms" for name, seconds in self.seconds.items()]
        failed = [f"{name} failed with {fault}" for name, fault in self.faults.items()]
        return f"{self.chosen} (a micro-batch through all layers: {', '.join([*measured, *failed])})"


def choose_fastest(config: Config, batch: PackedBatch, mesh: Mesh, device: torch.device) -> Fastest:
    """The same on every process; all call it together.

    batch: a micro-batch of the run with its images, on every process the same.
    """
    options = candidates(config, mesh)
    if len(options) == 1:
        return Fastest(options[0], {})
    file, about = _file_of(config, batch, mesh, device, options)
    faults: dict[str, str] = {}
    seconds = mesh.world.broadcast_object(_read(file, options) if mesh.is_first else None)
    if seconds is None:
        seconds, faults = _measured(options, config, batch, mesh, device)
        if mesh.is_first and not faults:  # what has failed may go another time
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps({**about, "seconds": seconds}, indent=1))
    return Fastest(fastest([option for option in options if str(option) in seconds], seconds), seconds, faults)


def fastest(options: Sequence[Candidate], seconds: Mapping[str, float]) -> Candidate:
    """The first, or the one that is fastest, where that saves GAIN."""
    best = min(options, key=lambda option: seconds[str(option)])
    return best if seconds[str(best)] <= (1 - GAIN) * seconds[str(options[0])] else options[0]


def candidates(config: Config, mesh: Mesh) -> list[Candidate]:
    """What can be used on all processes; first what a run has that does not measure."""
    first, train = choose_run_attention(config).name, config.train
    attentions: list[str] = [first]
    if train.attention == "auto":
        attentions += [name for name in VARLEN if name != first and _can_attend(config, name)]
    compiled = [True] if train.compile else [False] if compile_fault(config) else [False, True]
    own = [Candidate(attention, compile) for attention in attentions for compile in compiled]
    everywhere = mesh.world.gather_objects(own)
    usable = [option for option in own if all(option in others for others in everywhere)]
    if not usable:
        raise RunError("the processes have no attention in common; name one that all have as train.attention")
    return usable


def _can_attend(config: Config, name: str) -> bool:
    try:
        choose_run_attention(configs.replace(config, train__attention=name))
    except UserError:
        return False
    return True


def kept_kernels(config: Config, folder: Path | None) -> Config | None:
    """The config with the kernels that a checkpoint's run has chosen; None where there are none, or they do not go."""
    if folder is None or not config.train.measure_kernels:
        return None
    before = configs.load(folder / CONFIG).train
    asked = config.train
    if not before.measure_kernels or before.attention == "auto" or asked.attention not in ("auto", before.attention):
        return None
    if asked.compile and not before.compile:
        return None
    kept = Candidate(before.attention, before.compile).applied(config)
    try:
        check_kernels(kept, elsewhere=False)
    except UserError:
        return None
    return kept


def _measured(
    options: Sequence[Candidate], config: Config, batch: PackedBatch, mesh: Mesh, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds by candidate; of those that fail, why. RunError where that is the first, which a run has otherwise."""
    samples: dict[str, LayerSamples] = {}
    faults: dict[str, str] = {}
    for option in options:
        sample, fault = _first_measurement(option, config, batch, mesh, device)
        found = next(filter(None, mesh.world.gather_objects(fault)), None)
        if found is None:
            assert sample is not None
            samples[str(option)] = sample
        elif option == options[0]:
            remedy = "set train.attention to another" + ", or train.compile to false" * option.compiled
            raise RunError(f"{option} failed with {found}; {remedy}")
        else:
            faults[str(option)] = found
    warm_ups = WARM_UPS - 1
    turns = [{name: sample.measure() for name, sample in samples.items()} for _ in range(warm_ups + REPEATS)][warm_ups:]
    in_first = mesh.pipeline.size == 1  # a stage of several is as good as another for a comparison
    seconds = {
        name: sum(agree_on_costs(sample.times([turn[name] for turn in turns], in_first), config, mesh))
        for name, sample in samples.items()
    }
    return seconds, faults


def _first_measurement(
    option: Candidate, config: Config, batch: PackedBatch, mesh: Mesh, device: torch.device
) -> tuple[LayerSamples | None, str | None]:
    """What a candidate's layers are measured on, after they have run, and been compiled, once; or why they fail."""
    own = option.applied(config)
    try:
        specs, dtype = specs_of(own, mesh.tensor), DTYPES[resolve_dtype(config)]
        sample = LayerSamples(specs, batch, own, mesh.tensor, device, dtype)
        sample.measure()
    except Exception as error:  # noqa: BLE001 - whatever a compiler or somebody's kernel raises
        return None, " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return sample, None


def _file_of(
    config: Config, batch: PackedBatch, mesh: Mesh, device: torch.device, options: Sequence[Candidate]
) -> tuple[Path, dict[str, Any]]:
    """The file of such a measurement, and what it is of."""
    tree = configs.to_dict(config)
    about = {
        "devices": sorted(set(mesh.world.gather_objects(_device_name(device)))),
        "processes": mesh.world.size,
        "torch": torch.__version__,
        "candidates": [str(option) for option in options],
        "dtype": resolve_dtype(config),
        "float8": config.train.float8,
        "tokens, images, patches": [len(batch.tokens), len(batch.image_start), batch.num_patches],
        "activation_checkpointing": [
            config.train.activation_checkpointing,
            config.train.activation_checkpointing_every,
        ],
        "strategy": config.contrast.strategy,
        "model": tree["model"],
        "parallel": tree["parallel"],
    }
    return cache_folder(config.data) / f"kernels-{fingerprint(about)}.json", about


def _read(file: Path, options: Sequence[Candidate]) -> dict[str, float] | None:
    """The seconds in a file; None where it is not there, or is damaged."""
    try:
        seconds = json.loads(file.read_text())["seconds"]
        return {str(option): float(seconds[str(option)]) for option in options}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {torch.get_num_threads()} threads"
