"""Protects a corpus's way to another tokenizer: as if it had been made with that, and with the same image files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data import writers
from data.helpers import TOKENIZER, byte_level, contents, plain
from data.writers import picture

from megatron_lcl.cli import main
from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare import retokenize as retokenize_module
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.retokenize import retokenize
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError

OTHER = tokenizers.JsonTokenizer(byte_level().to_str().encode())
DOCUMENTS = [
    Document(
        (Text(f"Text  {k}\n水 🙂"), Image(picture(k % 4)), Text(" <s> jumps " * (k + 1))),
        kind="pairs" if k % 2 else None,
    )
    for k in range(9)
]
DOCUMENTS.append(Document((Text("a"), Image(picture(5), "", 0.25, 1), Text("b")), kind="matched"))


def make(folder: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    if not (folder / "in").exists():
        writers.write_jsonl(DOCUMENTS, folder / "in")
    output = folder / tokenizer.fingerprint
    preprocess("jsonl", folder / "in", output, tokenizer=tokenizer)
    return output


def test_as_if_made_with_the_other_tokenizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are encoded some at a time, here four of 30."""
    monkeypatch.setattr(retokenize_module, "_BATCH", 4)
    source = make(tmp_path, TOKENIZER)
    expected = make(tmp_path, OTHER)
    OTHER.save(tmp_path / "tokenizer.json")
    before = contents(source)
    assert main(["retokenize", str(source), "--tokenizer", str(tmp_path / "tokenizer.json"), "--output",
                 str(tmp_path / "new/out")]) == 0  # fmt: skip
    assert "10 documents" in capsys.readouterr().out
    ours, theirs = contents(tmp_path / "new/out"), contents(expected)
    assert set(ours) == set(theirs)
    assert {name for name in theirs if ours[name] != theirs[name]} == {"corpus.json"}  # the recipe
    made, made_anew = open_corpus(tmp_path / "new/out"), open_corpus(expected)
    for key in ("counts", "shards", "files", "tokenizer", "drops", "source"):
        assert made.manifest[key] == made_anew.manifest[key]
    assert plain(list(made)) == plain(list(open_corpus(source)))
    assert not verify(made.path)
    assert contents(source) == before
    for name in before:
        if name.startswith(("images", "names")):
            assert (source / name).samefile(made.path / name)
    back = retokenize(made.path, tmp_path / "back", source)  # with the tokenizer of a corpus
    assert {name: info for name, info in back["files"].items() if name != "drops.jsonl"} == {
        name: info for name, info in open_corpus(source).manifest["files"].items() if name != "drops.jsonl"
    }
    merge([source, tmp_path / "back"], tmp_path / "merged")


def test_what_is_refused_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make(tmp_path, TOKENIZER)
    clip = make(tmp_path, tokenizers.ClipTokenizer([]))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    out = str(tmp_path / "out")
    for arguments, message in (
        ([str(clip), "--tokenizer", str(source), "--output", out], "(clip) does not give texts back as they were"),
        ([str(source), "--tokenizer", str(source), "--output", out], "has this tokenizer already"),
        ([str(source), "--tokenizer", str(tmp_path / "no.json"), "--output", out], "no tokenizer at"),
        (
            [str(source), "--tokenizer", str(clip), "--output", str(tmp_path / "full")],
            "is not empty; give a new folder",
        ),
        ([str(tmp_path / "in"), "--tokenizer", "clip", "--output", out], "is not a corpus"),
    ):
        assert main(["retokenize", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-lcl")]
        assert message in line
    (source / "names-00000.bin").unlink()
    with pytest.raises(UserError, match="is missing"):
        retokenize(source, out, OTHER)
    with pytest.raises(UserError, match="`megatron-lcl retokenize` gives one of them the other's"):
        merge([clip, make(tmp_path, OTHER)], tmp_path / "merged")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"in", "full", source.name, clip.name, OTHER.fingerprint}


def test_a_text_that_would_have_no_tokens_is_refused(tmp_path: Path) -> None:
    """A corpus has no empty pieces: matches of images count its texts."""
    from tokenizers import normalizers

    source = make(tmp_path, TOKENIZER)
    made = byte_level()
    made.normalizer = normalizers.Replace("b", "")  # all of the last document's second text
    said = r"document 9 \(documents.jsonl@\d+\): a text of 1 tokens has none under the new one"
    with pytest.raises(UserError, match=said):
        retokenize(source, tmp_path / "out", tokenizers.JsonTokenizer(made.to_str().encode()))
    assert not (tmp_path / "out").exists()


def test_ids_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    """As when an unknown token stands in a corpus: what it was is not known."""
    source = make(tmp_path, TOKENIZER)
    corpus = open_corpus(source)
    ids = corpus.shard(0).piece(0)
    assert isinstance(ids, np.ndarray)
    file = source / "tokens-00000.bin"
    with open(file, "r+b") as opened:
        opened.write(np.int32(0).tobytes())  # <unk>
    with pytest.raises(
        UserError, match=r"document 0 \(documents.jsonl@0\): a text that the corpus's tokenizer does not"
    ):
        retokenize(source, tmp_path / "out", OTHER)
    assert not (tmp_path / "out").exists()
