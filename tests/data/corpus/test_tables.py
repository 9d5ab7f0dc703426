"""Tables are read as they were written, whatever the folders above them are called."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.corpus import tables


def test_a_folder_is_no_column(tmp_path: Path) -> None:
    folder = tmp_path / "a=b" / "url=9"
    folder.mkdir(parents=True)
    table = pa.table({"url": ["x", "y"], "status": ["kept", "dead"]})
    pq.write_table(table, file := folder / "a.parquet")
    assert tables.read_table(file) == table
    assert tables.read_table(file, columns=["url"]) == table.select(["url"])
    assert tables.read_table(file, filters=[("status", "=", "dead")], use_threads=False) == table.slice(1)


def test_no_other_module_reads_tables_by_pyarrow() -> None:
    root = Path(tables.__file__).parents[2]
    found = re.compile(r"\b(pq|pyarrow\.parquet)\.read_table\b|from pyarrow\.parquet import .*\bread_table\b")
    for text in (
        "pq.read_table(file)",
        "pyarrow.parquet.read_table(file)",
        "from pyarrow.parquet import a, read_table",
    ):
        assert found.search(text)
    assert not found.search("from megatron_lcl.data.corpus.tables import read_table")
    users = [file for file in root.rglob("*.py") if found.search(file.read_text(encoding="utf-8"))]
    assert [file.relative_to(root) for file in users] == [Path("data/corpus/tables.py")]
