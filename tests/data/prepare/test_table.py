"""Protects tables of pairs: CSV, TSV and parquet, and the image of a row by path, by URL, and by img2dataset's key."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from data import writers
from data.helpers import TOKENIZER, contents, documents_of, plain, undecoded
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create, lines
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

TEXTS = ["plain", 'with "quotes", and commas', "two\nlines", "last é"]
URLS = [f"https://x.org/{k}?size=1" for k in range(4)]


def expected(texts: list[str] = TEXTS) -> list[list[object]]:
    return [[(picture(k), None, None), text] for k, text in enumerate(texts)]


def write_csv(file: Path, header: list[str], rows: list[list[str]], encoding: str = "utf-8") -> None:
    with open(file, "w", newline="", encoding=encoding) as opened:
        csv.writer(opened).writerows([header, *rows])


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(picture(k))
    return folder


def test_csv_by_path(tmp_path: Path, pictures: Path) -> None:
    write_csv(tmp_path / "a.csv", ["id", "File_Name", "title", "Caption"],
              [[f"n{k}", f"{k}.png", "t", text] for k, text in enumerate(TEXTS)], "utf-8-sig")  # fmt: skip
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for file, names in (
        (tmp_path / "a.csv", ["a.csv:2 n0", "a.csv:4 n2"]),
        (packed, ["b.csv.gz:2 n0", "b.csv.gz:4 n2"]),
    ):
        importer = create("table", file, pictures, {})
        found, drops = documents_of(importer)
        assert plain(found) == expected()
        assert [importer.place(found[k].name) + f" n{k}" for k in (0, 2)] == names
        assert (importer.kind, drops.bad_counts) == ("pairs", {})
    preprocess("table", tmp_path / "a.csv", tmp_path / "out", images=pictures, tokenizer=TOKENIZER)
    assert plain(list(open_corpus(tmp_path / "out"))) == expected()


def test_tsv_in_ranges(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes are characters, and a row belongs to the range in which it begins."""
    texts = ['"open', "b", 'half "quoted"', "d"]
    body = "".join(f"{text}\t{k}.png\r\n" for k, text in enumerate(texts))
    (tmp_path / "no-header.tsv").write_text(body)
    (tmp_path / "header.tsv").write_text("caption\tpath\n" + body)
    for size in (1, 9, 1 << 20):
        monkeypatch.setattr(lines, "RANGE", size)
        assert plain(documents_of(create("table", tmp_path / "header.tsv", pictures, {}))[0]) == expected(texts)
        options = {"columns": "caption,path"}
        assert plain(documents_of(create("table", tmp_path / "no-header.tsv", pictures, options))[0]) == expected(texts)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("header", [False, True])
def test_quoted_fields_with_tabs(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, header: bool, packed: bool
) -> None:
    """As pandas and Python's csv write them; commas are characters."""
    texts = ["one, comma", 'He said "hi", to\ta dog', '"sunset" by the river', "two\nlines"]
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [["filepath", "title"]] * header + [[f"{k}.png", text] for k, text in enumerate(texts)]
        csv.writer(file, delimiter="\t").writerows(rows)
    if packed:
        (tmp_path / "b.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
        path = tmp_path / "b.csv.gz"
    monkeypatch.setattr(lines, "RANGE", 9)
    importer = create("table", path, pictures, {} if header else {"columns": "filepath,title"})
    found, drops = documents_of(importer)
    assert plain(found) == expected(texts)
    assert (drops.bad_counts, drops.noted_counts, importer.rules) == ({}, {}, 6)


def test_quotes_in_tsv_are_noted_where_they_look_like_those_of_csv(tmp_path: Path, pictures: Path) -> None:
    texts = ['"He said ""hi"" to the dog"', '"quoted as it is"', '"" and ""', '"a" and "b"']
    (tmp_path / "a.tsv").write_text("title\tpath\n" + "".join(f"{text}\t{k}.png\n" for k, text in enumerate(texts)))
    importer = create("table", tmp_path / "a.tsv", pictures, {})
    found, drops = documents_of(importer)
    assert plain(found) == expected(texts)
    (reason,) = drops.noted_counts
    assert "in quotes" in reason
    assert (drops.noted_counts[reason], drops.names[reason], importer.rules) == (1, ["a.tsv@11"], 5)


def test_csv_in_ranges(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range begins at a record, whatever the quotes hold: as if the file were read by one process."""
    write_csv(tmp_path / "a.csv", ["caption", "path"], [[text, f"{k}.png"] for k, text in enumerate(TEXTS)])
    draw = random.Random(0)
    for k in range(60):  # mostly against the rules
        (tmp_path / f"{k}.csv").write_text(
            "".join(draw.choices('ab",\n\r é', [4, 4, 3, 3, 4, 1, 1, 1], k=200)), "utf-8"
        )
    (tmp_path / "long.csv").write_text('a,b\n"open,c\n' + "x\n" * 70_000 + 'd,"e\nf"\n')
    for file in sorted(tmp_path.glob("*.csv")):
        found = []
        for size in (1 << 20, 1, 40):
            monkeypatch.setattr(lines, "RANGE", size)
            importer = create("table", file, pictures, {} if file.stem == "a" else {"columns": "caption,path"})
            units = importer.units()
            documents, drops = documents_of(importer)
            found.append(([(document.name, document.items) for document in documents], drops.to_dict()))
            assert len(units) > 1 or size > 1 or file.stem.isdecimal(), file
            assert sum(unit.size for unit in units) == file.stat().st_size
        assert found[1:] == found[:1] * 2, file
        if file.stem == "a":
            assert plain(documents) == expected()


def store_by_url(folder: Path) -> Path:
    """As `fetch` leaves it: tars of images named by the SHA-256 of their URL, with their extension."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for k, url in enumerate(URLS):
            writers._add(archive, hashlib.sha256(url.encode()).hexdigest() + ".png", picture(k))
    return folder


def store_of_img2dataset(folder: Path, digits: int = 5) -> Path:
    """As img2dataset 1.47 leaves it, two images a shard; the third URL could not be loaded. digits: of the shard, by
    its option `oom_shard_count`."""
    folder.mkdir()
    for shard in range(2):
        rows = []
        with tarfile.open(folder / f"{shard:0{digits}d}.tar", "w") as archive:
            for k in range(2 * shard, 2 * shard + 2):
                key, there = f"{shard:0{digits}d}{k % 2:04d}", k != 2
                row = {
                    "url": URLS[k],
                    "caption": "theirs",
                    "key": key,
                    "status": "success" if there else "failed_to_dow",
                }
                rows.append(row)
                if there:
                    for suffix, data in (("png", picture(k)), ("txt", b"theirs"), ("json", json.dumps(row).encode())):
                        writers._add(archive, f"{key}.{suffix}", data)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{shard:0{digits}d}.parquet")
    return folder


def test_images_by_url(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["URL", "TEXT"], [[url, text] for url, text in zip(URLS, TEXTS, strict=True)])
    found, drops = documents_of(create("table", tmp_path / "a.csv", store_by_url(tmp_path / "store"), {}))
    assert plain(found) == expected()
    assert [document.metadata["id"] for document in found] == URLS  # LAION's column is in upper case
    assert not drops.bad_counts
    images = store_of_img2dataset(tmp_path / "images")
    rows = [plain_row for k, plain_row in enumerate(expected()) if k != 2]
    importer = create("table", tmp_path / "a.csv", images, {})
    (tmp_path / "work").mkdir()
    for prepared in (False, True):
        if prepared:
            importer.prepare(tmp_path / "work")
            assert {path.name for path in (tmp_path / "work").iterdir()} == {"images-in-archives", "keys-of-urls"}
        found, drops = documents_of(importer)
        assert [row for row in plain(found) if len(row) == 2] == rows
        assert drops.bad_counts == {"image: file missing": 1}
        assert drops.names["image: file missing"] == [
            f"a.csv@{(tmp_path / 'a.csv').read_bytes().index(b'https://x.org/2')}: {URLS[2]}"
        ]
    before = importer.signature()
    min(images.glob("*.parquet")).touch()  # which says what image is of a URL
    assert create("table", tmp_path / "a.csv", images, {}).signature() != before


def test_images_by_key(tmp_path: Path) -> None:
    """Also where pandas took the key for a number, and in a folder per shard."""
    images = store_of_img2dataset(tmp_path / "images")
    (tmp_path / "files/00000").mkdir(parents=True)
    (tmp_path / "files/00000/000000001.png").write_bytes(picture(1))
    for column in (pa.array(["000000001", "000010001"]), pa.array([1, 10001])):
        pq.write_table(pa.table({"key": column, "caption": ["b", "d"]}), tmp_path / "mine.parquet")
        found, _ = documents_of(create("table", tmp_path / "mine.parquet", images, {}))
        assert plain(found) == [[(picture(1), None, None), "b"], [(picture(3), None, None), "d"]]
        found, drops = documents_of(create("table", tmp_path / "mine.parquet", tmp_path / "files", {}))
        assert plain(found) == [[(picture(1), None, None), "b"], ["d"]]
        assert drops.bad_counts == {"image: file missing": 1}


@pytest.mark.parametrize("digits", [6, 8], ids=["6", "8, as DataComp's"])
def test_images_by_key_where_shards_have_more_digits(tmp_path: Path, digits: int) -> None:
    """In tars, and in a folder per shard, with img2dataset's tables and without them."""
    tars, folders = store_of_img2dataset(tmp_path / "tars", digits), tmp_path / "folders"
    keys, table = [f"{shard:0{digits}d}0001" for shard in (0, 1)], tmp_path / "mine.parquet"
    for key, k in zip(keys, (1, 3), strict=True):
        file = folders / key[:digits] / f"{key}.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(picture(k))
    for images in (tars, folders):
        for column in (pa.array(keys), pa.array([1, 10001])):
            pq.write_table(pa.table({"key": column, "caption": ["b", "d"]}), table)
            assert plain(documents_of(create("table", table, images, {}))[0]) == [
                [(picture(1), None, None), "b"],
                [(picture(3), None, None), "d"],
            ]
    for shard in tars.glob("*.parquet"):
        shard.rename(folders / shard.name)
    pq.write_table(pa.table({"url": [URLS[1], URLS[3]], "caption": ["b", "d"]}), table)
    found, _ = documents_of(create("table", table, folders, {}))
    assert [row[0][0] for row in plain(found)] == [picture(1), picture(3)]
    with tarfile.open(tars / "more.tar", "w") as archive:  # the shard in the key goes first, also in a number
        writers._add(archive, f"{keys[1]}.png", picture(0))
    pq.write_table(pa.table({"key": [10001], "caption": ["d"]}), table)
    assert plain(documents_of(create("table", table, tars, {}))[0]) == [[(picture(3), None, None), "d"]]


@pytest.mark.parametrize("digits", [5, 6])
def test_images_by_key_where_each_tar_has_a_table_and_keys_of_its_own(tmp_path: Path, digits: int) -> None:
    """The same in each tar: the table's name says which."""
    images, tables = tmp_path / "images", tmp_path / "tables"
    images.mkdir()
    tables.mkdir()
    for shard in range(3):
        with tarfile.open(images / f"{shard:0{digits}d}.tar", "w") as archive:
            writers._add(archive, f"{0:0{digits + 4}d}.png", picture(shard))
        keys = pa.table({"key": [f"{0:0{digits + 4}d}"], "caption": [str(shard)]})
        pq.write_table(keys, tables / f"{shard:0{digits}d}.parquet")
    found, _ = documents_of(create("table", tables, images, {}))
    assert plain(found) == [[(picture(shard), None, None), str(shard)] for shard in range(3)]


def test_urls_of_our_own_lines_and_of_mmc4(tmp_path: Path) -> None:
    store = store_by_url(tmp_path / "store")
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": [{"text": "a"}, {"image": URLS[1]}]}))
    assert documents_of(create("jsonl", tmp_path / "a.jsonl", store, {}))[0][0].images[0].data == picture(1)
    info = {"image_name": "b1c2.jpg", "raw_url": URLS[2], "matched_text_index": 0, "matched_sim": 0.5}
    (tmp_path / "docs_shard_0_v2.jsonl").write_text(json.dumps({"text_list": ["a"], "image_info": [info]}))
    found, _ = documents_of(create("mmc4", tmp_path / "docs_shard_0_v2.jsonl", store, {}))
    assert found[0].images[0].data == picture(2)


def test_quoted_fields_of_any_length_with_their_line_ends(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the limit of csv, which stays what it is; CRLF in quotes; in ranges and compressed. As pyarrow reads it."""
    texts = ["one\r\ntwo\r\n", "a, line\n" * 20_000, "cr\r\n\r\nlf\n", "last"]
    assert len(texts[1]) > csv.field_size_limit() == 131_072
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "path"], *([text, f"{k}.png"] for k, text in enumerate(texts))])
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    assert pa_csv.read_csv(
        tmp_path / "a.csv", parse_options=pa_csv.ParseOptions(newlines_in_values=True)
    )["text"].to_pylist() == texts  # fmt: skip
    for name, size in (("a.csv", 9), ("a.csv", 1 << 20), ("b.csv.gz", 9)):
        monkeypatch.setattr(lines, "RANGE", size)
        found, drops = documents_of(create("table", tmp_path / name, pictures, {}))
        assert plain(found) == expected(texts)
        assert not drops.bad_counts
    assert csv.field_size_limit() == 131_072


def test_a_quote_that_is_not_closed_is_not_one_bad_row(tmp_path: Path, pictures: Path) -> None:
    """It takes all that follows."""
    rows = [f"text {k},{k % 4}.png" for k in range(2_000)]
    rows[100] = '"text 100,0.png'
    (tmp_path / "a.csv").write_text("\n".join(["caption,image", *rows]))
    found, drops = documents_of(create("table", tmp_path / "a.csv", pictures, {}))
    assert len(found) == 100
    assert drops.bad_counts == {"document: another number of fields than columns": 1_900}
    with pytest.raises(UserError, match=r"1,900 of 2,000 documents are bad"):
        preprocess("table", tmp_path / "a.csv", tmp_path / "out", images=pictures, tokenizer=TOKENIZER)


def test_rows_that_are_bad(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 1 << 17)
    lines_ = [b"caption,image", b"a,0.png", b"", b"only one", b"b,1.png,more",
              b'"' + b"x" * 90_000, b"x" * 90_000, b"c,../x.png", b",2.png", b"caf\xe9,3.png", b"d,"]  # fmt: skip
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines_))
    found, drops = documents_of(create("table", tmp_path / "a.csv", pictures, {}))
    assert plain(found) == [[(picture(0), None, None), "a"], ["c"], [(picture(2), None, None), ""],
                            [(picture(3), None, None), "caf\ufffd"], ["d"]]  # fmt: skip
    assert [document.metadata["lost_images"] for document in found] == [0, 1, 0, 0, 1]
    assert drops.bad_counts == {
        "document: another number of fields than columns": 2,
        "document: a row that is no CSV": 2,
        "image: name leads outside the folder": 1,
        "image: no name": 1,
    }
    assert drops.left_out_counts == {"text: blank": 1}
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 1}


@pytest.mark.usefixtures("no_waiting_lines")
def test_a_table_without_the_columns_says_which_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_csv(tmp_path / "a.csv", ["foo", "bar baz"], [["x", "y"]])
    for options, message in (
        ({}, "has no column of texts; it has foo, 'bar baz': name it with --option text_column=NAME"),
        ({"text_column": "foo"}, "has no column of images; it has foo, 'bar baz': name it with --option image_column"),
        ({"text_column": "fou"}, "--option text_column=fou: .* has no such column; it has foo"),
        ({"join": "hash"}, "--option join=hash: give path, key, url"),
    ):
        with pytest.raises(UserError, match=message):
            create("table", tmp_path / "a.csv", None, options)
    assert main(["preprocess", "--format", "table", "--input", str(tmp_path / "a.csv"), "--output",
                 str(tmp_path / "out")]) == 2  # fmt: skip
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    write_csv(tmp_path / "b.csv", ["caption", "image"], [["x", "y"]])
    (tmp_path / "a.csv").rename(tmp_path / "c.csv")
    _, drops = documents_of(create("table", tmp_path, None, {}))
    assert drops.bad_counts["document: no columns caption and image; it has foo, 'bar baz'"] == 1


def test_two_workers_write_the_same_bytes(tmp_path: Path) -> None:
    images = store_of_img2dataset(tmp_path / "images")
    (tmp_path / "in").mkdir()
    for part in range(3):
        rows = [[url, f"{part} {text}"] for url, text in zip(URLS, TEXTS, strict=True)]
        write_csv(tmp_path / f"in/{part}.csv", ["url", "caption"], rows)
    for workers in (1, 2):
        preprocess("table", tmp_path / "in", tmp_path / str(workers), images=images, tokenizer=TOKENIZER,
                   workers=workers, task_bytes=1, max_bad_fraction=1)  # fmt: skip
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(open_corpus(tmp_path / "1")) == 12


def test_a_column_twice(tmp_path: Path, pictures: Path) -> None:
    """One that names the documents is not read, as nothing says which is meant."""
    columns = {"path": [f"{k}.png" for k in range(4)], "caption": TEXTS, "id": list("abcd")}
    data = pa.Table.from_arrays([*map(pa.array, columns.values()), pa.array(range(4))], [*columns, "id"])
    pq.write_table(data, tmp_path / "a.parquet")
    found, drops = documents_of(create("table", tmp_path / "a.parquet", pictures, {}))
    assert plain(found) == expected()
    assert "id" not in found[0].metadata
    assert not drops.bad_counts


def test_a_text_that_is_not_utf8(tmp_path: Path, pictures: Path) -> None:
    """Be the column of strings or, as this one, of JSON."""
    raw = undecoded([b"plain", b"caf\xe9", b"two\nlines", b"last"])
    texts = pa.ExtensionArray.from_storage(pa.json_(), raw)
    pq.write_table(pa.table({"path": [f"{k}.png" for k in range(4)], "caption": texts}), tmp_path / "a.parquet")
    found, drops = documents_of(create("table", tmp_path / "a.parquet", pictures, {"text_column": "caption"}))
    assert plain(found) == expected(["plain", "caf\ufffd", "two\nlines", "last"])
    assert not drops.bad_counts
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 1}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
@pytest.mark.parametrize("charset", ["gb18030", "cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
def test_charsets(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, charset: str, suffix: str) -> None:
    """Of CSV, TSV and compressed files; in ranges, where the charset has ASCII's line ends."""
    texts = ["plain", "Größe" if charset == "cp1252" else "朱镕基", "é, é", "last"]
    mark, quote = (",", '"') if "csv" in suffix else ("\t", "")
    rows = [("path", "caption"), *((f"{k}.png", f"{quote}{text}{quote}") for k, text in enumerate(texts))]
    raw = "\r\n".join(map(mark.join, rows)).encode(charset)
    (tmp_path / f"a.{suffix}").write_bytes(gzip.compress(raw) if suffix == "csv.gz" else raw)
    for size in (1, 1 << 20):
        monkeypatch.setattr(lines, "RANGE", size)
        importer = create("table", tmp_path / f"a.{suffix}", pictures, {"encoding": charset})
        found, drops = documents_of(importer)
        assert plain(found) == expected(texts)
        assert not drops.bad_counts
        assert not drops.noted_counts
    if charset == "utf-16" and suffix != "csv.gz":  # is known by its mark
        marked = create("table", tmp_path / f"a.{suffix}", pictures, {})
        assert plain(documents_of(marked)[0]) == expected(texts)
        assert marked.rules == 6


def test_bytes_that_are_not_in_the_charset(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,caption\n0.png,\xc4\xff\n1.png,b\n")
    found, drops = documents_of(create("table", tmp_path / "a.csv", pictures, {"encoding": "GBK"}))
    assert plain(found) == expected(["\ufffd\ufffd", "b"])
    assert drops.noted_counts == {"document: invalid gbk replaced": 1}
    (tmp_path / "b.csv").write_bytes("path,caption\n0.png,a\n".encode("utf-16") + b"x")
    assert documents_of(create("table", tmp_path / "b.csv", pictures, {}))[1].noted_counts == {
        "document: invalid UTF-16 replaced": 1
    }
    (tmp_path / "c.csv").write_bytes("标题,图\n".encode("gbk"))
    with pytest.raises(UserError, match=r"it has .*which is not utf-8: name its charset with --option encoding=NAME"):
        create("table", tmp_path / "c.csv", pictures, {})


@pytest.mark.parametrize("charset", ["klingon", "rot13", "undefined", "idna", "punycode", "a\0b"])
def test_a_charset_that_is_none(tmp_path: Path, charset: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"path,caption\n")
    with pytest.raises(UserError, match=r"--option encoding=.*: Python knows no such charset; give one such as utf-8"):
        create("table", tmp_path / "a.csv", None, {"encoding": charset})


def test_many_replaced_bytes_are_worth_a_warning(tmp_path: Path, pictures: Path) -> None:
    for number, warned in ((3, False), (4, True)):
        rows = [f"{k % 4}.png,{'Größe' if k < number else 'plain'} {k}" for k in range(9)]
        (tmp_path / f"{number}.csv").write_bytes("\n".join(["path,caption", *rows]).encode("cp1252"))
        summary = preprocess("table", tmp_path / f"{number}.csv", tmp_path / f"out-{number}", images=pictures,
                             tokenizer=TOKENIZER)  # fmt: skip
        assert ("--option encoding=NAME" in str(summary)) == warned
        assert f"noted  {number}  document: invalid UTF-8 replaced" in str(summary)


def test_images_in_the_rows_are_for_another_format(tmp_path: Path, pictures: Path) -> None:
    rows = {"caption": TEXTS[:2]}
    for images in (
        [None, picture(1)],
        [{"bytes": picture(0), "path": None}] * 2,
        [[{"bytes": picture(0), "path": None}]] * 2,
    ):
        pq.write_table(pa.table({"image": images, **rows}), tmp_path / "a.parquet")
        with pytest.raises(UserError, match=r"column image holds images.* --format hf --option image_column=image"):
            create("table", tmp_path / "a.parquet", None, {})
    pq.write_table(pa.table({"image": [picture(0), picture(1)], **rows}), tmp_path / "a.parquet")
    found, _ = documents_of(create("hf", tmp_path / "a.parquet", None, {"image_column": "image"}))  # as it says
    assert plain(found) == expected(TEXTS[:2])
    pq.write_table(pa.table({"image": [b"0.png", b"1.png"], **rows}), tmp_path / "a.parquet")  # as Spark writes strings
    assert plain(documents_of(create("table", tmp_path / "a.parquet", pictures, {}))[0]) == expected(TEXTS[:2])
