"""Protects: importers read a store of parquet as one of tars, other readers read it, and a damaged one is told."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fetch.faulty_server import image
from data.helpers import documents_of, plain

from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.fetch import store
from megatron_lcl.data.fetch.settings import Store
from megatron_lcl.data.fetch.store import SCHEMA, PartStore, Row
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.image_tables import write_image_table
from megatron_lcl.data.prepare.importers.sources import ImageSource, images_signature

URLS = [f"http://example.org/{k}?é" for k in range(40)]
IMAGES = [image(str(k)) * (1 + k % 5) for k in range(40)]


def write(folder: Path, kind: Store) -> Path:
    """Two parts of two shards each; every third URL is dead."""
    folder.mkdir()
    for number in range(2):
        part = PartStore(folder, number, 12, kind)
        for k in range(20 * number, 20 * number + 20):
            data = IMAGES[k] if k % 3 else b""
            digest = hashlib.sha256(data).hexdigest()
            row = (
                Row(URLS[k], "kept", "", digest, len(data), 8, 6, "PNG") if data else Row(URLS[k], "dead", "status 404")
            )
            part.add(row, data)
        part.finish()
    return folder


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "GROUP_ROWS", 5)  # so that files have several row groups
    return write(tmp_path / "parquet", "parquet")


def test_importers_read_both_alike(parquet: Path, tmp_path: Path) -> None:
    tars = write(tmp_path / "tar", "tar")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"items": [{"image": u}, {"text": u}]}) + "\n" for u in URLS))
    (tmp_path / "a.csv").write_text("url,caption\n" + "".join(f"{url},of {url}\n" for url in URLS))
    rows = {"images": [[url, None] for url in URLS], "texts": [[None, "after"] for _ in URLS]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    info = {"image_name": "x.png", "matched_text_index": 0, "matched_sim": 0.5}
    page = {"text_list": ["a"], "image_info": [{**info, "raw_url": url} for url in URLS]}
    (tmp_path / "docs_shard_0_v2.jsonl").write_text(json.dumps(page))
    (tmp_path / "work").mkdir()
    for format, file in (("jsonl", "a.jsonl"), ("table", "a.csv"), ("obelics", "a.parquet"),
                         ("mmc4", "docs_shard_0_v2.jsonl")):  # fmt: skip
        found = []
        for folder in (tars, parquet):
            importer = create(format, tmp_path / file, folder, {})
            documents, drops = documents_of(importer)
            found.append((plain(documents), drops.to_dict()))
            (tmp_path / "work" / f"{format}-{folder.name}").mkdir()
            importer.prepare(tmp_path / "work" / f"{format}-{folder.name}")
            assert plain(documents_of(importer)[0]) == found[-1][0]
        assert found[0] == found[1]
        images = [im.data for document in documents for im in document.images]
        assert images == [IMAGES[k] for k in range(40) if k % 3]
        assert drops.bad_counts == {"image: file missing": 14}


def test_other_readers_read_it(parquet: Path) -> None:
    files = sorted(parquet.iterdir())
    assert [file.name for file in files] == [f"0000{k}-0000{n}.images.parquet" for k in range(2) for n in range(2)]
    table = pa.concat_tables([pq.read_table(file) for file in files])
    assert table.schema.names == [*SCHEMA.names, "bytes"]
    for k, row in enumerate(table.to_pylist()):
        assert (row["url"], row["status"]) == (URLS[k], "kept" if k % 3 else "dead")
        assert row["bytes"] == (IMAGES[k] if k % 3 else None)


def test_datasets_reads_it(parquet: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files, cache = [str(file) for file in sorted(parquet.iterdir())], str(parquet.parent / "cache")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    kept = loaded.filter(lambda row: row["bytes"] is not None).cast_column("bytes", datasets.Image())
    assert kept[0]["bytes"].size == (8, 6)


def test_one_file_of_a_store_and_the_signature(parquet: Path) -> None:
    before = images_signature(parquet)
    assert ImageSource(parquet / "00001-00000.images.parquet").read(URLS[25]) == IMAGES[25]
    (parquet / "00001-00001.images.parquet").unlink()
    assert images_signature(parquet) != before


@pytest.mark.parametrize("kind", ["cut", "compressed", "dictionary", "small pages", "without the column"])
def test_written_anew_or_damaged(kind: str, parquet: Path) -> None:
    """None of its images is taken for another one."""
    file = parquet / "00000-00000.images.parquet"
    table = pq.read_table(file)
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-30])
    elif kind == "compressed":
        pq.write_table(table, file, compression="snappy", use_dictionary=False)
    elif kind == "dictionary":
        pq.write_table(table, file, compression="none")
    elif kind == "small pages":
        pq.write_table(table, file, compression="none", use_dictionary=False, data_page_size=100, write_batch_size=1)
    else:
        pq.write_table(table.drop_columns(["bytes"]), file)
    source = ImageSource(parquet)
    assert source.read(URLS[13]) == IMAGES[13]
    with pytest.raises(BadImage, match=r"and 00000-00000\.images\.parquet is damaged, or not as `fetch` wrote it"):
        source.read(URLS[1])


@pytest.mark.parametrize(
    "change",
    [
        {"size": pa.array([None, 3])},
        {"size": pa.array(["3", "3"])},
        {"size": pa.array([3.0, 3.0])},
        {"key": pa.array([None, "b"])},
        {"key": pa.array([b"a", b"b"])},
        {"key": pa.array([1, 2])},
    ],
)
def test_a_store_whose_columns_are_of_other_kinds(change: dict[str, pa.Array], tmp_path: Path) -> None:
    """As another program may have made it: it is told as damaged."""
    columns = {"key": ["a", "b"], "size": [3, 3], "status": ["kept", "kept"], "bytes": [b"abc", b"def"]}
    table = pa.table(columns)
    schema = pa.schema([pa.field(name, change[name].type) if name in change else table.field(name) for name in columns])
    for name, changed in (("whole", {}), ("odd", change)):
        (tmp_path / name).mkdir()
        given = pa.table({**columns, **changed}, schema=schema if changed else table.schema)
        write_image_table(tmp_path / name / "0.images.parquet", [given], given.schema)
    assert ImageSource(tmp_path / "whole").read("b") == b"def"
    with pytest.raises(BadImage, match="is damaged, or not as `fetch` wrote it"):
        ImageSource(tmp_path / "odd").read("c")
