"""COCO captions (Chen et al. 2015): a JSON file with lists `images` and `annotations`, as `captions_train2017.json`.

Each caption makes a pair with its image; the pairs of an image are held out together. Other data sets in this form
(nocaps, TextCaps in COCO's form) are read alike.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.charsets import text_of
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.data.prepare.importers.row_groups import some_columns
from megatron_lcl.data.prepare.importers.sources import ImagesByName, text_item
from megatron_lcl.data.prepare.importers.urls import is_url
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import raise_if_passing

_IMAGES_PER_UNIT = 200
_IMAGE_BYTES = 160_000
"""the mean of COCO's; says how the work is cut, and nothing else"""
Id = int | str


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str = ""
    coco_url: str | None = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: Id
    caption: str | None = None


class _File(msgspec.Struct):
    images: list[_Image]
    annotations: list[_Annotation]


class _Captions:
    """A file's images, and the captions of each."""

    def __init__(self, file: _File, noted: Sequence[str] = ()) -> None:
        self.images, self.noted = file.images, noted
        self.of: dict[Id, list[str | None]] = {image.id: [] for image in file.images}
        self.unlisted = [a.image_id for a in file.annotations if a.image_id not in self.of]
        for annotation in file.annotations:
            self.of.get(annotation.image_id, []).append(annotation.caption)


class CocoImporter(ImagesByName, FilesImporter):
    """A file, or a folder of them; 200 images are a unit."""

    kind = "pairs"
    reads = (
        ".json with lists images (id, file_name) and annotations (image_id, caption); images in --images, a folder or "
        "tars, by file_name, else by coco_url as `fetch` stores it"
    )
    suffixes = (".json",)
    reads_objects = True

    def __init__(self, input: Path, images: Path | None = None) -> None:
        super().__init__(input)
        self.look_in(images, self.root)
        if images is None:  # else earlier corpora would not be recognized; preprocess notes the archives of --images
            self.beside = self.images.archives
        self._read: tuple[Path, _Captions | str] | None = None
        if len(self.files) == 1 and isinstance(fault := self._captions(self.files[0]), str):
            raise UserError(f"{self.files[0]} holds no COCO captions: {fault}")

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_read": None}  # a worker reads a file once, in less time than it takes to send it

    def units_of_files(self) -> list[Unit]:
        """Payload: (path, its first image, its last + 1)."""
        units = []
        for file in self.files:
            captions, name = self._captions(file), self.found.name(file)
            total = 0 if isinstance(captions, str) else len(captions.images)
            for start in range(0, max(total, 1), _IMAGES_PER_UNIT):
                stop = min(total, start + _IMAGES_PER_UNIT)
                units.append(Unit(f"{name}:{start}", (stop - start) * _IMAGE_BYTES, (file, start, stop)))
        return units

    def documents_of_file(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        file, start, stop = unit.payload
        captions, name = self._captions(file), self.found.name(file)
        if isinstance(captions, str):
            drops.bad("document", f"no COCO captions: {captions}", name)
            return
        if start == 0 and (unlisted := captions.unlisted):
            drops.bad("text", "caption of an image that is not listed", f"{name}: {unlisted[0]}", len(unlisted))
        for reason in captions.noted if start == 0 else ():
            drops.note("document", reason, name)
        for number, image in enumerate(captions.images[start:stop], start):
            yield from self._pairs(image, captions.of[image.id], (self.stem(file),), f"{name}:{number}", drops)

    def _pairs(
        self, image: _Image, texts: list[str | None], near: tuple[str], name: str, drops: Drops
    ) -> Iterator[Document]:
        try:
            url = image.coco_url or ""
            names = ([image.file_name] if image.file_name else []) + ([url] if is_url(url) else [])
            if not names:
                raise BadImage("no name")
            found = [Image(self.images.read(names, near), name=image.file_name or url)]
        except BadImage as error:
            drops.bad("image", str(error), f"{name}: {image.file_name[:200]}")
            found = []
        if not texts:
            drops.note("document", "no caption", name)
        about = {"id": str(image.id), "group": name, "lost_images": int(not found)}
        for number, text in enumerate(texts or [""]):
            label = f"{name}#{number}" if len(texts) > 1 else name
            items: list[Text | Image] = [*found, *([text_item(text, label, drops)] if texts else [])]
            yield Document(tuple(items), name=label, metadata=about)

    def _captions(self, file: Path) -> _Captions | str:
        """A file's content, or what is wrong with it; that of the last file is kept."""
        if self._read is None or self._read[0] != file:
            self._read = file, _read(file)
        return self._read[1]


def _read(file: Path) -> _Captions | str:
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise_if_passing(error, file)
        return f"it cannot be read ({error.strerror})"
    try:
        return _Captions(msgspec.json.decode(raw, type=_File))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # as lines of JSON are: NaN, lone surrogates, invalid UTF-8, its mark
        text, noted = text_of(raw)
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return "it is no JSON"
    try:
        return _Captions(msgspec.convert(tree, _File), noted)
    except msgspec.ValidationError as error:
        keys = f"; it has {some_columns(list(itertools.islice(tree, 100)))}" if isinstance(tree, dict) else ""
        return f"{error}{keys}"
