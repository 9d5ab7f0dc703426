"""How long a checkpoint stops training, and what changing its layout costs; ours beside DeepSpeed's own.

    python benchmarks/checkpoint_stall.py [--width 768] [--layers 6] [--rounds 5]

One process, AdamW, ZeRO-1, random weights. Saving: DeepSpeed's `save_checkpoint` (no hashes, no fsync, no weights file)
and ours, waiting and in the background, one after another in every round. Converting: DeepSpeed's `ds_to_universal`
(one worker) and ours. Loading: `load_model` in a fresh process, peak memory beside the size of the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from claims import exit_with
from measuring import versions

from megatron_lcl import config as configs
from megatron_lcl.train.checkpoint import reshard
from megatron_lcl.train.checkpoint.checkpointer import Checkpointer
from megatron_lcl.train.checkpoint.folder import STATE, Progress, step_folder
from megatron_lcl.train.engine import build_engine, build_module, init_processes

PEAK = """
import sys, torch, megatron_lcl
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
model = megatron_lcl.load_model(sys.argv[1])
total = sum(float(p.detach().sum()) for p in model.parameters())  # every page is touched
print(peak() - before, sum(4 * p.numel() for p in model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder), options)
    torch.distributed.destroy_process_group()


def measure(folder: Path, options: argparse.Namespace) -> None:
    width, layers = options.width, options.layers
    sizes = {"width": width, "layers": layers, "heads": width // 64, "mlp_width": 4 * width}
    language = {**sizes, "vocab_size": 32000, "context_length": 512}
    engines = {}
    for mode in ("waiting", "background"):
        tree = {
            "model": {"vision": sizes, "language": language},
            "checkpoint": {"background": mode == "background", "keep_last": 1},
            "train": {"output": str(folder / mode), "global_batch": 1},
        }
        config = configs.from_dict(tree)
        mesh = init_processes(config)
        engine = build_engine(build_module(config, mesh), config, mesh)
        for group in engine.optimizer.optimizer.param_groups:  # the moments exist
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        engine.optimizer.optimizer.step()
        own = engine.checkpoint_engine
        engines[mode] = Checkpointer(engine, config, mesh, folder / mode), own
    num_parameters = sum(p.numel() for p in engine.module.parameters())
    print(f"{num_parameters / 1e6:.0f} million parameters, {torch.get_num_threads()} threads, {options.rounds} rounds")
    print(versions("torch", "deepspeed"))

    stalls: dict[str, list[float]] = {"DeepSpeed": [], "ours, waiting": [], "ours, background": []}
    writes: dict[str, list[float]] = {"ours, waiting": [], "ours, background": []}
    for number in range(options.rounds):
        stalls["DeepSpeed"].append(deepspeed_save(*engines["waiting"], folder / "deepspeed"))
        for mode in ("waiting", "background"):
            saver = engines[mode][0]
            saver.save(Progress(number + 1, 0, {}))
            saver.wait()
            [saved] = saver.finished()
            stalls[f"ours, {mode}"].append(saved.stall_seconds)
            writes[f"ours, {mode}"].append(saved.write_seconds)
    base = statistics.median(stalls["DeepSpeed"])
    print(f"\n{'saving':<18}{'stall, s':>10}{'of DeepSpeed’s':>16}{'writing, s':>12}")
    for name, values in stalls.items():
        median, writing = statistics.median(values), writes.get(name)
        print(
            f"{name:<18}{median:>10.3f}{median / base:>16.2f}{statistics.median(writing) if writing else median:>12.3f}"
        )

    source = step_folder(folder / "waiting", options.rounds)
    started = time.perf_counter()
    num_files = deepspeed_convert(source / STATE, folder / "converted")
    theirs = time.perf_counter() - started
    started = time.perf_counter()
    reshard.convert(source, config.model)
    ours = time.perf_counter() - started
    print(f"\nconverting        DeepSpeed {theirs:.2f} s ({num_files} files), ours {ours:.2f} s: {ours / theirs:.2f}")

    command = [sys.executable, "-c", PEAK, str(source)]
    peak, size = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    print(
        f"loading           peak {peak / 1024:.0f} MiB for {size / 2**20:.0f} MiB of weights: {peak * 1024 / size:.2f}"
    )


def deepspeed_save(saver: Checkpointer, own: Any, folder: Path) -> float:
    ours, saver.engine.checkpoint_engine = saver.engine.checkpoint_engine, own
    shutil.rmtree(folder, ignore_errors=True)
    (folder / STATE).mkdir(parents=True)
    started = time.perf_counter()
    saver.engine.save_checkpoint(str(folder), tag=STATE, save_latest=False)
    seconds = time.perf_counter() - started
    saver.engine.checkpoint_engine = ours
    return seconds


def deepspeed_convert(source: Path, output: Path) -> int:
    from deepspeed.checkpoint import ds_to_universal

    arguments = {"input_folder": str(source), "output_folder": str(output), "keep_temp_folder": True, "strict": False}
    arguments |= {"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(**arguments))
    return sum(path.is_file() for path in output.rglob("*"))


if __name__ == "__main__":
    exit_with(main)
