"""A plan as text: every number with what it is of."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phases_of
from megatron_lcl.data.loading.batch import batch_bytes
from megatron_lcl.data.loading.shared_memory import PREFETCH
from megatron_lcl.model.layers import num_of_parts, num_parameters
from megatron_lcl.plan.devices import DEVICES
from megatron_lcl.plan.layouts import Layout, slots
from megatron_lcl.plan.predict import Prediction, seconds_of_run
from megatron_lcl.plan.run import USABLE, Plan
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.settings import offloaded
from megatron_lcl.train.simulate import Usage
from megatron_lcl.units import counted, in_bytes

SHOWN = 10
"""layouts that are listed"""
STRATEGIES = "retain: activations of all micro-batches are saved until the loss; recompute: every forward runs twice"


def lines(plan: Plan, images: float | None = None) -> Iterator[str]:
    """What `megatron-lcl plan` prints. images: that the run sees; None: as the config says."""
    best = plan.best
    yield from _asked(plan)
    yield ""
    yield f"best        {best.name}" + (", as the config has it" if best == plan.own else "")
    if objectives.create(best.config).all_features_first:
        yield f"            {STRATEGIES}"
    phases = plan.phases(best)
    longest = max(phases, key=lambda of: (of[0].stop - of[0].first) * of[1].seconds)
    if len(phases) > 1:
        yield f"phase {longest[0].number + 1:<6}of {len(phases)}, in which it spends most: {longest[0].describe()}"
    yield from _memory(plan, best)
    yield from _step(plan, longest[0].config, longest[1])
    yield from _run(plan, [(phase.stop - phase.first, of) for phase, of in phases], images)
    yield ""
    yield from _ranking(plan)
    yield from _not_fitting(plan)
    yield from _refused(plan.refused)


def numbers(plan: Plan) -> dict[str, str | float | bool]:
    """What `plan --json` writes, under the names of metrics: of the config's layout, or if it does not fit the best.

    Of a run with phases: of the one that needs most.
    """
    return numbers_of(plan.own or plan.best, plan.device, plan.target.processes)


def numbers_of(layout: Layout, device: str, processes: int) -> dict[str, str | float | bool]:
    """The same of one layout, whose time is predicted."""
    of = layout.prediction
    assert of is not None
    return {
        "layout": layout.name,
        "processes": processes,
        "device": device,
        "is_measured": device == "cpu",
        "step_seconds": of.seconds,
        "images_per_second": of.images_per_second,
        "tokens_per_second": of.tokens / of.seconds,
        "flops_per_second": of.flops.total / of.seconds,
        "mfu": of.mfu,
        "memory_peak_bytes": layout.needs,
        "memory_gradients_bytes": layout.gradients,
        "memory_offloaded_bytes": layout.offloaded,
        "memory_is_bound": not layout.usages,
    }


def _asked(plan: Plan) -> Iterator[str]:
    config, target, rates = plan.config, plan.target, plan.target.rates
    model, train, data = config.model, config.train, config.data
    parts = ", ".join(f"{name} {count:,}" for name, count in num_of_parts(model).items())
    yield f"model       {num_parameters(model):,} parameters: {parts}"
    if plan.device == "cpu":
        measured = ", ".join(f"{part} {rate / 1e9:,.1f}" for part, rate in rates.matmul.items())
        attention = ", ".join(f"{part} {rate / 1e9:,.1f}" for part, rate in rates.attention.items())
        here = f"{counted(target.processes, 'process')} of this machine, {in_bytes(target.room)} each"
        yield f"device      {here}; measured now:"
        yield f"            GFLOP/s in products: {measured}; in attention: {attention}"
        passes = f"norms, GELU and sums: {rates.elements / 1e9:,.1f}; of memory: {rates.memory / 1e9:,.1f}"
        yield f"            GB/s in {passes}"
    else:
        nodes = f"{counted(plan.nodes, 'node')} of {target.node_size}"
        yield f"device      {target.processes:,} x {DEVICES[plan.device].label}, {nodes}; {train.dtype}"
        yield f"            peak {rates.peak / 1e12:,.0f} TFLOP/s; {USABLE:.0%} of its memory are planned with"
        yield "            nothing was measured on this device: its data sheet, and assumed shares of it,"
        yield from (f"            {part}" for part in rates.assumed)
    how = " (assumed; --images-per-pack N says otherwise)" if plan.assumed_images else ""
    packs = f"{train.global_batch:,} packs of {data.tokens_per_pack:,} tokens"
    images = slots(config, target.text_per_image)
    yield f"batch       {packs} and {counted(images, 'image')}{how}"
    of_phases = [slots(phase.config, target.text_per_image) for phase in phases_of(config)]
    if len(set(of_phases)) > 1:
        yield f"            by phase: {', '.join(map(str, of_phases))} images a pack"
    longest = min(model.language.context_length, data.tokens_per_pack)
    yield f"            packs are taken to be full, and sequences {longest:,} tokens long"


def _memory(plan: Plan, best: Layout) -> Iterator[str]:
    config, target = best.config, plan.target
    moved = sorted(offloaded(config))
    yield (
        f"memory      {in_bytes(best.needs)} of {in_bytes(target.room)} a process, by a simulated step"
        f" (ZeRO-{config.zero.stage}, {'offloaded: ' + ', '.join(moved) if moved else 'nothing offloaded'})"
    )
    yield "            by stage       weights  optimizer, sums    batches  activations  temporary       peak"
    for stages, usage in _by_stage(best.usages):
        parts = [usage.parameters, usage.optimizer, usage.batches, usage.graphs, usage.temporary, usage.peak]
        widths = (10, 17, 11, 13, 11, 11)
        numbers = "".join(f"{in_bytes(part):>{width}}" for part, width in zip(parts, widths, strict=True))
        yield f"            {stages:<14}{numbers}"
        network = f"{in_bytes(usage.network)} of what is sent and received"
        within = f"{in_bytes(usage.losses)} while a loss is computed, {network}"
        yield f"            {'':14}in these, each at its most: {within}"
    yield f"            gradients, in these: {in_bytes(best.gradients)} once they are summed and split (by formula)"
    if best.offloaded:
        on_node = in_bytes(min(target.node_size, target.processes) * best.offloaded)
        yield f"            on the host: {in_bytes(best.offloaded)} a process, {on_node} a node"
    yield f"            the loader: {_loader(plan, config)}"


def _by_stage(usages: Sequence[Usage]) -> Iterator[tuple[str, Usage]]:
    """Stages one after another that need the same in one row."""
    for usage, alike in itertools.groupby(enumerate(usages), key=lambda pair: pair[1]):
        stages = [stage for stage, _ in alike]
        yield f"stage {stages[0]}" if len(stages) == 1 else f"stages {stages[0]}-{stages[-1]}", usage


def _loader(plan: Plan, config: Config) -> str:
    """Host memory of the loader's batches on a node."""
    target, split = plan.target, config.parallel.tensor * config.parallel.pipeline
    replicas = max(1, target.node_size // split)
    images = slots(config, target.text_per_image)
    batch = batch_bytes(config.train.micro_batch, config.data.tokens_per_pack, images, config.model.vision.image_size)
    workers, ahead = config.data.workers, max(1, PREFETCH * config.data.workers)
    return (
        f"{replicas * workers} processes on a node, {in_bytes(replicas * ahead * batch)} of batches read ahead "
        "(and what Python and the decoder take)"
    )


def _step(plan: Plan, config: Config, of: Prediction) -> Iterator[str]:
    flops = of.flops
    data = check_layout(config, plan.target.processes)
    parts = ", ".join(f"{name} {getattr(flops, name) / flops.total:.1%}" for name in type(flops).__dataclass_fields__)
    yield f"FLOPs       {flops.total:.3e} a step: {parts}"
    yield f"            as the model needs; computing again takes {of.again / of.compute:.0%} of the computing"
    axes = {name: sent for name, sent in of.sending.by_axis().items() if sent}
    sent = ", ".join(f"{name} {in_bytes(number)}" for name, number in axes.items()) or "nothing"
    yield f"network     a process sends in a step: {sent}"
    yield f"replicas    {data:,}, each of {counted(of.micro_batches, 'micro-batch')} a step"
    if config.parallel.pipeline > 1:
        stages = ", ".join(f"{1000 * seconds:,.0f}" for seconds in of.stages)
        firsts = ", ".join(map(str, of.partition))
        yield f"pipeline    stages of {stages} ms a micro-batch, from layers {firsts};"
        yield f"            {of.balance:.0%} of the slowest on average; bubble {of.bubble / of.seconds:.1%} of a step"
    spent = {"compute": of.compute, "bubble": of.bubble, "network": of.network}
    spent |= {"optimizer": of.optimizer, "contrast": of.loss}
    shares = ", ".join(f"{name} {seconds / of.seconds:.1%}" for name, seconds in spent.items() if seconds)
    yield f"step        {_seconds(of.seconds)}: {shares}"
    yield (
        f"            {of.images_per_second:,.0f} images/s, {of.tokens / of.seconds:,.0f} tokens/s, "
        f"MFU {of.mfu:.1%}{' of the fastest product' if plan.device == 'cpu' else ''}"
    )


def _run(plan: Plan, per_step: list[tuple[int, Prediction]], images: float | None) -> Iterator[str]:
    seconds, seen = seconds_of_run(per_step, images)
    unit = "process-hours" if plan.device == "cpu" else "GPU-hours"
    yield f"run         {seen:,.0f} images: {days_and_hours(seconds, plan.target.processes, unit)}"


def days_and_hours(seconds: float, processes: int, unit: str) -> str:
    """How long it takes, and what of."""
    return f"{seconds / 86400:,.2f} days, {processes * seconds / 3600:,.0f} {unit}"


def _ranking(plan: Plan) -> Iterator[str]:
    fitting, best = plan.layouts, plan.best
    yield f"layouts that fit, by predicted step time (first {min(SHOWN, len(fitting))} of {len(fitting)}):"
    for number, layout in enumerate(fitting[:SHOWN], 1):
        yield _row(number, layout, best, " <- the config's" * (layout == plan.own))
    if plan.own is not None and plan.own not in fitting[:SHOWN]:
        yield _row(fitting.index(plan.own) + 1, plan.own, best, " <- the config's")


def _row(number: int, layout: Layout, best: Layout, mark: str) -> str:
    memory = ("" if layout.usages else "at least ") + in_bytes(layout.needs)
    slower = f"x {layout.seconds / best.seconds:.2f}"
    assert layout.prediction is not None
    numbers = f"{number:>4}  {_seconds(layout.seconds):>9}  {slower:>7}  MFU {layout.prediction.mfu:5.1%}  {memory:>17}"
    return f"{numbers}  {layout.name}{mark}"


def _not_fitting(plan: Plan) -> Iterator[str]:
    """A line for each split of the model, with the layout of it that comes nearest."""
    fits = {_split(layout.config) for layout in plan.layouts}
    nearest: dict[tuple[object, ...], Layout] = {}
    for layout in plan.too_large:
        nearest.setdefault(_split(layout.config), layout)
    some = [layout for split, layout in nearest.items() if split in fits]
    never = [layout for split, layout in nearest.items() if split not in fits]
    if plan.too_large:
        yield f"{len(plan.too_large)} layouts need more than {in_bytes(plan.target.room)}:"
    if some:
        yield f"      {len(some)} splits of the model fit with smaller micro-batches or more checkpointing only"
    for layout in never:
        how = "a simulated step needs" if layout.usages else "needs at least"
        yield f"      {how} {in_bytes(layout.needs)}: {layout.name}"


def _split(config: Config) -> tuple[object, ...]:
    return (config.parallel, config.zero.stage, config.contrast.strategy)


def _refused(refused: Sequence[Layout]) -> Iterator[str]:
    """A line for each reason, with how many layouts it is of."""
    if not refused:
        return
    yield f"{len(refused)} layouts are refused:"
    examples, counts = dict[str, str](), Counter[str]()
    for layout in refused:
        words = "".join("#" if letter.isdigit() else letter for letter in layout.refused)
        examples.setdefault(words, layout.refused)
        counts[words] += 1
    for words, count in counts.most_common():
        yield f"{count:>5}  {examples[words]}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1000 * seconds:,.1f} ms"
