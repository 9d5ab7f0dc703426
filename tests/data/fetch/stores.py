"""What the tests read from image stores, without the code that they test."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow.parquet as pq


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
