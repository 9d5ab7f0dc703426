"""Is a corpus complete and valid? Checksums, offsets, index ranges, token ids, and that every image decodes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_lcl.data.corpus.corpus_manifest import COUNTS, MANIFEST, contents_of, has_names, shard_files, total
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.indexed import IMAGE, TEXT
from megatron_lcl.data.corpus.probe import BadImage, probe
from megatron_lcl.data.corpus.scratch import temporary_folder
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus, is_corpus, open_corpus
from megatron_lcl.data.corpus.structure import structure_faults
from megatron_lcl.data.corpus.tokenizer import SPECIAL_TOKENS
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.errors import UserError
from megatron_lcl.interrupts import ending_on_sigterm
from megatron_lcl.units import counted

_BLOCK = 1 << 22
"""tokens that are looked at together; more where a single piece has more"""


def verify(path: str | Path, quick: bool = False, max_faults: int = 10) -> list[str]:
    """The first `max_faults` faults of the corpus at `path`, a line each; an empty list if there is none.

    `quick` skips the images: that they decode, and have the stored size and hash. Of a corpus in object storage one
    shard at a time is copied to the folder for temporary files (TMPDIR). UserError where the storage cannot be reached,
    or `path` is a folder without a manifest.
    """
    faults: list[str] = []
    with ending_on_sigterm(), closing(_faults(Path(path), quick)) as found:
        for fault in found:
            faults.append(fault)
            if len(faults) == max_faults:
                break
    return faults


def _faults(path: Path, quick: bool) -> Generator[str, None, None]:
    try:
        corpus = open_corpus(path)
    except StorageError:
        raise
    except UserError as error:
        if not is_corpus(path):
            raise
        yield error.said()
        return
    files, named = corpus.manifest["files"], corpus.manifest["tokenizer"]
    of_shards = {name for number in range(corpus.num_shards) for name in shard_files(number)}
    others = [name for name in files if name not in of_shards]
    with _on_disk(corpus, others) as folder:
        for name in others:
            yield from _file_faults(folder / name, files[name])
    listed = {name for number in range(corpus.num_shards) for name in shard_files(number, names=False)}
    for name in sorted({*listed, named["file"]} - set(files)):
        yield f"{name}: not in the manifest"
    if total(corpus.manifest["shards"]) != corpus.manifest["counts"]:
        yield f"{MANIFEST}: the counts are not the sum of the shards'"
    try:
        if (corpus.tokenizer.fingerprint, corpus.tokenizer.vocab_size) != (named["fingerprint"], named["vocab_size"]):
            yield f"{named['file']}: not the tokenizer that the manifest names"
    except UserError as error:
        yield str(error)
    if not listed - set(files) and corpus.manifest.get("contents") not in (None, contents_of(corpus.manifest)):
        yield f"{MANIFEST}: its `contents` are not those of the files that it names"
    for number in range(corpus.num_shards):
        names = [name for name in shard_files(number) if name in files]
        with _on_disk(corpus, names) as folder:
            for name in names:
                yield from _file_faults(folder / name, files[name])
            try:
                for fault in _shard_faults(corpus, folder, number, named["vocab_size"] - len(SPECIAL_TOKENS), quick):
                    yield f"shard {number:05d}: {fault}"
            except UserError as error:
                yield str(error)


@contextmanager
def _on_disk(corpus: Corpus, names: list[str]) -> Iterator[Path]:
    """The folder with some files of a corpus; of one in object storage copies, as far as they are there."""
    if corpus.remote is None:
        yield corpus.path
        return
    with temporary_folder("megatron-lcl-verify-") as folder:
        found = zip(names, corpus.remote.store.head(names), strict=True)
        there = {name: about for name, about in found if about}
        corpus.remote.store.fetch(list(there), folder, list(there.values()))
        yield folder


def _file_faults(path: Path, info: dict[str, Any]) -> Iterator[str]:
    try:
        size, digest = path.stat().st_size, hash_file(path)
    except OSError as error:
        yield f"{path.name}: {error.strerror}"
        return
    if size != info["size"]:
        yield f"{path.name}: {size:,} bytes, not {info['size']:,}"
    elif digest != info["xxh3"]:
        yield f"{path.name}: its XXH3 is not that of the manifest"


def _shard_faults(corpus: Corpus, folder: Path, number: int, base_size: int, quick: bool) -> Iterator[str]:
    shard = Shard(folder, number)
    structure = list(structure_faults(shard))
    yield from structure
    if structure:
        return  # what follows reads by these offsets
    yield from _content_faults(shard, base_size)
    if has_names(corpus.manifest, number) and shard.names is not None:
        shard.names.check()
    counts = {
        "documents": shard.num_documents,
        "pieces": shard.num_pieces,
        "tokens": int(shard.lengths[shard.modes == TEXT].sum(dtype=np.int64)),
        "placements": int((shard.modes == IMAGE).sum()),
        "images": shard.num_images,
        "image_bytes": int(shard.image_sizes.sum(dtype=np.int64)),
    }
    if counts != (said := {name: corpus.manifest["shards"][number][name] for name in COUNTS}):
        yield f"holds {counts}, the manifest says {said}"
    if not quick:
        for j in range(shard.num_images):
            yield from _image_faults(shard, j)


def _content_faults(shard: Shard, base_size: int) -> Iterator[str]:
    is_image = shard.modes == IMAGE
    if (shard.lengths[is_image] != 1).any():
        yield "an image piece that is not one number"
        return
    elements = shard.pieces(0, shard.num_pieces)
    ends = np.cumsum(shard.lengths, dtype=np.int64)
    for first, last in _blocks(ends):
        values = shard.pieces(first, last)
        limits = np.repeat(np.where(is_image[first:last], shard.num_images, base_size), shard.lengths[first:last])
        wrong = (values < 0) | (values >= limits)
        if wrong.any():
            where = int(np.argmax(wrong))
            piece = int(np.searchsorted(ends, where + (ends[first - 1] if first else 0), side="right"))
            kind = "image index" if is_image[piece] else "token id"
            yield f"piece {piece}: {kind} {int(values[where])} is out of range"
            return
    used = np.unique(elements[ends[is_image] - 1])
    if len(used) != shard.num_images:
        yield f"{counted(shard.num_images - len(used), 'stored image')} that no document shows"
    infinite = np.isinf(shard.similarity)
    if infinite.any():
        yield f"placement {int(np.argmax(infinite))}: its similarity is infinite"
    document_of = np.repeat(np.arange(shard.num_documents), np.diff(shard.document_offsets))
    num_texts = np.bincount(document_of[~is_image], minlength=shard.num_documents)
    limit = num_texts[document_of[is_image]]
    wrong = (shard.matched_text < -1) | (shard.matched_text >= limit)
    if wrong.any():
        at = int(np.argmax(wrong))
        texts = counted(int(limit[at]), "text")
        yield f"placement {at}: matched text {int(shard.matched_text[at])} of a document with {texts}"


def _blocks(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """The pieces first … last-1 that are looked at together, so that memory stays small.

    ends: int64 [pieces], the number of tokens up to the end of each.
    """
    first = tokens = 0
    while first < len(ends):
        last = max(first + 1, int(np.searchsorted(ends, tokens + _BLOCK, side="right")))
        yield first, last
        first, tokens = last, int(ends[last - 1])


def _image_faults(shard: Shard, j: int) -> Iterator[str]:
    data = bytes(shard.image(j))
    if xxhash.xxh3_128_digest(data) != shard.image_xxh3[j].tobytes():
        yield f"image {j}: its XXH3 is not the stored one"
    try:
        found = probe(data)
    except BadImage as error:
        yield f"image {j}: {error}"
        return
    if (found.width, found.height) != (shard.image_width[j], shard.image_height[j]):
        yield f"image {j}: {found.width}x{found.height}, not {shard.image_width[j]}x{shard.image_height[j]}"
