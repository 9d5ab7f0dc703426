"""The lower bound for a process's memory (train/memory.py) beside the peak that is measured, in several settings.

    python benchmarks/memory_estimate.py [SETTING …]

Each setting trains two steps in a process of its own. On CPU the peak is the resident set's, less what the process had
before it built the model; on a GPU it is torch's. Exits with 1 if a bound is above its peak, or below 0.4 of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = {
    "vision": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "heads": 4, "mlp_width": 768},
    "language": {"context_length": 256, "vocab_size": 2003, "width": 128, "layers": 6, "heads": 4, "mlp_width": 512},
    "pool_heads": 4,
}
WIDE = {"width": 768, "heads": 8, "mlp_width": 3072, "vocab_size": 8003}
RECOMPUTE = {"contrast": {"strategy": "recompute"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "retain": {},
    "recompute, micro-batches of 4": {**RECOMPUTE, "train": {"micro_batch": 4}},
    "retain, blocks computed again": {"train": {"activation_checkpointing": "full"}},
    "retain, attention computed again": {"train": {"activation_checkpointing": "attention"}},
    "retain, bfloat16": {"train": {"dtype": "bfloat16"}},
    "recompute, a wide model": {"model": {**MODEL, "language": {**MODEL["language"], **WIDE}}, **RECOMPUTE},
}
PACKS, IMAGES, ROWS = 8, 8, 4
"""packs of a step; images of a pack, and its sequences, each as long as the context"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"of: {'; '.join(SETTINGS)}. Default: all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    failed = 0
    print(f"{'MB':<40}{'bound':>9}{'measured':>10}{'share':>8}")
    for name in options.settings or SETTINGS:
        bound, measured = run(name)
        failed += not 0.4 * measured <= bound <= measured
        print(f"{name:<40}{bound / 1e6:>9.0f}{measured / 1e6:>10.0f}{bound / measured:>8.2f}", flush=True)
    return 1 if failed else 0


def run(name: str) -> tuple[float, float]:
    """Bound and peak of a setting, bytes, measured in a new process."""
    command = [sys.executable, __file__, "--measure", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    bound, measured = json.loads(done.stdout.splitlines()[-1])
    return bound, measured


def measure(name: str) -> tuple[float, float]:
    """The same in this process."""
    import torch

    from megatron_lcl import config as configs
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
    from megatron_lcl.train.memory import estimate

    def config_of(setting: dict[str, Any]) -> configs.Config:
        train = {"global_batch": PACKS, "dtype": "float32", **setting.get("train", {})}
        data = {"tokens_per_pack": ROWS * MODEL["language"]["context_length"], "images_per_pack": IMAGES}  # type: ignore[index]
        return configs.from_dict({"model": MODEL, "data": data, **setting, "train": train})

    def two_steps(config: configs.Config) -> None:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)
        for _ in range(2):  # the optimizer's states are there from the first step's end on
            stepper.run([batch.to(engine.device) for batch in make_batches(config)], 1e-3)

    config = config_of(SETTINGS[name])
    mesh = init_processes(config)
    narrow = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 8}
    small = {part: {**MODEL[part], **narrow} for part in ("vision", "language")}  # type: ignore[dict-item]
    two_steps(config_of({"model": {**small, "pool_heads": 2}, "contrast": {"strategy": "recompute"}}))
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        two_steps(config)
        peak = torch.cuda.max_memory_allocated()
    else:
        before = resident("VmRSS")
        two_steps(config)
        peak = resident("VmHWM")
    torch.distributed.destroy_process_group()
    return estimate(config, 1).total, peak - before


def resident(field: str) -> int:
    """A size of this process that Linux keeps, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def make_batches(config: Any) -> list[Any]:
    """The micro-batches of a step: sequences as long as the context, each with its share of the images."""
    import torch

    from megatron_lcl.model.lcl import pack_padded
    from megatron_lcl.model.special import SpecialTokens

    model, packs = config.model, config.train.micro_batch
    special, length = SpecialTokens.of(model.language.vocab_size), model.language.context_length
    image = [special.soi, *[special.placeholder] * model.vision.num_patches, special.eoi]
    head = [special.sot, *([5, 6, *image] * (IMAGES // ROWS))]
    row = torch.tensor([*head, *[7] * (length - len(head) - 1), special.eot])
    pixels = torch.zeros(packs * IMAGES, 3, model.vision.image_size, model.vision.image_size, dtype=torch.uint8)
    lengths = torch.full((packs * ROWS,), length)
    return [pack_padded(row.repeat(packs * ROWS, 1), lengths, pixels.clone(), model) for _ in range(PACKS // packs)]


if __name__ == "__main__":
    sys.exit(main())
