"""`fetch` on loopback: images/s, and images a second of CPU, for lists of several lengths; beside img2dataset.

All fetch the same JPEG (400 x 300, 30 kB) under as many URLs from one server process, which answers at several
loopback addresses, that is hosts, in one run, one after the other. CPU time is that of a program and of the processes
that it has started, without the server's. `--max-image-side` compares decoding, scaling and encoding too. img2dataset
without it neither decodes nor checks the images; we decode each.

    python benchmarks/fetch_speed.py [--urls 1000 10000 100000] [--workers 1 2] [--img2dataset PYTHON]

PYTHON: of an environment that has img2dataset (it wants other versions of our packages, so it has its own).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from arguments import interpreter, positive
from claims import exit_with
from measuring import versions
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from data.fetch.faulty_server import ODD_ROBOTS, serving

ADDRESSES = 16
CONCURRENCY = 64
PEER = """
import sys
from img2dataset import download
listed, output, workers, side = sys.argv[1:]
resize = {"resize_mode": "keep_ratio_largest", "image_size": int(side), "resize_only_if_bigger": True}
if __name__ == "__main__":
    download(
        url_list=listed, output_folder=output, input_format="txt", output_format="webdataset", retries=0,
        processes_count=int(workers), thread_count=CONCURRENCY, number_sample_per_shard=10_000, timeout=30,
        distributor="multiprocessing",
        **(resize if int(side) else {"resize_mode": "no", "disable_all_reencoding": True}),
    )
"""


def photograph() -> bytes:
    """Smooth, as photographs are, with some grain."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
        (400, 300), Image.Resampling.BICUBIC
    )
    grain = np.asarray(coarse, np.int16) + random.normal(0, 6, (300, 400, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def measured(command: list[str], log: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, largest process in MB) of a command and what it starts."""
    start = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3


def images_in(folder: Path) -> int:
    number = 0
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar) as archive:
            number += sum(member.name.endswith((".jpg", ".png")) for member in archive)
    return number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", type=positive, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--workers", type=positive, nargs="+", default=[1])
    parser.add_argument("--max-image-side", type=int, nargs="+", default=[0], help="0: as they are")
    parser.add_argument("--img2dataset", type=interpreter, metavar="PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photo.jpg").write_bytes(photograph())
        peer = folder / "peer.py"
        peer.write_text(PEER.replace("CONCURRENCY", str(CONCURRENCY)))
        size = (folder / "photo.jpg").stat().st_size
        print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, images of {size:,} bytes")
        if options.img2dataset:
            print(versions("img2dataset", python=options.img2dataset))
        print(
            f"{'':12} {'URLs':>8} {'side':>5} {'processes':>9} {'kept':>8} {'images/s':>9} {'per CPU s':>10} {'MB':>6}"
        )
        with serving(folder, ADDRESSES + len(ODD_ROBOTS)) as (all_hosts, port):
            hosts = [host for host in all_hosts if host not in ODD_ROBOTS]
            for number in options.urls:
                listed = folder / "urls.txt"
                listed.write_text("".join(f"http://{hosts[k % len(hosts)]}:{port}/photo/{k}\n" for k in range(number)))
                for side in options.max_image_side:
                    for workers in options.workers:
                        ours = [sys.executable, "-m", "megatron_lcl", "fetch", str(listed), "--workers", str(workers)]
                        ours += ["--allow-private", "--delay", "0", "--concurrency", str(CONCURRENCY)]
                        ours += [
                            "--per-host",
                            str(CONCURRENCY),
                            "--shard-urls",
                            str(max(1, min(10_000, number // workers))),
                        ]
                        ours += ["--max-image-side", str(side)] if side else []
                        runs = {"fetch": [*ours, "--output"]}
                        if options.img2dataset:
                            runs["img2dataset"] = [options.img2dataset, str(peer), str(listed)]
                        for what, command in runs.items():
                            output = folder / "output"
                            command = [*command, str(output), *([str(workers), str(side)] if what != "fetch" else [])]
                            seconds, cpu, memory = measured(command, folder / "log")
                            kept = images_in(output)
                            print(
                                f"{what:12} {number:8,} {side or '':>5} {workers:9} {kept:8,} {kept / seconds:9.0f} "
                                f"{kept / cpu:10.0f} {memory:6.0f}",
                                flush=True,
                            )
                            shutil.rmtree(output)
                            if kept != number:
                                raise SystemExit(f"{what} has kept {kept:,} of {number:,} images: not comparable")


if __name__ == "__main__":
    exit_with(main)
