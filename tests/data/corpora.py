"""Small corpora of known content: every text token and every image says which document and place it is from."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from megatron_lcl.data.corpus.corpus_manifest import total, write_manifest
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.indexed import FileInfo
from megatron_lcl.data.corpus.store import Corpus, ShardWriter, open_corpus
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer, Tokenizer

Piece = Sequence[int] | tuple[bytes, float | None, int | None]
"""token ids, or an image with similarity and matched text"""
MakeCorpus = Callable[..., Corpus]


def jpeg(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A JPEG of its own."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_corpus(
    folder: Path, documents: Sequence[Sequence[Piece]], num_shards: int = 1, source: str = "jsonl"
) -> Corpus:
    """A corpus of the given documents, spread over shards in order."""
    folder.mkdir(parents=True)
    shards, files = [], {}
    for k, block in enumerate(np.array_split(np.arange(len(documents)), num_shards)):
        writer = ShardWriter(folder, k)
        for d in block:
            for piece in documents[d]:
                if isinstance(piece, tuple):
                    writer.add_image(piece[0], 40, 32, "JPEG", piece[1], piece[2])
                else:
                    writer.add_texts([np.array(piece, np.int32).tobytes()])
            writer.end_document(f"source-{d}.txt")
        written, counts = writer.finish()
        files.update(written)
        shards.append(counts)
    return finish_corpus(folder, ClipTokenizer([]), shards, files, source)


def finish_corpus(
    folder: Path, tokenizer: Tokenizer, shards: list[dict[str, int]], files: dict[str, FileInfo], source: str = "jsonl"
) -> Corpus:
    """The corpus of shards that are written: counts of each, and all of their files."""
    tokenizer.save(folder / tokenizer.file_name)
    manifest = {"format_version": 1, "source": {"format": source}, "shards": shards, "files": files}
    manifest |= {"counts": total(shards), "drops": Drops().to_dict()}
    manifest["tokenizer"] = {
        "file": tokenizer.file_name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
    }
    write_manifest(folder, manifest)
    return open_corpus(folder)


def random_documents(
    num: int, seed: int = 0, matched: bool = False, mean_text: float = 20.0, max_images: int = 4, num_jpegs: int = 50
) -> list[list[Piece]]:
    """Documents of texts and images; matched ones as MMC4 has them, images behind all texts."""
    rng = np.random.default_rng(seed)
    jpegs = [jpeg(1000 * seed + i) for i in range(num_jpegs)]
    documents: list[list[Piece]] = []
    for _ in range(num):
        texts = [
            rng.integers(0, 500, max(1, int(rng.exponential(mean_text)))).tolist() for _ in range(rng.integers(1, 6))
        ]
        images = [jpegs[rng.integers(num_jpegs)] for _ in range(rng.integers(0, max_images + 1))]
        if matched:
            pieces: list[Piece] = [*texts]
            pieces += [(i, float(rng.uniform(0.15, 0.4)), int(rng.integers(len(texts)))) for i in images]
        else:
            pieces = [*texts, *((i, None, None) for i in images)]
            pieces = [pieces[k] for k in rng.permutation(len(pieces))]
        documents.append(pieces)
    return documents
