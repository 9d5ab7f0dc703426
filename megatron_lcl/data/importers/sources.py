"""Where images are: a folder, a tar file, or a folder of tar files. Names never lead outside."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from megatron_lcl.data.document import Text
from megatron_lcl.data.drops import Drops
from megatron_lcl.data.probe import BadImage

MAX_FILE = 256 << 20


class ImageSource:
    """Images by name below `root`: a folder, which may itself hold tar files, or one tar file; None: there are none.

    Tar files are listed when a name is first not found in the folder, and then kept in mind: about 200 bytes an image.
    """

    def __init__(self, root: Path | None) -> None:
        self._root = root
        self._tars: list[Path] = []
        self._members: dict[str, tuple[int, int, int]] | None = None
        """name, and name without folders → (tar, first byte, size)"""

    def __getstate__(self) -> dict[str, Any]:
        return {"_root": self._root, "_tars": [], "_members": None}

    def read(self, names: str | Iterable[str]) -> bytes:
        """The first of the names that there is. BadImage says why there is none."""
        if self._root is None:
            raise BadImage("no image folder was given")
        candidates = [names] if isinstance(names, str) else list(names)
        for name in candidates:
            _check_name(name)
        for name in candidates:
            if (data := _read_file(self._root / name)) is not None:
                return data
        if self._members is None:
            self._members = self._list_tars(self._root)
        for name in candidates:
            if name in self._members:
                return self._read_member(*self._members[name])
        raise BadImage("file missing")

    def _list_tars(self, root: Path) -> dict[str, tuple[int, int, int]]:
        self._tars = [root] if root.is_file() else sorted(root.glob("*.tar"))
        members: dict[str, tuple[int, int, int]] = {}
        for number, path in enumerate(self._tars):
            for name, start, size in _tar_index(path):
                members.setdefault(name, (number, start, size))
                members.setdefault(PurePosixPath(name).name, (number, start, size))
        return members

    def _read_member(self, number: int, start: int, size: int) -> bytes:
        if size > MAX_FILE:
            raise BadImage(f"over {MAX_FILE >> 20} MiB")
        with open(self._tars[number], "rb") as file:
            file.seek(start)
            return file.read(size)


def _tar_index(path: Path) -> list[tuple[str, int, int]]:
    """(name, first byte, size) of the regular files in a tar, as far as it can be read."""
    found: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as archive:
            found.extend((m.name.removeprefix("./"), m.offset_data, m.size) for m in archive if m.isfile())
    except (tarfile.TarError, OSError, EOFError, ValueError):
        pass  # images that are not found are counted one by one
    return found


def _check_name(name: str) -> None:
    """Refuse what is not a plain relative path."""
    path = PurePosixPath(name)
    if not name.strip():
        raise BadImage("no name")
    if path.is_absolute() or ".." in path.parts or "\0" in name or PureWindowsPath(name).drive or "\\" in name:
        raise BadImage("name leads outside the folder")


def _read_file(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > MAX_FILE:
            raise BadImage(f"over {MAX_FILE >> 20} MiB")
        return path.read_bytes()
    except (OSError, ValueError):
        return None


def text_item(value: object, name: str, drops: Drops) -> Text:
    """A Text; an empty one, which keeps its place among the texts and is counted here, where `value` is not a text."""
    if isinstance(value, str) and value.strip():
        return Text(value)
    if isinstance(value, str):
        drops.left_out("text", "blank", name)
    else:
        drops.bad("text", "null" if value is None else "not a string", name)
    return Text("")


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
