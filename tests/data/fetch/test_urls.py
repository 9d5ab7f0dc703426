"""URLs out of what people have, and images by URL into the importers' documents."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fetch.faulty_server import image
from data.helpers import TOKENIZER

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.document import Document, Image
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.fetch.plan import host_of, make_plan, open_plan
from megatron_lcl.data.fetch.settings import Settings
from megatron_lcl.data.fetch.store import PartStore, Row
from megatron_lcl.data.fetch.urls import read_urls, url_files
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.sources import NO_FOLDER
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

A, B, C = "http://a.example/1.jpg", "https://b.example/2.png?size=3#x", "HTTP://c.example/ä b.gif"


def urls_of(path: Path, column: str | None = None) -> tuple[list[str], dict[str, int]]:
    drops = Drops()
    found = [url for some in read_urls(url_files(path), column, drops) for url in some]
    return found, drops.bad_counts


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MMC4 = {
    "url": "http://page.example/",
    "text_list": ["one", "two"],
    "image_info": [
        {"image_name": "x.jpg", "raw_url": A, "matched_text_index": 1, "matched_sim": 0.5},
        {"image_name": "y.png", "raw_url": B, "matched_text_index": 0, "matched_sim": 0.25},
    ],
}
OURS = {"items": [{"image": A}, {"text": "one"}, {"image": "there/already.jpg"}, {"image": C}]}


def test_what_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    obelics = parquet(folder / "1.parquet", images=[[A, None], [None, B, C]], texts=[[None, "t"], ["t", None, None]])
    assert urls_of(obelics) == ([A, B, C], {})
    mint = parquet(folder / "2.parquet", url=["http://page.example/"], images=[[A, None]], texts=[[None, "t"]])
    assert urls_of(mint) == ([A], {})
    for name in ("url", "URL", "image_url"):
        laion = parquet(folder / "3.parquet", **{name: [A, None, "x.jpg", B], "TEXT": list("abcd")})
        assert urls_of(laion) == ([A, B], {"image: not a URL": 1})
    large = pa.array([A, B], pa.large_string())
    assert urls_of(parquet(folder / "4.parquet", picture=large), "picture") == ([A, B], {})
    assert urls_of(lines(folder / "5.jsonl", MMC4, OURS)) == ([A, B, A, C], {})
    assert urls_of(lines(folder / "6.jsonl", {"images": [None, C]}, {"url": B, "caption": "b"}, {"where": A})) == (
        [C, B],
        {},
    )
    assert urls_of(lines(folder / "7.jsonl", {"where": A}, {"where": [B]}), "where") == ([A, B], {})
    (folder / "8.jsonl.gz").write_bytes(gzip.compress(json.dumps(OURS).encode()))
    (folder / "9.txt").write_text(f"{A}\n\n {B} \n", encoding="utf-8")
    assert urls_of(folder / "9.txt") == ([A, B], {})
    (folder / "10.txt").write_text(f"{A}\n{B}\n", encoding="utf-8-sig")  # with a byte order mark
    assert urls_of(folder / "10.txt") == ([A, B], {})
    (folder / "10.txt").write_bytes(b"# caf\xe9\n" + A.encode())
    assert urls_of(folder / "10.txt") == ([A], {"image: not a URL": 1})
    (folder / "10.txt").unlink()
    (folder / "damaged.parquet").write_bytes(laion.read_bytes()[:-40])
    assert urls_of(folder / "damaged.parquet") == ([], {"document: damaged parquet file": 1})
    (folder / "damaged.parquet").unlink()
    (folder / "4.parquet").unlink()
    assert urls_of(folder)[0] == [A, B, C, A, A, B, A, B, A, C, C, B, A, C, A, B]


@pytest.mark.parametrize(
    ("name", "is_array"),
    [
        *((name, False) for name in ("a.json", "a.json.gz", "a.ndjson", "a.NDJSON.gz", "a.jsonl")),
        *((name, True) for name in ("a.json", "a.json.gz")),
    ],
)
def test_json_by_other_names(tmp_path: Path, name: str, is_array: bool) -> None:
    """As lines, or, by its name, one array. In a folder where there is none of the usual kinds."""
    file = tmp_path / "in" / name
    file.parent.mkdir()
    rows = [MMC4, OURS, {"url": B}, "no object"]
    text = json.dumps(rows, indent=1) if is_array else "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    expected = [A, B, A, C, B], {"document: not a JSON object": 1}
    assert urls_of(file) == urls_of(file.parent) == expected
    assert urls_of(file, "url") == (["http://page.example/", B], expected[1])
    if name != "a.jsonl":
        (file.parent / "list.txt").write_text(A)
        assert urls_of(file.parent) == ([A], {})


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_lines_of_which_the_first_is_an_array(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('["url", "caption"]\n' + "".join(json.dumps({"url": url}) + "\n" for url in (A, B)))
    assert urls_of(tmp_path / name) == ([A, B], {"document: not a JSON object": 1})


def test_urls_that_are_no_unicode(tmp_path: Path) -> None:
    """As JSON may have them: no file of a plan could hold them."""
    odd = ["http://a.example/\ud800.jpg", "http://\udfff.example/1.jpg"]
    file = lines(tmp_path / "a.jsonl", {"images": [A, *odd]}, {"url": B})
    assert urls_of(file) == ([A, B], {"image: not a URL": 2})


def test_real_lists(shared: Path) -> None:
    urls, dropped = urls_of(shared / "samples" / "pairs" / "img2dataset_urls.parquet")
    assert (len(urls), dropped) == (1000, {})
    urls, dropped = urls_of(shared / "samples" / "mmc4")
    assert len(urls) > 60
    assert not dropped


def test_table_without_the_column(tmp_path: Path) -> None:
    file = parquet(tmp_path / "t.parquet", picture=[A], number=[1])
    with pytest.raises(UserError, match=r"no column of URLs named images or url .* it has picture, number"):
        urls_of(file)
    with pytest.raises(UserError, match=r"named number; it has picture, number"):
        urls_of(file, "number")
    assert main(["fetch", str(file), "--output", str(tmp_path / "store")]) == 2
    assert not (tmp_path / "store").exists()


def test_a_plan_has_each_url_once_and_each_host_in_one_part(tmp_path: Path) -> None:
    urls = [f"http://host{k % 40}.example/{k % 400}" for k in range(1000)]
    make_plan(tmp_path, iter([urls]), {}, "input", Settings(shard_urls=100))
    plan = open_plan(tmp_path, "input", Settings(shard_urls=100))
    assert plan is not None
    parts = [plan.urls(part) for part in range(len(plan.parts))]
    assert len(parts) > 3
    assert [len(part) for part in parts] == list(plan.parts)
    assert min(plan.parts[:-1]) >= 100, "each URL counts once, however often the input has it"
    assert sorted(url for part in parts for url in part) == sorted(set(urls))
    hosts = [{host_of(url) for url in part} for part in parts]
    assert sum(map(len, hosts)) == len(set.union(*hosts)) == 40


def test_a_plan_of_an_earlier_release(tmp_path: Path) -> None:
    """There was only one kind of store."""
    make_plan(tmp_path, iter([[A]]), {}, "input", Settings())
    about = json.loads((tmp_path / "plan" / "plan.json").read_text())
    del about["store"]
    (tmp_path / "plan" / "plan.json").write_text(json.dumps(about))
    assert open_plan(tmp_path, "input", Settings()) is not None
    with pytest.raises(UserError, match="images fetched with --store tar"):
        open_plan(tmp_path, "input", Settings(store="parquet"))


def test_a_plan_is_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file, their folder, the rename, and the folder that has it then: no failure of power leaves half of one."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"to {new.name}")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    urls = [f"http://host{k}.example/{k}" for k in range(9)]
    make_plan(tmp_path, iter([urls]), {}, "input", Settings(shard_urls=3))
    files = sorted(path.name for path in (tmp_path / "plan").iterdir())
    assert len(files) > 2
    assert sorted(done[:-3]) == files
    assert done[-3:] == ["plan", "to plan", tmp_path.name]


def test_host_of() -> None:
    for url, host in (
        ("http://A.example:80/x", "a.example"),
        ("https://me:pw@b.example?x=@y", "b.example"),
        ("http://[::1]:8080/", "[::1]"),
        ("http:///nothing", ""),
        ("http://d.example\\x", "d.example"),
    ):
        assert host_of(url) == host


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of A and C; B is dead."""
    folder = tmp_path_factory.mktemp("store")
    part = PartStore(folder, 0, 2)
    for url, format in ((A, "PNG"), (C, "AVIF")):
        data = image(url)
        part.add(Row(url, "kept", "", hashlib.sha256(data).hexdigest(), len(data), 8, 6, format), data)
    part.add(Row(B, "dead", "status 404"))
    part.finish()
    return folder


def documents(format: str, input: Path, images: Path | None) -> tuple[list[Document], Drops]:
    importer, drops = create(format, input, images, {}), Drops()
    return [document for unit in importer.units() for document in importer.documents(unit, drops)], drops


def pictures(document: Document) -> list[bytes]:
    return [item.data for item in document.items if isinstance(item, Image)]


def test_importers_find_images_by_url(stored: Path, tmp_path: Path) -> None:
    (mmc4,), drops = documents("mmc4", lines(tmp_path / "docs_shard_0_v2.jsonl", MMC4), stored)
    assert pictures(mmc4) == [image(A)]
    assert drops.bad_counts == {"image: file missing": 1}

    obelics = parquet(tmp_path / "o.parquet", images=[[A, None, B, C]], texts=[[None, "one", None, None]])
    for format in ("obelics", "omnicorpus"):
        (page,), drops = documents(format, obelics, stored)
        assert pictures(page) == [image(A), image(C)]
        assert drops.bad_counts == {"image: file missing": 1}

    (ours,), drops = documents("jsonl", lines(tmp_path / "ours.jsonl", OURS), stored)
    assert pictures(ours) == [image(A), image(C)]
    assert drops.bad_counts == {"image: file missing": 1}


def test_a_store_that_was_not_given(stored: Path, tmp_path: Path) -> None:
    """Is not searched for beside the input as if it had been, unless there are archives."""
    ours, table = lines(tmp_path / "ours.jsonl", OURS), tmp_path / "a.csv"
    table.write_text(f"url,text\n{A},one\n")
    assert documents("jsonl", ours, None)[1].bad_counts == {
        f"image: {NO_FOLDER}": 2,
        "image: file missing": 1,
    }
    assert documents("table", table, None)[1].bad_counts == {f"image: {NO_FOLDER}": 1}
    (tmp_path / "img2dataset" / "00000").mkdir(parents=True)  # its images beside the list
    shutil.copy(table, tmp_path / "img2dataset")
    assert documents("table", tmp_path / "img2dataset" / "a.csv", None)[1].bad_counts == {"image: file missing": 1}
    for format, input in (("jsonl", lines(tmp_path / "b.jsonl", {"items": [{"image": A}]})), ("table", table)):
        with pytest.raises(UserError, match=rf"{NO_FOLDER}, 1 \(.*\); give --images DIR \(URLs: what `.* fetch` has"):
            preprocess(format, input, tmp_path / "out", tokenizer=TOKENIZER)
    with pytest.raises(UserError, match=rf"no usable document: .*{NO_FOLDER}, 1 \(.*\); give --images DIR"):
        preprocess("jsonl", tmp_path / "b.jsonl", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    for file in stored.glob("*.tar"):
        (tmp_path / file.name).symlink_to(file)
    lines(ours, {"items": [{"image": A}, {"image": B}]})
    assert documents("jsonl", ours, None)[1].bad_counts == {"image: file missing": 1}


def test_names_come_before_urls(stored: Path, tmp_path: Path) -> None:
    """MMC4's images in a folder of their names are found as before."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x.jpg").write_bytes(image("by name"))
    (page,), _ = documents("mmc4", lines(tmp_path / "docs_shard_0_v2.jsonl", MMC4), tmp_path / "images")
    assert pictures(page) == [image("by name")]
