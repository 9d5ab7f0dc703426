"""A corpus back into source formats: JSON lines with tars of images, or WebDataset tars.

`preprocess` reads both back with the corpus's own tokenizer. Of JSON lines the same documents come, with their kinds,
similarities and names; of WebDataset tars the same texts and images.
"""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.scratch import whole_folder
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.errors import UserError

EXPORTS = ("jsonl", "webdataset")
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "?": "img"}
"""file name extensions of formats that are not called like the format"""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path | str
    documents: int
    images: int
    without_image: int
    """documents that were left out, as a WebDataset sample needs an image"""
    exact: bool
    """the texts are what they were; else as a tokenizer that changes texts gives them back"""

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.documents:,} documents, {self.images:,} images"]
        if self.without_image:
            lines.append(f"  left out  {self.without_image:,}  documents without an image")
        if not self.exact:
            lines.append("  noted  the texts are as the corpus's tokenizer gives them back, not as they were")
        return "\n".join(lines)


def export_corpus(corpus: str | Path, output: str | Path, format: str = "jsonl", progress: bool = False) -> Exported:
    """Write `corpus` into the new folder `output`, two files a shard at most; the same corpus gives the same bytes.

    jsonl: `00000.jsonl`, a document a line as the format `jsonl` reads it, and `00000.tar` of its images, named by
    their XXH3-128. webdataset: `00000.tar`; of a corpus of pairs with image, .txt and .json under a key for each, which
    the format `webdataset` reads; of any other with .json (lists `texts` and `images`, one of them null at each
    position) and the images under a key for each document, like the interleaved samples in Megatron Energon's
    documentation, which the format `mint1t` reads. UserError, leaving nothing, for another format, a folder that is not
    empty, and a file that is missing.
    """
    source, output = open_corpus(corpus), Path(output)
    if format not in EXPORTS:
        raise UserError(f"--format {format}: a corpus is exported as {' or '.join(EXPORTS)}")
    write = {"jsonl": _write_lines, "webdataset": _write_pairs if {*source.kinds} <= {"pairs"} else _write_samples}[
        format
    ]
    source.check_sizes()
    documents = images = without = 0
    with whole_folder(output) as folder:
        for number in tqdm(range(source.num_shards), desc=output.name, unit="shard", disable=not progress):
            written = write(source, number, folder)
            documents, images, without = (a + b for a, b in zip((documents, images, without), written, strict=True))
    return Exported(output, documents, images, without, source.tokenizer.is_lossless)


def _write_lines(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    shard = corpus.open_shard(number)
    if shard.num_images:
        with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for j in range(shard.num_images):
                _add(archive, _image_name(shard, j), bytes(shard.image(j)))
    with open(folder / f"{number:05d}.jsonl", "w", encoding="utf-8") as file:
        for local in range(shard.num_documents):
            start, stop = shard.document_offsets[local : local + 2].tolist()
            items = [_item(corpus, shard, k) for k in range(start, stop)]
            line = {**_name(shard, local), "kind": corpus.kinds[number], "items": items}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return shard.num_documents, shard.num_images, 0


def _item(corpus: Corpus, shard: Shard, piece: int) -> dict[str, Any]:
    value = shard.piece(piece)
    if not isinstance(value, int):
        return {"text": corpus.tokenizer.decode(value)}
    placement = int(shard.placement_of[piece])
    similarity, matched = float(shard.similarity[placement]), int(shard.matched_text[placement])
    item: dict[str, Any] = {"image": _image_name(shard, value)}
    if similarity == similarity:  # not NaN
        item["similarity"] = similarity
    if matched >= 0:
        item["matched_text_index"] = matched
    return item


def _write_samples(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    """Documents of any kind."""
    shard, images = corpus.open_shard(number), 0
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for local in range(shard.num_documents):
            key = f"{local:09d}"
            lists: dict[str, list[str | None]] = {"texts": [], "images": []}
            for k in range(*shard.document_offsets[local : local + 2].tolist()):
                value = shard.piece(k)
                text = image = None
                if isinstance(value, int):
                    image = f"{len(lists['images'])}.{_suffix(shard, value)}"
                    _add(archive, f"{key}.{image}", bytes(shard.image(value)))
                    images += 1
                else:
                    text = corpus.tokenizer.decode(value)
                lists["texts"].append(text)
                lists["images"].append(image)
            record = {**_name(shard, local), **lists}
            _add(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    return shard.num_documents, images, 0


def _write_pairs(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    shard, first = corpus.open_shard(number), int(corpus.document_starts[number])
    documents = 0
    with tarfile.open(folder / f"{number:05d}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for local in range(shard.num_documents):
            start, stop = shard.document_offsets[local : local + 2].tolist()
            document: Document = corpus[first + local]
            texts = [item.text for item in document.items if isinstance(item, Text)]
            images = [item for item in document.items if isinstance(item, Image)]
            if len(images) > 1 or len(texts) > 1:
                raise UserError(
                    f"document {first + local} of {corpus.where} has {len(images)} images and {len(texts)} texts, and "
                    "webdataset holds pairs; export it with --format jsonl"
                )
            if not images:
                continue
            key = f"{local:09d}"
            image = next(int(shard.pieces(k, k + 1)[0]) for k in range(start, stop) if shard.modes[k])
            _add(archive, f"{key}.{_suffix(shard, image)}", images[0].data)
            for text in texts:
                _add(archive, f"{key}.txt", text.encode())
            _add(archive, f"{key}.json", json.dumps({"id": document.name}, ensure_ascii=False).encode())
            documents += 1
    return documents, documents, shard.num_documents - documents


def _name(shard: Shard, local: int) -> dict[str, str]:
    """What a document is called, as a line's `id`; empty where it has no name."""
    return {"id": shard.names[local]} if shard.names and shard.names[local] else {}


def _image_name(shard: Shard, j: int) -> str:
    return f"{shard.image_xxh3[j].tobytes().hex()}.{_suffix(shard, j)}"


def _suffix(shard: Shard, j: int) -> str:
    format = FORMATS[shard.image_format[j]]
    return _SUFFIXES.get(format, format.lower())


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
