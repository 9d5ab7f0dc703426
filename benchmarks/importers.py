"""Documents and megabytes a second on one core, and peak of memory, of `preprocess` by format and number of documents.

    python benchmarks/importers.py [FORMAT …] [--documents 1000 10000 100000] [--image-side 224] [--folder DIR]
                                   [--datatrove PYTHON]

A document is a text of about 40 words, an image of its own (a JPEG), and, where the format is not one of pairs, another
text. Claims: documents a second do not fall with their number, memory does not grow with it (`claims.flat`); else the
exit code is 1. Megabytes are those of the input, images included; CPU seconds are those of `preprocess`, with
tokenizing and checking of images, without imports. 100,000 documents are 1.5 GB a format (`mint1t`, whose images are
uncompressed TIFF frames, ten times that), removed before the next.

datatrove, where it has a reader of the format, reads the same files and writes the texts as JSON lines: no tokens, and
no images, though those that stand in a table are read with it. Its CPU seconds are without imports, too. PYTHON: of an
environment that has `datatrove[io]`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from arguments import interpreter
from claims import exit_unless, exit_with, flat
from measuring import resident
from PIL import Image as Pillow

from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece

Document = tuple[str, bytes, str]
Documents = Iterator[tuple[int, Document]]
_ROWS = 500
"""rows of a row group, a batch, a book"""
_PAGES_A_FOLDER = 1000


class Source:
    """Documents of seeded words and pictures, made as they are needed."""

    def __init__(self, num: int, side: int) -> None:
        rng = random.Random(0)
        words = ["".join(rng.choices("etaoinshrdlcumwfgypbvk", k=rng.randint(2, 9))) for _ in range(5000)]
        self.texts = [" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(2000)]
        self.pictures = [_jpeg(seed, side) for seed in range(32)]
        self.num = num

    def __iter__(self) -> Documents:
        for k in range(self.num):
            picture, number = self.pictures[k % 32], k.to_bytes(8, "big")
            own = picture[:2] + b"\xff\xfe\x00\x0a" + number + picture[2:]  # a comment makes its bytes its own
            yield k, (f"{k} {self.texts[k % 2000]}", own, self.texts[(k + 7) % 2000])

    def batches(self) -> Iterator[list[tuple[int, Document]]]:
        batch = []
        for entry in self:
            batch.append(entry)
            if len(batch) == _ROWS:
                yield batch
                batch = []
        if batch:
            yield batch


def _jpeg(seed: int, side: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).resize((side, side)).save(out, "JPEG", quality=85)
    return out.getvalue()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _url(k: int) -> str:
    return f"https://example.org/{k}.jpg"


# --- a writer for each format: (source, input, images) -----------------------------------------------------------


def jsonl(source: Source, input: Path, images: Path) -> None:
    with open(input / "a.jsonl", "w") as file, tarfile.open(images / "a.tar", "w") as archive:
        for k, (before, image, after) in source:
            _add(archive, f"{k}.jpg", image)
            file.write(json.dumps({"items": [{"text": before}, {"image": f"{k}.jpg"}, {"text": after}]}) + "\n")


def mmc4(source: Source, input: Path, images: Path) -> None:
    with open(input / "docs_shard_0_v2.jsonl", "w") as file, tarfile.open(images / "0.tar", "w") as archive:
        for k, (before, image, after) in source:
            _add(archive, f"{k}.jpg", image)
            info = {"image_name": f"{k}.jpg", "matched_text_index": 1, "matched_sim": 0.3}
            file.write(json.dumps({"text_list": [before, after], "image_info": [info]}) + "\n")


def obelics(source: Source, input: Path, images: Path) -> None:
    kind = pa.list_(pa.string())
    schema = pa.schema([("images", kind), ("texts", kind)])
    with pq.ParquetWriter(input / "a.parquet", schema) as writer, tarfile.open(images / "a.tar", "w") as archive:
        for batch in source.batches():
            rows = []
            for k, (before, image, after) in batch:
                _add(archive, hashlib.sha256(_url(k).encode()).hexdigest() + ".jpg", image)
                rows.append({"images": [None, _url(k), None], "texts": [before, None, after]})
            writer.write_table(pa.Table.from_pylist(rows, schema))


def nemo(source: Source, input: Path, _: Path) -> None:
    schema = pa.schema(
        [("sample_id", pa.string()), ("position", pa.int32()), ("modality", pa.string()),
         ("content_type", pa.string()), ("text_content", pa.string()), ("binary_content", pa.large_binary())]
    )  # fmt: skip
    with pq.ParquetWriter(input / "a.parquet", schema) as writer:
        for batch in source.batches():
            rows = []
            for k, (before, image, after) in batch:
                for position, (modality, content) in enumerate((("text", before), ("image", image), ("text", after))):
                    column = "text_content" if modality == "text" else "binary_content"
                    rows.append({"sample_id": str(k), "position": position, "modality": modality, column: content})
            writer.write_table(pa.Table.from_pylist(rows, schema))


def hf(source: Source, input: Path, _: Path) -> None:
    """As `save_to_disk` writes it."""
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    schema = pa.schema(
        [("image", image_type), ("text", pa.string())], {"huggingface": json.dumps({"info": {"features": features}})}
    )
    name = "data-00000-of-00001.arrow"
    with pa.OSFile(str(input / name), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in source.batches():
            rows = [{"image": {"bytes": image, "path": None}, "text": text} for _, (text, image, _) in batch]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    (input / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))


def table(source: Source, input: Path, images: Path) -> None:
    """CSV with URLs, in a store by hash."""
    with open(input / "a.csv", "w", newline="") as file, tarfile.open(images / "a.tar", "w") as archive:
        writer = csv.writer(file)
        writer.writerow(["url", "caption"])
        for k, (text, image, _) in source:
            _add(archive, hashlib.sha256(_url(k).encode()).hexdigest() + ".jpg", image)
            writer.writerow([_url(k), text])


def coco(source: Source, input: Path, images: Path) -> None:
    infos, annotations = [], []
    with tarfile.open(images / "a.tar", "w") as archive:
        for k, (text, image, _) in source:
            _add(archive, f"{k:012d}.jpg", image)
            infos.append({"id": k, "file_name": f"{k:012d}.jpg"})
            annotations.append({"id": k, "image_id": k, "caption": text})
    (input / "captions.json").write_text(json.dumps({"images": infos, "annotations": annotations}))


def webdataset(source: Source, input: Path, _: Path) -> None:
    with tarfile.open(input / "00000.tar", "w") as archive:
        for k, (text, image, _unused) in source:
            _add(archive, f"{k:09d}.jpg", image)
            _add(archive, f"{k:09d}.txt", text.encode())


def mint1t(source: Source, input: Path, _: Path) -> None:
    with tarfile.open(input / "00000.tar", "w") as archive:
        for k, (before, image, after) in source:
            out = io.BytesIO()
            Pillow.open(io.BytesIO(image)).save(out, "TIFF", compression="tiff_lzw")
            record = {"texts": [before, None, after], "images": [None, "x", None]}
            _add(archive, f"{k:09d}.json", json.dumps(record).encode())
            _add(archive, f"{k:09d}.tiff", out.getvalue())


def _pages(source: Source, input: Path, suffix: str, page: str) -> None:
    for k, (before, image, after) in source:
        folder = input / f"{k // _PAGES_A_FOLDER:04d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{k}.jpg").write_bytes(image)
        (folder / f"{k:07d}{suffix}").write_text(page.format(before=before, k=k, after=after))


def html(source: Source, input: Path, _: Path) -> None:
    _pages(source, input, ".html", '<html><body><p>{before}</p><img src="{k}.jpg"><p>{after}</p></body></html>')


def markdown(source: Source, input: Path, _: Path) -> None:
    _pages(source, input, ".md", "{before}\n\n![]({k}.jpg)\n\n{after}\n")


def epub(source: Source, input: Path, _: Path) -> None:
    """Books of 500 chapters."""
    container = '<container><rootfiles><rootfile full-path="a.opf"/></rootfiles></container>'
    for number, batch in enumerate(source.batches()):
        with zipfile.ZipFile(input / f"{number:05d}.epub", "w") as book:
            book.writestr("META-INF/container.xml", container)
            items, spine = [], []
            for k, (before, image, after) in batch:
                page = f'<html><body><p>{before}</p><img src="{k}.jpg"/><p>{after}</p></body></html>'
                book.writestr(f"{k}.xhtml", page, zipfile.ZIP_DEFLATED)
                book.writestr(f"{k}.jpg", image)
                items.append(f'<item id="i{k}" href="{k}.xhtml" media-type="application/xhtml+xml"/>')
                spine.append(f'<itemref idref="i{k}"/>')
            book.writestr(
                "a.opf", f"<package><manifest>{''.join(items)}</manifest><spine>{''.join(spine)}</spine></package>"
            )


WRITERS: dict[str, Callable[[Source, Path, Path], None]] = {
    "coco": coco, "epub": epub, "hf": hf, "html": html, "jsonl": jsonl, "markdown": markdown, "mint1t": mint1t,
    "mmc4": mmc4, "nemo": nemo, "obelics": obelics, "omnicorpus": obelics, "table": table, "webdataset": webdataset,
}  # fmt: skip


PEER = """
import json, resource, sys
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline import readers
from datatrove.pipeline.writers import JsonlWriter

format, folder, output = sys.argv[1:]
texts = {
    "jsonl": lambda row: [item["text"] for item in row["items"] if "text" in item],
    "table": lambda row: [row["caption"]],
    "obelics": lambda row: [text for text in row["texts"] if text],
    "hf": lambda row: [row["text"]],
}[format]

def adapter(self, row, path, number):
    return {"text": "\\n".join(texts(row)), "id": f"{path}/{number}"}

reader = {
    "jsonl": lambda: readers.JsonlReader(folder, adapter=adapter),
    "table": lambda: readers.CSVReader(folder, adapter=adapter),
    "obelics": lambda: readers.ParquetReader(folder, adapter=adapter),
    "hf": lambda: readers.IpcReader(folder, stream=True, adapter=adapter, glob_pattern="*.arrow"),
}[format]()
before = resource.getrusage(resource.RUSAGE_SELF)
LocalPipelineExecutor([reader, JsonlWriter(output, compression=None)], logging_dir=output + "-logs").run()
after = resource.getrusage(resource.RUSAGE_SELF)
found = sum(len(file.read_bytes().splitlines()) for file in Path(output).glob("*.jsonl"))
status = Path("/proc/self/status").read_text()
seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(seconds, found, int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""
PEERS = ("jsonl", "table", "obelics", "hf")


# --- measuring ---------------------------------------------------------------------------------------------------


def one(format: str, input: Path, images: Path, output: Path, tokenizer: Path) -> None:
    """In a process of its own: CPU seconds, documents, peak MiB."""
    if format in ("webdataset", "mint1t"):
        import webdataset.tariterators  # noqa: F401 - imports torch, which takes a second
    apart = images if any(images.iterdir()) else None
    before = resource.getrusage(resource.RUSAGE_SELF)
    summary = preprocess(format, input, output, images=apart, tokenizer=tokenizer)
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(seconds, summary.counts["documents"], resident("VmHWM"))


def measured(command: list[str]) -> tuple[float, float, float]:
    """What a process prints last: CPU seconds, documents, peak MiB."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds, found, peak = (float(value) for value in done.stdout.split()[-3:])
    return seconds, found, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"default: all of {', '.join(WRITERS)}")
    parser.add_argument("--documents", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--image-side", type=int, default=224, help="pixels (%(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="for the data (default: the system's for temporary files)")
    parser.add_argument("--datatrove", type=interpreter, metavar="PYTHON")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        format, *paths = arguments.one
        return one(format, *map(Path, paths))
    if unknown := set(arguments.formats) - set(WRITERS):
        parser.error(f"no such format: {', '.join(sorted(unknown))}")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'format':<22}{'documents':>10}{'input, MB':>11}{'documents/s':>13}{'MB/s':>8}{'peak, MiB':>11}")
    claims: dict[str, bool] = {}
    for format in arguments.formats or WRITERS:
        rates = {}
        for num in arguments.documents:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
                folder = Path(name)
                (folder / "in").mkdir()
                (folder / "images").mkdir()
                source = Source(num, arguments.image_side)
                train_sentencepiece(source.texts, 2000).save(folder / "t.model")
                WRITERS[format](source, folder / "in", folder / "images")
                files = [path for part in ("in", "images") for path in (folder / part).rglob("*") if path.is_file()]
                size = sum(path.stat().st_size for path in files) / 1e6
                places = [str(folder / part) for part in ("in", "images", "out", "t.model")]
                runs = {format: [sys.executable, __file__, "--one", format, *places]}
                if arguments.datatrove and format in PEERS:
                    (folder / "peer.py").write_text(PEER)
                    peer = [arguments.datatrove, str(folder / "peer.py"), format, places[0], str(folder / "peer")]
                    runs["datatrove, " + format] = peer
                for what, command in runs.items():
                    seconds, found, peak = measured(command)
                    assert found == num, (what, found)
                    if what == format:
                        rates[num] = num / seconds, peak
                    print(
                        f"{what:<22}{num:>10,}{size:>11.1f}{num / seconds:>13,.0f}{size / seconds:>8.1f}{peak:>11.0f}",
                        flush=True,
                    )
        claims |= flat(format, rates)
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
