"""Protects the reading of Hugging Face data sets: the streams of `save_to_disk`, and parquet with Image features.

The library itself reads what stands here (and wrote what the tests were compared with); it need not be installed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.helpers import TOKENIZER, documents_of, plain, undecoded
from data.writers import picture

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
VALUE, PICTURE = {"dtype": "string", "_type": "Value"}, {"_type": "Image"}


def table(columns: dict[str, tuple[pa.DataType, dict[str, Any]]], rows: Sequence[Sequence[Any]]) -> pa.Table:
    """With the metadata that `datasets` writes."""
    features = {name: feature for name, (_, feature) in columns.items()}
    schema = pa.schema(
        [(name, kind) for name, (kind, _) in columns.items()],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows], schema)


def save_to_disk(data: pa.Table, folder: Path, num_shards: int = 2, batch: int = 3) -> None:
    folder.mkdir(parents=True)
    names = [f"data-{k:05d}-of-{num_shards:05d}.arrow" for k in range(num_shards)]
    step = -(-len(data) // num_shards)
    for k, name in enumerate(names):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, data.schema) as writer:
            writer.write_table(data.slice(k * step, step), max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def image(k: int) -> dict[str, Any]:
    return {"bytes": picture(k), "path": f"{k}.png"}


PAIRS = table({"image": (IMAGE, PICTURE), "caption": (pa.string(), VALUE)}, [(image(k), f"text {k}") for k in range(7)])
EXPECTED = [[(picture(k), None, None), f"text {k}"] for k in range(7)]


def read(folder: Path, **options: str) -> list[list[object]]:
    found, drops = documents_of(create("hf", folder, None, options))
    assert not drops.bad_counts
    return plain(found)


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    save_to_disk(PAIRS, tmp_path / "one")
    (tmp_path / "one/cache-0123.arrow").write_bytes(b"of map")
    assert read(tmp_path / "one") == EXPECTED
    summary = preprocess("hf", tmp_path / "one", tmp_path / "out", tokenizer=TOKENIZER)
    corpus = open_corpus(tmp_path / "out")
    assert plain(list(corpus)) == EXPECTED
    assert corpus.kinds == ("pairs",)
    assert corpus.name(4) == "data-00001-of-00002.arrow:0"
    assert summary.drops.left_out_counts == {
        "document: file that is not of the data set: state.json does not list it": 1
    }


def test_splits(tmp_path: Path) -> None:
    save_to_disk(PAIRS, tmp_path / "d/train")
    save_to_disk(PAIRS.slice(5), tmp_path / "d/test", 1)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "p/data").mkdir(parents=True)
    pq.write_table(PAIRS, tmp_path / "p/data/train-00000-of-00001-0123abcd.parquet", row_group_size=2)
    pq.write_table(PAIRS.slice(5), tmp_path / "p/data/test-00000-of-00001.parquet")
    for folder in (tmp_path / "d", tmp_path / "p"):
        with pytest.raises(UserError, match=r"has several splits, 'test' and 'train': name one with --option split="):
            create("hf", folder, None, {})
        with pytest.raises(UserError, match=r"--option split=dev: .* has test, train"):
            create("hf", folder, None, {"split": "dev"})
        assert read(folder, split="train") == EXPECTED
        assert read(folder, split="test") == EXPECTED[5:]
        assert len(read(folder, split="all")) == 9


README = """---
license: mit
configs:
- config_name: default
  data_files:
  - {split: test, path: [d/b.parquet, "e/**/test*"]}
  - {split: train, path: "d/*"}
- {config_name: same, data_files: "d/[ct]*"}
- {config_name: none, data_files: "none/*"}
---
test-*: none
"""


@pytest.mark.parametrize(
    ("files", "split"),
    [
        ({"train.parquet": "train", "test.parquet": "test"}, "train"),
        ({"my_train_file.parquet": "train", "b/Test 01.parquet": "Test"}, "train"),
        ({"training1.parquet": "training", "dev.parquet": "dev", "eval-2.parquet": "eval"}, "training"),
        ({"train/part-00000-of-00002.parquet": "train", "test/part-00000-of-00002.parquet": "test"}, "test"),
        ({"x/train/a.parquet": "train", "x/fine-val/deep/a.parquet": "val"}, "val"),
        ({"data/train_sft-00000-of-00001.parquet": "train_sft", "data/train_gen-00000-of-00001.parquet": "train_gen"},
         "train_gen"),
        ({"test-en-00000-of-00001.parquet": "test", "train-en-00000-of-00001.parquet": "train"}, "train"),
        ({"new/train-00000-of-00001.parquet": "train", "new/odd-00000-of-00001.parquet": "odd"}, "train"),
        ({"d/train.parquet": "train", "d/b.parquet": "test", "e/f/test.parquet": "test", "README.md": README}, "train"),
        ({"d/test.parquet": "train", "d/contest.parquet": "train", "README.md": README}, ""),
        ({"train.parquet": "train", "test.parquet": "test", "README.md": "---\nconfigs: [1, data_files]\n---"}, "test"),
        ({"contest.parquet": "", "README.md": "---" + "\n" * 1_000_000}, ""),
        ({"contest.parquet": "", "latest/a.parquet": "", "b.parquet": "", "README.md": "---\n: [\n---\n"}, ""),
    ],
)  # fmt: skip
def test_which_split_a_file_belongs_to(tmp_path: Path, files: dict[str, str], split: str) -> None:
    """As `datasets` tells it: by the card, by the file's name, by its folders'; a word within another is none."""
    splits = {name: its for name, its in files.items() if name != "README.md"}
    for k, name in enumerate(splits):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        pq.write_table(PAIRS.slice(k, 1), tmp_path / name)
    if len(splits) < len(files):
        (tmp_path / "README.md").write_text(files["README.md"])
    if len(names := sorted(set(splits.values()))) > 1:
        with pytest.raises(UserError, match=f"{' and '.join(map(repr, names))}: name one with --option split="):
            create("hf", tmp_path, None, {})
    expected = [row for row, its in zip(EXPECTED, splits.values(), strict=False) if not split or its == split]
    assert sorted(read(tmp_path, split=split), key=lambda row: str(row[1])) == expected


def test_configs_that_have_a_split_each(tmp_path: Path) -> None:
    """No data set is two of them: the small one, as they are published, may hold rows of the other."""
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: full\n"
        "  data_files: [{split: train, path: data/train-*}, {split: test, path: x/*}]\n"
        "- config_name: mini\n  data_files: [{split: train, path: [mini/train-*, data/train-1*]}]\n---\n"
    )
    for k, name in enumerate(("data/train-0", "data/train-1", "mini/train-0", "x/test", "more/train")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(PAIRS.slice(k, 1), tmp_path / f"{name}.parquet")
    several = "several splits, 'full/test' and 'full/train' and 'mini/train' and 'train': name one with --option split="
    with pytest.raises(UserError, match=several):
        create("hf", tmp_path, None, {})
    for split, rows in (("full/train", [0, 1]), ("mini/train", [1, 2]), ("full/test", [3]), ("train", [4])):
        assert read(tmp_path, split=split) == [EXPECTED[k] for k in rows]
    assert len(read(tmp_path, split="all")) == 5
    with pytest.raises(UserError, match=r"split=test: .* has full/test, full/train, mini/train, train"):
        create("hf", tmp_path, None, {"split": "test"})
    importer = create("hf", tmp_path, None, {"split": "mini/train"})
    assert documents_of(importer)[1].left_out_counts == {"document: file that is of another split": 3}


def test_splits_saved_one_by_one(tmp_path: Path) -> None:
    for name in ("train", "test"):
        save_to_disk(PAIRS, tmp_path / name)
    with pytest.raises(UserError, match="several splits, 'test' and 'train'"):
        create("hf", tmp_path, None, {})
    assert read(tmp_path, split="test") == EXPECTED


def test_lists_of_images_and_of_texts(tmp_path: Path) -> None:
    several = {"feature": PICTURE, "_type": "List"}
    columns = {"images": (pa.list_(IMAGE), several), "texts": (pa.list_(pa.string()), [VALUE])}
    rows = [([None, image(0), None, image(1)], ["a", None, "b", None]), ([image(2)], [None])]
    pq.write_table(table(columns, rows), tmp_path / "lists.parquet")
    importer = create("hf", tmp_path / "lists.parquet", None, {})
    assert importer.kind == "natural"
    assert plain(documents_of(importer)[0]) == plain(
        [Document((Text("a"), Image(picture(0)), Text("b"), Image(picture(1)))), Document((Image(picture(2)),))]
    )
    columns = {"images": (pa.list_(IMAGE), several), "text": (pa.string(), VALUE)}
    pq.write_table(table(columns, [([image(0), image(1)], "a")]), tmp_path / "before.parquet")
    assert read(tmp_path / "before.parquet") == plain([Document((Image(picture(0)), Image(picture(1)), Text("a")))])


def test_captions_of_one_image_are_held_out_together(tmp_path: Path) -> None:
    columns = {"image": (IMAGE, PICTURE), "sentences": (pa.list_(pa.string()), [VALUE]), "id": (pa.int64(), VALUE)}
    pq.write_table(table(columns, [(image(0), ["a", "b"], 17), (image(1), ["c"], 18)]), tmp_path / "a.parquet")
    found, _ = documents_of(create("hf", tmp_path, None, {}))
    assert plain(found) == [[(picture(k), None, None), text] for k, text in ((0, "a"), (0, "b"), (1, "c"))]
    assert [d.metadata.get("group") for d in found] == ["a.parquet:0", "a.parquet:0", None]
    assert found[1].source == "a.parquet:0#1 17"


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    kinds = {"a": (IMAGE, PICTURE), "b": (IMAGE, PICTURE), "x": (pa.string(), VALUE), "y": (pa.string(), VALUE)}
    kinds["sound"] = (IMAGE, {"_type": "Audio"})
    data = table(kinds, [(image(0), image(1), "s", "t", image(2))])
    pq.write_table(data, tmp_path / "a.parquet")
    for options, message in (
        ({}, "several columns of images; it has a, b, x, y, sound: name one with --option image_column=NAME"),
        (
            {"image_column": "a"},
            "several columns of texts; it has a, b, x, y, sound: name one with --option text_column=NAME",
        ),
        ({"image_column": "c"}, "--option image_column=c: .* has no such column; it has a, b, x, y, sound"),
    ):
        with pytest.raises(UserError, match=message):
            create("hf", tmp_path, None, options)
    assert read(tmp_path, image_column="b", text_column="y") == [[(picture(1), None, None), "t"]]
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of images; it has url"):
        create("hf", tmp_path, None, {})


CHAT = pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))


def test_the_only_column_of_strings_is_no_text_where_there_are_chats(tmp_path: Path) -> None:
    """The only one of strings is `source` in FineVision, `id` in LLaVA, whose texts are in lists of structs."""
    chat = pa.array([[{"user": "q", "assistant": "a"}]], CHAT)
    fine_vision = {"images": pa.array([[image(0)]], pa.list_(IMAGE)), "texts": chat, "source": ["chartqa"]}
    llava = {"id": ["1"], "image": pa.array([image(0)], IMAGE), "conversations": chat}
    for data, columns in ((fine_vision, "images, texts, source"), (llava, "id, image, conversations")):
        pq.write_table(pa.table(data), tmp_path / "a.parquet")
        message = f"no column of texts by a known name; it has {columns}: name one with --option text_column=NAME"
        with pytest.raises(UserError, match=message):
            create("hf", tmp_path, None, {})
    with pytest.raises(UserError, match=r"column conversations holds list<.*, no texts; write one to a column of its"):
        create("hf", tmp_path, None, {"text_column": "conversations"})
    assert read(tmp_path, text_column="id") == [[(picture(0), None, None), "1"]]
    named_else = {"image": pa.array([image(0)], IMAGE), "label": ["a"], "conversations": chat}
    pq.write_table(pa.table(named_else), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column of texts by a known name; it has image, label, conversations"):
        create("hf", tmp_path, None, {})


@pytest.mark.parametrize("name", ["utterance", "bildtext", "id", "Source", "file_name"])
def test_the_only_column_of_strings(tmp_path: Path, name: str) -> None:
    """It is the text, as it was in earlier releases, whose recipes said no name; but not by a name of ids and places.
    Lists of structs without strings, and lists of images, are no chats."""
    boxes = pa.array([[{"x": 1, "y": 2}]], pa.list_(pa.struct([("x", pa.int64()), ("y", pa.int64())])))
    more = pa.array([[image(1)]], pa.list_(IMAGE))
    data = {"image": pa.array([image(0)], IMAGE), name: ["some"], "boxes": boxes, "more": more, "year": [1]}
    pq.write_table(pa.table({**data, "split": pa.array(["a"]).dictionary_encode()}), tmp_path / "a.parquet")
    if name in ("utterance", "bildtext"):
        assert read(tmp_path, image_column="image") == [[(picture(0), None, None), "some"]]
        importer = create("hf", tmp_path, None, {"image_column": "image"})
        assert (importer.rules, importer.chosen) == (2, f"images of column image, texts of column {name}")
        pq.write_table(pa.table(data).drop_columns(["more"]), tmp_path / "a.parquet")
        assert read(tmp_path) == [[(picture(0), None, None), "some"]]
    else:
        with pytest.raises(UserError, match="name one with --option text_column=NAME"):
            create("hf", tmp_path, None, {"image_column": "image"})
        assert read(tmp_path, image_column="image", text_column=name) == [[(picture(0), None, None), "some"]]


def test_columns_that_hold_no_texts_are_refused(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([image(0)], IMAGE),
        "text": ["a"],
        "number": [1],
        "chat": pa.array([[{"user": "q", "assistant": "a"}]], CHAT),
        "numbers": [[1.5]],
        "nothing": pa.nulls(1),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("image", "number", "chat", "numbers"):
        for options in ({"captions": f"text,{name}"}, {"text_column": name, "image_column": "image"}):
            with pytest.raises(UserError, match=f"column {name} holds .*, no texts; write one to a column of its own"):
                create("hf", tmp_path, None, options)
    assert read(tmp_path, captions="nothing") == [[(picture(0), None, None), "a"]]
    chosen = create("hf", tmp_path, None, {"captions": "text,nothing"}).chosen
    assert chosen == "images of column image, texts of column text, captions of text, nothing, too"


def test_captions_that_are_not_utf8(tmp_path: Path) -> None:
    """Bytes, or strings that are none, are decoded as texts are."""
    raw = [b"plain", b"caf\xe9"]
    for more in (pa.array(raw), pa.array(raw).view(pa.string()), pa.array([[text] for text in raw])):
        data = pa.table({"image": pa.array([image(0), image(1)], IMAGE), "text": ["a", "b"], "more": more})
        pq.write_table(data, tmp_path / "a.parquet")
        found, drops = documents_of(create("hf", tmp_path, None, {"captions": "more"}))
        assert plain(found) == [[(picture(0), None, None), "a", "plain"], [(picture(1), None, None), "b", "caf\ufffd"]]
        assert (drops.bad_counts, drops.noted_counts) == ({}, {"document: invalid UTF-8 replaced": 1})


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_texts_in_a_dictionary_or_a_view(tmp_path: Path, kind: str) -> None:
    """As Arrow's writers may have them, also around or in lists; and not another column of strings."""
    texts = ["x", "y" * 30, "x"]
    columns = {
        "dictionary": pa.array(texts).dictionary_encode(),
        "view": pa.array(texts, pa.string_view()),
        "dictionary of large strings": pa.array(texts, pa.large_string()).dictionary_encode(),
        "plain": pa.array(texts),
    }
    columns["list of a dictionary"] = pa.ListArray.from_arrays([0, 1, 2, 3], columns["dictionary"])
    for name, column in columns.items():
        data = pa.table({"image": pa.array([image(k) for k in range(3)], IMAGE), "text": column, "caption": ["c"] * 3})
        if kind == "parquet":
            pq.write_table(data, tmp_path / "a.parquet")
        else:
            with pa.ipc.new_stream(str(tmp_path / "a.arrow"), data.schema) as stream:
                stream.write_table(data)
        importer = create("hf", tmp_path, None, {})
        found, drops = documents_of(importer)
        assert plain(found) == [[(picture(k), None, None), text] for k, text in enumerate(texts)], name
        assert not drops.bad_counts
        assert importer.rules == 2 + (name != "plain")
        assert create("hf", tmp_path, None, {"text_column": "text"}).rules == 2


def test_a_view_that_is_not_utf8(tmp_path: Path) -> None:
    """It is no damage of its batch."""
    texts = pa.array([b"plain", b"caf\xe9"], pa.binary_view()).view(pa.string_view())
    data = pa.table({"image": pa.array([image(0), image(1)], IMAGE), "text": texts})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), data.schema) as stream:
        stream.write_table(data)
    found, drops = documents_of(create("hf", tmp_path, None, {}))
    assert [document.texts[0].text for document in found] == ["plain", "caf\ufffd"]
    assert not drops.bad_counts


def test_a_file_that_is_no_table_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "llava.json").write_text("[]")
    with pytest.raises(UserError, match=r"llava\.json is neither parquet nor an Arrow file\. The format reads: "):
        create("hf", tmp_path / "llava.json", None, {})


@pytest.mark.parametrize("given", ["images", "link", "."])
def test_paths_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """As the library stores the files of a folder: below --images their folders count, elsewhere the name alone."""
    (tmp_path / "images/cats").mkdir(parents=True)
    (tmp_path / "link").symlink_to("images")
    for name, k in (("cats/1.png", 1), ("2.png", 2), ("3.png", 3)):
        (tmp_path / "images" / name).write_bytes(picture(k))
    folder = tmp_path / ("link" if given == "link" else "images")
    paths = [f"{folder}/cats/1.png", "/other/2.png", f"{folder}/../3.png", "/other/cats/1.png"]
    rows = [({"bytes": None, "path": path}, path) for path in paths]
    data = table({"image": (IMAGE, PICTURE), "text": (pa.string(), VALUE)}, rows)
    pq.write_table(data, tmp_path / "a.parquet")
    monkeypatch.chdir(tmp_path / "images" if given == "." else tmp_path)
    importer = create("hf", tmp_path / "a.parquet", folder if given == "link" else given, {})
    found, drops = documents_of(importer)
    assert [[i.data for i in d.images] for d in found] == [[picture(1)], [picture(2)], [], []]
    assert drops.bad_counts == {"image: name leads outside the folder": 1, "image: file missing": 1}
    assert [create("hf", tmp_path / "a.parquet", images, {}).rules for images in (None, ".")] == [2, 4]


def test_what_is_bad(tmp_path: Path) -> None:
    rows = [({"bytes": None, "path": "dir/3.png"}, "found"), ({"bytes": None, "path": "4.png"}, "lost"), (None, "none"),
            (image(0), None)]  # fmt: skip
    data = table({"image": (IMAGE, PICTURE), "text": (pa.string(), VALUE)}, rows)
    save_to_disk(data, tmp_path / "in/a", 1)
    save_to_disk(data, tmp_path / "in/b", 1, batch=1)
    (cut,) = (tmp_path / "in/b").glob("*.arrow")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    save_to_disk(pa.table({"image": ["x"]}), tmp_path / "in/c", 1)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/3.png").write_bytes(picture(3))
    found, drops = documents_of(create("hf", tmp_path / "in", tmp_path / "images", {}))
    assert plain(found)[0] == [(picture(3), None, None), "found"]
    assert [d.texts[0].text for d in found[:3]] == ["found", "lost", "none"]
    assert [d.metadata["lost_images"] for d in found[:4]] == [0, 1, 1, 0]
    bad = drops.bad_counts
    assert bad["document: damaged or truncated Arrow file, the rows after it are lost"] == 1
    assert bad["document: no column text; it has image"] == 1
    assert bad["image: neither bytes nor path"] >= 1
    assert bad["image: file missing"] >= 1
    state = tmp_path / "in/a/state.json"
    for content, message in ((b"{", "damaged"), (b'{"_data_files": [{"filename": "gone.arrow"}]}', "gone.arrow is mis"),
                             (b'{"_data_files": [], "_indices_data_files": [1]}', "save it anew")):  # fmt: skip
        state.write_bytes(content)
        with pytest.raises(UserError, match=message):
            create("hf", tmp_path / "in", None, {})


def test_a_column_name_that_is_not_utf8(tmp_path: Path) -> None:
    """Such a file is a damaged one, be it the first."""
    save_to_disk(PAIRS, tmp_path / "in")
    first = min((tmp_path / "in").glob("*.arrow"))
    raw = first.read_bytes()
    at = raw.rindex(b"caption", 0, raw.index(b"text 0"))  # behind the metadata, which name it too
    first.write_bytes(raw[:at] + b"\xe3" + raw[at + 1 :])
    found, drops = documents_of(create("hf", tmp_path / "in", None, {}))
    assert plain(found) == EXPECTED[4:]
    assert drops.bad_counts == {"document: damaged or truncated Arrow file, the rows after it are lost": 1}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_path_that_is_not_utf8(tmp_path: Path, kind: str) -> None:
    """It costs its own image at most, and none whose bytes are there."""
    text = undecoded([f"{k}.png".encode() if k % 6 != 2 else b"\xff.png" for k in range(12)])
    images = pa.StructArray.from_arrays([pa.array([picture(k) if k < 6 else None for k in range(12)]), text],
                                        fields=list(IMAGE))  # fmt: skip
    data = pa.table({"image": images, "id": text, "text": [f"text {k}" for k in range(12)]})
    if kind == "parquet":
        pq.write_table(data, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_stream(str(tmp_path / "a.arrow"), data.schema) as stream:
            stream.write_table(data)
    (tmp_path / "images").mkdir()
    for k in range(12):
        (tmp_path / f"images/{k}.png").write_bytes(picture(k))
    found, drops = documents_of(create("hf", tmp_path / f"a.{kind}", tmp_path / "images", {}))
    expected = [[(picture(k), None, None), f"text {k}"] for k in range(12)]
    del expected[8][0]
    assert plain(found) == expected
    assert [d.metadata.get("id") for d in found] == [f"{k}.png" if k % 6 != 2 else "\ufffd.png" for k in range(12)]
    assert drops.bad_counts == {"image: file missing": 1}
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 4}  # two paths, two ids


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("of", ["string", "large", "JSON", "dictionary", "runs", "list", "large list", "fixed list"])
def test_ids_of_an_arrow_file_that_are_not_utf8(tmp_path: Path, of: str, wrong: bool) -> None:
    """No row is lost, whatever type the column has; where its offsets lead outside, all rows of its batch are."""
    offsets, characters = [0, 1, 99 if wrong else 2, 3], pa.py_buffer(b"a\xffc")
    text = pa.StringArray.from_buffers(3, pa.array(offsets, pa.int32()).buffers()[1], characters)
    large = pa.LargeStringArray.from_buffers(3, pa.array(offsets, pa.int64()).buffers()[1], characters)
    runs, each = pa.run_end_encoded(pa.int32(), pa.string()), pa.array([1, 2, 3], pa.int32())
    ids = {
        "string": lambda: text,
        "large": lambda: large,
        "JSON": lambda: pa.ExtensionArray.from_storage(pa.json_(), text),
        "dictionary": lambda: pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), text),
        "runs": lambda: pa.Array.from_buffers(runs, 3, [None], children=[each, text]),
        "list": lambda: pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), text),
        "large list": lambda: pa.LargeListArray.from_arrays(pa.array([0, 1, 2, 3]), large),
        "fixed list": lambda: pa.FixedSizeListArray.from_arrays(text, 1),
    }[of]()
    data = pa.table({"image": pa.array([image(0)] * 3, IMAGE), "id": ids, "text": list("abc")})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), data.schema) as stream:
        for _ in range(1 + wrong):
            stream.write_table(data)
    found, drops = documents_of(create("hf", tmp_path / "a.arrow", None, {}))
    assert len(found) == (0 if wrong else 3)
    assert drops.bad_counts == ({"document: lost in a damaged Arrow file": 6} if wrong else {})
    assert drops.names.get("document: lost in a damaged Arrow file") == (["a.arrow:0", "a.arrow:3"] if wrong else None)
    if not wrong and "list" not in of:
        assert [d.metadata["id"] for d in found] == ["a", "\ufffd", "c"]
