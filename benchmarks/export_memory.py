"""Peak memory of an export or an import, beside the size of the model's weights. Exits with 1 over 1.5 times it.

Writes a checkpoint of random weights, converts it in a process of its own and reads that process's peak resident
memory; what Python and the libraries take by themselves (the same conversion of a model of a few kilobytes) is
subtracted. Weights mapped from a file count as resident while they are used, though the system may drop them at any
time.

    python benchmarks/export_memory.py [--size b|l|g] [--formats hf timm open_clip import]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from claims import exit_with
from measuring import resident

from megatron_lcl.config import Config, Language, Model, Vision

BOUND = 1.5
FORMATS = ["hf", "timm", "open_clip", "import"]
TEXT = Language(256, 49411, 512, 12, 8, 2048)
SIZES = {
    "tiny": Model(Vision(32, 16, 64, 1, 1, 64), Language(16, 64, 64, 1, 1, 64), 1),
    "b": Model(Vision(224, 16, 768, 12, 12, 3072), TEXT, 8),
    "l": Model(Vision(224, 14, 1024, 24, 16, 4096), TEXT, 8),
    "g": Model(Vision(224, 14, 1408, 40, 16, 6144), TEXT, 8),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES)[1:], default="b")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--one", nargs=3, metavar=("CHECKPOINT", "FORMAT", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return convert_once(*arguments.one)
    if arguments.make:
        return write(*arguments.make)

    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        names = ("tiny", arguments.size)
        for name in names:
            run("--make", str(Path(folder) / name), name)
        size = (Path(folder) / arguments.size / "model.safetensors").stat().st_size
        print(f"weights of size {arguments.size}: {size / 2**20:.0f} MiB (float32, language model included)")
        print(f"{'format':10} {'dtype':10} {'peak MiB':>9} {'of which libraries':>19} {'ratio to weights':>17}")
        for format in arguments.formats:
            for dtype in ("float32",) if format == "import" else ("float32", "bfloat16"):
                alone, whole = (float(run("--one", str(Path(folder) / name), format, dtype)) for name in names)
                ratio = (whole - alone) * 2**20 / size
                worst = max(worst, ratio)
                print(f"{format:10} {dtype:10} {whole:9.0f} {alone:19.0f} {ratio:17.2f}", flush=True)
    print(f"the most: {worst:.2f}; the bound: {BOUND}")
    return int(worst > BOUND)


def run(*arguments: str) -> str:
    """The last word that this program prints in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return said.split()[-1] if said else ""


def write(folder: str, name: str) -> int:
    """A checkpoint of ours, and the same in the reference's format (`lcl.pt`, `lcl.json`)."""
    import torch

    from megatron_lcl import LCL
    from megatron_lcl.convert.export import save_checkpoint
    from megatron_lcl.model.reference_format import open_clip_config

    path = Path(folder)
    path.mkdir()
    model = LCL(SIZES[name])
    save_checkpoint(model, Config(model=model.config), path)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict_open_clip().items()}}, path / "lcl.pt")
    (path / "lcl.json").write_text(json.dumps(open_clip_config(model.config)))
    return 0


def convert_once(checkpoint: str, format: str, dtype: str) -> int:
    """Prints the process's peak, MiB."""
    from megatron_lcl.convert.export import export, import_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        if format == "import":
            import_checkpoint("open_clip", Path(checkpoint) / "lcl.pt", Path(folder) / "out")
        else:
            export(checkpoint, format, Path(folder) / "out", dtype=dtype)
    print(resident("VmHWM"))
    return 0


if __name__ == "__main__":
    exit_with(main)
