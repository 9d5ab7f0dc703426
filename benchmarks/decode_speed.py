"""Decoding on one core: ours beside Pillow's `convert("RGB")` and the crop of torchvision's RandomResizedCrop.

Photographs are re-encoded as JPEG with the given longer side (800 pixels: as they come from the web; 256: as a corpus
preprocessed to that size has them). Both take the same crops and end with the pixels as bytes, by channels, so that
these can be compared as well. Time is CPU time, which other work on the machine disturbs less.

Claims, else the exit code is 1: at least 2.2 times the images a second; within 1 % of torchvision's pixels on average.

    python benchmarks/decode_speed.py FOLDER_OF_PHOTOGRAPHS [--side 800] [--rounds 5]
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from arguments import existing_folder, positive
from claims import exit_unless, exit_with
from measuring import versions
from PIL import Image

from megatron_lcl.data.loading.crops import crop_box, decode_train
from megatron_lcl.data.loading.hashes import uniform

FASTER, NEAR = 2.2, 0.01
SIZE, SCALE, RATIO = 224, (0.9, 1.0), (3 / 4, 4 / 3)


def photographs(folder: Path, side: int, limit: int = 60) -> list[bytes]:
    """JPEG files (quality 90) of the folder's larger pictures, longer side `side`."""
    out = []
    for path in sorted(folder.rglob("*.jp*g")):
        with Image.open(path) as image:
            if image.mode != "RGB" or max(image.size) < 500:
                continue
            factor = side / max(image.size)
            resized = image.resize([max(1, round(x * factor)) for x in image.size], Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        resized.save(buffer, "JPEG", quality=90)
        out.append(buffer.getvalue())
    return out[:limit]


def draws(n: int) -> Callable[[], float]:
    turn = iter(range(1 << 30))
    return lambda: uniform(np.uint64(n), next(turn))


def ours(data: bytes, n: int) -> np.ndarray:
    return np.ascontiguousarray(decode_train(data, SIZE, draws(n), SCALE, RATIO))


def theirs(data: bytes, n: int) -> np.ndarray:
    from torchvision.transforms import functional as F

    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, width, height = crop_box(*image.size, draws(n), SCALE, RATIO)
    cropped = F.resized_crop(image, top, left, height, width, [SIZE, SIZE], F.InterpolationMode.BICUBIC)
    return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=existing_folder)
    parser.add_argument("--side", type=positive, nargs="+", default=[800, 256])
    parser.add_argument("--rounds", type=positive, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(versions("pillow", "torchvision", "simplejpeg"))
    print("side  photographs  images/s ours  images/s torchvision  ratio (median, range)   mean difference of a pixel")
    claims = {}
    for side in arguments.side:
        files = photographs(arguments.folder, side)
        if not files:
            raise SystemExit(f"no RGB JPEG of 500 pixels or more under {arguments.folder}")
        difference = statistics.mean(_difference(data, n) for n, data in enumerate(files))  # and warms both
        times = []
        for _ in range(arguments.rounds):
            started = time.process_time()
            for n, data in enumerate(files):
                ours(data, n)
            between = time.process_time()
            for n, data in enumerate(files):
                theirs(data, n)
            times.append((between - started, time.process_time() - between))
        ratios = [b / a for a, b in times]
        mine, other = (len(files) / statistics.median(x) for x in zip(*times, strict=True))
        print(
            f"{side:4}  {len(files):11}  {mine:13.0f}  {other:20.0f}  {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})   {difference:.3%}"
        )
        claims[f"{side} pixels: at least {FASTER} times as fast"] = statistics.median(ratios) >= FASTER
        claims[f"{side} pixels: within {NEAR:.0%}"] = difference < NEAR
    exit_unless(claims)


def _difference(data: bytes, n: int) -> float:
    return float(np.abs(ours(data, n) - theirs(data, n).astype(np.float32)).mean()) / 255


if __name__ == "__main__":
    exit_with(main)
