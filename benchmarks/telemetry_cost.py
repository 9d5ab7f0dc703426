"""What telemetry costs: the same steps with and without it, in turns, in one process.

    python benchmarks/telemetry_cost.py [--rounds 12] [--every 10]

A turn is `every` steps. With: as a run makes them, phases timed, operations counted, the last step measured (norms and
attention logits by part, a sample of features), read and written to metrics.jsonl and TensorBoard. Without: the steps
alone, and nothing is read. Printed are medians over the turns, by the clock and in the process's own CPU time, which
other work disturbs less, and the median of what the turns with telemetry took more than their neighbors. On a machine
with other work that differs by more than what is looked for; so also the CPU time spent inside of telemetry's own
functions; and last, what a look at the largest sample of features takes, whose batch here is small.

Claim: under 1 % of a step, by both: turns with telemetry beside their neighbors, and the time inside of its functions;
on a GPU by the clock, where only the first counts. Exit code 1 if it does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from arguments import positive
from claims import exit_unless, exit_with

from megatron_lcl import config as configs
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.attention_logits import AttentionLogits
from megatron_lcl.model.layers import num_parameters
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes
from megatron_lcl.train.telemetry import Telemetry, health
from megatron_lcl.train.telemetry.features import FeatureSample
from megatron_lcl.train.telemetry.meter import StepMeter
from megatron_lcl.train.telemetry.norms import PartNorms

CLAIM = 0.01
NUM_PACKS, SEQUENCES, WORDS = 4, 8, 60
MODEL = {
    "vision": {"image_size": 96, "patch_size": 16, "width": 128, "layers": 4, "heads": 4, "mlp_width": 512},
    "language": {"context_length": 128, "vocab_size": 8000, "width": 128, "layers": 4, "heads": 4, "mlp_width": 512},
    "pool_heads": 4,
}


def batch_of(config: configs.Config, seed: int) -> PackedBatch:
    """Sequences of words, an image, and words."""
    draw, special = torch.Generator().manual_seed(seed), SpecialTokens.of(config.model.language.vocab_size)
    image = torch.tensor([special.soi, *[special.placeholder] * config.model.vision.num_patches, special.eoi])
    rows = []
    for _ in range(SEQUENCES):
        words = torch.randint(1, 1900, (WORDS,), generator=draw)
        rows.append(torch.cat([words[:30], image, words[30:]]))
    lengths, side = torch.tensor([len(row) for row in rows]), config.model.vision.image_size
    images = torch.randint(0, 256, (SEQUENCES, 3, side, side), generator=draw, dtype=torch.uint8)
    return pack_padded(torch.stack(rows), lengths, images, config.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--every", type=positive, default=10)
    options = parser.parse_args()
    config = configs.from_dict(
        {
            "model": MODEL,
            "train": {
                "global_batch": NUM_PACKS,
                "dtype": "auto" if torch.cuda.is_available() else "float32",
                "log_every": options.every,
                "steps": 10**6,
                "progress": False,
            },
        }
    )
    mesh = init_processes(config)
    engine = build_engine(build_module(config, mesh), config, mesh)
    stepper = build_stepper(engine, config, mesh)
    host = [batch_of(config, seed) for seed in range(NUM_PACKS)]
    batches = [batch.to(engine.device) for batch in host]
    quiet = contextlib.redirect_stdout(io.StringIO())  # its lines of a log
    with tempfile.TemporaryDirectory() as folder, quiet, Telemetry(Path(folder), config, True, 0) as telemetry:
        meter = StepMeter(config, mesh, stepper.clock, telemetry)
        done, inside = 0, [0.0]

        def timed(function: Any) -> Any:
            def call(*arguments: Any, **named: Any) -> Any:
                used = time.process_time()
                try:
                    return function(*arguments, **named)
                finally:
                    inside[0] += time.process_time() - used

            return call

        for owner, names in (
            (PartNorms, ("_before_step", "_after_step", "over_all_processes")),
            (AttentionLogits, ("of_images", "of_pool", "of_packs", "over_all_processes")),
            (FeatureSample, ("__init__", "take", "gather")),
            (StepMeter, ("read", "step", "line")),
            (Telemetry, ("count", "step")),
        ):
            for name in names:
                setattr(owner, name, timed(getattr(owner, name)))

        def with_telemetry() -> None:
            nonlocal done
            for _ in range(options.every):
                done += 1
                logged = telemetry.is_logged(done)
                stepper.clock.enter("data")
                started = time.perf_counter()
                meter.read(host, config, stepper.objective)
                pending = stepper.start(batches, 1e-4, float("inf"), logged)
                seconds = time.perf_counter() - started
                meter.step(batches, pending.counts, seconds)
                telemetry.count(done, pending.counts.counts)
                if logged:
                    result = pending.read()
                    telemetry.step(done, result, 1e-4, meter.line(done, result, 1e-4))

        def without() -> None:
            with stepper.clock.paused():
                for _ in range(options.every):
                    stepper.start(batches, 1e-4)

        ways = {"with": with_telemetry, "without": without}
        wall: dict[str, list[float]] = {name: [] for name in ways}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name in sorted(ways, reverse=number % 2 == 1):
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                since, used = time.perf_counter(), time.process_time()
                ways[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:  # the first turns warm up
                    wall[name].append((time.perf_counter() - since) / options.every)
                    cpu[name].append((time.process_time() - used) / options.every)
            if not number:
                inside[0] = 0.0
    share = inside[0] / (options.rounds * options.every)
    pairs = torch.randn(2, 256, 1024)
    looks = []
    for _ in range(7):
        used = time.process_time()
        health.measure(*pairs)
        looks.append(time.process_time() - used)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, 1 thread"
    print(f"{num_parameters(config.model) / 1e6:.1f} M parameters, log_every {options.every}, {device}")
    more = {}
    for what, times in (("clock", wall), ("CPU time", cpu)):
        medians = {name: statistics.median(values) for name, values in times.items()}
        more[what] = statistics.median(a / b - 1 for a, b in zip(times["with"], times["without"], strict=True))
        print(
            f"{what:<9} ms a step: with {1e3 * medians['with']:.1f}, without {1e3 * medians['without']:.1f}; "
            f"medians differ by {medians['with'] / medians['without'] - 1:+.2%}, neighbors by {more[what]:+.2%}"
        )
    alone = statistics.median(cpu["without"])
    print(f"inside telemetry: {1e3 * share:.2f} ms of CPU a step, {share / alone:.2%} of one without")
    print(
        f"health of 256 pairs of width 1024: {1e3 * statistics.median(looks):.0f} ms of the first process's CPU a line"
    )
    has_gpu = torch.cuda.is_available()
    claims = {f"under {CLAIM:.0%} more than neighbors": more["clock" if has_gpu else "CPU time"] < CLAIM}
    exit_unless(claims if has_gpu else claims | {f"under {CLAIM:.0%} inside telemetry": share / alone < CLAIM})


if __name__ == "__main__":
    exit_with(main)
