"""Image stores in parquet (`fetch --store parquet`): a row for each URL, with its image, as any reader takes.

An image is found in a file as in a tar, by its first byte and its size. A row group's images are one page, neither
compressed nor in a dictionary: its values, each 4 bytes of size and the image, end where the column of the group ends
(Apache Parquet's format: "Data Pages", "Plain"). What another program has written anew is laid out otherwise; that
shows at the sizes, and is refused.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_lcl.data.prepare.importers import row_groups

IMAGES = "bytes"
"""the column of the images, null where there is none; `key` and `size` name and measure them"""
GROUP_BYTES, GROUP_ROWS = 32 << 20, 1000
"""a row group's images, but for the last, and its rows, are no more"""
DAMAGE = (*row_groups.DAMAGE, KeyError)
_MAX_PAGE = 1 << 30
_SIZE = 4


def write_image_table(file: Path, groups: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Each table becomes a row group. schema: with `IMAGES`, and strings and numbers."""
    others = [name for name in schema.names if name != IMAGES]
    with pq.ParquetWriter(
        file,
        schema,
        compression={**dict.fromkeys(others, "zstd"), IMAGES: "none"},
        use_dictionary=others,
        write_statistics=others,
        data_page_size=_MAX_PAGE,
        data_page_version="1.0",
    ) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=len(group))


def image_places(file: Path) -> Iterator[tuple[str, int, int]]:
    """(key, first byte, size) of the images of a file; one of DAMAGE where they do not lie as they were written."""
    with pq.ParquetFile(row_groups.opened(file)) as table, file.open("rb") as raw:
        schema = table.schema_arrow
        column = schema.names.index(IMAGES)
        if schema.field("key").type != pa.string() or not pa.types.is_integer(schema.field("size").type):
            raise ValueError
        file_size = raw.seek(0, io.SEEK_END)
        for group in range(table.num_row_groups):
            chunk = table.metadata.row_group(group).column(column)
            rows = table.read_row_group(group, columns=["key", "size", "status"], use_threads=False).to_pylist()
            kept = [(row["key"], row["size"]) for row in rows if row["status"] == "kept"]
            end = chunk.data_page_offset + chunk.total_compressed_size
            if end > file_size or any(key is None or size is None for key, size in kept):
                raise ValueError
            start = end - sum(_SIZE + size for _, size in kept)
            for key, size in kept:
                raw.seek(max(0, start))
                if int.from_bytes(raw.read(_SIZE), "little") != size:
                    raise ValueError
                yield key, start + _SIZE, size
                start += _SIZE + size
