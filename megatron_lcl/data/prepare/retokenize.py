"""A corpus under another tokenizer: texts are decoded and encoded again, images linked, never read.

A corpus keeps no texts but their ids. So its tokenizer must give back every text exactly; a corpus of one that does not
(CLIP's, which lower-cases) is refused.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.corpus_manifest import (
    PARENTS,
    as_parent,
    has_names,
    manifest_of,
    shard_files,
    write_manifest,
)
from megatron_lcl.data.corpus.drops import LOG
from megatron_lcl.data.corpus.indexed import IMAGE, TEXT, FileInfo, IndexedWriter, write_file
from megatron_lcl.data.corpus.scratch import whole_folder
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.corpus.tokenizer import JoinedEncoder, Tokenizer
from megatron_lcl.data.prepare.merge import link_file
from megatron_lcl.errors import UserError

_BATCH = 384
"""pieces encoded together"""


def retokenize(
    corpus: str | Path, output: str | Path, tokenizer: Tokenizer | str | Path, progress: bool = False
) -> dict[str, Any]:
    """Write `corpus` with the ids of another tokenizer into the new folder `output`; returns its manifest.

    Shards, documents, their order, names and images are the same; the files of the images are hard-linked (copied to
    another file system, or from object storage). Raises UserError, leaving nothing, where the corpus has this
    tokenizer, its own does not give texts back exactly, a file is missing, or a text has no tokens under the new one.
    """
    source, output = open_corpus(corpus), Path(output)
    new = tokenizers.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    if new.fingerprint == source.manifest["tokenizer"]["fingerprint"]:
        raise UserError(f"{source.where} has this tokenizer already")
    if not source.tokenizer.is_lossless:
        raise UserError(
            f"the tokenizer of {source.where} ({source.tokenizer.fingerprint.partition('-')[0]}) does not give texts "
            "back as they were; run `megatron-lcl preprocess` on their source with the new one"
        )
    source.check_sizes()
    with whole_folder(output) as folder:
        files: dict[str, FileInfo] = {}
        shards = []
        encode = new.joined_encoder()
        for number in tqdm(range(source.num_shards), desc=output.name, unit="shard", disable=not progress):
            written = _write_tokens(source, number, folder, encode)
            files |= written
            for name in shard_files(number, has_names(source.manifest, number)):
                if name not in written:
                    link_file(source, name, folder / name)
                    files[name] = source.manifest["files"][name]
            entry = source.manifest["shards"][number]
            shards.append({**entry, "tokens": _num_tokens(written, entry["placements"])})
        files[new.file_name] = write_file(folder / new.file_name, new.content)
        if LOG in source.manifest["files"]:
            link_file(source, LOG, folder / LOG)
            files[LOG] = source.manifest["files"][LOG]
        manifest = manifest_of(
            source=source.manifest["source"],
            tokenizer=new.entry,
            drops=source.manifest["drops"],
            shards=shards,
            files=files,
            recipe={"retokenized": source.manifest["fingerprint"], "tokenizer": new.fingerprint},
            **{PARENTS: [as_parent(source.manifest)]},
        )
        write_manifest(folder, manifest)
    return manifest


def _num_tokens(files: dict[str, FileInfo], num_images: int) -> int:
    """Of a shard's new files: an image piece is one number of the container."""
    size = next(info["size"] for name, info in files.items() if name.endswith(".bin"))
    return int(size) // 4 - num_images


def _write_tokens(corpus: Corpus, number: int, folder: Path, encode: JoinedEncoder) -> dict[str, FileInfo]:
    """The token files of a shard anew."""
    shard = corpus.open_shard(number)
    writer = IndexedWriter(folder / f"tokens-{number:05d}", np.int32)
    ends = set(shard.document_offsets[1:].tolist())
    try:
        for start in range(0, shard.num_pieces, _BATCH):
            stop = min(start + _BATCH, shard.num_pieces)
            texts = [(k, _text(corpus, shard, k)) for k in range(start, stop) if shard.modes[k] == TEXT]
            ids, lengths = encode([text for _, text in texts])
            rest = io.BytesIO(ids)
            pieces = map(rest.read, (4 * length for length in lengths))
            for k in range(start, stop):
                if shard.modes[k] == IMAGE:
                    writer.add(shard.pieces(k, k + 1), IMAGE)
                elif piece := next(pieces):
                    writer.add(piece, TEXT)
                else:
                    raise UserError(
                        f"{_name(corpus, shard, k)}: a text of {shard.lengths[k]} tokens has none under the new one"
                    )
                if k + 1 in ends:
                    writer.end_document()
        return writer.finish()
    except BaseException:
        writer.abort()
        raise


def _text(corpus: Corpus, shard: Shard, piece: int) -> str:
    """The text of a piece. UserError where it has other ids, such as one with an unknown token."""
    ids = shard.pieces(piece, piece + 1)
    text = corpus.tokenizer.decode(ids)
    if corpus.tokenizer.encode(text) != ids.tolist():
        raise UserError(
            f"{_name(corpus, shard, piece)}: a text that the corpus's tokenizer does not give back exactly; run "
            "`megatron-lcl preprocess` on the source with the new tokenizer"
        )
    return text


def _name(corpus: Corpus, shard: Shard, piece: int) -> str:
    document = int(corpus.document_starts[shard.number]) + shard.document_of(piece)
    return f"document {document} ({corpus.name(document) or shard.number})"
