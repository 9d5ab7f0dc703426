"""Protects: of damaged and odd files in every source format what can be read is read, and every drop is counted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from data import writers
from data.helpers import TOKENIZER, corpus_of, documents_of, encoded, undecoded
from data.writers import picture
from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create, lines, sorted_runs, sources
from megatron_lcl.data.prepare.importers.row_groups import column_values
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.data.prepare.preprocess import Summary, preprocess

# --- MMC4 --------------------------------------------------------------------------------------------------------


def mmc4(tmp_path: Path, pages: list[Any], images: dict[str, bytes], name: str = "docs_shard_0_v2.jsonl") -> Summary:
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    for image, data in images.items():
        (tmp_path / "images" / image).write_bytes(data)
    (tmp_path / "in" / name).write_text("\n".join(map(json.dumps, pages)))
    return preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
                      max_bad_fraction=1)  # fmt: skip


def info(name: Any, index: Any, similarity: Any = 0.5) -> dict[str, Any]:
    return {"image_name": name, "matched_text_index": index, "matched_sim": similarity}


def test_mmc4_oddities(tmp_path: Path) -> None:
    page = {
        "text_list": ["a", "b", None, "d"],
        "image_info": [
            info("2.png", 3), info("0.png", 1, 0.25), info("1.png", 1), info("0.png", 2), info("0.png", None),
            info("0.png", 4), info("0.png", -1), info("../x", 0), info("0.png", 0, float("nan")), info(None, 0),
            info("0.png", "1"), None, info("0.png", 0, None),
        ],
    }  # fmt: skip
    matrix = [[0.0, 0.125], [0.5, 0.75]]
    from_matrix = {"text_list": ["x", "y"], "image_info": [info("0.png", 1, None), info("1.png", 0, None)],
                   "similarity_matrix": matrix}  # fmt: skip
    wrong = {"text_list": ["x", "y"], "image_info": [info("0.png", 1)], "similarity_matrix": matrix}
    images = {f"{k}.png": picture(k) for k in range(3)}
    not_a_number = {"text_list": ["x", "y"], "image_info": [info("0.png", 0, None), info("1.png", 1, None)],
                    "similarity_matrix": [[float("nan"), 0.5], [0.5, 0.25]]}  # fmt: skip
    pages = [page, from_matrix, wrong, {"text_list": None}, {"text_list": ["z"]}, not_a_number]
    summary = mmc4(tmp_path, pages, images)
    documents = list(open_corpus(tmp_path / "out"))
    # two images share a sentence, image_info is in no order, the null sentence is gone
    assert [i.text if isinstance(i, Text) else (i.data, i.similarity, i.matched_text) for i in documents[0].items] == [
        "a", (picture(0), 0.25, 1), (picture(1), 0.5, 1), " b", (picture(2), 0.5, 2), " d",
    ]  # fmt: skip
    assert [(i.data, i.similarity) for i in documents[1].images] == [(picture(1), 0.5), (picture(0), 0.125)]
    assert [i.matched_text for i in documents[1].images] == [0, 1]
    assert [(i.data, i.similarity) for i in documents[-1].images] == [(picture(1), 0.25)]
    assert summary.drops.bad_counts == {
        "document: no text_list": 1,
        "image: matched text is blank": 1,
        "image: matched text null": 1,
        "image: matched text out of range": 3,
        "image: name leads outside the folder": 1,
        "image: no image_info": 1,
        "image: no name": 2,
        "image: no similarity": 1,
        "image: similarity is not a number": 2,
        "text: null": 1,
    }
    assert summary.drops.noted_counts == {"document: similarity_matrix of the wrong size": 1}


def test_mmc4_shards_in_number_order_with_gaps_and_images_in_tars(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    for shard in (10, 2, 5):
        line = json.dumps({"text_list": [f"shard {shard}"], "image_info": [info(f"{shard}.png", 0)]})
        with zipfile.ZipFile(tmp_path / f"in/docs_no_face_shard_{shard}_v3.jsonl.zip", "w") as archive:
            archive.writestr("whatever", line)
        with tarfile.open(tmp_path / f"images/{shard}.tar", "w") as tar:
            writers._add(tar, f"folder/{shard}.png", picture(shard))
    summary = preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER)
    assert [d.texts[0].text for d in open_corpus(tmp_path / "out")] == ["shard 2", "shard 5", "shard 10"]
    assert [d.images[0].data for d in open_corpus(tmp_path / "out")] == [picture(2), picture(5), picture(10)]
    assert summary.drops.noted_counts == {"document: shards that are not there": 6}


def test_missing_shards_of_mmc4_are_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many units the file behind them is."""
    monkeypatch.setattr(lines, "RANGE", 50)
    for shard in (0, 3):
        (tmp_path / f"docs_shard_{shard}_v2.jsonl").write_text('{"text_list": ["a"], "image_info": []}\n' * 4)
    found, drops = documents_of(create("mmc4", tmp_path, None, {}))
    assert (len(found), drops.noted_counts) == (8, {"document: shards that are not there": 2})


def test_mmc4_sample_without_its_images(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images are bad, 100%.*no image folder was given"):
        preprocess("mmc4", shared / "samples/mmc4", tmp_path / "out", tokenizer="clip")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["drops.jsonl"]
    summary = preprocess("mmc4", shared / "samples/mmc4", tmp_path / "out", tokenizer="clip", max_bad_fraction=1)
    assert summary.counts["documents"] == 60


def test_webdataset_sample_without_captions(shared: Path, tmp_path: Path) -> None:
    summary = preprocess("webdataset", shared / "samples/pairs", tmp_path / "out", tokenizer=TOKENIZER)
    assert summary.drops.noted_counts["document: no caption"] == summary.counts["documents"] > 0


def test_a_list_of_captions_is_not_passed_over(tmp_path: Path) -> None:
    """It is bad, with the option that reads it; a text file goes before it."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (caption, text) in enumerate(((["one", "two"], None), (7, None), (None, None), ([], "its text"))):
            writers._add(archive, f"{number}.png", picture(number))
            writers._add(archive, f"{number}.json", json.dumps({"caption": caption}).encode())
            if text is not None:
                writers._add(archive, f"{number}.txt", text.encode())
    found, drops = documents_of(create("webdataset", tmp_path, None, {}))
    assert [[text.text for text in document.texts] for document in found] == [[], [], [], ["its text"]]
    assert drops.bad_counts == {"text: caption is not a string; a list of them: --option captions=caption": 2}
    assert drops.noted_counts == {"document: no caption": 3}
    found, drops = documents_of(create("webdataset", tmp_path, None, {"captions": "caption"}))
    assert [[text.text for text in document.texts] for document in found] == [["one", "two"], [], [], ["its text"]]
    assert drops.bad_counts == {"text: not a string": 1}


@pytest.mark.parametrize("suffix", [".jsonl.zip", ".jsonl.gz", ".jsonl.zst"])
def test_truncated_shards_give_what_they_hold(tmp_path: Path, suffix: str) -> None:
    rng = random.Random(0)
    lines = "".join(json.dumps({"text_list": [rng.randbytes(40).hex()], "image_info": []}) + "\n" for _ in range(9000))
    file = tmp_path / f"docs_shard_0_v2{suffix}"
    if suffix == ".jsonl.zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x", lines)
    elif suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        file.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    summary = preprocess("mmc4", file, tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=0.2)
    assert 4000 < summary.counts["documents"] < 7000
    assert summary.drops.bad_counts["document: truncated file, the lines after it are lost"] == 1


# --- parquet, tars -----------------------------------------------------------------------------------------------


def test_obelics_oddities(tmp_path: Path) -> None:
    rows = [
        {"images": ["http://x/a", None, None], "texts": [None, "t", None]},
        {"images": ["http://x/a"], "texts": ["both"]},
        {"images": ["http://x/a"], "texts": ["t", "u"]},
        {"images": None, "texts": ["t"]},
        {"images": ["http://x/../../etc/passwd"], "texts": [None]},
    ]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/a.parquet")
    (tmp_path / "in/b.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "in/c.parquet")
    (tmp_path / "images").mkdir()
    for row in range(2):
        (tmp_path / f"images/a_{row}_0.png").write_bytes(picture(row))
    summary = preprocess("obelics", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
                         max_bad_fraction=1, options={"image_name": "{file}_{row}_{position}"})  # fmt: skip
    assert [d.images[0].data for d in open_corpus(tmp_path / "out")] == [picture(0), picture(1)]
    assert summary.drops.bad_counts == {
        "document: damaged parquet file": 1,
        "document: images and texts are not lists of one length": 2,
        "document: no columns images and texts; it has url": 1,
        "document: nothing left, its images are missing or bad": 1,
        "image: file missing": 1,
        "text: both image and text at one position": 1,
        "text: null": 1,
    }
    with pytest.raises(ValueError, match=r"it may use \{sha256\}"):
        preprocess("obelics", tmp_path / "in", tmp_path / "o2", tokenizer=TOKENIZER, options={"image_name": "{nope}"})


def test_mint1t_with_another_number_of_frames(tmp_path: Path) -> None:
    documents = [Document((Image(picture(0)), Text("a"), Image(picture(1)))), Document((Text("b"), Image(picture(2))))]
    writers.write_mint1t(documents, tmp_path / "in")
    path = tmp_path / "in/00000.tar"
    with tarfile.open(path) as archive:
        members = [(m.name, archive.extractfile(m).read()) for m in archive]  # type: ignore[union-attr]
    tiffs = [data for name, data in members if name.endswith("tiff")]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            writers._add(archive, name, tiffs[1] if name == "000000.tiff" else data)
    summary = preprocess("mint1t", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    assert summary.drops.bad_counts == {"image: TIFF with another number of frames": 2}
    corpus = open_corpus(tmp_path / "out")
    assert [len(d.images) for d in corpus] == [0, 1]
    # earlier releases made frames of float levels from 0 to 1 black, and put nothing between texts, nor what blank ones
    # held
    assert corpus.manifest["recipe"]["rules"] == 5


@pytest.mark.parametrize("format", ["obelics", "omnicorpus"])
def test_invalid_utf8_in_parquet_loses_no_row(format: str, tmp_path: Path) -> None:
    values = [b"text %d" % k for k in range(200)]
    values[70] = b"caf\xe9"
    columns = {"images": pa.array([[None]] * 200, pa.list_(pa.string())),
               "texts": pa.ListArray.from_arrays(pa.array(range(201), pa.int32()), undecoded(values))}  # fmt: skip
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "in/a.parquet")
    summary = preprocess(format, tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER)
    expected = [value.decode(errors="replace") for value in values]
    assert [d.texts[0].text for d in open_corpus(tmp_path / "out")] == expected
    assert not summary.drops.bad_counts
    assert (summary.drops.noted_counts, summary.drops.names) == (
        {"document: invalid UTF-8 replaced": 1}, {"document: invalid UTF-8 replaced": ["a.parquet:70"]},
    )  # fmt: skip


@pytest.mark.parametrize("of", ["string", "JSON", "binary", "struct", "struct of binary"])
def test_ids_of_pages_that_are_not_utf8(tmp_path: Path, of: str) -> None:
    """Each is decoded with a note, in whatever type the column has; the others are what they are."""
    urls = [b"http://x/0", b"http://x/\xff", b"http://x/2"]
    objects = [b'{"url": "%s"}' % url for url in urls]
    about = {
        "string": lambda: undecoded(objects),
        "JSON": lambda: pa.ExtensionArray.from_storage(pa.json_(), undecoded(objects)),
        "binary": lambda: pa.array(objects),
        "struct": lambda: pa.StructArray.from_arrays([undecoded(urls)], ["url"]),
        "struct of binary": lambda: pa.StructArray.from_arrays([pa.array(urls)], ["url"]),
    }[of]()
    lists = {name: pa.array([[value]] * 3, pa.list_(pa.string())) for name, value in (("images", None), ("texts", "a"))}
    pq.write_table(pa.table({**lists, "general_metadata": about}), tmp_path / "a.parquet")
    found, drops = documents_of(create("omnicorpus", tmp_path / "a.parquet", None, {}))
    assert [document.metadata["id"] for document in found] == ["http://x/0", "http://x/\ufffd", "http://x/2"]
    assert not drops.bad_counts
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 1}


def test_runs_of_strings_that_are_not_utf8() -> None:
    """As an Arrow file may have them."""
    parts = [pa.array([2, 3, 4], pa.int32()), undecoded([b"\xff", None, b"a"])]
    runs = pa.Array.from_buffers(pa.run_end_encoded(pa.int32(), pa.string()), 4, [None], children=parts)
    assert column_values(runs) == [b"\xff", b"\xff", None, "a"]


def test_rows_lost_with_a_damaged_row_group_are_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [{"images": [None], "texts": [rng.randbytes(2000).hex()]} for _ in range(400)]
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/a.parquet"
    schema = pa.schema([("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, row_group_size=200, data_page_size=20_000,
                   write_batch_size=10, use_dictionary=False)  # fmt: skip
    raw = bytearray(file.read_bytes())
    at = len(raw) * 3 // 4
    raw[at : at + 60_000] = b"\xff" * 60_000  # page headers in the middle of the second group
    file.write_bytes(raw)
    summary = preprocess("obelics", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    (lost,) = summary.drops.bad_counts.items()
    assert lost == ("document: lost in a damaged parquet file", 400 - summary.counts["documents"])
    assert 200 < summary.counts["documents"] < 390


@pytest.mark.parametrize("format", ["webdataset", "mint1t"])
def test_a_truncated_tar_gives_what_it_holds(format: str, tmp_path: Path) -> None:
    documents = [Document((Image(picture(k)), Text(f"text {k}"))) for k in range(20)]
    getattr(writers, f"write_{format}")(documents, tmp_path / "in")
    (whole, *_) = sorted((tmp_path / "in").glob("*.tar"))
    with tarfile.open(whole) as archive:
        images = [m.offset_data for m in archive if m.name.endswith(("jpg", "tiff"))]
    with open(whole, "r+b") as file:
        file.truncate(images[7] + 100)
    samples = documents[:7] + (documents[10:] if format == "webdataset" else [])  # WebDataset has a second tar
    summary = preprocess(format, tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    back = list(open_corpus(tmp_path / "out"))
    complete = [d.texts[0].text for d in back if d.images]
    assert complete == [d.texts[0].text for d in samples]
    assert summary.drops.bad_counts["document: damaged or truncated tar, the samples after it are lost"] == 1


def test_images_of_a_truncated_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for k in range(9):
            writers._add(archive, f"{k}.png", picture(k))
    with tarfile.open(tmp_path / "0.tar") as archive:
        start = archive.getmembers()[6].offset_data
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(start + 100)
    (tmp_path / "work").mkdir()
    for prepared in (False, True, True):  # the last finds what the one before has left
        source = ImageSource(tmp_path)
        if prepared:
            source.prepare(tmp_path / "work")
        assert [source.read(f"{k}.png") for k in range(6)] == [picture(k) for k in range(6)]
        for k in (7, 8):
            with pytest.raises(BadImage, match=r"file missing, and 0\.tar is damaged or cut"):
                source.read(f"{k}.png")


def test_invalid_utf8_in_tars_is_replaced_and_noted(tmp_path: Path) -> None:
    for folder in ("pairs", "pdf"):
        (tmp_path / folder).mkdir()
    with tarfile.open(tmp_path / "pairs/0.tar", "w") as archive:
        for key, (name, caption) in enumerate({"txt": b"a\xffb", "json": b'{"caption": "c\xff"}'}.items()):
            writers._add(archive, f"{key}.png", picture(key))
            writers._add(archive, f"{key}.{name}", caption)
    with tarfile.open(tmp_path / "pdf/0.tar", "w") as archive:
        writers._add(archive, "0.json", b'{"texts": ["a\xffb"], "images": [null]}')
    for format, folder, texts in (("webdataset", "pairs", ["a\ufffdb", "c\ufffd"]), ("mint1t", "pdf", ["a\ufffdb"])):
        summary = preprocess(format, tmp_path / folder, tmp_path / f"{folder}-out", tokenizer=TOKENIZER)
        assert [d.texts[0].text for d in open_corpus(summary.path)] == texts
        assert summary.drops.noted_counts == {"document: invalid UTF-8 replaced": len(texts)}


def test_extensions_do_not_matter(tmp_path: Path) -> None:
    images = {"jpeg.png": encoded_picture("JPEG"), "png.jpg": encoded_picture("PNG"), "webp": encoded_picture("WEBP")}
    summary = corpus_of(tmp_path, [{"items": [{"image": name} for name in images]}], images)
    assert [image.data for image in open_corpus(summary.path)[0].images] == list(images.values())
    assert not summary.drops.bad_counts
    shard = open_corpus(summary.path).shard(0)
    assert [FORMATS[code] for code in shard.image_format] == ["JPEG", "PNG", "WEBP"]


def encoded_picture(format: str) -> bytes:
    return encoded(Pillow.open(io.BytesIO(picture(4))), format)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    line = b'\xef\xbb\xbf{"items": [{"text": "first"}]}'
    summary = corpus_of(tmp_path, [line, {"items": [{"text": "second"}]}], {})
    assert [d.texts[0].text for d in open_corpus(summary.path)] == ["first", "second"]
    assert summary.drops == Drops()


# --- images in tars ----------------------------------------------------------------------------------------------


def test_names_that_repeat_from_tar_to_tar(tmp_path: Path) -> None:
    """Each shard's own tar comes first; where none is its own, only equal files are taken."""
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    page = {"text_list": ["t"], "image_info": [info("0.png", 0), info("same.png", 0)]}
    for shard in (0, 1, 10, 7):
        (tmp_path / f"in/docs_shard_{shard}_v2.jsonl").write_text(json.dumps(page))
    for tar, shard in (("0", 0), ("00001", 1), ("shard_10", 10)):
        with tarfile.open(tmp_path / f"images/{tar}.tar", "w") as archive:
            writers._add(archive, "folder/0.png", picture(shard))
            writers._add(archive, "same.png", picture(50))
    summary = preprocess("mmc4", tmp_path / "in", tmp_path / "out", images=tmp_path / "images", tokenizer=TOKENIZER,
                         max_bad_fraction=1)  # fmt: skip
    expected = [[picture(k), picture(50)] for k in (0, 1)] + [[picture(50)], [picture(10), picture(50)]]
    assert [[i.data for i in d.images] for d in open_corpus(tmp_path / "out")] == expected
    assert summary.drops.bad_counts == {"image: several images of this name in the tars": 1}


def test_an_index_of_tars_in_files_is_that_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_runs, "_RUN", 8)  # members come in many sorted runs
    names = [f"{folder}/{k}.png" for folder in ("a", "b") for k in range(15)]
    for half in range(2):
        with tarfile.open(tmp_path / f"{half}.tar", "w") as archive:
            for name in names[half::2]:
                writers._add(archive, name, name.encode())
    source = ImageSource(tmp_path)
    (tmp_path / "work").mkdir()
    prepared = ImageSource(tmp_path)
    prepared.prepare(tmp_path / "work")
    monkeypatch.setattr(sources, "_members", None)  # nothing is listed again
    copied = pickle.loads(pickle.dumps(prepared))
    copied.prepare(tmp_path / "work")
    assert [copied.read(name) for name in names] == [name.encode() for name in names]
    for name in ("c/1.png", "x.png", "\ud800.png"):
        with pytest.raises(BadImage):
            copied.read(name)
    monkeypatch.undo()
    assert [source.read(name) for name in names] == [name.encode() for name in names]


# --- what importers drop is counted ------------------------------------------------------------------------------


def bad_value(rng: random.Random) -> Any:
    return rng.choice((None, 3, "", " ", [], {}, "x", True, 1e99))


def random_line(rng: random.Random, format: str) -> tuple[bytes, int, int]:
    """A line of JSON, and how many texts and images a reader of the format's description finds in it."""
    kind = rng.random()
    if kind < 0.15:
        return (
            rng.choice(
                (b"junk", b'{"items": [', b"4", b"[]", b"{}", b"\xff", b'{"a": NaN}', b'{"items": [{"text": "a"}]} 4')
            ),
            0,
            0,
        )
    texts = [rng.choice(("some text", "other", bad_value(rng))) for _ in range(rng.randrange(5))]
    names = [rng.choice(("0.png", "gone.png", "../x", bad_value(rng))) for _ in range(rng.randrange(5))]
    if format == "jsonl":
        items = [{"text": text} for text in texts] + [
            {"image": name, "similarity": bad_value(rng), "matched_text_index": rng.choice((0, bad_value(rng)))}
            for name in names
        ]
        rng.shuffle(items)
        return json.dumps({"items": items}).encode(), len(texts), len(names)
    infos = [{"image_name": name, "matched_text_index": rng.choice((0, bad_value(rng))),
              "matched_sim": rng.choice((0.5, bad_value(rng)))} for name in names]  # fmt: skip
    return json.dumps({"text_list": texts, "image_info": infos}).encode(), len(texts), len(names)


def dropped(drops: Drops, kind: str) -> int:
    return sum(n for counts in (drops.bad_counts, drops.left_out_counts) for key, n in counts.items()
               if key.startswith(kind + ":"))  # fmt: skip


def check_counts(format: str, folder: Path, given: tuple[int, int, int]) -> None:
    """Documents, texts and images that were written down, against those an importer gives and those it drops."""
    importer, drops = create(format, folder / "in", None if format == "jsonl" else folder / "images", {}), Drops()
    documents = [d for unit in importer.units() for d in importer.documents(unit, drops)]
    texts = sum(bool(t.text) for d in documents for t in d.texts)
    found = len(documents), texts, sum(len(d.images) for d in documents)
    counts = [n + dropped(drops, kind) for n, kind in zip(found, ("document", "text", "image"), strict=True)]
    assert tuple(counts) == given


@pytest.mark.parametrize("format", ["jsonl", "mmc4"])
def test_what_importers_of_lines_drop(format: str, tmp_path: Path) -> None:
    for folder in ("in", "images"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(picture(0))
    for seed in range(60):
        rng = random.Random(seed)
        lines = [random_line(rng, format) for _ in range(30)]
        (tmp_path / "in/docs_shard_0_v2.jsonl").write_bytes(b"\n".join(line for line, _, _ in lines) + b"\n")
        texts, images = (sum(column) for column in list(zip(*lines, strict=True))[1:])
        check_counts(format, tmp_path, (len(lines), texts, images))


def test_what_importers_of_rows_drop(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / hashlib.sha256(b"a").hexdigest()).write_bytes(picture(0))
    schema = pa.schema([("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string()))])
    for seed in range(60):
        rng = random.Random(seed)
        rows, given = [], [0, 0, 0]
        for _ in range(30):
            length = rng.randrange(5)
            images = [rng.choice((None, "a", "gone", "../x")) for _ in range(length)]
            texts = [rng.choice((None, "text", "", " ")) for _ in range(length)]
            given[0] += 1
            if rng.random() < 0.2:
                images = rng.choice((None, [*images, "a"]))
            else:  # a text where no image is; one beside an image is a text that is dropped
                given[1] += sum(image is None or text is not None for image, text in zip(images, texts, strict=True))
                given[2] += sum(image is not None for image in images)
            rows.append({"images": images, "texts": texts})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "in/a.parquet", row_group_size=7)
        check_counts("obelics", tmp_path, (given[0], given[1], given[2]))
