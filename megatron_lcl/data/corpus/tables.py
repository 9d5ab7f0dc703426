"""Parquet files of our own, each read whole or by columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def read_table(file: Path, **options: Any) -> pa.Table:
    """What `pyarrow.parquet.read_table` reads of one file, and nothing of its path.

    pyarrow 17 to 24 adds a column for a folder `key=value` above the file (apache/arrow#43574), as of a data set in
    many files.
    """
    return pq.read_table(file, partitioning=None, **options)
