"""A corpus back into source formats: JSON lines with tars of images, WebDataset tars, or Hugging Face's parquet.

`preprocess` reads all of them back with the corpus's own tokenizer. Of JSON lines the same documents come, with their
kinds, similarities and names; of the others the same texts and images.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_lcl.data.corpus.document import CAPTIONED
from megatron_lcl.data.corpus.image_columns import FORMATS
from megatron_lcl.data.corpus.scratch import whole_folder
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.prepare.importers.image_tables import GROUP_BYTES, GROUP_ROWS
from megatron_lcl.errors import UserError
from megatron_lcl.units import counted

EXPORTS = ("jsonl", "webdataset", "hf")
_DIGITS = 5
"""of a shard's number in names of files, or as many as the last one has: the order of names is that of shards"""
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2", "TIFF": "tif", "?": "img"}
"""file name extensions of formats that are not called like the format"""
_Documents = Iterator[tuple[int, dict[str, str], list[int | str]]]
_STRING: dict[str, Any] = {"dtype": "string", "_type": "Value"}
_IMAGE: dict[str, Any] = {"_type": "Image"}


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path | str
    documents: int
    images: int
    without_image: int
    """documents that were left out, as a pair of these formats needs an image"""
    exact: bool
    """the texts are what they were; else as a tokenizer that changes texts gives them back"""
    lost: tuple[str, ...] = ()
    """what the corpus says of its documents, and the files do not"""

    def __str__(self) -> str:
        lines = [f"{self.path}: {counted(self.documents, 'document')}, {counted(self.images, 'image')}"]
        if self.without_image:
            lines.append(f"  left out  {self.without_image:,}  documents without an image")
        if not self.exact:
            lines.append("  noted  the texts are as the corpus's tokenizer gives them back, not as they were")
        lines += [f"  noted  not in these files: {what}; --format jsonl has it" for what in self.lost]
        return "\n".join(lines)


def export_corpus(corpus: str | Path, output: str | Path, format: str = "jsonl", progress: bool = False) -> Exported:
    """Write `corpus` into the new folder `output`, two files a shard at most; the same corpus gives the same bytes (of
    parquet with the same pyarrow).

    jsonl: `00000.jsonl`, a document a line as the format `jsonl` reads it, and `00000.tar` of its images, named by
    their XXH3-128. webdataset: `00000.tar`; of a corpus of pairs and captions with image, .txt and .json (`captions`:
    the texts after the first) under a key for each, which the format `webdataset` reads; of any other with .json (lists
    `texts` and `images`, one of them null at each position) and the images under a key for each document, like the
    interleaved samples in Megatron Energon's documentation, which the format `mint1t` reads. hf: `00000.parquet` with
    the features of `datasets`, a row for each document: `image`, `text` ("" where there is none) and, if there are any,
    `captions`; or lists `images` and `texts` as above. The format `hf` reads it. UserError, leaving nothing, for
    another format, a folder that is not empty, and a file that is missing.
    """
    source, output = open_corpus(corpus), Path(output)
    if format not in EXPORTS:
        raise UserError(f"--format {format}: a corpus is exported as {', '.join(EXPORTS[:-1])} or {EXPORTS[-1]}")
    samples = _write_pairs if _is_captioned(source) else _write_samples
    write = {"jsonl": _write_lines, "webdataset": samples, "hf": _write_rows}[format]
    source.check_sizes()
    documents = images = without = 0
    with whole_folder(output) as folder:
        for number in tqdm(range(source.num_shards), desc=output.name, unit="shard", disable=not progress):
            written = write(source, number, folder)
            documents, images, without = (a + b for a, b in zip((documents, images, without), written, strict=True))
    lost = () if format == "jsonl" else tuple(_lost(source))
    return Exported(output, documents, images, without, source.tokenizer.is_lossless, lost)


def _is_captioned(corpus: Corpus) -> bool:
    """Whether all documents are an image with its texts, and are written as such; else all are as interleaved ones."""
    return {*corpus.kinds} <= {*CAPTIONED}


def _lost(corpus: Corpus) -> Iterator[str]:
    """What only JSON lines say."""
    if "matched" in corpus.kinds:
        yield "which text an image is matched to, and its similarity"
    if not _is_captioned(corpus) and (captioned := sorted({*corpus.kinds} & {*CAPTIONED})):
        yield f"which documents are {' and '.join(captioned)}, as others are interleaved"


def _write_lines(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    shard = corpus.open_shard(number)
    if shard.num_images:
        with tarfile.open(folder / f"{_stem(corpus, number)}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for j in range(shard.num_images):
                add_file(archive, _image_name(shard, j), bytes(shard.image(j)))
    with open(folder / f"{_stem(corpus, number)}.jsonl", "w", encoding="utf-8") as file:
        for local, name in enumerate(_names(shard)):
            items = [_item(corpus, shard, k) for k in range(*shard.bounds(local))]
            line = {**name, "kind": corpus.kinds[number], "items": items}
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
    with tarfile.open(folder / f"{_stem(corpus, number)}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for local, name, items in _documents(corpus, shard):
            key = f"{local:09d}"
            lists: dict[str, list[str | None]] = {"texts": [], "images": []}
            for position, item in enumerate(items):
                text = image = None
                if isinstance(item, int):
                    image = f"{position}.{_suffix(shard, item)}"
                    add_file(archive, f"{key}.{image}", bytes(shard.image(item)))
                    images += 1
                else:
                    text = item
                lists["texts"].append(text)
                lists["images"].append(image)
            record = {**name, **lists}
            add_file(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    return shard.num_documents, images, 0


def _write_pairs(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    shard, documents = corpus.open_shard(number), 0
    with tarfile.open(folder / f"{_stem(corpus, number)}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for local, name, image, texts in _pairs(corpus, shard):
            key = f"{local:09d}"
            add_file(archive, f"{key}.{_suffix(shard, image)}", bytes(shard.image(image)))
            for text in texts[:1]:
                add_file(archive, f"{key}.txt", text.encode())
            record = {**name, **({"captions": texts[1:]} if texts[1:] else {})}
            add_file(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
            documents += 1
    return documents, documents, shard.num_documents - documents


def _write_rows(corpus: Corpus, number: int, folder: Path) -> tuple[int, int, int]:
    """In row groups of GROUP_ROWS and GROUP_BYTES of texts and images, unless one document has more: so much this, and
    a reader, has in memory."""
    shard, schema, captioned = corpus.open_shard(number), _schema(corpus), _is_captioned(corpus)
    pairs: _Documents = ((local, name, [image, *texts]) for local, name, image, texts in _pairs(corpus, shard))
    rows: list[dict[str, Any]] = []
    documents = images = size = 0
    with (
        # by Arrow itself a full disk would be said in its words
        open(folder / f"{_stem(corpus, number)}.parquet", "wb") as file,
        pq.ParquetWriter(file, schema, use_dictionary=False) as writer,
    ):
        for _, name, items in pairs if captioned else _documents(corpus, shard):
            added = sum(len(i.encode()) if isinstance(i, str) else int(shard.image_sizes[i]) for i in items)
            if len(rows) == GROUP_ROWS or (rows and size + added > GROUP_BYTES):
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
            pictures = [_picture(shard, item) if isinstance(item, int) else None for item in items]
            texts = [None if isinstance(item, int) else item for item in items]
            row: dict[str, Any] = {"images": pictures, "texts": texts}
            if captioned:
                row = {"image": pictures[0], "text": (texts[1:] or [""])[0], "captions": texts[2:]}
            rows.append({**name, **row})
            documents, images, size = documents + 1, images + len(pictures) - pictures.count(None), size + added
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    return documents, images, shard.num_documents - documents


def _picture(shard: Shard, j: int) -> dict[str, Any]:
    return {"bytes": bytes(shard.image(j)), "path": _image_name(shard, j)}


def _schema(corpus: Corpus) -> pa.Schema:
    """Of `_write_rows`, with the features in its metadata as `datasets` 4 and 5 write them."""
    features = {"id": _STRING, "images": _several(_IMAGE), "texts": _several(_STRING)}
    if _is_captioned(corpus):
        more = {"captions": _several(_STRING)} if "captions" in corpus.kinds else {}
        features = {"id": _STRING, "image": _IMAGE, "text": _STRING, **more}
    columns = [(name, _arrow_type(feature)) for name, feature in features.items()]
    return pa.schema(columns, {"huggingface": json.dumps({"info": {"features": features}})})


def _several(feature: dict[str, Any]) -> dict[str, Any]:
    return {"feature": feature, "_type": "List"}


def _arrow_type(feature: dict[str, Any]) -> pa.DataType:
    if "feature" in feature:
        return pa.list_(_arrow_type(feature["feature"]))
    return pa.string() if feature == _STRING else pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _documents(corpus: Corpus, shard: Shard) -> _Documents:
    """(its number in the shard, its name as of `_names`, its items) of each document; an item is an image's number in
    the shard, or a text."""
    for local, name in enumerate(_names(shard)):
        values = (shard.piece(k) for k in range(*shard.bounds(local)))
        yield local, name, [value if isinstance(value, int) else corpus.tokenizer.decode(value) for value in values]


def _pairs(corpus: Corpus, shard: Shard) -> Iterator[tuple[int, dict[str, str], int, list[str]]]:
    """(its number in the shard, its name, its image, its texts) of each document that has an image. UserError where it
    has several, or where a pair has several texts."""
    for local, name, items in _documents(corpus, shard):
        images = [item for item in items if isinstance(item, int)]
        texts = [item for item in items if isinstance(item, str)]
        kind = corpus.kinds[shard.number]
        if len(images) > 1 or (len(texts) > 1 and kind == "pairs"):
            raise UserError(
                f"document {int(corpus.document_starts[shard.number]) + local} of {corpus.where} has {len(images)} "
                f"images and {len(texts)} texts, but is of kind {kind}; export it with --format jsonl"
            )
        if images:
            yield local, name, images[0], texts


def _names(shard: Shard) -> Iterator[dict[str, str]]:
    """What each document is called, as a line's `id`; empty where it has no name."""
    names = shard.names.between(0, shard.num_documents) if shard.names else itertools.repeat("", shard.num_documents)
    return ({"id": name} if name else {} for name in names)


def _stem(corpus: Corpus, number: int) -> str:
    return f"{number:0{max(_DIGITS, len(str(corpus.num_shards - 1)))}d}"


def _image_name(shard: Shard, j: int) -> str:
    return f"{shard.image_xxh3[j].tobytes().hex()}.{_suffix(shard, j)}"


def _suffix(shard: Shard, j: int) -> str:
    format = FORMATS[shard.image_format[j]]
    return _SUFFIXES.get(format, format.lower())


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of a tar whose bytes follow from its name and content: without an owner, a mode of its own and a time."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))
