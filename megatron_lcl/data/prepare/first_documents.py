"""The first documents of an input, for a trial: another importer, read no further."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from megatron_lcl.data.corpus.document import Document
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.prepare.faulty_documents import naming_faulty_documents
from megatron_lcl.data.prepare.importers import Importer, Unit


class FirstDocuments(Importer):
    """The first `limit` documents of `importer`, which has been scanned."""

    def __init__(self, importer: Importer, limit: int) -> None:
        self._importer = importer
        self._limit = limit
        self.kind = importer.kind
        self.separator = importer.separator

    def __str__(self) -> str:
        return str(self._importer)

    def signature(self) -> str:
        return self._importer.signature()

    def units(self) -> list[Unit]:
        """As many as it takes; the documents in them are read to be counted. Payload: (unit, documents of it)."""
        units: list[Unit] = []
        missing = self._limit
        for unit in self._importer.units():
            if not missing:
                break
            with naming_faulty_documents(self._importer, [unit]):
                found = sum(1 for _ in itertools.islice(self._importer.documents(unit, Drops()), missing))
            missing -= found
            units.append(Unit(unit.name, unit.size, (unit, found if not missing else None)))
        return units

    def prepare(self, folder: Path) -> None:
        self._importer.prepare(folder)

    def place(self, name: str) -> str:
        return self._importer.place(name)

    def count_others(self, drops: Drops) -> None:
        self._importer.count_others(drops)

    def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:
        inner, count = unit.payload
        yield from itertools.islice(self._importer.documents(inner, drops), count)
