"""Protects Markdown files: their texts and images in reading order, and the rules of HTML pages."""

from __future__ import annotations

from pathlib import Path

from data.helpers import TOKENIZER, documents_of, plain
from data.writers import picture

from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.preprocess import preprocess

PAGE = """\ufeff---
title: hidden
tags: [a, b]
---
# A mill

By the *river*,
in `1804`. See [the map](map.md).

![A mill](pictures/mill.png "title")

| wheel | stone |
| --- | --- |
| oak | granite |

```
x = 1
y  = 2
```

Before <img src="pictures/wheel.png" width="3"> and after.

![of another host](https://x.org/a.png) ![gone](gone.png) ![icon](pictures/icon.png)

---
The end <!-- not this -->
"""
IMAGES = {"mill": picture(1, 90, 80), "wheel": picture(2, 90, 80), "icon": picture(3, 20, 20)}


def write(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True)
    for name, data in IMAGES.items():
        (folder / f"pictures/{name}.png").write_bytes(data)
    (folder / "page.md").write_text(PAGE.replace("\n", "\r\n"), "utf-8", newline="")
    (folder / "text.markdown").write_text("Only *text*.")
    (folder / "copy.md").write_text(PAGE.replace("hidden", "other"), "utf-8")


def test_a_page(tmp_path: Path) -> None:
    write(tmp_path / "in")
    found, drops = documents_of(create("markdown", tmp_path / "in", None, {}))
    assert plain(found) == [[
        "A mill\nBy the river, in 1804. See the map.", (IMAGES["mill"], None, None),
        "wheel stone\noak granite\nx = 1\ny  = 2\nBefore", (IMAGES["wheel"], None, None), "and after.\nThe end",
    ]]  # fmt: skip
    assert found[0].metadata["lost_images"] == 2
    assert drops.bad_counts == {"image: on another host": 1, "image: file missing": 1}
    assert drops.left_out_counts == {
        "document: repeats another page": 1, "document: page without images": 1, "image: under 64 pixels on a side": 1,
    }  # fmt: skip
    kept, _ = documents_of(create("markdown", tmp_path / "in", None, {"text_pages": True}))
    assert plain(kept)[1:] == [["Only text."]]


def test_through_a_corpus(tmp_path: Path) -> None:
    write(tmp_path / "in")
    summary = preprocess("markdown", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1)
    corpus = open_corpus(summary.path)
    assert [image.data for image in corpus[0].images] == [IMAGES["mill"], IMAGES["wheel"]]
    assert corpus.kinds == ("natural",)
    assert corpus.manifest["recipe"]["rules"] == 7  # two more, as texts are separated


def test_charsets(tmp_path: Path) -> None:
    """A mark goes, and says UTF-16; what is not UTF-8 is noted."""
    codecs = {"mark": "utf-8-sig", "sixteen": "utf-16", "windows": "cp1252"}
    for k, (name, codec) in enumerate(codecs.items()):
        (tmp_path / f"{name}.md").write_bytes(f"# Größe\n\n![]({name}.png) {name}".encode(codec))
        (tmp_path / f"{name}.png").write_bytes(picture(k, 90, 80))
    found, drops = documents_of(create("markdown", tmp_path, None, {}))
    assert [(row[0], row[2]) for row in plain(found)] == [
        ("Größe", "mark"), ("Größe", "sixteen"), ("Gr\ufffd\ufffde", "windows"),
    ]  # fmt: skip
    assert drops.noted_counts == {"document: invalid UTF-8 replaced": 1}
    assert drops.names["document: invalid UTF-8 replaced"] == ["windows.md"]
