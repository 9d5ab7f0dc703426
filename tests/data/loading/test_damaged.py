"""Protects: a corpus whose files were changed, their sizes kept, is a one-line error wherever it is read, and neither a
crash nor other data than was written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import random_documents, write_corpus
from small_loaders import CONTEXT, P, loader_of

from megatron_lcl.config import Corpus, Data
from megatron_lcl.curate.documents import places, ranges
from megatron_lcl.data.corpus.indexed import map_array
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import ClipTokenizer
from megatron_lcl.data.loading.rules import Sequences
from megatron_lcl.data.loading.source import Source, open_source
from megatron_lcl.data.pages import inspect
from megatron_lcl.data.prepare.export_corpus import export_corpus
from megatron_lcl.data.prepare.retokenize import retokenize
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.sources import open_images

_HEADER = 34
"""bytes before the arrays of an index"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose document 0 has a text and then an image, and whose last one has a text."""
    documents = random_documents(40, num_jpegs=5)
    documents[-1] = [[7] * 30]
    documents[0] = [[7] * 30, documents[1][-1] if isinstance(documents[1][-1], tuple) else _image(documents)]
    return write_corpus(tmp_path_factory.mktemp("sound") / "corpus", documents).path


def _image(documents: list[Any]) -> Any:
    return next(piece for document in documents for piece in document if isinstance(piece, tuple))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "corpus"))


def changed(folder: Path, kind: str, array: str, at: int | slice, value: int) -> None:
    """Write one number into a shard's files, whose sizes stay."""
    prefix = folder / f"{kind}-00000"
    if array == "data":
        content = np.memmap(prefix.with_suffix(".bin"), np.int32, "r+")
        content[at] = value
        content.flush()
        return
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    num, entries = np.frombuffer(raw, np.uint64, 2, _HEADER - 16).tolist()
    sizes = {"lengths": (np.int32, num), "pointers": (np.int64, num), "documents": (np.int64, entries)}
    start = _HEADER
    for name, (dtype, count) in {**sizes, "modes": (np.int8, num)}.items():
        if name == array:
            np.ndarray(count, dtype, raw, start)[at] = value
        start += count * np.dtype(dtype).itemsize
    prefix.with_suffix(".idx").write_bytes(raw)


CONTENT = {
    "an id above the vocabulary": (("tokens", "data", 0, 1_000_000), "document 0: token id 1000000 is out of range"),
    "a negative id": (("tokens", "data", 0, -5), "document 0: token id -5 is out of range"),
    "an image before the first": (("tokens", "data", 30, -1), "document 0: image -1 is out of range"),
    "an image behind the last": (("tokens", "data", 30, 12345), "document 0: image 12345 is out of range"),
}
STRUCTURE = {
    "a document that ends nowhere": (("tokens", "documents", 1, 1 << 40), "document"),
    "a document before all": (("tokens", "documents", 1, -(1 << 33)), "document"),
    "a text behind the file": (("tokens", "pointers", 0, 1 << 40), "pointers|no bytes"),
    "a text before the file": (("tokens", "pointers", 0, -400), "pointers|no bytes"),
    "an image before the file": (("images", "pointers", 0, -5000), "pointers|no bytes"),
    "a text that is an image": (("tokens", "modes", slice(-1, None), 1), "placements"),
    "a text of less than nothing": (("tokens", "lengths", 0, -1_000_000), "sequence 0 is empty|no bytes|pointers"),
}
BOTH = {**CONTENT, **STRUCTURE}


def read(folder: Path) -> None:
    """Every document, as a run does."""
    for _ in loader_of(folder, steps=30, data={"cache": f"{folder}-cache"}):
        pass


@pytest.mark.parametrize("what", BOTH)
def test_a_run_ends_with_what_is_damaged(folder: Path, what: str) -> None:
    change, said = BOTH[what]
    changed(folder, *change)
    with pytest.raises(UserError, match=rf"{folder}.*({said}).*`megatron-lcl verify {folder}` says"):
        read(folder)
    assert verify(folder, quick=True)


@pytest.mark.parametrize("what", [name for name in BOTH if "less than" not in name])
def test_also_where_documents_were_measured_before(folder: Path, what: str) -> None:
    """Their sizes are kept in the cache, and the indices not read as a whole again."""
    read(folder)
    change, said = BOTH[what]
    changed(folder, *change)
    with pytest.raises(UserError, match=rf"{folder}.*({said}).*`megatron-lcl verify {folder}` says"):
        read(folder)


@pytest.mark.parametrize(
    ("value", "said"), [(1, "its pieces name more images than the shard has placements"), (-1, "a piece of mode -1"),
                        (3, "a piece of mode 3")]
)  # fmt: skip
def test_pieces_of_another_kind_since_documents_were_measured(folder: Path, value: int, said: str) -> None:
    """Compiled functions read as many placements as a document has pieces that are no texts."""
    data = Data(corpora=(Corpus(str(folder)),), cache=f"{folder}-cache")

    def source() -> Source:
        return open_source(open_corpus(folder), data, P, CONTEXT, 4, Sequences())

    documents = np.arange(len(source().tokens))
    changed(folder, "tokens", "modes", slice(None), value)
    with pytest.raises(UserError, match=said):
        any(source().arranged(document, 0) is None for document in documents)
    with pytest.raises(UserError, match=said):
        source().sizes(documents, 0, np.array([[0, 1]] * len(documents)))


def test_an_id_of_a_special_token_is_no_text(folder: Path) -> None:
    special = open_corpus(folder).tokenizer.soi
    changed(folder, "tokens", "data", 0, special)
    with pytest.raises(UserError, match=f"document 0: token id {special} is out of range, which ends at"):
        read(folder)


def test_a_manifest_that_promises_more_documents(folder: Path) -> None:
    """Whoever measures them would read behind the last one."""
    manifest = json.loads((folder / "corpus.json").read_text())
    manifest["shards"][0]["documents"] += 10_000
    (folder / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"shard 0: 40 documents, the manifest says 10,040; "):
        read(folder)
    with pytest.raises(UserError, match=r"document 40: its pieces are "):
        inspect.show(open_corpus(folder), 40)


def _show(folder: Path, _output: Path) -> None:
    inspect.show(open_corpus(folder), 0)


def _stats(folder: Path, _output: Path) -> None:
    inspect.stats(open_corpus(folder))


def _curate(folder: Path, _output: Path) -> None:
    corpus = open_corpus(folder)
    for task in ranges(corpus, 1 << 20):
        places(corpus, task)


def _evaluate(folder: Path, _output: Path) -> None:
    open_images(str(folder))


def _export(folder: Path, output: Path) -> None:
    export_corpus(folder, output)


def _retokenize(folder: Path, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipTokenizer, "is_lossless", True)  # which else is the error
        retokenize(folder, output, ClipTokenizer([("a", "b")]))


@pytest.mark.parametrize(
    ("reading", "what"),
    [
        *((reading, "a document before all") for reading in (_show, _stats, _curate, _evaluate, _export, _retokenize)),
        *((reading, "a text behind the file") for reading in (_show, _stats, _curate, _evaluate, _export, _retokenize)),
        *((reading, "an image before the first") for reading in (_show, _curate, _export)),
        *((reading, "an image behind the last") for reading in (_show, _curate, _export)),
        *((reading, "a negative id") for reading in (_show, _evaluate, _export, _retokenize)),
    ],
)
def test_so_does_what_else_reads_corpora(
    folder: Path, tmp_path: Path, reading: Callable[[Path, Path], None], what: str
) -> None:
    changed(folder, *BOTH[what][0])
    with pytest.raises(UserError, match="megatron-lcl verify"):
        reading(folder, tmp_path / "output")


def test_a_name_with_nul_is_refused(folder: Path) -> None:
    manifest = json.loads((folder / "corpus.json").read_text())
    manifest["files"]["x\0y"] = {"size": 1, "xxh3": "00"}
    (folder / "corpus.json").write_text(json.dumps(manifest))
    assert len(verify(folder, quick=True)) == 1
    with pytest.raises(UserError):
        open_corpus(folder)


def test_an_array_of_objects_is_not_mapped(tmp_path: Path) -> None:
    """Its bytes would be taken for addresses."""
    np.save(tmp_path / "a.npy", np.array([1, "x"], object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy holds object, not numbers"):
        map_array(tmp_path / "a.npy")
