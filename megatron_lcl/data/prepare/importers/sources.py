"""Where images are: a folder, a tar file, or a folder of tar or parquet files, as an image store is. Names never lead
outside."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.data.corpus.document import Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.prepare.importers import Importer, files_signature
from megatron_lcl.data.prepare.importers.charsets import invalid
from megatron_lcl.data.prepare.importers.files import MAX_FILE, TooLarge, normal_forms, uncompressed, whole_file
from megatron_lcl.data.prepare.importers.sorted_runs import SortedRuns
from megatron_lcl.data.prepare.importers.tars import DAMAGE, tar_files
from megatron_lcl.data.prepare.importers.urls import TABLE_SUFFIX, is_url, names_of_url
from megatron_lcl.data.storage.paths import ObjectPath
from megatron_lcl.errors import UserError, naming
from megatron_lcl.filesystem import exists, is_file, matching, raise_if_passing

MAX_PATH = 4096
"""characters; Linux's bound"""
NO_FOLDER = "no image folder was given"
_DAMAGED = "damaged.json"
_START_BITS = 48
"""of a member's first byte in an archive; above it are 16 bits of the key's hash"""


def images_signature(root: Path) -> str:
    """Changes with the folder's name and its archives' names, sizes and times; other files are too many to list."""
    return f"{root.resolve().name} {files_signature(_archives(root), root.parent)}"


class ImageSource(SortedRuns):
    """Images by name below `root`: a folder, which may itself hold archives, or one archive; None: there are none.

    Archives (tar files, and a store's parquet files) are listed once, and their members kept as sorted arrays of 24
    bytes for each image's name, and 24 for what is left of it without its first folder, its first two, and so on: in
    files that all processes map, after `prepare`, else in memory. UserError where `root` is any other file.

    is_given: whether `root` was given for the images; else it is the input's, which has what is named by URLs only
    where it has archives.
    """

    def __init__(self, root: Path | None, is_given: bool = True) -> None:
        self._root, self.is_given = root, is_given
        self.archives = [] if root is None else _archives(root)
        self._stems = {path.stem for path in self.archives}
        self._packed = "" if root is None or is_file(root) else _packed(root)
        self._damaged: list[str] = []
        super().__init__(self.archives, "images-in-archives", 3)

    def columns(self) -> Iterator[tuple[int, int, int]]:
        """Of all members of the archives, under their name and under each end of it: 64 bits of the key's hash; 16 more
        of it (upper bits) and first byte; number of the archive (upper 32 bits) and size (lower 32 bits)."""
        self._damaged = []
        for number, path in enumerate(self.archives):
            for name, start, size in _members(path, self._damaged):
                place = number << 32 | min(size, 0xFFFF_FFFF)
                for k, end in enumerate(_ends(name)):
                    digest, more = _digest(_ending(end) if k else end)
                    yield digest, more << _START_BITS | start, place

    def write_runs(self, folder: Path) -> None:
        super().write_runs(folder)
        (folder / _DAMAGED).write_text(json.dumps(self._damaged))

    def read_runs(self, folder: Path) -> list[np.ndarray]:
        self._damaged = json.loads((folder / _DAMAGED).read_text())
        return super().read_runs(folder)

    def has_archive(self, stem: str) -> bool:
        """Whether there is one of this name, without extension."""
        return stem in self._stems

    def read(self, names: str | Iterable[str], near: Collection[str] = (), folder: str = "") -> bytes:
        """The first of the names that there is, else of their other normal forms. BadImage says why there is none.

        A name that is a URL means the image that `megatron-lcl fetch` has stored of it. In archives, a member that has
        none of the names is taken if its name ends with one of them, or is the end of one (`1.png`, of `cats/1.png`),
        the longest end of them all first.
        near: names, without extension, of archives to look into before the others, as names may repeat in them.
        folder: one below `root` whose files go before all others.
        """
        if self._root is None:
            raise BadImage(NO_FOLDER)
        given = [names] if isinstance(names, str) else [*names]
        candidates = list(dict.fromkeys(n for one in given for n in (names_of_url(one) if is_url(one) else [one])))
        for name in candidates:
            _check_name(name)
        others = [form for name in candidates for form in normal_forms(name)[1:]]
        if (data := self._look_for([candidates, others], near, folder)) is not None:
            return data
        if self._damaged:
            raise BadImage(f"file missing, and {self._damaged[0]}")
        if self._packed:
            raise BadImage(f"file missing, and {self._packed} is compressed, which is not read: unpack it")
        if not (self.is_given or self.archives) and all(map(is_url, given)):
            raise BadImage(NO_FOLDER)
        raise BadImage("file missing")

    def _look_for(self, forms: Sequence[Sequence[str]], near: Collection[str], folder: str) -> bytes | None:
        assert self._root is not None
        places = [self._root / folder, self._root] if folder else [self._root]
        # of objects each name is a request, so beside archives there are no single ones
        for place in places if not (self.archives and isinstance(self._root, ObjectPath)) else ():
            for name in itertools.chain(*forms):
                if (data := _read_file(place / name)) is not None:
                    return data
        if self.archives:
            keys_of = [_keys(names) for names in forms]
            for keys in (*(exact for exact, _ in keys_of), *(partial for _, partial in keys_of)):
                if members := self._first(keys, near):
                    data = self._read_member(*members[0])
                    if any(self._read_member(*member) != data for member in members[1:]):  # nothing says which is meant
                        raise BadImage("several images of this name in the tars")
                    return data
        return None

    def _first(self, keys: Iterable[str], near: Collection[str]) -> list[tuple[int, int, int]]:
        """Members of the first key that has any in the archives `near`, else in any; [] where none has."""
        elsewhere: list[tuple[int, int, int]] = []
        for key in dict.fromkeys(keys):
            found = self._find(key)
            if own := [member for member in found if self.archives[member[0]].stem in near]:
                return own
            elsewhere = elsewhere or found
            if elsewhere and self._stems.isdisjoint(near):  # then no later key can go before it
                break
        return elsewhere

    def _find(self, key: str) -> list[tuple[int, int, int]]:
        """(archive, first byte, size) of all members of a name."""
        digest, more = _digest(key)
        return [
            (place >> 32, start & ((1 << _START_BITS) - 1), place & 0xFFFF_FFFF)
            for start, place in self.find(digest)
            if start >> _START_BITS == more
        ]

    def _read_member(self, number: int, start: int, size: int) -> bytes:
        if size > MAX_FILE:
            raise BadImage(str(TooLarge()))
        path = self.archives[number]
        with naming(str(path)), path.open("rb", 0) as file:
            file.seek(start)
            return file.read(size)


class ImagesByName(Importer):
    """An importer that looks for images by their names."""

    images: ImageSource

    def look_in(self, root: Path | None, beside: Path | None = None) -> None:
        """For all images; without `root`, in `beside`. Earlier releases did not find names in another normal form, so
        `rules` are one more; and in archives, where they took members of other folders, two."""
        self.images = ImageSource(root or beside, is_given=root is not None)
        self.rules += 1 + bool(self.images.archives)

    def prepare(self, folder: Path) -> None:
        self.images.prepare(folder)


def _archives(root: Path) -> list[Path]:
    if not is_file(root):
        return sorted([*matching(root, "*.tar"), *matching(root, f"*{TABLE_SUFFIX}")])
    if not root.name.lower().endswith((".tar", TABLE_SUFFIX)):
        raise UserError(
            f"--images {root}: give a folder of images, .tar files or *{TABLE_SUFFIX}, or one such file; "
            "unpack a zip or a compressed tar"
        )
    return [root]


def _packed(root: Path) -> str:
    """Name of an archive in the folder that is not read, as it is compressed; "" where there is none."""
    found = sorted(path for pattern in ("*.tar.*", "*.tgz", "*.zip") for path in matching(root, pattern))
    lost = (path.name for path in found if not exists(path.with_name(uncompressed(path.name))))
    return next((name for name in lost if not name.lower().endswith(".jsonl.zip")), "")


def _ends(name: str) -> list[str]:
    """A path, and what is left of it without its first folder, its first two, and so on; [] of none that can be."""
    parts = [part for part in name.split("/") if part not in ("", ".")] if len(name) <= MAX_PATH else []
    return ["/".join(parts[k:]) for k in range(len(parts))]


def _ending(end: str) -> str:
    """The key of members that have folders before this; no name has a NUL."""
    return "\0" + end


def _digest(key: str) -> tuple[int, int]:
    """64 bits of a key's XXH3-128 and 16 more: of 10^10 images and 10^11 keys looked for in vain, 64 bits alone would
    give some fifty the image of another name, and 80 none."""
    whole = xxhash.xxh3_128_intdigest(key.encode(errors="surrogatepass"))
    return whole & 0xFFFF_FFFF_FFFF_FFFF, whole >> 112


def _members(path: Path, damaged: list[str]) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, size) of the files in an archive, as far as it can be read."""
    if path.name.endswith(TABLE_SUFFIX):
        from megatron_lcl.data.prepare.importers import image_tables  # pyarrow.parquet, which few inputs need

        try:
            yield from image_tables.image_places(path)
        except image_tables.DAMAGE as error:
            raise_if_passing(error, path)
            damaged.append(f"{path.name} is damaged, or not as `fetch` wrote it")
        return
    try:
        with path.open("rb") as file:
            for _, member in tar_files(file):
                yield member.name, member.offset_data, member.size
    except DAMAGE as error:
        raise_if_passing(error, path)
        damaged.append(f"{path.name} is damaged or cut")


def _check_name(name: str) -> None:
    """Refuse what is not a plain relative path."""
    path = PurePosixPath(name)
    if not name.strip():
        raise BadImage("no name")
    if path.is_absolute() or ".." in path.parts or "\0" in name or PureWindowsPath(name).drive or "\\" in name:
        raise BadImage("name leads outside the folder")


def _read_file(path: Path) -> bytes | None:
    try:
        return whole_file(path)
    except TooLarge as error:
        raise BadImage(str(error)) from None
    except (OSError, ValueError) as error:
        raise_if_passing(error, path)
        return None


def decoded(raw: bytes, name: str, drops: Drops, codec: str = "utf-8") -> str:
    """UTF-8, or what another codec of Python reads, as a string; what is none of it is replaced, and noted."""
    try:
        return raw.decode(codec)
    except UnicodeDecodeError:
        drops.note("document", invalid(codec), name)
        return raw.decode(codec, "replace")


def decoded_file(raw: bytes, name: str, drops: Drops, codec: str = "utf-8") -> str:
    """`decoded`, without the byte order mark with which a file may begin, and which is no part of what is in it."""
    return decoded(raw, name, drops, codec).removeprefix("\ufeff")


def as_text(value: Any, name: str, drops: Drops) -> Any:
    """A value of a table: bytes, as a string is that is not UTF-8, `decoded`; any other as it is."""
    return decoded(value, name, drops) if isinstance(value, bytes) else value


def text_item(value: object, name: str, drops: Drops) -> Text:
    """A Text; an empty one, which keeps its place among the texts and is counted here, where `value` is not a text.

    Bytes are UTF-8, as `decoded` reads it. A text of white space stays: where it is not written, it is counted.
    """
    if isinstance(value, bytes):
        value = decoded(value, name, drops)
    if isinstance(value, str):
        if not value:
            drops.left_out("text", "blank", name)
        return Text(value)
    drops.bad("text", "null" if value is None else "not a string", name)
    return Text("")


def interleaved(
    images: Iterable[Any], texts: Iterable[Any], found: Iterable[Image | None], name: str, drops: Drops
) -> tuple[tuple[Text | Image, ...], int]:
    """(items, number of lost images) of two lists of one length, of which the image counts where neither is null.

    found: what was read of each image that is not null; None where that was counted as bad.
    """
    items: list[Text | Image] = []
    read = list(found)
    rest = iter(read)
    for image, text in zip(images, texts, strict=True):
        if image is None:
            items.append(text_item(text, name, drops))
            continue
        if text is not None:
            drops.bad("text", "both image and text at one position", name, sample=str(as_text(text, name, drops)))
        if (item := next(rest)) is not None:
            items.append(item)
    return tuple(items), read.count(None)


def its_id(record: object, name: str, drops: Drops) -> dict[str, Any]:
    """A document's metadata with what its record calls it: a URL, else an id; {} where it has neither.

    Bytes are UTF-8, as `decoded` reads it.
    """
    if isinstance(record, dict):
        for key in ("url", "id"):
            if isinstance(value := as_text(record.get(key), name, drops), str | int) and value != "":
                return {"id": str(value)}
    return {}


def listed(names: str) -> tuple[str, ...]:
    """The names in an option that has several, separated by commas."""
    return tuple(name.strip() for name in names.split(",") if name.strip())


def more_captions(record: Any, keys: Iterable[str], name: str, drops: Drops) -> Iterator[str | bytes]:
    """The captions under some keys of a record, strings or lists of strings, in this order."""
    for key in keys if isinstance(record, dict) else ():
        found = record.get(key)
        for text in found if isinstance(found, list) else [found]:
            if isinstance(text, str | bytes):
                yield text
            elif text is not None:
                drops.bad("text", "not a string", name)


def number_or_none(value: object) -> float | None:
    """A number as float, whatever else as NaN; None stays None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return float("nan")
    try:
        return float(value)
    except OverflowError:
        return float("nan")


def index_or_none(value: object) -> int | None:
    """An index, or -1 (out of range) for whatever is not a whole number; None stays None."""
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, float) and value.is_integer():
        whole = True
    return int(value) if whole else -1  # type: ignore[call-overload]


def _keys(names: Iterable[str]) -> tuple[list[str], list[str]]:
    exact: list[str] = []
    partial: list[str] = []
    for whole, *shorter in filter(None, map(_ends, names)):
        if whole not in partial:  # else it is an earlier name without its folders
            exact.append(whole)
            partial += [_ending(whole), *shorter]
    return exact, sorted(partial, key=lambda end: -end.count("/"))
