"""`megatron-lcl selftest`: does every kernel compute its formula, and every layout give what one process gives?

Each process of a case is started afresh, so that a case which hangs or dies takes nothing with it. Where a launcher
has started this program on a cluster, each of its processes starts the process of the same rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing as mp
import os
import pickle
import queue
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_lcl.attention import CAPABILITY
from megatron_lcl.errors import UserError
from megatron_lcl.interrupts import end_with_command, holding_interrupts
from megatron_lcl.processes import variables
from megatron_lcl.selftest import kernels
from megatron_lcl.selftest.cases import CASES, Case
from megatron_lcl.selftest.kernels import Kernel, KernelCase
from megatron_lcl.selftest.reference import Trajectory, reference
from megatron_lcl.selftest.worker import run_case
from megatron_lcl.train.forks import forkserver
from megatron_lcl.train.kernels import compile_fault
from megatron_lcl.train.launch import is_launched
from megatron_lcl.train.launch_store import (
    LOOPBACK,
    exchange_in_store,
    gloo_on_loopback,
    open_store,
    serve_store,
    wait_for_keys,
)
from megatron_lcl.units import counted, listed


@dataclass(frozen=True)
class Bounds:
    """Relative differences that rounding may make."""

    losses: float
    """of losses and gradient norms"""
    gradient: float
    """of the whole model's gradient"""
    parameters: float
    one: float
    """of one tensor's gradient, so that no small tensor hides a fault; of the norms by part"""
    floor: float
    """also of one tensor's gradient, but of the whole model's norm"""
    sent: float
    """of the bytes that a process sends, beside one byte"""


# bfloat16 is compared with float32 in one process. Measured on CPU in six layouts: losses 2.3e-2 (the contrast's, of
# logits up to 14), norms 1.6e-2, gradient 2.5e-2, parameters 1.6e-3, one tensor 4.6e-2; key biases, whose gradients are
# mathematically zero, 3.2e-5 of the whole. Two to three times that is allowed, six times for the last. A sum that is
# missing or made twice is off by half of itself or more. More messages than in float32 are too small to be counted (see
# selftest.count_traffic): the formulas say up to 3.6e-3 more than is sent.
BOUNDS = {
    "float32": Bounds(losses=1e-5, gradient=1e-5, parameters=1e-5, one=1e-4, floor=1e-7, sent=0.0),
    "bfloat16": Bounds(losses=5e-2, gradient=5e-2, parameters=4e-3, one=0.15, floor=2e-4, sent=5e-3),
}
COMPILING = 5
"""times the limit of a case takes what is compiled: on CUDA some forty kernels one after another; blocks"""
GRACE = 30.0
"""seconds beyond a case's time that the others' word on it is waited for, and, on the first process, their end"""


@dataclass(frozen=True)
class Verdict:
    """A case against one process: the largest relative differences, and what is over its bound."""

    case: Case
    loss: float = math.nan
    grad_norm: float = math.nan
    gradient: float = math.nan
    parameters: float = math.nan
    sent: float = math.nan
    """kB that a process sends in a step, mean of all"""
    formula: float = math.nan
    """the same by the formulas of docs/parallelism.md"""
    faults: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return " ".join(self.case.name.split())

    def row(self) -> str:
        """One line of the table."""
        numbers = "  ".join(f"{x:9.1e}" for x in (self.loss, self.grad_norm, self.gradient, self.parameters))
        verdict = "equal" if not self.faults else "DIFFERS: " + "; ".join(self.faults[:4])
        verdict += f" and {len(self.faults) - 4} more" if self.faults[4:] else ""
        numbers += f"  {self.sent:7.1f} {self.formula:7.1f}"
        return f"{self.case.name:<64}  {numbers}  {self.seconds:5.1f}  {verdict}"


LEGEND = """\
Every layout trains the same tiny model on the same steps, and is compared with one process in float32.
  losses, norms      largest relative difference of a step's losses or log scale; of its gradient norm
  gradient           norm of the difference over the norm, of the whole gradient of the first step
  parameters         the same of all parameters after the last step
                     (after it images and texts by themselves are encoded as an evaluation does, and compared too)
  kB sent, formula   what a process sends in a step as counted, and by the formulas of docs/parallelism.md
  s                  seconds; then the verdict
"""
HEADER = (
    f"{'layout':<64}  {'losses':>9}  {'norms':>9}  {'gradient':>9}  {'parameters':>10}  {'kB sent':>7} {'formula':>7}"
    f"  {'s':>5}"
)


def verdict_of(verdicts: Sequence[Verdict | KernelVerdict], seconds: float, where: str, skipped: int) -> str:
    """The last line: what all of it says."""
    failed = [verdict.name for verdict in verdicts if verdict.faults]
    told = f"in {seconds:.0f} s on {where}" + (f" ({skipped} skipped)" if skipped else "")
    if failed:
        return f"FAILED: {len(failed)} of {len(verdicts)} checks {told}: {'; '.join(failed)}"
    return f"all {counted(len(verdicts), 'check')} passed {told}"


def compare(case: Case, ours: Trajectory, truth: Trajectory) -> Verdict:
    """The verdict on what a case gave."""
    bounds = BOUNDS[case.dtype]
    pairs = [(a, b) for x, y in zip(ours.losses, truth.losses, strict=True) for a, b in zip(x, y, strict=True)]
    loss = max(_relative(a, b) for a, b in pairs)
    norm = max(_relative(a, b) for a, b in zip(ours.grad_norms, truth.grad_norms, strict=True))
    faults = []
    if not loss <= bounds.losses:
        faults.append("losses")
    if not norm <= bounds.losses:
        faults.append("gradient norms")
    for what, own, expected_ones in (
        ("norms by part", ours.norms_of_parts, truth.norms_of_parts),
        ("attention logits", ours.attention_logits, truth.attention_logits),
    ):
        parts = [(a, b) for x, y in zip(own, expected_ones, strict=True) for a, b in zip(x, y, strict=True)]
        if not all(_relative(a, b) <= bounds.one for a, b in parts):
            faults.append(what)
    gradient, of_gradients = _distance(ours.gradients, truth.gradients, bounds.gradient, "gradients")
    parameters, of_parameters = _distance(ours.parameters, truth.parameters, bounds.parameters, "parameters")
    total = _norm(truth.gradients.values())
    excess = {}
    for name, expected in truth.gradients.items():
        allowed = bounds.one * float(expected.norm()) + bounds.floor * total
        error = float((ours.gradients[name] - expected).norm()) if name in ours.gradients else 0.0
        if not error <= allowed:
            excess[name] = error / allowed
    if excess:
        worst = sorted(excess, key=lambda name: -excess[name])
        faults.append(f"gradient of {', '.join(worst[:3])}" + (f" and {len(worst) - 3} more" if worst[3:] else ""))
    sent, formula = (
        sum(sum(x.values()) for x in all_ranks) / case.processes / 1e3 for all_ranks in (ours.sent, ours.expected)
    )
    _, of_features = _distance(ours.features, truth.features, bounds.one, "features of lone images and texts")
    if ours.averages.keys() != truth.averages.keys():
        faults.append(f"averages are {', '.join(ours.averages)}, not {', '.join(truth.averages)}")
    for name in ours.averages.keys() & truth.averages.keys():
        faults += _distance(ours.averages[name], truth.averages[name], bounds.parameters, f"average {name}")[1]
    faults += [*of_gradients, *of_parameters, *of_features, *_byte_faults(ours, bounds.sent)]
    return Verdict(case, loss, norm, gradient, parameters, sent, formula, tuple(faults))


def _byte_faults(ours: Trajectory, bound: float) -> Iterator[str]:
    """Where a process sent other bytes than the formulas say."""
    for rank, (sent, formula) in enumerate(zip(ours.sent, ours.expected, strict=True)):
        for ranks in sorted(sent.keys() | formula.keys()):
            counted, expected = sent.get(ranks, 0.0), formula.get(ranks, 0.0)
            if abs(counted - expected) > 1 + bound * expected:
                yield f"bytes: process {rank} sent {counted:.0f}, not {expected:.0f}, among {list(ranks)}"


def _relative(a: float, b: float) -> float:
    distance = abs(a - b) / abs(b) if b else abs(a)  # 0: what the objective has not
    return distance if math.isfinite(distance) else math.inf  # max drops nan


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def _distance(
    ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], bound: float, what: str
) -> tuple[float, tuple[str, ...]]:
    if odd := sorted(ours.keys() ^ truth.keys()) or [n for n in truth if ours[n].shape != truth[n].shape]:
        return math.nan, (f"{what} lack, or have too many, or of another shape: {', '.join(odd[:3])}",)
    # key biases: their gradients are rounding, which Adam turns into steps of full size
    names = [n for n in truth if not n.endswith(("k.bias", "norm_k.bias"))]
    distance = _norm(ours[n] - truth[n] for n in names) / _norm(truth[n] for n in names)
    return distance, () if distance <= bound else (what,)


@dataclass(frozen=True)
class KernelVerdict:
    """The kernels on the first process's device, and what is wrong on any."""

    case: KernelCase
    kernels: tuple[Kernel, ...] = ()
    faults: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return "kernels"

    def row(self) -> str:
        """The lines of the table, and of faults beside it: other devices', a process that died."""
        lines = [kernels.LEGEND + kernels.HEADER, *(kernel.row() for kernel in self.kernels)]
        known = {kernel.fault for kernel in self.kernels}
        return "\n".join([*lines, *(f"kernels: {fault}" for fault in self.faults if fault not in known), ""])


def selftest(
    cases: Sequence[Case | KernelCase] = (KernelCase(), *CASES),
    *,
    timeout: float = 120.0,
    prepare: Callable[[int], None] | None = None,
    say: Callable[[str], Any] = print,
) -> list[Verdict | KernelVerdict]:
    """Run the cases that the processes at hand suffice for; the verdicts, on the first process.

    Without a launcher it starts the processes itself: four on a machine without CUDA, else one a device. Where no case
    has as many processes as there are, one more case does, with so many replicas. timeout: seconds for a case;
    COMPILING times as many for one with compiled blocks, and on CUDA for that of the kernels. prepare: see `run_case`.
    UserError where the first process does not answer.
    """
    if launched := is_launched():
        ranks, world = [int(os.environ["RANK"])], int(os.environ["WORLD_SIZE"])
    else:
        world = torch.cuda.device_count() or max(case.processes for case in cases)
        ranks = list(range(world))
    starters = list(range(world)) if launched else [0]
    store = _open_store(launched and world > 1, timeout)
    if launched or torch.cuda.is_available():  # every device, or machine, has kernels of its own
        cases = [KernelCase(world) if isinstance(case, KernelCase) else case for case in cases]
    lacks = _lacks_of_first(cases, store, 0 in ranks, timeout)
    fitting = those_that_fit([case for case, fault in zip(cases, lacks, strict=True) if not fault], world)
    left_out = [case.processes > world or bool(fault) for case, fault in zip(cases, lacks, strict=True)]
    skipped, began = sum(left_out), time.monotonic()
    here, where = counted(world, "process"), "NCCL" if torch.cuda.is_available() else "gloo"
    if 0 in ranks:
        left = sum(case.processes > world for case in cases)
        say(f"{here}, {where}" + (f"; skipped, for they need more: {counted(left, 'layout')}" if left else ""))
        for fault in filter(None, dict.fromkeys(lacks)):
            say(f"{fault}: its layouts are skipped")
    truths: dict[tuple[Any, ...], Trajectory] = {}
    verdicts: list[Verdict | KernelVerdict] = []
    for number, case in enumerate(fitting):
        if 0 in ranks and isinstance(case, Case) and not any(isinstance(v, Verdict) for v in verdicts):
            say(LEGEND + HEADER)
        started, prefix = time.monotonic(), f"case {number}"
        of_case = dist.PrefixStore(prefix, store)
        mine = [rank for rank in ranks if rank < case.processes]
        compiles = case.compiled if isinstance(case, Case) else torch.cuda.is_available()
        limit = timeout * (COMPILING if compiles else 1)
        result, own_faults = _start(case, mine, of_case, (store.host, store.port, prefix), limit, prepare)
        faults, silent = _of_everyone(of_case, own_faults, ranks[0], starters, limit)
        if 0 in ranks:
            verdict: Verdict | KernelVerdict
            if isinstance(case, KernelCase):
                faults += [kernel.fault for kernel in result or () if kernel.fault]
                verdict = KernelVerdict(case, tuple(result or ()), tuple(faults))
            elif result is None or faults:
                verdict = Verdict(case, faults=tuple(faults))
            else:
                if case.truth not in truths:
                    truths[case.truth] = reference(case)
                verdict = compare(case, result, truths[case.truth])
            verdicts.append(replace(verdict, seconds=time.monotonic() - started))
            say(verdicts[-1].row())
        if silent:  # and would be in every other case
            break
    if 0 in ranks:
        device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        skipped += len(fitting) - len(verdicts)
        say(verdict_of(verdicts, time.monotonic() - began, f"{device} ({here}, {where})", skipped))
    store.set(f"ended {ranks[0]}", "")
    if 0 in ranks:  # it may serve the store, in which the others still read the last case's faults
        with contextlib.suppress(dist.DistStoreError):
            store.wait([f"ended {starter}" for starter in starters], timedelta(seconds=GRACE))
    return verdicts


def those_that_fit(cases: Sequence[Case | KernelCase], world: int) -> list[Case | KernelCase]:
    """Those for which there are processes; of layouts, where none has as many, one more that has."""
    layouts = [case.processes for case in cases if isinstance(case, Case)]
    more = [Case(data=world)] if layouts and world not in layouts else []
    return [*(case for case in cases if case.processes <= world), *more]


def _lacks_of_first(cases: Sequence[Case | KernelCase], store: dist.Store, is_first: bool, timeout: float) -> list[str]:
    """Of each case what the first process's machine lacks. It decides for all: programs that run other cases than each
    other would wait for one another in each that follows. A machine that lacks more has a fault in these cases."""
    if is_first:
        store.set("lacks", json.dumps([_lacks(case) for case in cases]))
    with contextlib.suppress(dist.DistError):  # it may be gone, and the store with it
        if wait_for_keys(store.check, ["lacks"], timeout + GRACE):
            lacks: list[str] = json.loads(store.get("lacks"))
            return lacks
    raise UserError(f"{_silent([0])}: see what it has said; if it only came late, give a longer --timeout")


def _lacks(case: Case | KernelCase) -> str:
    """What this machine or its devices lack for a case."""
    if isinstance(case, KernelCase):
        return ""
    if case.compiled and (fault := compile_fault(case.config())):
        return fault
    if case.dtype == "float32" or not torch.cuda.is_available():
        return ""
    if all(torch.cuda.get_device_capability(i) >= CAPABILITY for i in range(torch.cuda.device_count())):
        return ""
    return f"the GPU has no {case.dtype} (compute capability 8.0, Ampere, does)"


def _open_store(launched: bool, timeout: float) -> dist.TCPStore:
    """The store in which processes find each other."""
    if launched:
        return open_store(timeout)
    return serve_store(LOOPBACK, 0, timeout)


def _of_everyone(
    store: dist.Store, own: Sequence[str], me: int, starters: Sequence[int], timeout: float
) -> tuple[list[str], bool]:
    """The faults that all programs found which start processes, and whether one of these programs does not answer."""
    said = exchange_in_store(store, "faults", me, starters, json.dumps(own), timeout + GRACE)
    faults = [fault for told in said.values() for fault in json.loads(told)]
    silent = [starter for starter in starters if starter not in said]
    if silent:
        faults.append(_silent(silent))
    return faults, bool(silent)


def _silent(starters: Sequence[int]) -> str:
    return f"the program that starts {listed(starters, 'process')} does not answer"


def _start(
    case: Case | KernelCase,
    ranks: list[int],
    store: dist.Store,
    place: tuple[str, int, str],
    timeout: float,
    prepare: Any,
) -> tuple[Any, list[str]]:
    """Run these ranks of a case to their end: the first process's result, and what went wrong here.

    A fault anywhere ends the case everywhere. place: host and port of the store, and the case's prefix there.
    """
    # forked from a server that has imported everything; but CUDA does not survive a fork, and whether Triton interprets
    # is decided when it is imported
    spawned = torch.cuda.is_available() or isinstance(case, KernelCase)
    interprets = isinstance(case, KernelCase) and not torch.cuda.is_available()
    with holding_interrupts():
        context: Any = mp.get_context("spawn") if spawned else forkserver()
    results: Any = context.Queue()
    arguments = (case, place, timeout, prepare, results)
    children = {rank: context.Process(target=_child, args=(rank, *arguments), daemon=True) for rank in ranks}
    result, waiting = None, set(ranks)
    faults: list[str] = []
    deadline = time.monotonic() + timeout
    try:
        with variables({"TRITON_INTERPRET": "1"} if interprets else {}), holding_interrupts():
            for child in children.values():
                child.start()
        while waiting and not faults and not store.check(["fault"]):
            try:
                rank, value, fault = results.get(timeout=0.2)
            except queue.Empty:
                dead = [r for r in waiting if children[r].exitcode not in (None, 0)]
                faults += [f"process {r} ended with code {children[r].exitcode}" for r in dead]
                if not dead and time.monotonic() > deadline:
                    faults.append(f"{listed(sorted(waiting), 'process')} did not finish within {timeout:g} s")
                continue
            waiting.discard(rank)
            result = pickle.loads(value) if rank == 0 else result
            faults += [fault] if fault else []
    finally:
        if faults:
            store.set("fault", "yes")
        for child in children.values():
            child.join(0 if waiting else 10)
            if child.is_alive():
                child.kill()
                child.join()
    return result, faults


def _child(
    rank: int, case: Case | KernelCase, place: tuple[str, int, str], timeout: float, prepare: Any, results: Any
) -> None:
    end_with_command()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(1)
    try:
        if isinstance(case, KernelCase):
            results.put((rank, pickle.dumps(case.run(rank, prepare)), None))
            return
        host, port, prefix = place
        gloo_on_loopback(host)
        whole = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
        store = dist.PrefixStore(prefix, whole)
        result, fault = run_case(case, rank, store, timeout / 2, prepare), None
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the verdict
        where = traceback.extract_tb(error.__traceback__)[-1]
        result, fault = None, f"process {rank}: {' '.join(str(error).split())} ({where.name}, line {where.lineno})"
    # as bytes: tensors would be handed over through a file descriptor of this process, which ends
    results.put((rank, pickle.dumps(result), fault))
