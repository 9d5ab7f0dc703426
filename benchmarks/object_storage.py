"""Ranged reads of one S3 object by three libraries: MB/s, latency of a read, CPU; beside each other in one run.

An S3 server (moto) on loopback behind a proxy that waits 20 ms before each answer and keeps the object, so that the
proxy is what limits, alike for all. Each library reads random ranges in as many threads as reads are in flight, in a
process of its own; CPU time is that process's.

    python benchmarks/object_storage.py [--peers PYTHON] [--sizes 65536 1048576 4194304] [--flight 1 8 32]

PYTHON: of an environment with obstore, s3fs and multi-storage-client (they want other versions of our packages).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from arguments import interpreter, positive
from claims import exit_with
from measuring import versions
from s3_server import moto, proxied

OBJECT = 64 << 20
LIBRARIES = ["obstore", "s3fs", "msc", "msc-rust"]
READER = """
import json, os, random, sys, time
from concurrent.futures import ThreadPoolExecutor
library, sizes, flights, total = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
began = time.perf_counter()
if library == "obstore":
    from obstore import get_range
    from obstore.store import S3Store
    store = S3Store.from_url("s3://bench/")
    read = lambda start, size: get_range(store, "object", start=start, length=size)
elif library == "s3fs":
    import s3fs
    system = s3fs.S3FileSystem()
    read = lambda start, size: system.cat_file("bench/object", start=start, end=start + size)
else:
    import multistorageclient as msc
    from multistorageclient.types import Range
    from multistorageclient import StorageClient, StorageClientConfig
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    options = {"base_path": "bench", "region_name": "us-east-1", "endpoint_url": endpoint}
    if library.endswith("rust"):
        options["rust_client"] = {"allow_http": True}
    client = StorageClient(StorageClientConfig.from_dict(
        {"profiles": {"p": {"storage_provider": {"type": "s3", "options": options}}}}, profile="p"))
    read = lambda start, size: client.read("object", byte_range=Range(offset=start, size=size))
got = read(0, 100)
assert len(got) == 100, (len(got), bytes(got)[:200])
print(json.dumps({"start": time.perf_counter() - began}), flush=True)
for size in sizes:
    for flight in flights:
        count = max(4 * flight, min(400, 20 * flight, 2 * total // size))
        draw = random.Random(1)
        starts = [draw.randrange(0, total - size) for _ in range(count)]
        def one(start):
            since = time.perf_counter()
            assert len(read(start, size)) == size
            return time.perf_counter() - since
        with ThreadPoolExecutor(flight) as pool:
            list(pool.map(one, starts[:flight]))
            since, cpu = time.perf_counter(), time.process_time()
            took = sorted(pool.map(one, starts))
            wall, cpu = time.perf_counter() - since, time.process_time() - cpu
        said = {"size": size, "flight": flight, "mb_s": count * size / wall / 1e6, "cpu_ms": 1e3 * cpu / count}
        said |= {"p50": 1e3 * took[len(took) // 2], "p99": 1e3 * took[int(0.99 * (len(took) - 1))]}
        print(json.dumps(said), flush=True)
kib = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"peak MB": kib * 1.024e-3}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=interpreter, default=sys.executable)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[1 << 16, 1 << 20, 1 << 22])
    parser.add_argument("--flight", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--latency", type=float, default=0.02)
    arguments = parser.parse_args()
    import obstore
    from obstore.store import S3Store

    with moto() as server, proxied(server) as proxy:
        keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "bench")
        regions = dict.fromkeys(("AWS_REGION", "AWS_DEFAULT_REGION"), "us-east-1")
        os.environ.update(**keys, **regions, AWS_ENDPOINT_URL=proxy.url, AWS_ALLOW_HTTP="true")
        create_bucket(proxy.url, "bench")
        obstore.put(S3Store.from_url("s3://bench/"), "object", os.urandom(OBJECT), use_multipart=False)
        proxy.keeps, proxy.latency = True, arguments.latency
        bytes(obstore.get(S3Store.from_url("s3://bench/"), "object").bytes())
        print(versions("obstore", "s3fs", "multi-storage-client", python=arguments.peers))
        for library in arguments.libraries:
            numbers = json.dumps(arguments.sizes), json.dumps(arguments.flight), str(OBJECT)
            command = [arguments.peers, "-c", READER, library, *numbers]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{library}: {done.stderr.strip().splitlines()[-1]}", flush=True)
            for line in map(json.loads, done.stdout.splitlines()):
                if "size" in line:
                    print(
                        f"{library:9} {line['size'] >> 10:5d} KiB x {line['flight']:2d}: {line['mb_s']:7.1f} MB/s, "
                        f"p50 {line['p50']:6.1f} ms, p99 {line['p99']:6.1f} ms, CPU {line['cpu_ms']:6.2f} ms a read",
                        flush=True,
                    )
                else:
                    print(f"{library:9} {line}", flush=True)


def create_bucket(url: str, name: str) -> None:
    import urllib.request

    with urllib.request.urlopen(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=60) as answer:
        assert answer.status == 200


if __name__ == "__main__":
    exit_with(main)
