"""Samples of a WebDataset tar, through the `webdataset` library; what a damaged tar still holds is read."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.importers import Unit
from megatron_lcl.data.prepare.importers.files import FilesImporter
from megatron_lcl.errors import UserError


class TarImporter(FilesImporter):
    """A tar file or a folder of them, which hold texts and images alike."""

    format: ClassVar[str]
    suffixes = (".tar", ".tar.gz", ".tgz")
    reads_objects = True

    def __init__(self, input: Path, images: Path | None = None) -> None:
        if images is not None:
            raise UserError(f"format {self.format} has its images in the tars; leave out --images")
        super().__init__(input)

    def units_of_files(self) -> list[Unit]:
        """Payload: the path."""
        return [Unit(self.found.name(file), file.stat().st_size, file) for file in self.files]


def tar_samples(unit: Unit, drops: Drops) -> Iterator[dict[str, Any]]:
    """{"__key__": key, suffix: bytes, …} of each sample."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    def count(error: Exception) -> bool:
        """Called by the library for whatever goes wrong; True to go on with the next file."""
        if isinstance(error, tarfile.TarError | EOFError | OSError | zlib.error):
            drops.bad("document", "damaged or truncated tar, the samples after it are lost", unit.name)
            return False
        if isinstance(error, ValueError):
            drops.bad("document", "file name twice in a tar", unit.name)
            return True
        raise error

    try:
        with unit.payload.open("rb") as stream:
            files = tar_file_expander([{"url": unit.name, "stream": stream}], handler=count)
            yield from group_by_keys(files, handler=count)
    except OSError as error:
        drops.bad("document", f"file cannot be read ({error.strerror})", unit.name)
