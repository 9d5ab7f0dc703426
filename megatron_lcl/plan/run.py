"""A config, so many devices, and what comes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.config.phases import Phase, phases_of
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.plan.calibrate import calibrate
from megatron_lcl.plan.devices import DEVICES, assumed_rates, check_name
from megatron_lcl.plan.layouts import MAX_SIMULATED, Layout, Target, bound, confirm, slots, survey
from megatron_lcl.plan.predict import Prediction
from megatron_lcl.train.memory import available
from megatron_lcl.train.optimizer import check_optimizer
from megatron_lcl.train.parts import check_freeze
from megatron_lcl.train.precision import check_dtype
from megatron_lcl.train.simulate import placeholders_of_image
from megatron_lcl.units import counted, in_bytes

USABLE = 0.92
"""share of a GPU's memory that a run may plan with: the driver's context, the network library's buffers and fragments
of the allocator take the rest (assumed)"""
NODE = 8
"""GPUs of a node, where nobody says"""
TEXT_PER_IMAGE = 100 + 2
"""tokens beside an image's placeholders, where nobody says: text as in the interleaved documents that configs/ count
with, and the image's two special tokens"""


@dataclass(frozen=True)
class Plan:
    """What was found for a config on so many devices."""

    config: Config
    device: str
    nodes: int
    target: Target
    assumed_images: bool
    """nobody said how many images a pack has"""
    layouts: list[Layout]
    """those that fit, fastest first; the first one's step was simulated, the others pass the bound"""
    too_large: list[Layout]
    """least first"""
    refused: list[Layout]
    own: Layout | None
    """the config's own layout, where it fits"""

    @property
    def best(self) -> Layout:
        return self.layouts[0]

    def phases(self, layout: Layout) -> list[tuple[Phase, Prediction]]:
        """What a step of each phase takes."""
        return [(phase, self.target.predict(phase.config)) for phase in phases_of(layout.config)]


def plan(
    config: Config,
    gpus: int,
    gpu: str = "h100",
    nodes: int | None = None,
    images_per_pack: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What a run of the config takes on so many GPUs, or processes of this machine (`cpu`). UserError in one line where
    nothing goes.

    say: is told what takes long. No GPU and no corpus is needed.
    """
    device = check_name(gpu)
    check_optimizer(config)
    check_freeze(config)
    node_size = _node_size(gpus, nodes, device)
    text, assumed = text_per_image(config, images_per_pack)
    if device == "cpu":
        check_dtype(config)
        say("measuring this machine")
        rates, room = calibrate(config, gpus, slots(config, text)), available(gpus).size
    else:
        if config.train.dtype == "auto":
            config = configs.replace(config, train__dtype="bfloat16")
        rates, room = assumed_rates(DEVICES[device], config.train.dtype), USABLE * DEVICES[device].memory
    target = Target(gpus, node_size, rates, room, text, on_host=device != "cpu")
    passed, too_large, refused = survey(config, target)
    fitting, failed = confirm(passed, target, say)
    too_large = sorted([*failed, *too_large], key=lambda layout: layout.needs)
    if not fitting or not fitting[0].usages:
        raise UserError(_nothing_fits(config, target, fitting, too_large, refused))
    own = next((layout for layout in fitting if _is_own(layout, config)), None)
    return Plan(config, device, gpus // node_size, target, assumed, fitting, too_large, refused, own)


def own_layout(config: Config, device: str, processes: int, nodes: int, images: int | None) -> Layout:
    """The config in its own layout on GPUs of a name in `DEVICES`, at once: no step is simulated, and the memory is the
    bound. UserError where the layout does not divide.

    config: of a run with phases that of one. images: slots of a pack, where they are known.
    """
    if config.train.dtype == "auto":
        config = configs.replace(config, train__dtype="bfloat16")
    if images:
        config = configs.replace(config, data__images_per_pack=images)
    text, _ = text_per_image(config, None)
    rates = assumed_rates(DEVICES[device], config.train.dtype)
    target = Target(processes, -(-processes // nodes), rates, USABLE * DEVICES[device].memory, text, on_host=True)
    return replace(bound(config, target), prediction=target.predict(config))


def _is_own(layout: Layout, config: Config) -> bool:
    """Whether the config asks for the layout; with `contrast.strategy: auto` for the faster of those that fit."""
    strategies = ("auto", layout.config.contrast.strategy)
    return config.contrast.strategy in strategies and replace(layout.config, contrast=config.contrast) == config


def write(config: Config, file: Path) -> None:
    """The whole config as YAML. UserError where there is such a file."""
    if exists(file):
        raise UserError(f"{file} exists; name another file for --write")
    replace_text(file, configs.to_yaml(config))


def text_per_image(config: Config, given: int | None) -> tuple[float, bool]:
    """Tokens of a pack for each image beside its placeholders, and whether they are assumed, as a run has them from its
    corpora. From them follow the image slots of phases whose images or packs have other sizes.

    given: image slots of a pack as the config says it without `schedule.phases`.
    """
    if given is not None and given < 1:
        raise UserError(f"--images-per-pack {given}: give a number above 0")
    own = config.data.images_per_pack
    if given and own not in (None, given):
        raise UserError(
            f"--images-per-pack {given} is for a config that leaves them to the corpora, and data.images_per_pack = "
            f"{own}; give --data.images_per_pack {given} in its place"
        )
    placeholders, tokens = placeholders_of_image(config), config.data.tokens_per_pack
    if given is None:
        return max(1, min(TEXT_PER_IMAGE, config.model.language.context_length - placeholders)), own is None
    text = max(1.0, tokens / given - placeholders)
    if given > (most := slots(config, text)):
        raise UserError(
            f"--images-per-pack {given}: a pack of {tokens:,} tokens has room for {most} images of {placeholders} "
            "placeholders; give at most that"
        )
    return text, False


def _node_size(gpus: int, nodes: int | None, device: str) -> int:
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: give a number above 0")
    if device == "cpu":
        if nodes not in (None, 1):
            raise UserError(f"--nodes {nodes} with --gpu cpu: only this machine can be measured; leave it out")
        return gpus
    if nodes is None:
        size = min(NODE, gpus)
        if gpus % size:
            below = gpus // size * size
            raise UserError(
                f"--gpus {gpus} is no multiple of {size} a node; the nearest are {below} and {below + size}, or say "
                "how many nodes there are: --nodes N"
            )
        return size
    if nodes < 1 or gpus % nodes:
        divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
        nearest = min(divisors, key=lambda n: abs(n - nodes))
        raise UserError(f"--gpus {gpus} do not divide into {nodes} nodes; the nearest number that does is {nearest}")
    return gpus // nodes


def _nothing_fits(
    config: Config, target: Target, unknown: list[Layout], too_large: list[Layout], refused: list[Layout]
) -> str:
    room = in_bytes(target.room)
    if not unknown and not too_large:
        own = max(refused, key=lambda layout: _likeness(layout.config, config))  # the first of equals
        return f"no layout is legal on {counted(target.processes, 'process')}: {own.refused}"
    if unknown:
        least = min(unknown, key=lambda layout: layout.needs)
        return (
            f"the simulated steps of the {MAX_SIMULATED} fastest layouts do not fit into {room} a process; of the rest "
            f"the one with the lowest bound ({in_bytes(least.needs)}) is {least.name}: give it in the config, or take "
            "more GPUs"
        )
    least = too_large[0]
    text = f"nothing fits into {room} a process: the least is {in_bytes(least.needs)}, with {least.name}"
    if nearest := _nearest_that_fits(config, target):
        return f"{text}; the nearest number of GPUs for which a bound passes is {nearest}"
    return f"{text}; make packs smaller (data.tokens_per_pack), or take devices with more memory"


def _likeness(a: Config, b: Config) -> tuple[bool, bool, bool]:
    """Which parts of the layouts are equal, the weightiest first."""
    return a.parallel == b.parallel, a.zero == b.zero, a.train.micro_batch == b.train.micro_batch


def _nearest_that_fits(config: Config, target: Target) -> int | None:
    """Twice the processes, and so on: the first number for which some layout passes the bound."""
    for times in (2, 4, 8, 16, 32):
        more = replace(target, processes=times * target.processes)
        if survey(config, more)[0]:
            return more.processes
    return None
