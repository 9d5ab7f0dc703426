"""What tests of corpora share: a tokenizer, documents through a corpus and back, a corpus of given lines, damage."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from data import writers
from PIL import Image as Pillow

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.importers import Importer
from megatron_lcl.data.prepare.preprocess import Summary, preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece

TOKENIZER = train_sentencepiece(["The quick brown fox jumps over the lazy dog. " * 20], 400)


def plain(documents: Sequence[Document]) -> list[list[object]]:
    """What a document holds, in order."""
    return [
        [item.text if isinstance(item, Text) else (item.data, item.similarity, item.matched_text) for item in d.items]
        for d in documents
    ]


def pixels(documents: Sequence[Document]) -> list[list[object]]:
    """The same with pixels in place of encoded bytes."""

    def decoded(data: bytes) -> tuple[object, ...]:
        array = np.asarray(Pillow.open(io.BytesIO(data)).convert("RGBA"))
        return array.shape, array.tobytes()

    return [[item.text if isinstance(item, Text) else decoded(item.data) for item in d.items] for d in documents]


def reduced(document: Document, side: int = 128) -> Document:
    """With images of at most so many pixels a side. MINT-1T's are decoded and encoded again: seconds for large ones."""
    items: list[Text | Image] = []
    for item in document.items:
        if isinstance(item, Image):
            small = Pillow.open(io.BytesIO(item.data)).convert("RGBA")
            small.thumbnail((side, side))
            item = Image(encoded(small, "PNG", compress_level=1))
        items.append(item)
    return Document(tuple(items))


def through(
    format: str, tmp_path: Path, input: Path, images: Path | None = None, tokenizer: tokenizers.Tokenizer = TOKENIZER
) -> list[Document]:
    preprocess(format, input, tmp_path / f"out-{format}", images=images, tokenizer=tokenizer)
    return list(open_corpus(tmp_path / f"out-{format}"))


def matched(document: Document) -> Document:
    """Every image before some text, with a similarity that float32 holds."""
    num_texts = len(document.texts)
    images = [Image(i.data, "", 0.25 + k / 64, k % num_texts) for k, i in enumerate(document.images)]
    items: list[Text | Image] = []
    for number, text in enumerate(document.texts):
        items += [image for image in images if image.matched_text == number] + [text]
    return Document(tuple(items))


def spaced(documents: Sequence[Document], separator: str) -> list[Document]:
    """With the separator before each text but the first, where no white space is on either side of the border."""
    result = []
    for document in documents:
        texts = [text.text for text in document.texts]
        glued = [False, *(re.search(r"\s$", a) is re.match(r"\s", b) is None for a, b in itertools.pairwise(texts))]
        new = (Text(separator * add + text) for add, text in zip(glued, texts, strict=False))
        items = tuple(next(new) if isinstance(item, Text) else item for item in document.items)
        result.append(Document(items, document.name, document.metadata, document.kind))
    return result


def check_all_formats(documents: list[Document], tmp_path: Path, tokenizer: tokenizers.Tokenizer = TOKENIZER) -> None:
    writers.write_jsonl(documents, tmp_path / "jsonl")
    assert plain(through("jsonl", tmp_path, tmp_path / "jsonl", None, tokenizer)) == plain(documents)
    for format, structs, separator in (("obelics", False, "\n\n"), ("omnicorpus", True, " ")):
        writers.write_parquet(documents, tmp_path / format, tmp_path / f"{format}-images", structs)
        back = through(format, tmp_path, tmp_path / format, tmp_path / f"{format}-images", tokenizer)
        assert plain(back) == plain(spaced(documents, separator))
    small = [reduced(d) for d in documents]
    writers.write_mint1t(small, tmp_path / "mint1t")
    assert pixels(through("mint1t", tmp_path, tmp_path / "mint1t", None, tokenizer)) == pixels(spaced(small, " "))
    with_texts = [matched(d) for d in documents if d.texts]
    if with_texts:
        writers.write_mmc4(with_texts, tmp_path / "mmc4", tmp_path / "mmc4-images")
        assert plain(through("mmc4", tmp_path, tmp_path / "mmc4", tmp_path / "mmc4-images", tokenizer)) == plain(
            spaced(with_texts, " ")
        )
    pairs = [Document((d.images[0], d.texts[0])) for d in documents if d.images and d.texts]
    if pairs:
        writers.write_webdataset(pairs, tmp_path / "webdataset")
        assert plain(through("webdataset", tmp_path, tmp_path / "webdataset", None, tokenizer)) == plain(pairs)


def corpus_of(tmp_path: Path, lines: list[Any], images: dict[str, bytes], **options: Any) -> Summary:
    (tmp_path / "in").mkdir()
    for name, data in images.items():
        (tmp_path / "in" / name).write_bytes(data)
    raw = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    (tmp_path / "in" / "a.jsonl").write_bytes(raw)
    return preprocess("jsonl", tmp_path / "in", tmp_path / "out", tokenizer=TOKENIZER, max_bad_fraction=1, **options)


def encoded(image: Pillow.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Flip bits, overwrite, insert, delete or repeat a stretch, or cut the end."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.choice((1, 2, 4, 16, 200))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + length] = rng.randbytes(length)
        elif kind == 2:
            data[at:at] = rng.choice(
                (b'"', b"\\u0000", b"null", b"{", b"]", b"\n", b"\xff", b"-1", b"1e999", b"<", b"\0")
            )
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length]
        else:
            del data[at:]
    return bytes(data)


def undecoded(values: Sequence[bytes | None]) -> pa.Array:
    """Strings as a damaged file has them: these bytes, be they UTF-8 or not."""
    valid, *buffers = pa.array(values, pa.binary()).buffers()
    return pa.StringArray.from_buffers(len(values), *buffers, valid)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def parts_in(work: Path) -> dict[str, dict[str, bytes]]:
    return {part.name: contents(part) for part in work.glob("part-*")}


def documents_of(importer: Importer) -> tuple[list[Document], Drops]:
    """All documents of an importer; read from pickled copies, last unit first, as any number of workers may."""
    units = importer.units()
    assert units == importer.units()
    parts = []
    for unit in reversed(units):
        drops = Drops()
        copy, unit = pickle.loads(pickle.dumps((importer, unit)))
        parts.append((list(copy.documents(unit, drops)), drops))
    total = Drops()
    for _, drops in reversed(parts):
        total.add(drops)
    importer.count_others(total)
    return [document for documents, _ in reversed(parts) for document in documents], total


def byte_level(special: str = "<|endoftext|>") -> Any:
    """A byte-pair encoding as GPT-2's, by the library itself; it asks for special tokens around a text and for cuts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[special], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 5], trainer)
    made.post_processor = processors.TemplateProcessing(single=f"{special} $A", special_tokens=[(special, 0)])
    made.enable_truncation(3)
    made.enable_padding(length=50, pad_token=special)
    return made
