"""Evaluation images planted in a corpus after changes: how many are found, and how many other images are taken for one.

Two folders of pictures that have none in common: evaluation images, and others. All evaluation images are indexed; some
are changed in each of the ways below and looked for; all others are looked for. A picture with a side of more than
three tiles is cut into tiles, each of which counts as a picture, so that a few thousand large photographs do for
10,000: files are read in random order, and of each at most four tiles are taken, until there are enough. Pictures that
are nearly blank (a standard deviation below 8 of 256 levels) are left out. Named: taken for the very image that was
planted, and not for one that looks like it. The search is the product's.

    python benchmarks/decontaminate.py --evaluation DIR --others DIR [--images 10000] [--planted 500] [--exclude TEXT]

Claims, else the exit code is 1: 99 % found after resizing, recompression and flip, 90 % after a crop or an overlay of a
tenth of the area, at most one of 10,000 others.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from arguments import existing_folder, positive
from claims import exit_with
from PIL import Image, ImageDraw, ImageFont

from megatron_lcl.curate.duplicates.evaluation import Finder, evaluation_facts, write_index
from megatron_lcl.curate.duplicates.settings import Decontamination
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.rgb import decode_rgb

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
AREA = 0.1
"""of a crop, a bar, a logo"""
BLANK, MIN_SIDE, PART, TILES, AT_ONCE = 8.0, 96, 250, 4, 256
SETTINGS = Decontamination()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluation", type=existing_folder, required=True)
    parser.add_argument("--others", type=existing_folder, required=True)
    parser.add_argument("--images", type=positive, default=10_000)
    parser.add_argument("--planted", type=positive, default=500)
    parser.add_argument("--tile", type=positive, default=320)
    parser.add_argument("--exclude", nargs="*", default=[], help="texts of paths that are left out")
    parser.add_argument("--workers", type=positive, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(arguments.workers, get_context("spawn")) as pool:
        folders = [Path(name) / kind for kind in ("evaluation", "others", "facts", "index")]
        for folder in folders:
            folder.mkdir()
        evaluation, others, facts, index = folders
        for source, target in ((arguments.evaluation, evaluation), (arguments.others, others)):
            collect(source, target, arguments, pool)
        files = sorted(evaluation.iterdir())
        start = time.perf_counter()
        parts = [(first, min(first + PART, len(files))) for first in range(0, len(files), PART)]
        saved = list(pool.map(partial(save_facts, evaluation, facts), parts))
        write_index(saved, index)
        spent = (time.perf_counter() - start) / len(files) * arguments.workers
        print(f"{len(files)} evaluation images, {spent * 1000:.1f} ms of a process an image to index")
        chosen = np.random.default_rng(1).choice(len(files), min(arguments.planted, len(files)), replace=False)
        planted = list(pool.map(partial(look_for_changed, evaluation, index), chosen.tolist(), chunksize=8))
        looked = list(pool.map(partial(look_for, index), sorted(others.iterdir()), chunksize=32))
        return report(planted, looked, files)


def collect(source: Path, target: Path, arguments: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
    """A sample of the pictures below a folder, as JPEG files of quality 95, numbered as they were drawn."""
    files = [
        file
        for file in sorted(source.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not any(text in str(file) for text in arguments.exclude)
    ]
    files = [files[number] for number in np.random.default_rng(0).permutation(len(files))]
    kept = 0
    for start in range(0, len(files), AT_ONCE):
        for part in pool.map(partial(pictures, arguments.tile), files[start : start + AT_ONCE], chunksize=8):
            for data in part[: arguments.images - kept]:
                (target / f"{kept:06d}.jpg").write_bytes(data)
                kept += 1
        if kept == arguments.images:
            return
    print(f"{source} has {kept} pictures only")


def pictures(tile: int, file: Path) -> list[bytes]:
    """Of a file; of its tiles at most `TILES`, which the hash of its name draws."""
    try:
        image = decode_rgb(file.read_bytes())
    except BadImage:
        return []
    if min(image.size) < MIN_SIDE:
        return []
    parts = [part for part in cut(image, tile) if np.asarray(part.convert("L").resize((64, 64))).std() >= BLANK]
    drawn = np.random.default_rng(zlib.crc32(file.name.encode())).permutation(len(parts))[:TILES]
    return [encoded(parts[number], 95) for number in sorted(drawn.tolist())]


def cut(image: Image.Image, tile: int) -> Iterator[Image.Image]:
    if max(image.size) <= 3 * tile:
        yield image
        return
    for top in range(0, image.height - tile + 1, tile):
        for left in range(0, image.width - tile + 1, tile):
            yield image.crop((left, top, left + tile, top + tile))


def save_facts(folder: Path, target: Path, part: tuple[int, int]) -> Path:
    file = target / f"{part[0]:06d}.npz"
    facts: dict[str, Any] = evaluation_facts(folder, *part, settings=SETTINGS)
    np.savez(file, **facts)
    return file


def look_for(index: Path, file: Path) -> tuple[int, float, float]:
    """The evaluation image that it is (-1: none), the share that agrees, seconds."""
    data = file.read_bytes()
    start = time.process_time()
    number, share = Finder(index, SETTINGS).find(data) or (-1, 0.0)
    return number, share, time.process_time() - start


def look_for_changed(folder: Path, index: Path, number: int) -> dict[str, tuple[bool, bool]]:
    """Of each change whether the image is found, and whether it is named."""
    image = decode_rgb(sorted(folder.iterdir())[number].read_bytes())
    rng = np.random.default_rng(number)
    finder = Finder(index, SETTINGS)
    found = {name: finder.find(change(image, rng)) for name, (change, _) in CHANGES.items()}
    return {name: (match is not None, match is not None and match[0] == number) for name, match in found.items()}


# --- changes -----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, quality: int, format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    image.save(out, format, quality=quality)
    return out.getvalue()


def resized(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def flipped(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def cropped(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A tenth of the area, drawn how much of it at which side."""
    share = rng.uniform(1 - AREA, 1)
    width, height = round(image.width * share), round(image.height * (1 - AREA) / share)
    left, top = (int(rng.integers(0, size + 1)) for size in (image.width - width, image.height - height))
    return image.crop((left, top, left + width, top + height))


def with_bar(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A bar with words, at the top, at the bottom, or anywhere."""
    image = image.copy()
    width, height = image.size
    thick = max(1, round(height * AREA))
    top = int(rng.choice([0, height - thick, int(rng.integers(0, height - thick + 1))]))
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, top, width, top + thick - 1), fill=color)
    font = ImageFont.load_default(size=max(8, round(thick * 0.7)))
    draw.text((width // 10, top), "the words of a caption", fill=tuple(255 - v for v in color), font=font)
    return image


def with_logo(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A disc in a rectangle, in a corner or anywhere."""
    image = image.copy()
    width, height = (round(size * AREA**0.5) for size in image.size)
    left, top = image.width - width, image.height - height
    places = [(0, 0), (left, 0), (0, top), (left, top), (int(rng.integers(left + 1)), int(rng.integers(top + 1)))]
    x, y = places[rng.integers(len(places))]
    color = tuple(int(v) for v in rng.integers(0, 256, 3))
    draw = ImageDraw.Draw(image)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=color)
    disc = (x + width // 4, y + height // 4, x + 3 * width // 4, y + 3 * height // 4)
    draw.ellipse(disc, fill=tuple(255 - v for v in color))
    return image


Change = Callable[[Image.Image, np.random.Generator], bytes]
CHANGES: dict[str, tuple[Change, float]] = {
    "resized to a half": (lambda i, rng: encoded(resized(i, 0.5), 90), 0.99),
    "resized to double": (lambda i, rng: encoded(resized(i, 2), 90), 0.99),
    "shorter side 64 pixels": (lambda i, rng: encoded(resized(i, 64 / min(i.size)), 90), 0.99),
    "stretched to 224 x 224": (lambda i, rng: encoded(i.resize((224, 224)), 90), 0.99),
    "JPEG 50": (lambda i, rng: encoded(i, 50), 0.99),
    "JPEG 75": (lambda i, rng: encoded(i, 75), 0.99),
    "JPEG 90": (lambda i, rng: encoded(i, 90), 0.99),
    "WebP 50": (lambda i, rng: encoded(i, 50, "WEBP"), 0.99),
    "flipped": (lambda i, rng: encoded(flipped(i), 90), 0.99),
    "flipped, a half, JPEG 50": (lambda i, rng: encoded(resized(flipped(i), 0.5), 50), 0.99),
    "cropped by 10 %": (lambda i, rng: encoded(cropped(i, rng), 90), 0.9),
    "flipped, cropped by 10 %": (lambda i, rng: encoded(cropped(flipped(i), rng), 90), 0.9),
    "bar with words, 10 %": (lambda i, rng: encoded(with_bar(i, rng), 90), 0.9),
    "logo, 10 %": (lambda i, rng: encoded(with_logo(i, rng), 90), 0.9),
}
"""and what share is to be found"""


def report(
    planted: list[dict[str, tuple[bool, bool]]], looked: list[tuple[int, float, float]], files: list[Path]
) -> int:
    failed = False
    print(f"\n{'change':<28}{'found of ' + str(len(planted)):>14}{'claimed':>10}{'named':>10}")
    for name, (_, claimed) in CHANGES.items():
        found, named = (sum(result[name][k] for result in planted) / len(planted) for k in (0, 1))
        failed |= found < claimed
        print(f"{name:<28}{found:>14.1%}{claimed:>10.0%}{named:>10.1%}")
    wrong = [(share, place, number) for place, (number, share, _) in enumerate(looked) if number >= 0]
    print(f"\n{len(wrong)} of {len(looked)} others are taken for one of {len(files)} evaluation images")
    for share, place, number in sorted(wrong, reverse=True)[:20]:
        print(f"  other {place} for {files[number].name}, {share:.2f} of the blocks")
    milliseconds = [1000 * seconds for _, _, seconds in looked]
    print(f"CPU ms an image: mean {statistics.mean(milliseconds):.1f}, median {statistics.median(milliseconds):.1f}")
    return int(failed or len(wrong) > len(looked) / 10_000)


if __name__ == "__main__":
    exit_with(main)
