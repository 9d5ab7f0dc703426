"""Protects docs/corpus-format.md: what it says of hashes and versions, done by its words and without our functions."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import xxhash
from data import writers
from data.corpus.conftest import DOCUMENTS
from data.helpers import TOKENIZER
from data.writers import picture
from pyarrow import parquet

from megatron_lcl.curate import run as curate
from megatron_lcl.curate.duplicates.settings import EVALUATION_RULES
from megatron_lcl.curate.settings import read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare import importers
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess

PAGE = (Path(__file__).parents[2] / "docs/corpus-format.md").read_text("utf-8")


def xxh3(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def of_sentencepiece(folder: Path) -> str:
    return "sentencepiece-" + xxh3((folder / "tokenizer.model").read_bytes())


def of_clip(folder: Path) -> str:
    return "clip-" + xxh3("\n".join(json.loads((folder / "tokenizer.json").read_text())["merges"]).encode())


def of_tokenizer_json(folder: Path) -> str:
    return "tokenizers-" + xxh3((folder / "tokenizer.json").read_bytes())


def byte_level(folder: Path) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = Tokenizer(models.BPE({c: k for k, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(folder / "given.json"))
    return folder / "given.json"


@pytest.mark.parametrize("fingerprint", [of_sentencepiece, of_clip, of_tokenizer_json])
def test_contents_and_fingerprint(tmp_path: Path, fingerprint: Callable[[Path], str]) -> None:
    """Of two shards, one of which says no kind, as those of earlier releases do."""
    writers.write_jsonl(DOCUMENTS, tmp_path / "in")
    tokenizer = (
        TOKENIZER if fingerprint is of_sentencepiece else "clip" if fingerprint is of_clip else byte_level(tmp_path)
    )
    preprocess("jsonl", tmp_path / "in", tmp_path / "corpus", tokenizer=tokenizer)
    old = json.loads((tmp_path / "corpus/corpus.json").read_text())
    for key in ("contents", "kind"):
        (old if key == "contents" else old["shards"][0]).pop(key)
    (tmp_path / "corpus/corpus.json").write_text(json.dumps(old))
    preprocess("jsonl", tmp_path / "in", tmp_path / "new", tokenizer=tokenizer)
    merge([tmp_path / "new", tmp_path / "corpus"], folder := tmp_path / "merged")
    for made, number in ((tmp_path / "new", 1), (folder, 2)):
        manifest = json.loads((made / "corpus.json").read_text())
        assert manifest["tokenizer"]["fingerprint"] == fingerprint(made)
        assert len(manifest["shards"]) == number
        text = f'["{fingerprint(made)}"'
        for k, shard in enumerate(manifest["shards"]):
            names = [f"tokens-{k:05d}.bin", f"tokens-{k:05d}.idx", f"images-{k:05d}.bin", f"images-{k:05d}.idx"]
            hashes = [xxh3((made / name).read_bytes()) for name in (*names, f"images-{k:05d}.arrow")]
            kind = f'"{shard["kind"]}"' if "kind" in shard else "null"
            text += ", [" + ", ".join([kind, *(f'"{digest}"' for digest in hashes)]) + "]"
        assert manifest["contents"] == xxh3((text + "]").encode())


DECODED = "`curate` with `duplicates.images.action`, evaluation sets or rules that ask a model"
COUNTED_OR_COMPARED = (
    "`curate` with `min_words`, `max_words` or `min_plain_words`, or with `duplicates.documents.action` and a "
    "threshold that is not null"
)
COMPARED = "`curate` with `duplicates.documents.action` and a threshold that is not null"
IMAGES_IN_TARS = (
    "`table`, and formats not named here that look for images by name, with images in tars or `*.images.parquet`"
)
NOT_SEPARATED = "with a tokenizer that does not separate texts itself"


@pytest.fixture
def rules(tmp_path: Path) -> Callable[[str, bool], int]:
    """rules(format, otherwise): of a small input; otherwise with compressed tars, or with images in a tar."""
    for folder in ("images", "files", "hf", "plain", "compressed"):
        (tmp_path / folder).mkdir()
    for name, mode in (("images/a.tar", "w:"), ("plain/a.tar", "w:"), ("compressed/a.tar.gz", "w:gz")):
        tarfile.open(tmp_path / name, mode).close()  # type: ignore[call-overload]
    for name, content in {
        "a.jsonl": "",
        "docs_shard_0_v2.jsonl": "",
        "a.csv": "caption,path\n",
        "a.json": json.dumps({"images": [], "annotations": []}),
    }.items():
        (tmp_path / "files" / name).write_text(content)
    image = {"bytes": b"", "path": "a.png"}
    parquet.write_table(pa.table({"image": [image], "text": ["text"]}), tmp_path / "hf/a.parquet")
    writers.write_parquet([Document((Text("text"), Image(picture(0))))], tmp_path / "rows", tmp_path / "none", False)
    folders = {"hf": "hf", "obelics": "rows", "omnicorpus": "rows"}

    def found(format: str, otherwise: bool) -> int:
        if format in ("html", "markdown", "epub", "nemo"):
            return importers.importer_class(format).rules
        if format in ("webdataset", "mint1t"):
            return importers.create(format, tmp_path / ("compressed" if otherwise else "plain"), None, {}).rules
        images = tmp_path / "images" if otherwise else None
        return importers.create(format, tmp_path / folders.get(format, "files"), images, {}).rules

    return found


def _rules_of_curate(overrides: dict[str, str]) -> int:
    return curate._rules_version(read_settings(overrides=overrides))


def test_versions_of_rules(rules: Callable[[str, bool], int], tmp_path: Path) -> None:
    """Every row of the table, and every format that is not in it."""
    section = PAGE.split("### Versions of the import rules")[1].split("\n## ")[0]
    table = dict(re.findall(r"^\| (.+?) \| ((?:\+ )?\d+) \|$", section, re.M))
    first = {format: rules(format, False) for format in importers.formats()}
    by_version: dict[int, list[str]] = {}
    for format, version in sorted(first.items()):
        by_version.setdefault(version, []).append(format)
    expected = {
        ", ".join(f"`{f}`" for f in found): str(version) for version, found in by_version.items() if version > 1
    }
    more = {format: rules(format, True) - version for format, version in first.items()}
    assert {format: number for format, number in more.items() if number} == dict.fromkeys(
        ("coco", "hf", "jsonl", "mint1t", "mmc4", "obelics", "omnicorpus", "table", "webdataset"), 1
    ) | {"hf": 2}
    separating = sorted(format for format in importers.formats() if importers.importer_class(format).separator)
    pairs = sorted(f"`{format}`" for format in importers.formats() if importers.importer_class(format).kind == "pairs")
    (tmp_path / "marked.csv").write_bytes("path,text\n".encode("utf-16"))
    marked = importers.create("table", tmp_path / "marked.csv", None, {}).rules - first["table"]
    (tmp_path / "below/own").mkdir(parents=True)
    (tmp_path / "below/own/a.csv").write_text("path,text\n")
    below = importers.create("table", tmp_path / "below", None, {}).rules - first["table"]
    encoded = {"image": [{"bytes": b"", "path": "a.png"}], "text": pa.array(["text"]).dictionary_encode()}
    parquet.write_table(pa.table(encoded), tmp_path / "encoded.parquet")
    by_dictionary = importers.create("hf", tmp_path / "encoded.parquet", None, {}).rules - first["hf"]
    (tmp_path / "tabs.csv").write_text("path\ttext\n")
    by_tabs = importers.create("table", tmp_path / "tabs.csv", None, {}).rules - first["table"]
    compared = _rules_of_curate({"duplicates.documents.action": "keep-one", "text.max_words": "9"})
    expected |= {
        "`table` with CSV whose fields are separated by tabs": f"+ {by_tabs}",
        "`table` with CSV or TSV that begins with the byte order mark of UTF-16": f"+ {marked}",
        "`table` whose images have paths, with a table in a folder of the input and without `--images`": f"+ {below}",
        "`hf` without `text_column`, its texts encoded by a dictionary or in views": f"+ {by_dictionary}",
        f"{', '.join(f'`{format}`' for format in separating)} {NOT_SEPARATED}": "+ 1",
        f"any format but {', '.join(pairs[:-1])} and {pairs[-1]} {NOT_SEPARATED}": "+ 1",
        "`hf` with `--images`": str(first["hf"] + more["hf"]),
        "`webdataset` with compressed tars": str(first["webdataset"] + more["webdataset"]),
        "`mint1t` with compressed tars": f"+ {more['mint1t']}",
        IMAGES_IN_TARS: "+ 1",
        "`curate`": str(curate._RULES),
        "`curate` with evaluation sets": str(EVALUATION_RULES),
        COUNTED_OR_COMPARED: f"+ {_rules_of_curate({'text.max_words': '9'}) - _rules_of_curate({})}",
        DECODED: f"+ {_rules_of_curate({'duplicates.images.action': 'keep-one'}) - _rules_of_curate({})}",
        COMPARED: f"+ {compared - _rules_of_curate({'text.max_words': '9'})}",
    }
    writers.write_jsonl([Document((Text(f"text {k}"), Image(picture(k)))) for k in range(9)], tmp_path / "in")
    for k, (flag, options) in enumerate(
        {"--max-image-side": {"max_image_side": 9}, "--held-out": {"held_out": tmp_path / "held-out"}}.items()
    ):
        preprocess("jsonl", tmp_path / "in", tmp_path / f"out-{k}", tokenizer="clip", **options)  # type: ignore[arg-type]
        recipe = json.loads((tmp_path / f"out-{k}/corpus.json").read_text())["recipe"]
        expected[f"any format with `{flag}`"] = f"+ {recipe['rules'] - first['jsonl']}"
    assert table == expected
