"""A folder's manifest: size and hash of every file in it, and a hash of its own, so that any flipped byte shows."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import xxhash

from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.storage.names import is_within
from megatron_lcl.errors import UserError

MANIFEST = "manifest.json"


class Unread(str):
    """The fault of a file that could not be read this time, for its storage or its permissions: it may be whole."""

    __slots__ = ()


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as they stand in a manifest."""
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}


def manifest_text(files: Mapping[str, dict[str, Any]]) -> str:
    """A manifest of files: fingerprints by name."""
    listed = json.dumps(files, sort_keys=True)
    own = xxhash.xxh3_128_hexdigest(listed.encode())
    return json.dumps({"files": files, "xxh3": own}, indent=1, sort_keys=True)


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The fingerprints of a folder's files. UserError where the manifest is damaged, another kind of folder's, or has
    names that lead out of the folder, OSError where there is none."""
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(text)
        if "format" in content:  # what `import` wrote under this name before it had one of its own
            raise UserError(f"lists the files of an {content['format']}, not of a run's checkpoint")
        files = content["files"]
        whole = text == manifest_text(files)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError("changed since it was written")
    if strange := [name for name in files if not is_within(name)]:
        raise UserError(f"names a file outside of its folder ({strange[0]})")
    return files


def verify(folder: Path, quick: bool = False, only: Container[str] | None = None) -> list[str]:
    """What is wrong with a folder, by file; empty if nothing is. Of what could not be read, and may be whole: `Unread`.

    quick: sizes only, nothing is read; only: these files. Files that the manifest does not name are no fault.
    """
    try:
        manifest = read_manifest(folder)
    except OSError as error:
        return [_unread(MANIFEST, error)]
    except ValueError as error:
        return [f"{MANIFEST}: {error}"]
    chosen = ((name, file) for name, file in manifest.items() if only is None or name in only)
    return [fault for name, file in chosen if (fault := _fault(folder / name, name, file, quick))]


def _fault(path: Path, name: str, expected: dict[str, Any], quick: bool) -> str | None:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return f"{name}: {size} bytes, was written with {expected['bytes']}"
        if not quick and hash_file(path) != expected["xxh3"]:
            return f"{name}: changed since it was written"
    except OSError as error:
        return _unread(name, error)
    return None


def _unread(name: str, error: OSError) -> str:
    missing = isinstance(error, FileNotFoundError | NotADirectoryError)
    return f"{name}: missing" if missing else Unread(f"{name}: {error.strerror or error}")
