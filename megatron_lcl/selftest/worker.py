"""One process of one case: are the process groups alive, and what do three steps give?"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl import objectives
from megatron_lcl.config.phases import phase_at
from megatron_lcl.evaluate.batches import image_batch, text_batch
from megatron_lcl.parallel.mesh import Axis, Mesh, join_processes, local_device
from megatron_lcl.selftest.cases import STEPS, Case, joined, lone_images_and_texts, make_batches
from megatron_lcl.selftest.count_traffic import Traffic
from megatron_lcl.selftest.reference import Trajectory
from megatron_lcl.train.launch_store import exchange_in_store
from megatron_lcl.units import listed

AXES = ("world", "data", "pipeline", "tensor", "model_parallel", "data_tensor")


class GroupError(RuntimeError):
    """A process group in which somebody does not answer, or a collective fails or gives something else."""


def run_case(
    case: Case, rank: int, store: dist.Store, timeout: float, prepare: Callable[[int], None] | None = None
) -> Trajectory | None:
    """Join the case's process group, check every group of its mesh, train, leave it; the result on the first process.

    timeout: seconds to wait for another process. prepare: called with the rank before anything else; tests plant
    faults with it.
    """
    if prepare is not None:
        prepare(rank)
    from megatron_lcl.train.engine import build_engine, build_module, init_processes, leave_processes

    config = case.config()
    torch.set_float32_matmul_precision("highest")  # no TF32: it would be far over the bounds
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.processes)}
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(case.processes))
    os.environ.setdefault("LOCAL_RANK", str(rank % max(1, torch.cuda.device_count())))
    meet(store, rank, case.processes, timeout)
    join_processes(store, rank, case.processes, timedelta(seconds=timeout))
    mesh = init_processes(config)
    for name in AXES:
        check_group(getattr(mesh, name), name, store, timeout)
    engine = build_engine(build_module(config, mesh), config, mesh)
    result = _train(case, engine, mesh)
    leave_processes(others_wait=False)  # or NCCL warns; where something was raised, others may still be in a collective
    return result


def meet(store: dist.Store, rank: int, processes: int, timeout: float) -> None:
    """Wait until every process has said that it is there. GroupError names those that have not."""
    said = exchange_in_store(store, "is there", rank, range(processes), "", timeout)
    if silent := [other for other in range(processes) if other not in said]:
        raise GroupError(f"{listed(silent, 'process')} did not answer within {timeout:g} s")


def check_group(axis: Axis, name: str, store: dist.Store, timeout: float) -> None:
    """One collective in a group, and one in that of its hosts, where they have one of their own.

    Every process gives its rank and gets everybody's, and then says in the store what went wrong. GroupError, on all,
    names those that say nothing, else those in which it went wrong, and what went wrong first.
    """
    me, all_ranks = axis.ranks[axis.rank], list(axis.ranks)
    groups = {name: (axis.group, local_device()), f"{name} host": (axis.host_group, torch.device("cpu"))}
    for called, (group, device) in groups.items():
        if group is None:
            continue
        own = torch.tensor([me], device=device)
        gathered = [torch.empty_like(own) for _ in all_ranks]
        wrong, began = "", time.monotonic()
        try:
            work = dist.all_gather(gathered, own, group=group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=timeout))
            got = [int(r) for r in gathered]
            wrong = f"received {got}" if got != all_ranks else ""
        except RuntimeError as error:
            wrong = str(error) or type(error).__name__
        key = f"group {called} {tuple(all_ranks)}"
        if wrong:
            store.compare_set(f"{key} failed first", "", f"process {me}: {wrong}")
        # others may wait in it until its timeout for a process in which it failed at once, and say nothing before
        left = max(timeout / 4, 1.25 * timeout - (time.monotonic() - began))
        said = exchange_in_store(store, key, me, all_ranks, wrong, left)
        silent, failed = [r for r in all_ranks if r not in said], [r for r in said if said[r]]
        first = store.get(f"{key} failed first").decode() if failed else ""
        if silent:
            why = f"; a collective failed first in {first}" if failed else f" within {timeout:g} s"
            raise GroupError(f"{called} group {all_ranks}: {listed(silent, 'process')} did not answer{why}")
        if failed:
            where = f"{listed(failed, 'process')}, first in {first}" if failed[1:] else first
            raise GroupError(f"{called} group {all_ranks}: all answer, but a collective failed in {where}")


def _train(case: Case, engine: Any, mesh: Mesh) -> Trajectory | None:
    from megatron_lcl.train.averages import Averages
    from megatron_lcl.train.broadcast_batches import broadcast_batches
    from megatron_lcl.train.engine import build_stepper, set_batch
    from megatron_lcl.train.master_weights import read_parameters
    from megatron_lcl.train.traffic import of_step

    config = case.config()
    stepper, averages = build_stepper(engine, config, mesh), Averages(config, engine)
    averaged: dict[str, int] = {}
    out, terms = Trajectory(), ("generation", "regression" if case.objective == "emu" else "contrastive")
    traffic = Traffic()
    for step in range(STEPS):
        here = phase_at(config, step).config_at(step)
        size = here.train.micro_batch
        num = here.train.global_batch // mesh.data.size // size
        set_batch(engine, here.train.global_batch, here.train.micro_batch)
        stepper.objective = objectives.create(here)
        packs = make_batches(config, step)[mesh.data.rank :: mesh.data.size]
        own = [joined(packs[n * size : (n + 1) * size]) for n in range(num)] if mesh.loads_data else None
        # the last step's bytes are counted, without those of a look at it; not in one process, which sends none: blocks
        # may be compiled there, which torch does not do under what counts
        with traffic if step == STEPS - 1 and mesh.world.size > 1 else contextlib.nullcontext():
            batches = broadcast_batches(own, num, size, mesh, engine.device)
            pending = stepper.start(batches, case.lr(step), measure=step < STEPS - 1)
            averages.update(step + 1, pending.skipped)
            result, averaged = pending.read(), averages.count(step + 1, averaged)
        out.losses.append([*(result.metrics[name] for name in terms), result.log_scale])
        out.grad_norms.append(result.grad_norm)
        if result.measured is not None:
            measured = result.measured
            out.norms_of_parts.append([*measured.grad_norms.values(), *measured.update_norms.values()])
            out.attention_logits.append([measured.attention_logits[part] for part in ("vision", "pool", "language")])
        if step == 0:  # Adam's first moment is then the gradient it was given, times 1 - beta1
            moments = read_parameters(engine, mesh, "exp_avg")
            out.gradients = {name: value / (1 - config.optimizer.betas[0]) for name, value in moments.items()}
    counted, formula = (
        {r: round(n, 3) for r, n in x.items() if n} for x in (traffic.sent, of_step(batches, engine, config, mesh))
    )
    out.sent = mesh.world.gather_objects(counted)
    out.expected = mesh.world.gather_objects(formula)
    out.parameters = read_parameters(engine, mesh)
    out.averages = {name: read_parameters(engine, mesh, name) for name in averaged}
    images, texts = lone_images_and_texts(config)
    alone = [image_batch(images, config.model), text_batch(texts, config.model)] if mesh.loads_data else None
    with averages.evaluated(averaged):
        encoded = stepper.forward(broadcast_batches(alone, 2, 1, mesh, engine.device))
    if encoded:  # the last pipeline stage
        of_images, of_texts = encoded
        out.features = {"images": of_images.latents.cpu(), "texts": of_texts.text_features.cpu()}
    out.features = mesh.world.broadcast_object(out.features, source=mesh.world.size - mesh.data_tensor.size)
    results = mesh.world.gather_objects((out.losses, out.grad_norms))
    assert all(r == results[0] for r in results), f"processes report different losses: {results}"
    mesh.world.barrier()
    return out if mesh.is_first else None
