"""MMC4 (Zhu et al. 2023): web pages as lists of sentences, and images matched to them by CLIP similarity.

Annotations are `docs_shard_{i}_v2.jsonl.zip` and their variants (`docs_no_face_shard_{i}_v3.jsonl`, …). Images, which
the data set does not ship, lie under `images`: flat, in a folder per shard, or in tar files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.lines import SUFFIXES, LinesImporter, json_lines
from megatron_lcl.data.prepare.importers.sources import ImagesByName, index_or_none, its_id, number_or_none, text_item
from megatron_lcl.data.prepare.importers.urls import is_url

_SHARD = re.compile(r"shard_(\d+)")


class Mmc4Importer(ImagesByName, LinesImporter):
    """One shard, or a folder of them. An image stands before the sentence it is matched to."""

    kind = "matched"
    separator = " "  # as OpenFlamingo joins the sentences (OmniCorpus, mllm_openflamingo/open_flamingo/train/data.py)
    reads = (
        "docs_shard_{i}_v2.jsonl.zip and variants, also .jsonl, .gz, .zst; images in --images: flat, a folder per "
        "shard, tars, or what `fetch` stored of their URLs"
    )
    suffixes = (*SUFFIXES, ".zip")

    def __init__(self, input: Path, images: Path | None = None) -> None:
        super().__init__(input)
        in_order = sorted(self.found.read, key=lambda p: (_shard_number(p), p))
        self.found = replace(self.found, names=[self.found.name(file) for file in in_order])
        self.look_in(images)
        numbers = [_shard_number(file) for file in self.files]
        self._missing_before = {
            file: max(0, number - before - 1)
            for file, number, before in zip(self.files[1:], numbers[1:], numbers[:-1], strict=True)
        }

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        path, start, _ = unit.payload
        missing = self._missing_before.get(path, 0)
        if missing and not start:
            drops.note("document", "shards that are not there", f"before {path.name}", missing)
        for name, page in json_lines(unit, drops):
            texts, infos = page.get("text_list"), page.get("image_info")
            if not isinstance(texts, list):
                drops.bad("document", "no text_list", name, sample=str(page))
                continue
            if not isinstance(infos, list):
                drops.bad("image", "no image_info", name)
                infos = []
            document = self._document(texts, infos, page.get("similarity_matrix"), path, name, drops)
            lost = len(infos) - len(document.images)
            yield msgspec.structs.replace(document, metadata={**its_id(page, name, drops), "lost_images": lost})

    def _document(
        self, texts: list[Any], infos: list[Any], matrix: Any, path: Path, name: str, drops: Drops
    ) -> Document:
        similarities = _matrix(matrix, len(infos), len(texts))
        if matrix is not None and similarities is None:
            drops.note("document", "similarity_matrix of the wrong size", name)
        folders = _folders(self.stem(path), _shard_number(path))
        images_of: dict[int, list[Image]] = {}
        for number, info in enumerate(infos):
            if not isinstance(info, dict) or not isinstance(info.get("image_name"), str):
                drops.bad("image", "no name", name)
                continue
            index = index_or_none(info.get("matched_text_index"))
            if index is None or not 0 <= index < len(texts):
                reason = "matched text null" if index is None else "matched text out of range"
                drops.bad("image", reason, f"{name}: {info['image_name']}")
                continue
            similarity = number_or_none(info.get("matched_sim"))
            if similarity is None and similarities is not None:
                similarity = float(similarities[number, index])
            if similarity is None:
                drops.bad("image", "no similarity", f"{name}: {info['image_name']}")
                continue
            try:
                names = [info["image_name"], *(f"{folder}/{info['image_name']}" for folder in folders)]
                data = self.images.read([*names, *_url(info)], near=folders)
            except BadImage as error:
                drops.bad("image", str(error), f"{name}: {info['image_name'][:200]}")
                continue
            images_of.setdefault(index, []).append(Image(data, info["image_name"], similarity, index))
        items: list[Text | Image] = []
        for index, text in enumerate(texts):
            items += [*images_of.get(index, ()), text_item(text, name, drops)]
        return Document(tuple(items), name=name)


def _url(info: dict[str, Any]) -> list[str]:
    """Where the image was on the web, if that is said."""
    url = info.get("raw_url")
    return [url] if isinstance(url, str) and is_url(url) else []


def _matrix(matrix: Any, rows: int, columns: int) -> np.ndarray | None:
    """[images, texts], or None if it is not of that size."""
    if not isinstance(matrix, list) or len(matrix) != rows:
        return None
    if any(not isinstance(row, list) or len(row) != columns for row in matrix):
        return None
    numbers = [[number_or_none(value) for value in row] for row in matrix]
    return np.array([[np.nan if v is None else v for v in row] for row in numbers]).reshape(rows, columns)


def _shard_number(path: Path) -> int:
    found = _SHARD.search(path.name)
    return int(found[1]) if found else 0


def _folders(stem: str, number: int) -> list[str]:
    """Folders, or tars, in which a shard's images may lie."""
    return [stem, f"shard_{number}", str(number), f"{number:05d}"]
