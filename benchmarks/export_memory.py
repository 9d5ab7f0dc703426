"""Peak memory of an export, beside the size of the model's weights.

Writes a checkpoint of random weights, exports it in a process of its own and reads that process's peak resident memory;
what Python and the libraries take by themselves (the same export of a model of a few kilobytes) is subtracted. Weights
mapped from a file count as resident while they are used, though the system may drop them at any time.

    python benchmarks/export_memory.py [--size b|l|g] [--formats hf timm open_clip]
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_lcl.config import Config, Language, Model, Vision

TEXT = Language(256, 49411, 512, 12, 8, 2048)
SIZES = {
    "tiny": Model(Vision(32, 16, 64, 1, 1, 64), Language(16, 64, 64, 1, 1, 64), 1),
    "b": Model(Vision(224, 16, 768, 12, 12, 3072), TEXT, 8),
    "l": Model(Vision(224, 14, 1024, 24, 16, 4096), TEXT, 8),
    "g": Model(Vision(224, 14, 1408, 40, 16, 6144), TEXT, 8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES)[1:], default="b")
    parser.add_argument("--formats", nargs="+", default=["hf", "timm", "open_clip"])
    parser.add_argument("--one", nargs=3, metavar=("CHECKPOINT", "FORMAT", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return export_once(*arguments.one)

    with tempfile.TemporaryDirectory() as folder:
        weights = {size: make(Path(folder) / size, SIZES[size]) for size in ("tiny", arguments.size)}
        size = weights[arguments.size]
        print(f"weights of size {arguments.size}: {size / 2**20:.0f} MiB (float32, language model included)")
        print(f"{'format':10} {'dtype':10} {'peak MiB':>9} {'of which libraries':>19} {'ratio to weights':>17}")
        for format in arguments.formats:
            for dtype in ("float32", "bfloat16"):
                alone, whole = (measure(Path(folder) / name, format, dtype) for name in ("tiny", arguments.size))
                print(
                    f"{format:10} {dtype:10} {whole / 2**20:9.0f} {alone / 2**20:19.0f} {(whole - alone) / size:17.2f}"
                )


def make(folder: Path, config: Model) -> int:
    """Writes a checkpoint; returns the size of its weights in bytes."""
    code = "import sys; from benchmarks.export_memory import write; write(sys.argv[1], sys.argv[2])"
    name = next(key for key, value in SIZES.items() if value == config)
    subprocess.run([sys.executable, "-c", code, str(folder), name], check=True, cwd=Path(__file__).parents[1])
    return (folder / "model.safetensors").stat().st_size


def write(folder: str, name: str) -> None:
    from megatron_lcl import LCL
    from megatron_lcl.convert.export import save_checkpoint

    Path(folder).mkdir()
    model = LCL(SIZES[name])
    save_checkpoint(model, Config(model=model.config), Path(folder))


def measure(checkpoint: Path, format: str, dtype: str) -> int:
    """Peak resident bytes of a process that exports."""
    command = [sys.executable, __file__, "--one", str(checkpoint), format, dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def export_once(checkpoint: str, format: str, dtype: str) -> None:
    from megatron_lcl.convert.export import export

    with tempfile.TemporaryDirectory() as folder:
        export(checkpoint, format, Path(folder) / "out", dtype=dtype)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    main()
