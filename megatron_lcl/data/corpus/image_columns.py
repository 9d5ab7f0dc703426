"""A shard's `images-00000.arrow`: what is known of its images, and of their places in documents.

One row: large_list `images` (width, height, format, xxh3), large_list `placements` (similarity, matched_text), an entry
for each piece of mode 1 in order. `format` is a number in the list `formats` of the schema's metadata.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_lcl.data.corpus.indexed import FileInfo, map_file, write_file
from megatron_lcl.errors import UserError

FORMATS = ("?", "JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "PPM", "ICO", "JPEG2000", "MPO")
"""formats of images, by the number that a corpus has of each; others may only be appended"""

_IMAGE_TYPE = pa.struct([("width", pa.int32()), ("height", pa.int32()), ("format", pa.int8()), ("xxh3", pa.binary(16))])
_PLACEMENT_TYPE = pa.struct([("similarity", pa.float32()), ("matched_text", pa.int32())])


def write_columns(
    path: Path, sizes: tuple[array, array, array], digests: Collection[bytes], similarity: array, matched_text: array
) -> FileInfo:
    """Write the file; its size and hash.

    sizes: of each image width and height, int32, and format, int8, an index into FORMATS. digests: its XXH3-128.
    similarity, matched_text: of each placement, float32 (NaN: none) and int32 (-1: none).
    """
    columns: dict[str, tuple[pa.StructType, list[pa.Array]]] = {
        "images": (
            _IMAGE_TYPE,
            [
                *map(_arrow, sizes, (pa.int32(), pa.int32(), pa.int8())),
                pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(16), len(digests), [None, pa.py_buffer(b"".join(digests))]
                ),
            ],
        ),
        "placements": (_PLACEMENT_TYPE, [_arrow(similarity, pa.float32()), _arrow(matched_text, pa.int32())]),
    }
    lists = {
        name: pa.LargeListArray.from_arrays(
            pa.array([0, len(arrays[0])], pa.int64()), pa.StructArray.from_arrays(arrays, fields=list(kind))
        )
        for name, (kind, arrays) in columns.items()
    }
    batch = pa.record_batch(lists)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema.with_metadata({"formats": ",".join(FORMATS)})) as writer:
        writer.write_batch(batch)
    return write_file(path, sink.getvalue().to_pybytes())


def _arrow(values: array, kind: pa.DataType) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def read_columns(path: Path) -> tuple[pa.StructArray, pa.StructArray]:
    """Images and placements of a shard, mapped. UserError where the file is missing, damaged, or of a later release."""
    try:
        content = map_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the corpus is incomplete") from None
    try:
        formats, images, placements = _columns(content)
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if more := formats[len(FORMATS) :]:
        raise UserError(
            f"{path} was written by a later release, which has more formats of images ({', '.join(more)}); read it "
            "with that one"
        )
    return images, placements


def _columns(content: pa.Buffer) -> tuple[list[str], pa.StructArray, pa.StructArray]:
    """Formats, images, placements; raises whatever a damaged file makes pyarrow raise."""
    row = pa.ipc.open_file(content).get_batch(0)
    row.validate(full=True)  # else a wrong length leads outside the file
    lists = [row.column("images"), row.column("placements")]
    if [array.type.value_type for array in lists] != [_IMAGE_TYPE, _PLACEMENT_TYPE] or row.num_rows != 1:
        raise UserError("it has other columns")
    if any(array.null_count for array in (*lists, *(field for array in lists for field in array.values.flatten()))):
        raise UserError("it has gaps")
    formats = (row.schema.metadata or {}).get(b"formats", b"").decode().split(",")
    if any(ours != theirs for ours, theirs in zip(FORMATS, formats, strict=False)):
        raise UserError(f"its `formats` are {','.join(formats)!r}, not {','.join(FORMATS)!r} (docs/corpus-format.md)")
    images, placements = (array.values for array in lists)
    numbers = images.field("format").to_numpy()
    wrong = (numbers < 0) | (numbers >= len(formats))
    if wrong.any():  # else it would be an error where it is looked up, or -1 taken for the last
        j = int(np.argmax(wrong))
        raise UserError(f"image {j} has the format {numbers[j]}, and its {len(formats)} `formats` begin with 0")
    return formats, images, placements
