"""A small model at any layout, whose optimizer is stepped with gradients that are the same at every one."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_lcl import config as configs
from megatron_lcl.config import Config

STEPS, LR, DECAY = 3, 1e-2, 0.3
PARTITION = (0, 3)  # of a pipeline of two stages


@dataclass(frozen=True)
class Layout:
    """How the processes divide the model."""

    name: str
    zero: int = 1
    tensor: int = 1
    pipeline: int = 1
    dtype: str = "float32"
    hierarchical: int = 1
    """ZeRO-3: data ranks among which parameters are sharded once more, for backward (ZeRO++, arXiv 2306.10209)"""


def config_of(layout: Layout, optimizer: dict[str, Any], train: dict[str, Any] | None = None) -> Config:
    """The small model's config: one vision block, two language blocks."""
    vision = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "heads": 4, "mlp_width": 40}
    # 99 token ids: padded by one row where two processes share them
    language = {"context_length": 32, "vocab_size": 99, "width": 32, "layers": 2, "heads": 4, "mlp_width": 64}
    # ZeRO-3: several partitions of a group, and no parameter so small that it stays whole
    zero = {"sub_group_size": 2000, "stage3_param_persistence_threshold": 0} if layout.zero == 3 else {}
    zero |= {"zero_hpz_partition_size": layout.hierarchical} if layout.hierarchical > 1 else {}
    tree: dict[str, Any] = {
        "model": {"vision": vision, "language": language, "pool_heads": 4},
        "optimizer": {"weight_decay": DECAY, "clip_norm": 0.5, **optimizer},
        "zero": {"stage": layout.zero},
        "deepspeed": {"zero_optimization": zero},
        "parallel": {"tensor": layout.tensor, "pipeline": layout.pipeline},
        "contrast": {"strategy": "recompute" if layout.zero == 3 else "retain"},
        "train": {"seed": 5, "global_batch": 4, "dtype": layout.dtype, **(train or {})},
    }
    return configs.from_dict(tree)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """Of a whole parameter; of the second step large, so that StableAdamW clips the update."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return torch.randn(shape, generator=draw) * (1.0, 10.0, 0.1)[step]


def run_layouts(rank: int, cases: list[tuple[Layout, dict[str, Any]]]) -> list[list[dict[str, np.ndarray]]]:
    """By case: whole parameters before the steps and after each; as numpy arrays, so that a queue copies them."""
    import torch.distributed as dist

    results = [step_layout(config_of(*case)) for case in cases]
    dist.destroy_process_group()
    return [[{name: value.numpy() for name, value in each.items()} for each in result] for result in results]


def step_layout(config: Config) -> list[dict[str, torch.Tensor]]:
    from megatron_lcl.parallel.layers import full_shape, shard
    from megatron_lcl.train.engine import build_engine, build_module, init_processes
    from megatron_lcl.train.master_weights import read_parameters
    from megatron_lcl.train.optimizers.pieces import partitions_of

    mesh = init_processes(config)
    module = build_module(config, mesh, PARTITION if config.parallel.pipeline > 1 else None)
    shapes = {name: full_shape(p) for name, p in module.named_parameters()}
    engine = build_engine(module, config, mesh)
    split = dict(engine.module.named_parameters())
    base, partitions = engine.optimizer.optimizer, partitions_of(engine.optimizer, mesh)
    groups = getattr(engine.optimizer, "sub_group_to_group_id", range(len(partitions)))
    states = [_copies(read_parameters(engine, mesh))]
    for step in range(STEPS):
        for number, partition in enumerate(partitions):
            flat = partition.flat
            flat.grad = torch.zeros_like(flat)
            for piece in partition.pieces:
                whole = gradient(piece.name, shapes[piece.name], step)
                own = shard(whole, split[piece.name], mesh.tensor).flatten()
                piece.of(flat.grad).copy_(own[piece.offset : piece.offset + piece.length])
            all_groups = base.param_groups  # one partition at a time, as DeepSpeed does
            group = all_groups[groups[number]]
            base.param_groups = [{**group, "params": [flat], "lr": LR * (1 + step)}]
            base.step()
            base.param_groups = all_groups
        states.append(_copies(read_parameters(engine, mesh)))
    return states


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
