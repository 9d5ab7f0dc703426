"""The cost model that partitions a pipeline, beside measured times of its stages.

Measured: a stage at work in the pipeline, its forward and backward instructions in DeepSpeed's engine: the median over
the steps of each instruction of a step, and the sum of these by the micro-batches. Predicted, from medians as well: the
sum over the stage's layers of what one layer of each kind takes alone (`train.pipeline.partition`). Two claims, and
exit code 1 where one does not hold:

* predicted and measured time of every stage differ by less than 10 %. After every step each kind of layer is measured
  once, so that what else the machine does meets both alike;
* so does every stage's share of the sum over the stages, predicted from the one measurement at the start that decides
  the partition, to which a common factor is nothing.

In CPU time of one thread, which a busy machine changes little. The steps are real ones, on processes of their own.
Also shown: what the slowest stage takes where every stage has equally many layers.

With --cuda on GPUs, one a stage (four are needed), in the dtype of a run there; in seconds, as a GPU has no such time,
and the device is waited for before and after each instruction. This has not been run yet.

    python benchmarks/pipeline_cost_model.py [--rounds 20] [--cuda]
"""

from __future__ import annotations

import argparse
import math
import multiprocessing as mp
import os
import statistics
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from claims import exit_with

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.model.lcl import pack_padded
from megatron_lcl.model.special import SpecialTokens
from megatron_lcl.parallel.mesh import local_device
from megatron_lcl.train.launch import hold_port
from megatron_lcl.train.precision import DTYPES, resolve_dtype

MICRO_BATCHES, WARM_UPS = 3, 2
STAGES = 4
"""at most"""
CLAIM = 0.10
"""of what a stage takes"""
ENCODER = {"heads": 4, "mlp_width": 1024, "width": 256}
MODELS = {
    "wide head: ViT 6x256 of 49 patches, LM 6x256, vocabulary 16,003; packs of 384 tokens, 4 images": (
        {"image_size": 224, "patch_size": 32, "layers": 6, **ENCODER},
        {"layers": 6, "vocab_size": 16003, "context_length": 384, **ENCODER},
        (384, 4),
    ),
    "many patches: ViT 6x256 of 196 patches, LM 6x128, vocabulary 4,003; packs of 512 tokens, 2 images": (
        {"image_size": 224, "patch_size": 16, "layers": 6, **ENCODER},
        {"layers": 6, "vocab_size": 4003, "context_length": 512, "heads": 2, "mlp_width": 512, "width": 128},
        (512, 2),
    ),
}


def config_of(name: str, num_stages: int, **train: Any) -> Config:
    vision, language, _ = MODELS[name]
    return configs.from_dict(
        {
            "model": {"vision": vision, "language": language, "pool_heads": 2},
            "parallel": {"pipeline": num_stages},
            "contrast": {"strategy": train.pop("strategy", "retain")},
            "train": {"global_batch": MICRO_BATCHES, **train},
        }
    )


def make_pack(name: str, config: Config, seed: int) -> PackedBatch:
    """Documents of random length with an image each, until the pack is full."""
    rows, slots = MODELS[name][2]
    draw = torch.Generator().manual_seed(seed)
    special, patches = SpecialTokens.of(config.model.language.vocab_size), config.model.vision.num_patches

    def text(length: int) -> list[int]:
        return torch.randint(1, special.sot, (length,), generator=draw).tolist()

    documents: list[list[int]] = []
    for image in range(slots):
        share = rows // slots if image < slots - 1 else rows - sum(map(len, documents))
        before = int(torch.randint(1, share - patches - 4, (1,), generator=draw))
        picture = [special.soi, *[special.placeholder] * patches, special.eoi]
        documents.append([special.sot, *text(before), *picture])
        documents[-1] += [*text(share - len(documents[-1]) - 1), special.eot]
    lengths = torch.tensor([len(document) for document in documents])
    ids = torch.zeros(slots, int(lengths.max()), dtype=torch.int64)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.tensor(document)
    size = config.model.vision.image_size
    images = torch.randint(0, 256, (slots, 3, size, size), generator=draw, dtype=torch.uint8)
    return pack_padded(ids, lengths, images, config.model)


def synchronized() -> float:
    """Seconds, once this process's GPU has nothing more to do."""
    torch.cuda.synchronize()
    return time.perf_counter()


def work(rank: int, name: str, config: Config, even: bool, num_rounds: int, port: int, results: Any) -> None:
    """One process of a pipeline: partitioned by the cost model or evenly, timed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(config.parallel.pipeline)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    from deepspeed.runtime.pipe import schedule

    from megatron_lcl.train.engine import build_engine, build_module, build_stepper, init_processes, specs_of
    from megatron_lcl.train.pipeline import partition as partition_module
    from megatron_lcl.train.pipeline.partition import (
        LayerSamples,
        agree_on_costs,
        hidden_shape,
        measure_costs,
        partition_balanced,
        partition_uniform,
        stage_sums,
    )

    clock = synchronized
    if not torch.cuda.is_available():
        clock = time.process_time
        # until this process ends
        patch.object(partition_module, "time", SimpleNamespace(perf_counter=clock)).start()
    mesh = init_processes(config)
    device = local_device()
    packs = [make_pack(name, config, m).to(device) for m in range(MICRO_BATCHES)]
    specs = specs_of(config, mesh.tensor)
    samples = LayerSamples(specs, packs[0], config, mesh.tensor, device, DTYPES[resolve_dtype(config)])
    costs, _ = measure_costs(samples, config, mesh)
    sizes = [float(math.prod(hidden_shape(i, packs[0], config.model, mesh.tensor))) for i in range(len(specs))]
    num_stages = mesh.pipeline.size
    partition = partition_uniform(config) if even else partition_balanced(costs, sizes, num_stages)
    mesh.world.barrier()
    engine = build_engine(build_module(config, mesh, partition), config, mesh)
    spent: list[float] = []

    def timed(function: Any) -> Any:
        def run(self: Any, buffer_id: int) -> None:
            started = clock()
            function(self, buffer_id)
            spent.append(clock() - started)

        return run

    instructions = engine._INSTRUCTION_MAP
    for kind in (schedule.ForwardPass, schedule.BackwardPass):
        instructions[kind] = timed(instructions[kind])
    stepper = build_stepper(engine, config, mesh)
    seconds, layers = list[list[float]](), []
    for _ in range(WARM_UPS + num_rounds):
        spent.clear()
        stepper.run(packs, 1e-4)
        seconds.append(list(spent))
        mesh.world.barrier()  # all measure at the same time, as they work
        layers.append(samples.measure())
        mesh.world.barrier()
    del seconds[:WARM_UPS], layers[:WARM_UPS]
    bounds, in_turn = [*partition, len(specs)], agree_on_costs(samples.times(layers), config, mesh)
    predicted = stage_sums(in_turn, partition), stage_sums(costs, partition)
    measured = sum(statistics.median(of_instruction) for of_instruction in zip(*seconds, strict=True)) / MICRO_BATCHES
    results.put((rank, bounds[rank : rank + 2], predicted, measured))
    mesh.world.barrier()


def run(name: str, num_stages: int, even: bool, strategy: str, rounds: int) -> tuple[float, float]:
    """Prints a row for each stage; the worst error, and what the slowest stage took."""
    held = hold_port()
    port = held.getsockname()[1]
    context, config = mp.get_context("spawn"), config_of(name, num_stages, strategy=strategy)
    results: Any = context.Queue()
    workers = [
        context.Process(target=work, args=(rank, name, config, even, rounds, port, results))
        for rank in range(num_stages)
    ]
    for worker in workers:
        worker.start()
    rows = sorted(results.get(timeout=900) for _ in workers)
    for worker in workers:
        worker.join()
    held.close()
    (in_turn, at_start), worst = rows[0][2], 0.0
    drift = sum(at_start) / sum(row[3] for row in rows)
    for (rank, (first, after), _, seconds), expected, before in zip(rows, in_turn, at_start, strict=True):
        error, of_share = expected / seconds - 1, before / (drift * seconds) - 1
        worst = max(worst, abs(error), abs(of_share))
        layers = f"layers {first:2} to {after - 1:2}"
        label = f"{strategy:9} {'even' if even else 'chosen':6} stage {rank} of {num_stages}, {layers}"
        times = f"{1000 * expected:8.1f} ms   {1000 * seconds:8.1f} ms"
        print(f"{label}   {times}   {100 * error:+5.1f} %   {100 * of_share:+5.1f} %", flush=True)
    return worst, max(row[3] for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of a step and a measurement of each kind of layer")
    parser.add_argument("--cuda", action="store_true", help="on GPUs, one a stage")
    options = parser.parse_args()
    if not options.cuda:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    elif torch.cuda.device_count() < STAGES:
        parser.error(f"--cuda needs {STAGES} GPUs, and there are {torch.cuda.device_count()}: leave it out for CPUs")
    rounds, worst = options.rounds, 0.0
    for name in MODELS:
        print(f"\n{name}\n{'':49}  predicted     measured     error   of share")
        two, _ = run(name, 2, False, "recompute", rounds)
        four, chosen = run(name, STAGES, False, "retain", rounds)
        evenly, even = run(name, STAGES, True, "retain", rounds)
        worst = max(worst, two, four, evenly)
        print(f"slowest of {STAGES} stages, chosen / even: {chosen / even:.2f}")
    print(f"\nlargest error {100 * worst:.1f} %")
    return int(worst >= CLAIM)


if __name__ == "__main__":
    exit_with(main)
