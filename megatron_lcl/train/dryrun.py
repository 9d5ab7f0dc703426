"""`train --dry-run`: what would be launched, and everything that can be checked before a GPU is taken.

Runs on a login node as well as on every node of a job. The text names nothing that may differ between the nodes of one
job, so nodes whose texts differ do not have the same software or do not see the same files.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import socket
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from packaging.requirements import Requirement

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.attention import NAMES, is_installed, load_fault
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at, phases_of
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.source import VERSION
from megatron_lcl.data.loading.summary import summarize_config
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.machine import installed
from megatron_lcl.model.layers import num_of_parts
from megatron_lcl.train.checkpoint import folder as checkpoint
from megatron_lcl.train.checkpoint.mirror import Mirror, resumed
from megatron_lcl.train.checks import check, without_pairs
from megatron_lcl.train.engine import check_built_for
from megatron_lcl.train.fits import check_memory, check_step
from megatron_lcl.train.kernels import Kernels, choose_kernels, kernels_of_blocks
from megatron_lcl.train.launch import check_devices
from megatron_lcl.train.layout import check_layout, num_micro_batches
from megatron_lcl.train.memory import Memory, available, largest_estimate, slots_of
from megatron_lcl.train.optimizer import unfinished_warmup
from megatron_lcl.train.resume_point import Origin, open_origin
from megatron_lcl.train.strategy import choose_strategy
from megatron_lcl.train.unused import unused_settings
from megatron_lcl.units import counted, plain

LAUNCH = "MEGATRON_LCL_LAUNCH"
"""variable in which a launch script says what it would run"""
TORCHRUN_WAITS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600"
"""the seconds that torchrun gives processes to end after a signal; torch 2.11 knows no other number than its 30"""
TORCHRUN_SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""the signals that it passes on: what a run needs that saves when it is told to end, as in launch/torchrun.sh"""
LAST_LINE = "checks      passed: "
"""the text's last line begins so; launch scripts look for it"""


def dry_run(config: Config, arguments: Sequence[str], nodes: int, processes: int) -> str:
    """What `megatron-lcl train ARGUMENTS` would start on `nodes` nodes with `processes` processes each.

    UserError or OSError, with one line, where a check fails.
    """
    check_requirements()
    check_slurm_devices()
    check_devices(processes)
    check_cuda_starts(processes)
    elsewhere = is_elsewhere(nodes)
    check(config, nodes * processes, processes, elsewhere)
    check_writable(Path(config.train.output))
    checks = ["requirements", "devices", "layout", "corpora", "run folder"]
    checks += [] if elsewhere else ["kernels", "memory"]
    if "MASTER_ADDR" in os.environ:
        check_resolves(os.environ["MASTER_ADDR"])
        checks.append("master address")
    origin, where = find_origin(config)
    lines = [*_launch(arguments, nodes, processes), *_layout(config, nodes * processes), *_model(config)]
    lines += [*_kernels(config, elsewhere), *_memory(config, nodes, processes, elsewhere, origin)]
    if warmup := unfinished_warmup(config):
        lines.append(f"warning     {warmup}")
    lines += [f"unused      {line}" for line in unused_settings(config)]
    lines += [*_data(config), *_packs(config, origin), *where, _software(), *_network()]
    return "\n".join([*lines, LAST_LINE + ", ".join(checks)])


# --- checks ------------------------------------------------------------------------------------------------------


def check_requirements() -> None:
    """UserError naming the first package that is absent or of another version than we need."""
    for text in _requirements():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if (found := installed(wanted.name)) is None:
            raise UserError(f"{wanted} is not installed for {sys.executable}; pip install '{wanted}'")
        if not wanted.specifier.contains(found, prereleases=True):
            raise UserError(f"{wanted.name} {found} is installed for {sys.executable}, and {wanted} is needed")


def find_origin(config: Config) -> tuple[Origin, list[str]]:
    """What the run would go on from, and lines that say it: a checkpoint of its own, the newest copy of one, or what
    `checkpoint.resume` names, in this order as at the start. Of copies the small files are read.

    UserError where the run cannot go on from it.
    """
    run, named = Path(config.train.output), config.checkpoint.resume
    has_own = bool(checkpoint.list_checkpoints(run))
    source = Mirror(config.checkpoint.mirror) if config.checkpoint.mirror is not None else None
    copy = source.newest_for(run) if source else None
    is_own = has_own or copy is not None
    if not is_own and (source := resumed(named)):
        copy = source.newest_for(run)
    if source and copy:
        url = f"{source.store.url}/{copy}"
        with tempfile.TemporaryDirectory() as folder:
            there = source.peek(copy, Path(folder))
            try:
                return _describe(there, url, config, is_own)
            except UserError as error:
                raise UserError(str(error).replace(str(there), url)) from None
    chosen, _ = checkpoint.choose(run, named, config.checkpoint.mirror, checkpoint.SMALL)
    if chosen is None:
        weights = config.train.init_from
        start = f"run         {run}: starts at step 0" + (f" with the weights of {weights}" if weights else "")
        return open_origin(None, config, False), [start]
    return _describe(chosen, chosen.name if has_own else str(chosen), config, has_own)


def _describe(folder: Path, shown: str, config: Config, is_own: bool) -> tuple[Origin, list[str]]:
    """What a run goes on from that begins with a checkpoint, and lines that say it."""
    origin = open_origin(folder, config, is_own)
    line = f"run         {config.train.output}: goes on from {shown}, if it verifies"
    return origin, [line, *(f"            {change}" for change in origin.changes(config).lines())]


def _requirements() -> list[str]:
    try:
        return metadata.requires("megatron-lcl") or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        project = Path(__file__).parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]


def check_slurm_devices() -> None:
    """UserError where Slurm gives this node GPUs and torch sees none."""
    visible, given = torch.cuda.device_count(), int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if given and not visible:
        has = counted(given, "GPU")
        raise UserError(
            f"Slurm gives this node {has}, but torch {torch.__version__} sees none; a torch built for CUDA "
            f"{torch.version.cuda} is installed, compare the driver's version"
            if torch.version.cuda
            else f"Slurm gives this node {has}, but torch {torch.__version__} is built without CUDA"
        )


def check_cuda_starts(processes: int) -> None:
    """UserError where torch counts GPUs, as the driver's management library does, and CUDA or torch cannot use them.

    That library answers also where the fabric manager is down, or the driver is too old for torch's CUDA. With
    PYTORCH_NVML_BASED_CUDA_CHECK `torch.cuda.is_available` asks it alone. What is done here allocates nothing on a GPU.
    """
    if not (torch.version.cuda and (visible := torch.cuda.device_count())):
        return
    try:
        torch.cuda.init()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        raise UserError(
            f"torch sees {counted(visible, 'GPU')}, but CUDA does not start on this node "
            f"({str(error).strip().splitlines()[0]}); see what nvidia-smi says, whether the driver is new enough for "
            f"CUDA {torch.version.cuda}, and, with NVSwitch, whether nvidia-fabricmanager runs in the driver's version"
        ) from None
    for device in range(min(processes, visible)):
        check_built_for(device)


def is_elsewhere(nodes: int) -> bool:
    """Whether the run's devices are not this machine's: it has no GPU, but torch or the launch wants them."""
    if torch.cuda.device_count() or "SLURM_JOB_ID" in os.environ:
        return False
    return bool(torch.version.cuda) or nodes > 1 or LAUNCH in os.environ


def check_writable(run: Path) -> None:
    """UserError where the run folder, or the folder in which it would be made, cannot be written."""
    existing = next(folder for folder in (run, *run.absolute().parents) if exists(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"train.output = {run}: {existing} cannot be written; name another folder")


def check_resolves(address: str) -> None:
    """UserError where the address at which processes meet has no meaning on this machine."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR = {address} does not resolve ({error.strerror}); set MASTER_ADDR to an address of the first "
            "node"
        ) from None


# --- the text ----------------------------------------------------------------------------------------------------


def _launch(arguments: Sequence[str], nodes: int, processes: int) -> Iterator[str]:
    program, line = sys.executable, shlex.join(["-m", "megatron_lcl", "train", *arguments])
    meet = [os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    where = f", meeting at {':'.join(meet)}" if meet else ""
    yield f"processes   {nodes * processes}: {processes} on each of {counted(nodes, 'node')}{where}"
    if LAUNCH in os.environ:
        yield f"command     {os.environ[LAUNCH].strip()}"
        return
    if "SLURM_JOB_ID" in os.environ:
        command = f"srun --ntasks-per-node={processes} {program} {line}"
    elif nodes > 1:
        where_and_which = f"--nnodes={nodes} --nproc-per-node={processes} --node-rank=K --master-addr=NODE_0"
        command = f"{TORCHRUN_WAITS} torchrun {where_and_which} {TORCHRUN_SIGNALS} {line}"
    else:
        command = f"{program} {line} --processes {processes}"
    yield f"each node   {command}"


def _layout(config: Config, processes: int) -> Iterator[str]:
    parallel, train, data = config.parallel, config.train, check_layout(config, processes)
    tokens, micro_batches = config.data.tokens_per_pack, num_micro_batches(config, data)
    a_step = f"{train.global_batch * tokens:,} tokens a step"
    yield (
        f"layout      data {data} x pipeline {parallel.pipeline} x tensor {parallel.tensor}, "
        f"ZeRO stage {config.zero.stage}, {train.dtype}"
    )
    yield (
        f"batch       {train.global_batch:,} packs of {tokens:,} tokens: {a_step}; "
        f"a replica runs {counted(micro_batches, 'micro-batch')} of {train.micro_batch}"
    )


def _model(config: Config) -> Iterator[str]:
    vision, *others = num_of_parts(config.model).values()
    parts = {"vision": vision, "pool and language": sum(others)}
    yield "model       " + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parts.items()) + " parameters"


def _kernels(config: Config, elsewhere: bool) -> Iterator[str]:
    if elsewhere:
        on_devices, attention = "chosen on the run's devices", config.train.attention
        kernels = Kernels(
            on_devices if attention == "auto" else attention,
            on_devices if objectives.has_triton(config) else "torch",
            kernels_of_blocks(config, has_cuda=bool(torch.version.cuda)),
            tuple(fault for name in NAMES if is_installed(name) and (fault := load_fault(name))),
        )
    else:
        kernels = choose_kernels(config)
    first, *skipped = kernels.lines()
    yield f"kernels     {first}{', or what is measured to be faster' * config.train.measure_kernels}"
    yield from (f"            {fault}" for fault in skipped)


def _memory(config: Config, nodes: int, processes: int, elsewhere: bool, origin: Origin) -> Iterator[str]:
    # nothing of this machine's, which may have a little more or less than the next one
    everywhere = nodes * processes
    if elsewhere and config.train.dtype == "auto":
        config = configs.replace(config, train__dtype="bfloat16")
    slots, progress = slots_of(origin.ledger, config), origin.progress if origin.folder else None
    has = Memory(math.inf, "", True) if elsewhere else available(processes)
    check_memory(config, everywhere, has, slots)
    choice = choose_strategy(config, everywhere, has, slots, None if elsewhere else progress)
    if choice is not None and elsewhere and choice.bound:
        yield f"contrast    {choice}, where the run's devices have the room; else recompute"
    elif choice is not None:
        config = configs.replace(config, contrast__strategy=choice.strategy)
        yield f"contrast    {choice}"
    if not (elsewhere or progress or (choice and choice.is_simulated)):
        check_step(config, everywhere, has, slots)
    yield f"memory      a process holds at least {largest_estimate(config, everywhere, slots, has.on_gpu).describe()}"


def _data(config: Config) -> Iterator[str]:
    lacking = without_pairs(config)
    for entry in config.data.corpora:
        corpus = open_corpus(entry.path, config.data.cache)
        if corpus.remote:
            corpus.remote.room.limit = config.data.storage_cache_gb * 1e9
        for index in {0, len(corpus) - 1} if len(corpus) else ():
            corpus[index]  # its files can be read
        missing = f", no pair for the contrast{lacking[entry.path]}" if entry.path in lacking else ""
        yield f"data        {entry.path} (weight {entry.weight:g}): {len(corpus):,} documents{missing}"


def _packs(config: Config, origin: Origin) -> Iterator[str]:
    """Builds the index of the first packs where the cache does not have it: the run would have to.

    Of a run with phases, of each; those still to come as if the run began with them, since where its documents will
    then stand does not change what its packs hold.
    """
    previous, sequences = origin.previous, objectives.create(config).sequences
    step, consumed = origin.progress.step, origin.progress.packs
    now, *later = [phase for phase in phases_of(config) if phase.stop > step] or [phase_at(config, step)]
    version = previous.settings["version"] if previous else VERSION
    documents = np.zeros(len(config.data.corpora))
    for phase in (now, *later):
        if later:
            yield f"phase {phase.number + 1:<6}{phase.describe(step)}"
        if phase is now:
            summary = summarize_config(config, sequences, previous, consumed, step)
        else:
            summary = summarize_config(phase.config, sequences, None, 0, version=version, names=phase.names)
        yield f"packs       {summary}"
        packs = (phase.stop - max(phase.first, step)) * phase.config.train.global_batch
        documents += packs * np.array(summary.drawn)
    steps = config.train.steps - step
    of_each = (
        f"{plain(number / len(open_corpus(corpus.path, config.data.cache)), 2)} of {corpus.path}"
        for number, corpus in zip(documents, config.data.corpora, strict=True)
    )
    yield f"epochs      in the {steps:,} steps to come about {', '.join(of_each)}"


def _software() -> str:
    names = ("torch", "triton", "flash-attn", "deepspeed", "megatron-lcl")
    versions = [f"{name} {version}" for name in names if (version := installed(name))]
    devices = torch.cuda.device_count()
    found = f"{counted(devices, 'GPU') if devices else 'no GPU'} visible"
    return f"software    Python {platform.python_version()}, {', '.join(versions)}; {found}"


def _network() -> Iterator[str]:
    """What is set of the communication libraries; the same on every node, like the rest."""
    names = sorted(name for name in os.environ if name.startswith(("NCCL_", "TORCH_NCCL_", "TORCH_FR_", "GLOO_")))
    if names:
        yield f"network     {shlex.join(f'{name}={os.environ[name]}' for name in names)}"
