"""Image-text pairs in WebDataset tars, as img2dataset writes LAION, CC3M and CC12M: `.jpg .txt .json` of one key.

Keys repeat from tar to tar; the image stands first, and a pair without caption is a document of one image. With option
`captions` all captions of a pair are kept, and each epoch of training reads one of them, in turn.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from megatron_lcl.data.corpus.document import Document, Image, Kind, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.sources import decoded_file, its_id, listed, more_captions, text_item
from megatron_lcl.data.prepare.importers.tars import TarImporter, tar_samples
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_dir, is_file, matching, raise_if_passing

_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif", "tiff", "jp2", "ppm", "ico", "img")
_TEXTS = ("txt", "text", "caption")
_INTERLEAVED = "no image in the sample, but lists texts and images; --format mint1t reads these"
_NO_STRING = "caption is not a string; a list of them: --option captions=caption"


class WebDatasetImporter(TarImporter):
    format = "webdataset"
    kind: Kind | None = "pairs"
    rules = 2
    reads = ".tar, .tar.gz with an image (.jpg, .png, …), its text (.txt, or the caption in .json) under each key"

    def __init__(
        self,
        input: Path,
        images: Path | None = None,
        captions: Annotated[
            str,
            "names of keys of the .json, separated by commas, whose strings or lists of strings are captions, too: all "
            "of a pair are kept, and each epoch reads one; empty: one caption a pair",
        ] = "",
    ) -> None:
        try:
            super().__init__(input, images)
        except UserError as error:
            if images is not None or is_file(input) or (folder := _with_loose_pairs(input)) is None:
                raise
            where = "that folder" if folder == input else f"each folder such as {folder.name}"
            remedy = f"`tar cf pairs.tar *` in {where} packs its images, each with its .txt"
            raise UserError(f"{error}; {remedy}") from None
        self.captions = listed(captions)
        if self.captions:
            self.kind = "captions"

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        for sample in tar_samples(unit, drops):
            name = f"{unit.name}:{sample['__key__']}"
            items: list[Text | Image] = []
            image = next((sample[s] for s in _IMAGES if s in sample), None)
            record = _record(sample, name, drops)
            if image is None:
                drops.bad("image", _INTERLEAVED if _is_interleaved(record) else "no image in the sample", name)
            else:
                items.append(Image(image, name=name))
            caption = self._caption(sample, record, name, drops)
            captions: list[str | bytes] = [] if caption is None else [caption]
            captions += more_captions(record, self.captions, name, drops)
            if not captions:
                drops.note("document", "no caption", name)
            items += [text_item(text, name, drops) for text in dict.fromkeys(captions)]
            yield Document(
                tuple(items), name=name, metadata={**its_id(record, name, drops), "lost_images": int(image is None)}
            )

    def _caption(self, sample: dict[str, Any], record: Any, name: str, drops: Drops) -> str | None:
        """The text file's content, else the "caption" of the JSON file, else None."""
        for suffix in _TEXTS:
            if suffix in sample:
                return decoded_file(sample[suffix], name, drops)
        caption = record.get("caption") if isinstance(record, dict) else None
        if caption is None or isinstance(caption, str):
            return caption
        if "caption" not in self.captions:
            drops.bad("text", _NO_STRING, name, sample=str(caption))
        return None


def _with_loose_pairs(folder: Path) -> Path | None:
    """Where images, each with its text beside it, lie: the folder or, as img2dataset's, one of its folders."""
    try:
        inside = (path for path in matching(folder, "*") if path.suffix[1:] not in (*_IMAGES, "txt", "json"))
        for each in (folder, *filter(is_dir, inside)):
            files = matching(each, "*.*")
            texts = {path.stem for path in files if path.suffix == ".txt"}
            if any(path.stem in texts and path.suffix[1:] in _IMAGES for path in files):
                return each
    except OSError as error:
        raise_if_passing(error, folder)
    return None


def _is_interleaved(record: Any) -> bool:
    """Whether a sample is a document as `export-corpus` writes those that are no pairs."""
    return isinstance(record, dict) and all(isinstance(record.get(key), list) for key in ("texts", "images"))


def _record(sample: dict[str, Any], name: str, drops: Drops) -> Any:
    """The JSON file's content, or None."""
    try:
        return json.loads(decoded_file(sample.get("json", b"{}"), name, drops))
    except (ValueError, RecursionError):
        return None
