"""What the tests read from image stores, without the code that they test."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq

_COLUMNS = ["url", "key", "status", "reason", "sha256", "size", "width", "height"]


def read_rows(folder: Path) -> Iterator[dict[str, object]]:
    """Every row of the tables of a store, without the images."""
    for table in sorted(folder.glob("[0-9]*-[0-9]*.parquet")):
        yield from pq.read_table(table, columns=_COLUMNS).to_pylist()


def images_in(folder: Path) -> dict[str, bytes]:
    """The images of a store by their key, each once, from its tars, or from its tables that have them."""
    found: dict[str, bytes] = {}
    for tar in sorted(folder.glob("*.tar")):
        with tarfile.open(tar) as archive:
            for member in archive:
                stem, _, extension = member.name.partition(".")
                assert extension == "png"
                assert stem not in found
                found[stem] = archive.extractfile(member).read()  # type: ignore[union-attr]
    for table in sorted(folder.glob("*.images.parquet")):
        for row in pq.read_table(table).to_pylist():
            assert (row["bytes"] is None) == (row["status"] != "kept")
            if row["bytes"] is not None:
                assert row["key"] not in found
                found[row["key"]] = row["bytes"]
    return found
