"""A process's memory: lower bound, simulated step, what `megatron-lcl plan` gives, and the peak that is measured.

    python benchmarks/memory_estimate.py [SETTING …]

Each setting trains two steps in processes of its own; the one that had most is shown, beside the simulation of that
rank (train/memory.py, train/simulate.py). What `plan` gives (plan/memory.py) is of the first process of that one's
pipeline stage, and of an encoder of six blocks, without a pipeline and with nothing frozen, extrapolated from two and
four. On CPU the peak is the resident set's, less what the process had before it built the model; on a GPU torch's.
There settings of more processes than GPUs are left out. Exits with 1 if a bound is above its peak, or a simulation or
what `plan` gives more than 10 % from it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from functools import partial
from typing import Any

from arguments import one_of
from claims import exit_with
from measuring import resident
from setting_processes import measured_by_all, those_that_fit

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL: dict[str, Any] = {
    "vision": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "heads": 4, "mlp_width": 768},
    "language": {"context_length": 256, "vocab_size": 2003, "width": 128, "layers": 6, "heads": 4, "mlp_width": 512},
    "pool_heads": 4,
}
WIDE = {**MODEL, "language": {**MODEL["language"], "width": 768, "heads": 8, "mlp_width": 3072, "vocab_size": 8003}}
SHALLOW = {
    **WIDE,
    "vision": {**MODEL["vision"], "layers": 1},
    "language": {**WIDE["language"], "layers": 1, "vocab_size": 16003},
}
RECOMPUTE = {"contrast": {"strategy": "recompute"}}
TWO: dict[str, Any] = {"processes": 2, "model": WIDE}
SETTINGS: dict[str, dict[str, Any]] = {
    "retain": {"model": WIDE},
    "recompute": {"model": WIDE, **RECOMPUTE},
    "retain, bfloat16": {"model": WIDE, "train": {"dtype": "bfloat16"}},
    "retain, blocks computed again": {"model": WIDE, "train": {"activation_checkpointing": "full"}},
    "retain, bfloat16, 24 packs, blocks computed again": {
        "model": WIDE,
        "train": {"dtype": "bfloat16", "activation_checkpointing": "full", "global_batch": 24},
    },
    "retain, ZeRO-1 of 2": TWO,
    "recompute, ZeRO-2 of 2": {**TWO, **RECOMPUTE, "zero": {"stage": 2}},
    "recompute, ZeRO-3 of 2": {**TWO, **RECOMPUTE, "zero": {"stage": 3}},
    "retain, tensor 2": {**TWO, "parallel": {"tensor": 2}},
    "retain, pipeline 2": {**TWO, "parallel": {"pipeline": 2}},
    "recompute, pipeline 2": {**TWO, **RECOMPUTE, "parallel": {"pipeline": 2}},
    "retain, one layer": {"model": SHALLOW},
    "retain, vision frozen": {"model": WIDE, "train": {"freeze": ["vision.*"]}},
}
PACKS, IMAGES, ROWS = 4, 8, 4
"""packs of a step where a setting has no other; images of a pack, and its sequences, each as long as the context"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "settings", nargs="*", type=one_of(SETTINGS), metavar="SETTING", help=f"of: {'; '.join(SETTINGS)}. Default: all"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    failed = 0
    names = f"{'bound':>9}{'simulated':>11}{'plan':>9}"
    print(f"{'MB':<50}{names}{'measured':>10}{names}   (of measured)")
    for name in those_that_fit(SETTINGS, options.settings or SETTINGS):
        bound, simulated, planned, measured = run(name)
        failed += bound > measured or any(abs(each - measured) > 0.1 * measured for each in (simulated, planned))
        megabytes = f"{bound / 1e6:>9.0f}{simulated / 1e6:>11.0f}{planned / 1e6:>9.0f}{measured / 1e6:>10.0f}"
        shares = f"{bound / measured:>9.2f}{simulated / measured:>11.2f}{planned / measured:>9.2f}"
        print(f"{name:<50}{megabytes}{shares}", flush=True)
    return 1 if failed else 0


def config_of(setting: dict[str, Any]) -> Any:
    """The config of a setting."""
    from megatron_lcl import config as configs

    train = {"global_batch": PACKS, "dtype": "float32", **setting.get("train", {})}
    data = {"tokens_per_pack": ROWS * MODEL["language"]["context_length"], "images_per_pack": IMAGES}
    given = {key: value for key, value in setting.items() if key != "processes"}
    return configs.from_dict({"model": MODEL, "data": data, **given, "train": train})


def run(name: str) -> tuple[float, float, float, float]:
    """Bound, simulation, plan and peak of a setting, bytes: of the process that has most, measured in new processes."""
    from megatron_lcl.plan.memory import simulate_shallow
    from megatron_lcl.train.memory import estimate
    from megatron_lcl.train.simulate import Usage, simulate, usage_of

    number = SETTINGS[name].get("processes", 1)
    peaks = measured_by_all(__file__, name, number)
    rank, config = peaks.index(max(peaks)), config_of(SETTINGS[name])
    simulated = simulate(config, number, IMAGES, rank)

    def simulated_once(own: Any, *place: int) -> Usage:
        return simulated if (own, *place) == (config, number, IMAGES, rank) else simulate(own, *place)

    stage = rank * config.parallel.pipeline // number
    planned = usage_of(config, number, IMAGES, stage, partial(simulate_shallow, simulated=simulated_once))
    has_gpu = importlib.import_module("torch").cuda.is_available()
    found = [usage.peak if has_gpu else usage.process for usage in (simulated, planned)]
    return estimate(config, number).total, found[0], found[1], max(peaks)


def measure(name: str) -> float:
    """The peak of this process, one of the setting's."""
    import torch

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    def two_steps(config: Any) -> None:
        engine = build_engine(build_module(config, mesh), config, mesh)
        stepper = build_stepper(engine, config, mesh)
        for _ in range(2):  # the optimizer's states are there from the first step's end on
            own = make_batches(config)[:: mesh.data.size]
            stepper.run([batch.to(engine.device) for batch in own], 1e-3)

    config = config_of(SETTINGS[name])
    mesh = init_processes(config)
    narrow = {"width": 8, "layers": 1, "heads": 2, "mlp_width": 8}
    small = {part: {**MODEL[part], **narrow} for part in ("vision", "language")}  # type: ignore[dict-item]
    two_steps(config_of({**SETTINGS[name], "model": {**small, "pool_heads": 2}}))
    if torch.cuda.is_available():
        before: float = torch.cuda.memory_allocated()
        two_steps(config)
        peak: float = torch.cuda.max_memory_allocated()
    else:
        before = 2**20 * resident("VmRSS")
        two_steps(config)
        peak = 2**20 * resident("VmHWM")
    torch.distributed.destroy_process_group()
    return peak - before


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
    return [
        pack_padded(row.repeat(packs * ROWS, 1), lengths, pixels.clone(), model)
        for _ in range(config.train.global_batch // packs)
    ]


if __name__ == "__main__":
    exit_with(main)
