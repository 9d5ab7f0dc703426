"""Documents written out in each source format, independently of the importers."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as Pillow

from megatron_lcl.data.corpus.document import Document, Image, Text


def picture(seed: int, width: int = 40, height: int = 30, format: str = "PNG", mode: str = "RGB") -> bytes:
    """A small encoded image, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).convert(mode).save(out, format)
    return out.getvalue()


def name_of(image: Image) -> str:
    return hashlib.sha256(image.data).hexdigest()[:16] + ".img"


def write_images(documents: Sequence[Document], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image in (image for document in documents for image in document.images):
        (folder / name_of(image)).write_bytes(image.data)


def write_jsonl(documents: Sequence[Document], folder: Path) -> None:
    """With similarities, matches and kinds, where there are any."""
    write_images(documents, folder)
    with open(folder / "documents.jsonl", "w", encoding="utf-8") as file:
        for document in documents:
            items: list[dict[str, Any]] = []
            for item in document.items:
                if isinstance(item, Text):
                    items.append({"text": item.text})
                else:
                    entry: dict[str, Any] = {"image": name_of(item)}
                    if item.similarity is not None:
                        entry["similarity"] = item.similarity
                    if item.matched_text is not None:
                        entry["matched_text_index"] = item.matched_text
                    items.append(entry)
            kind = {} if document.kind is None else {"kind": document.kind}
            file.write(json.dumps({**kind, "items": items}) + "\n")


def write_mmc4(documents: Sequence[Document], folder: Path, images: Path) -> None:
    """Two shards, zipped; image_info in no order; images in a folder per shard. Every image needs its match."""
    folder.mkdir(parents=True, exist_ok=True)
    half = (len(documents) + 1) // 2
    for shard, part in enumerate((documents[:half], documents[half:])):
        write_images(part, images / f"shard_{shard}")
        lines = []
        for document in part:
            infos = [
                {"image_name": name_of(i), "matched_text_index": i.matched_text, "matched_sim": i.similarity}
                for i in document.images
            ]
            texts = [t.text for t in document.texts]
            # the order between sentences is free, that within a sentence is kept
            infos.sort(key=lambda info: -info["matched_text_index"])
            matrix = [[0.1] * len(texts) for _ in infos]
            lines.append(json.dumps({"text_list": texts, "image_info": infos, "similarity_matrix": matrix}))
        with zipfile.ZipFile(folder / f"docs_shard_{shard}_v2.jsonl.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("any name", "\n".join(lines) + "\n")


def _lists(document: Document) -> tuple[list[str | None], list[str | None]]:
    images = ["http://x/" + name_of(item) if isinstance(item, Image) else None for item in document.items]
    return images, [item.text if isinstance(item, Text) else None for item in document.items]


def write_parquet(documents: Sequence[Document], folder: Path, images: Path, structs: bool) -> None:
    """OBELICS (metadata as JSON strings), or OmniCorpus (structs); images named by the hash of their URL."""
    folder.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for document in documents:
        urls, texts = _lists(document)
        for image in document.images:
            url = "http://x/" + name_of(image)
            (images / hashlib.sha256(url.encode()).hexdigest()).write_bytes(image.data)
        metadata: Any = [{"url": u} if u else None for u in urls]
        general: Any = {"url": "http://page"}
        if not structs:
            metadata, general = json.dumps(metadata), json.dumps(general)
        rows.append({"images": urls, "texts": texts, "metadata": metadata, "general_metadata": general})
    schema = None if structs else pa.schema(
        [("images", pa.list_(pa.string())), ("texts", pa.list_(pa.string())), ("metadata", pa.string()),
         ("general_metadata", pa.string())]
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "train-00000.parquet", row_group_size=7)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def add_header(archive: tarfile.TarFile, info: tarfile.TarInfo) -> None:
    """Without the content that it announces, which `addfile` of Python 3.13 refuses."""
    assert archive.fileobj is not None
    archive.offset += archive.fileobj.write(info.tobuf(archive.format))


def write_mint1t(documents: Sequence[Document], folder: Path) -> None:
    """Images as lossless frames of one TIFF."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "00000.tar", "w") as archive:
        for number, document in enumerate(documents):
            urls, texts = _lists(document)
            _add(archive, f"{number:06d}.json", json.dumps({"texts": texts, "images": urls}).encode())
            frames = [Pillow.open(io.BytesIO(image.data)).convert("RGBA") for image in document.images]
            if frames:
                out = io.BytesIO()
                frames[0].save(out, "TIFF", save_all=True, append_images=frames[1:])
                _add(archive, f"{number:06d}.tiff", out.getvalue())


def write_webdataset(documents: Sequence[Document], folder: Path) -> None:
    """Documents of one image and one text; keys start anew in the second tar."""
    folder.mkdir(parents=True, exist_ok=True)
    half = (len(documents) + 1) // 2
    for shard, part in enumerate((documents[:half], documents[half:])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as archive:
            for number, document in enumerate(part):
                _add(archive, f"{number:09d}.jpg", document.images[0].data)
                _add(archive, f"{number:09d}.txt", document.texts[0].text.encode())
                _add(archive, f"{number:09d}.json", json.dumps({"status": "success"}).encode())
