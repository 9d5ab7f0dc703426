"""Protects: whatever is flipped, cut or put into the files of any source format, none crashes, and counts add up."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data import writers
from data.helpers import TOKENIZER, mutate
from data.prepare import test_epub, test_hf_folders, test_nemo
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import _PLUGINS, create
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

DOCUMENTS = [
    Document((Text(f"text {k}"), Image(picture(k), "", 0.5, 0), Text("more"), Image(picture(k + 1), "", 0.25, 1)))
    for k in range(12)
]
PLAIN = [Document(tuple(Image(i.data) if isinstance(i, Image) else i for i in d.items)) for d in DOCUMENTS]
WRITE: dict[str, Callable[[Path], Path | None]] = {
    "jsonl": lambda folder: writers.write_jsonl(DOCUMENTS, folder / "in"),
    "jsonl.gz": lambda folder: _write_compressed(folder / "in", ".gz", gzip.compress),
    "jsonl.zst": lambda folder: _write_compressed(folder / "in", ".zst", zstandard.ZstdCompressor().compress),
    "mmc4": lambda folder: writers.write_mmc4(DOCUMENTS, folder / "in", folder / "images"),
    "obelics": lambda folder: writers.write_parquet(PLAIN, folder / "in", folder / "images", False),
    "omnicorpus": lambda folder: writers.write_parquet(PLAIN, folder / "in", folder / "images", True),
    "mint1t": lambda folder: writers.write_mint1t(PLAIN, folder / "in"),
    "webdataset": lambda folder: writers.write_webdataset([Document((d.images[0], d.texts[0])) for d in PLAIN],
                                                          folder / "in"),
    "html": lambda folder: _write_html(folder / "in"),
    "markdown": lambda folder: _write_markdown(folder / "in"),
    "epub": lambda folder: _write_books(folder / "in"),
    "coco": lambda folder: _write_coco(folder / "in", folder / "images"),
    "table": lambda folder: _write_tables(folder / "in", folder / "images"),
    "table.parquet": lambda folder: _write_table_parquet(folder / "in", folder / "images"),
    "nemo": lambda folder: _write_nemo(folder / "in"),
    "hf": lambda folder: _write_hf(folder / "in"),
    "hf.parquet": lambda folder: _write_hf_parquet(folder / "in", folder / "images"),
}  # fmt: skip
ROWS = [(f"{k}.png", f"text {k}") for k in range(4)] * 6


def _write_compressed(folder: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    writers.write_jsonl(DOCUMENTS, folder)
    plain = folder / "documents.jsonl"
    plain.with_suffix(".jsonl" + suffix).write_bytes(compress(plain.read_bytes()))
    plain.unlink()


def _write_html(folder: Path) -> None:
    folder.mkdir()
    for k in range(12):
        (folder / f"{k}.png").write_bytes(picture(k, 80, 70))
        page = f"<html><body><h1>{k}</h1><p>Some <b>text</b> {k}<img src='{k}.png'>after<pre>a\n b</pre></body></html>"
        (folder / f"{k}.html").write_text(page)


def _write_pictures(folder: Path, width: int = 40, height: int = 30) -> None:
    folder.mkdir(parents=True)
    for k in range(4):
        (folder / f"{k}.png").write_bytes(picture(k, width, height))


def _write_markdown(folder: Path) -> None:
    _write_pictures(folder, 80, 70)
    for k in range(6):
        (folder / f"{k}.md").write_text(
            f"---\nt: {k}\n---\n# {k}\n\nSome *text* <b>{k}\n\n![]({k % 4}.png)\n\n| a |\n| --- |"
        )


def _write_books(folder: Path) -> None:
    for number in (0, 1):
        test_epub.write_book(folder / f"{number}.epub", number)


def _write_coco(folder: Path, pictures: Path) -> None:
    _write_pictures(pictures)
    folder.mkdir()
    for number in range(2):
        images = [{"id": 4 * number + k, "file_name": name} for k, (name, _) in enumerate(ROWS[:4])]
        captions = [{"image_id": 4 * number + k % 4, "caption": text} for k, (_, text) in enumerate(ROWS[:4] * 2)]
        (folder / f"{number}.json").write_text(json.dumps({"images": images, "annotations": captions}))


def _write_tables(folder: Path, pictures: Path) -> None:
    _write_pictures(pictures)
    folder.mkdir()
    (folder / "a.csv").write_text("path,caption\r\n" + "".join(f'{name},"{text}\n"\r\n' for name, text in ROWS))
    (folder / "b.tsv").write_text("path\tcaption\n" + "".join(f"{name}\t{text}\n" for name, text in ROWS))
    (folder / "c.tsv.gz").write_bytes(gzip.compress((folder / "b.tsv").read_bytes()))


def _write_table_parquet(folder: Path, pictures: Path) -> None:
    _write_pictures(pictures)
    folder.mkdir()
    data = pa.table(
        {"path": [name for name, _ in ROWS], "caption": [text for _, text in ROWS], "url": ["u"] * len(ROWS)}
    )
    for name in "ab":
        pq.write_table(data, folder / f"{name}.parquet", row_group_size=9)


def _write_nemo(folder: Path) -> None:
    for name in "ab":
        test_nemo.write(folder / f"{name}.parquet", test_nemo.rows_of(PLAIN), 19)


def _write_hf(folder: Path) -> None:
    test_hf_folders.save_to_disk(test_hf_folders.PAIRS, folder, 2)


def _write_hf_parquet(folder: Path, pictures: Path) -> None:
    """Images by their paths, and one in the column; two lists of a row."""
    _write_pictures(pictures)
    folder.mkdir()
    kinds = {"images": pa.list_(test_hf_folders.IMAGE), "texts": pa.list_(pa.string())}
    rows = [
        ([{"bytes": None, "path": name}, None, test_hf_folders.image(0)], [None, text, None]) for name, text in ROWS
    ]
    data = test_hf_folders.table({name: (kind, {}) for name, kind in kinds.items()}, rows)
    for name in "ab":
        pq.write_table(data, folder / f"{name}.parquet", row_group_size=9)


def test_every_format_is_mutated() -> None:
    assert {name.split(".")[0] for name in WRITE} == set(_PLUGINS.built_in)


def _damaged(raw: bytes, rng: random.Random) -> bytes:
    """Damaged somewhere, or where most formats say what the file holds: among its first or its last bytes."""
    start, stop = rng.choice(((0, len(raw)), (0, 1500), (max(0, len(raw) - 1500), len(raw))))
    return raw[:start] + mutate(raw[start:stop], rng) + raw[stop:]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("format", WRITE)
def test_mutated_input_never_crashes_and_counts_add_up(
    format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    WRITE[format](tmp_path)
    format = format.split(".")[0]
    originals = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    images = tmp_path / "images" if (tmp_path / "images").exists() else None
    compared, soak = 0, request.config.getoption("--soak")
    for seed in range(400 if soak else 15):
        rng = random.Random(f"{format} {seed}")
        for path, raw in originals.items():
            path.write_bytes(_damaged(raw, rng) if rng.random() < 0.5 else raw)
        try:
            importer, drops = create(format, tmp_path / "in", images, {}), Drops()
        except UserError as error:
            of_state = format == "hf" and re.search(r"state\.json (is damaged|lists it)", str(error))
            if not (of_state or soak):  # in many more rounds nothing of another format may be left either
                raise
            continue
        documents = [d for unit in importer.units() for d in importer.documents(unit, drops)]
        yielded = sum(len(d.images) for d in documents), sum(bool(t.text) for d in documents for t in d.texts)
        output = tmp_path / f"out-{seed}"
        try:
            summary = preprocess(
                format, tmp_path / "in", output, images=images, tokenizer=TOKENIZER, max_bad_fraction=1
            )
        except ValueError as error:
            if "no usable document" not in str(error):
                raise
            continue
        counts, total = summary.counts, summary.drops
        for kind, kept, given in (
            ("image", counts["placements"], yielded[0]),
            ("text", counts["pieces"] - counts["placements"], yielded[1]),
            ("document", counts["documents"], len(documents)),
        ):
            dropped, before = (
                sum(n for c in (d.bad_counts, d.left_out_counts) for key, n in c.items() if key.startswith(kind + ":"))
                for d in (total, drops)
            )
            assert kept + dropped - before == given, (seed, kind)
        assert not verify(output)
        compared += 1
    assert compared
