"""`plan`'s step time beside real steps, on the CPU that it runs on; GPUs beside it are not used.

Each setting trains in processes of its own, of one thread each: after every step one round of the calibration (plan/
calibrate.py) runs in the same processes, so that what else the machine does meets both alike. Measured is the median of
five steps, predicted the step with the medians of the five rounds. Seconds of one process are CPU time, which a busy
machine changes less than the clock on the wall. Processes that wait for each other spend no CPU time meanwhile: seconds
of two are the clock's, of the process that took longest, and mean something where each has a core for itself. The exit
code is 1 where predicted and measured differ by more than 25 %.

`before` is what the command itself would have printed: a prediction from one calibration of five rounds, in processes
of their own, before the first step; beside it are the steps by the clock, as it measures. Each process has a core for
itself in both. Where other work comes and goes between the two, it is in one of them alone.

    python benchmarks/plan_step_time.py [SETTING …]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from typing import Any

from arguments import one_of
from claims import exit_with
from setting_processes import measured_by_all

os.environ.setdefault("OMP_NUM_THREADS", "1")

MODEL = {
    "vision": {"image_size": 96, "patch_size": 8, "width": 384, "layers": 6, "heads": 6, "mlp_width": 1536},
    "language": {"context_length": 512, "vocab_size": 8003, "width": 384, "layers": 6, "heads": 6, "mlp_width": 1536},
    "pool_heads": 6,
}
B32 = {  # ViT-B/32 and the language model beside it, a third as deep
    "vision": {"image_size": 224, "patch_size": 32, "width": 768, "layers": 4, "heads": 12, "mlp_width": 3072},
    "language": {"context_length": 1024, "width": 512, "layers": 4, "heads": 8, "mlp_width": 2048},
    "pool_heads": 8,
}
NARROW = {
    "vision": {"image_size": 64, "patch_size": 8, "width": 128, "layers": 12, "heads": 4, "mlp_width": 512},
    "language": {"context_length": 256, "vocab_size": 2003, "width": 128, "layers": 12, "heads": 4, "mlp_width": 512},
    "pool_heads": 4,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "384 wide, retain": {"model": MODEL},
    "384 wide, recompute": {"model": MODEL, "contrast": {"strategy": "recompute"}},
    "384 wide, checkpointing full": {"model": MODEL, "train": {"activation_checkpointing": "full"}},
    "384 wide, bfloat16": {"model": MODEL, "train": {"dtype": "bfloat16"}},
    "B/32, a third as deep, vocabulary 49,411": {"model": B32},
    "128 wide, 12 blocks each": {"model": NARROW},
    "128 wide, tensor 2": {"model": NARROW, "parallel": {"tensor": 2}, "processes": 2},
    "128 wide, pipeline 2": {"model": NARROW, "parallel": {"pipeline": 2}, "processes": 2},
    "128 wide, data 2": {"model": NARROW, "processes": 2},
    "384 wide, tensor 2": {"model": MODEL, "parallel": {"tensor": 2}, "processes": 2},
    "384 wide, pipeline 2": {"model": MODEL, "parallel": {"pipeline": 2}, "processes": 2},
    "384 wide, data 2": {"model": MODEL, "processes": 2},
}
PACKS, IMAGES = 2, 2
"""packs of a step; images of a pack, which is one sequence as long as the context"""
STEPS, CLAIM = 5, 0.25


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "settings", nargs="*", type=one_of(SETTINGS), metavar="SETTING", help=f"of: {'; '.join(SETTINGS)}. Default: all"
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: it is the CPU that is measured
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    worst = 0.0
    heads = f"{'predicted':>10}{'measured':>10}{'predicted / measured':>22}  {'by':<7}"
    print(f"{'seconds of a step':<44}{heads}{'before':>8}{'by the clock':>14}{'before / by the clock':>23}")
    for name in options.settings or SETTINGS:
        before, (predicted, measured, by_clock) = run(name)
        alone = SETTINGS[name].get("processes", 1) == 1
        worst = max(worst, abs(predicted / measured - 1))
        numbers = f"{predicted:>10.3f}{measured:>10.3f}{predicted / measured:>22.2f}"
        numbers += f"  {'CPU' if alone else 'clock':<7}{before:>8.3f}{by_clock:>14.3f}{before / by_clock:>23.2f}"
        print(f"{name:<44}{numbers}", flush=True)
    return int(worst > CLAIM)


def run(name: str) -> tuple[float, list[float]]:
    """Seconds of a step of a setting as predicted beforehand, and those that `measure` gives, in new processes."""
    from megatron_lcl.plan.calibrate import calibrate
    from megatron_lcl.plan.predict import predict
    from megatron_lcl.train.forks import stop_forkserver

    config, number = config_of(name)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:number])  # by which calibrate() shares out threads
    try:
        before = predict(config, number, number, calibrate(config, number, IMAGES), IMAGES).seconds
        return before, measured_by_all(__file__, name, number)[0]
    finally:
        stop_forkserver()  # it would keep these cores
        os.sched_setaffinity(0, cores)


def config_of(name: str) -> tuple[Any, int]:
    """A setting's config and processes."""
    from megatron_lcl import config as configs

    setting = dict(SETTINGS[name])
    number = setting.pop("processes", 1)
    model, train = setting["model"], {"global_batch": PACKS, "dtype": "float32", **setting.get("train", {})}
    data = {"tokens_per_pack": model["language"]["context_length"], "images_per_pack": IMAGES}
    return configs.from_dict({**setting, "data": data, "train": train}), number


def measure(name: str) -> tuple[float, float, float]:
    """Seconds of a step: predicted, measured, and by the clock; every process of the setting calls it."""
    import torch

    from megatron_lcl.plan.calibrate import Calibration, network, rates_of
    from megatron_lcl.plan.predict import predict
    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes

    torch.set_num_threads(1)
    torch.manual_seed(0)  # the ranks of a replica have the same batches
    config, number = config_of(name)
    clock = time.process_time if number == 1 else time.perf_counter
    mesh = init_processes(config)
    calibration, seconds, by_clock = Calibration(config, IMAGES, clock), [], []

    def prediction() -> Any:
        """Of the rounds so far."""
        found = calibration.found()
        between = network() if number > 1 else (found["memory"], 0.0)
        rates = rates_of(mesh.world.gather_objects((found, *between)))
        return predict(config, number, number, rates, IMAGES)

    calibration.round()
    engine = build_engine(build_module(config, mesh, prediction().partition), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    batches = [full_pack(config) for _ in range(PACKS // mesh.data.size)]
    stepper.run(batches, 1e-4)  # the optimizer's states come with the first step
    for _ in range(STEPS):
        mesh.world.barrier()
        started = clock(), time.perf_counter()
        stepper.run(batches, 1e-4)
        seconds.append(clock() - started[0])
        by_clock.append(time.perf_counter() - started[1])
        mesh.world.barrier()
        calibration.round()
    predicted = prediction()
    measured, of_clock = (max(mesh.world.gather_objects(statistics.median(each))) for each in (seconds, by_clock))
    torch.distributed.destroy_process_group()
    if mesh.is_first:
        names = ("compute", "again", "bubble", "network", "optimizer", "loss")
        print({part: round(getattr(predicted, part), 3) for part in names}, file=sys.stderr)
        print({part: round(rate / 1e9, 1) for part, rate in calibration.found().items()}, file=sys.stderr)
    return predicted.seconds, measured, of_clock


def full_pack(config: Any) -> Any:
    """One sequence as long as the context, with its images."""
    import torch

    from megatron_lcl.model.lcl import pack_padded
    from megatron_lcl.model.special import SpecialTokens

    model, length = config.model, config.model.language.context_length
    special, size = SpecialTokens.of(model.language.vocab_size), model.vision.image_size
    image = [special.soi, *[special.placeholder] * model.vision.num_patches, special.eoi]
    head = [special.sot, *([5, 6, *image] * IMAGES)]
    row = torch.tensor([[*head, *[7] * (length - len(head) - 1), special.eot]])
    pixels = torch.randint(0, 256, (IMAGES, 3, size, size), dtype=torch.uint8)
    return pack_padded(row, torch.tensor([length]), pixels, model)


if __name__ == "__main__":
    exit_with(main)
