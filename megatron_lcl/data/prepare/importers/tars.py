"""Samples of a WebDataset tar, through the `webdataset` library; what a damaged tar still holds is read."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Importer, Unit, files_signature
from megatron_lcl.data.prepare.importers.lines import find_files
from megatron_lcl.errors import UserError


def tar_units(input: Path, what: str) -> tuple[Path, list[Path], list[Unit]]:
    """Root folder, tar files and units (payload: the path). UserError where there are none."""
    files = find_files(input, (".tar", ".tar.gz"))
    if not files:
        raise UserError(f"no .tar files of {what} in {input}")
    return (
        input if input.is_dir() else input.parent,
        files,
        [Unit(file.name, file.stat().st_size, file) for file in files],
    )


class TarImporter(Importer):
    """`input`: a tar file or a folder of them, which hold texts and images alike."""

    format: ClassVar[str]
    contents: ClassVar[str]
    """what the tars hold, for messages"""

    def __init__(self, input: Path, images: Path | None = None) -> None:
        if images is not None:
            raise UserError(f"format {self.format} has its images in the tars; give no image folder")
        self.root, self.files, self._units = tar_units(input, self.contents)

    def signature(self) -> str:
        return files_signature(self.files, self.root)

    def units(self) -> list[Unit]:
        return self._units


def tar_samples(path: Path, drops: Drops) -> Iterator[dict[str, Any]]:
    """{"__key__": key, suffix: bytes, …} of each sample."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def count(error: Exception) -> bool:
        """Called by the library for whatever goes wrong; True to go on with the next file."""
        if isinstance(error, tarfile.TarError | EOFError | OSError | zlib.error):
            drops.bad("document", "damaged or truncated tar, the samples after it are lost", path.name)
            return False
        if isinstance(error, ValueError):
            drops.bad("document", "file name twice in a tar", path.name)
            return True
        raise error

    try:
        with open(path, "rb") as stream:
            files = tar_file_expander([{"url": path.name, "stream": stream}], handler=count)
            yield from group_by_keys(files, handler=count)
    except OSError as error:
        drops.bad("document", f"file cannot be read ({error.strerror})", path.name)
