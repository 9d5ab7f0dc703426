"""What a process of a layout holds, by simulated steps (train/simulate.py) that are as short as they can be.

A simulated step of a deep model on hundreds of replicas takes minutes, most of it for what repeats. So it has fewer
replicas, and without a pipeline fewer blocks: memory grows linearly with the blocks of each encoder, and what replicas
share between them is known (train/memory.py). A small model on a few is simulated as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.train.layout import check_layout
from megatron_lcl.train.memory import estimate
from megatron_lcl.train.simulate import Usage, extrapolated, simulate, usages_by_stage

REPLICAS = 64
"""at most, of a simulated step"""
BLOCKS = 4
"""an encoder of up to so many times `activation_checkpointing_every` is simulated whole; of a deeper one this many, and
half of them"""

Simulate = Callable[[Config, int, int, int], Usage]


def usages_of(config: Config, processes: int, images: int, on_gpu: bool, simulated: Simulate = simulate) -> list[Usage]:
    """Bytes of the first process of each stage, as `simulate.usages_by_stage`."""
    return usages_by_stage(
        config, processes, lambda stage: usage_of(config, processes, images, stage, simulated), on_gpu
    )


def usage_of(config: Config, processes: int, images: int, stage: int = 0, simulated: Simulate = simulate) -> Usage:
    """Bytes of the first process of a stage, of a run all of whose steps are as the config says.

    images: image slots of a pack.
    """
    data = check_layout(config, processes)
    few = data if "zero_hpz_partition_size" in config.deepspeed.get("zero_optimization", {}) else min(data, REPLICAS)
    fewer = configs.replace(config, train__global_batch=config.train.global_batch // data * few)
    split = config.parallel.tensor * config.parallel.pipeline
    rank = stage * few * config.parallel.tensor
    found = _of_depth(fewer, few * split, images, rank, simulated)
    if few == data:
        return found
    whole, part = (estimate(c, n, images, on_gpu=False) for c, n in ((config, processes), (fewer, few * split)))
    less = {name: getattr(whole, name) - getattr(part, name) for name in ("parameters", "optimizer", "gradients")}
    # features of all pairs and what the loss keeps of each, float32 (objectives/contrast.py)
    packs = config.train.global_batch - fewer.train.global_batch
    features = 4 * (2 * config.model.language.width + 2) * packs * images
    changes = {"parameters": less["parameters"], "optimizer": less["optimizer"]}
    changes |= dict.fromkeys(("peak", "touched"), sum(less.values()) + features) | {"network": features}
    return replace(found, **{name: getattr(found, name) + change for name, change in changes.items()})


def _of_depth(config: Config, processes: int, images: int, rank: int, simulated: Simulate) -> Usage:
    """Of the whole model, from simulations of as few blocks as tell."""
    enough = BLOCKS * config.train.activation_checkpointing_every
    depths = {"vision": config.model.vision.layers, "language": config.model.language.layers}
    if config.parallel.pipeline > 1 or config.train.freeze or max(depths.values()) <= enough:
        return simulated(config, processes, images, rank)
    deep = {name: depth for name, depth in depths.items() if depth > enough}
    least = {name: enough // 2 if name in deep else depth for name, depth in depths.items()}

    def of(blocks: dict[str, int]) -> Usage:
        layers = {f"model__{name}__layers": depth for name, depth in blocks.items()}
        return simulated(configs.replace(config, **layers), processes, images, rank)

    found = first = of(least)
    for encoder, depth in deep.items():
        more = of({**least, encoder: enough})
        found = extrapolated(found, first, more, (depth - least[encoder]) / (enough - least[encoder]))
    return found
