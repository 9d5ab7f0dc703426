"""Duplicates and evaluation images as rules of `curate`: what is removed is recorded with what it is like."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from curate.corpora_of_rules import files, manifests_read, write
from curate.duplicates.test_contamination import encoded, flipped, picture
from curate.duplicates.test_joins import sentence

from megatron_lcl.curate import run
from megatron_lcl.curate.duplicates import rules as duplicate_rules
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import Settings, read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError


def rules(**overrides: str) -> Settings:
    return read_settings(overrides={name.replace("__", "."): value for name, value in overrides.items()})


def removals(output: Path) -> list[tuple[int, int, str, str]]:
    table = pq.read_table(output / "removed.parquet")
    columns = (table[name].to_pylist() for name in ("document", "item", "rule", "matched"))
    return list(zip(*columns, strict=True))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Twice the same text but for a word, twice the same picture but for its size, and what a rule removes."""
    small = encoded(picture(0).resize((90, 90)))
    return write(
        tmp_path,
        [
            Document((Image(encoded(picture(0))), Text(sentence(0)), Text("no"))),
            Document((Text(sentence(1)), Image(small))),
            Document((Text(sentence(0, changed=1)), Image(encoded(picture(1))))),
            Document((Text(sentence(2)), Image(encoded(flipped(picture(2)))))),
            Document((Text("no"), Text(sentence(1).upper()), Image(encoded(picture(3))))),
        ],
        shard_documents=2,
    )


def test_duplicates_are_removed_and_named(source: Path, tmp_path: Path) -> None:
    settings = rules(
        text__min_characters="3", duplicates__documents__action="keep-one", duplicates__images__action="keep-one"
    )
    for workers in (1, 2):
        curate(source, tmp_path / str(workers), settings, workers=workers, task_bytes=100)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert removals(tmp_path / "1") == [
        (0, 2, "text.min_characters", ""),
        (1, 1, "image.duplicates", f"{source}: document 0, piece 0"),
        (2, -1, "document.duplicates", f"{source}: document 0"),
        (4, 0, "text.min_characters", ""),
        (4, -1, "document.duplicates", f"{source}: document 1"),
    ]
    assert len(open_corpus(tmp_path / "1")) == 3
    assert verify(tmp_path / "1") == []


def test_manifests_are_not_read_again_for_each_task(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They grow with their corpora, as the number of tasks does."""
    for name in ("set", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "set" / "1.jpg").write_bytes(encoded(picture(2)))
    documents = [Document((Text(sentence(k)), Image(encoded(picture(k))))) for k in range(3, 9)]
    other = write(tmp_path / "other", documents, shard_documents=2)
    settings = rules(
        evaluation__sets=f"[{tmp_path / 'set'}]",
        duplicates__against=f"[{other}]",
        duplicates__documents__action="keep-one",
        duplicates__images__action="keep-one",
    )
    counted = []
    for task_bytes in (1 << 25, 100):  # as many tasks as shards, and as documents
        with monkeypatch.context() as patch:
            read = manifests_read(patch)
            patch.setattr(duplicate_rules, "TASK_BYTES", task_bytes)
            curate(source, tmp_path / f"out-{task_bytes}", settings, task_bytes=task_bytes)
        counted.append(Counter(read))
    assert counted[0] == counted[1]
    assert removals(tmp_path / "out-100") == removals(tmp_path / f"out-{1 << 25}") != []
    rule = duplicate_rules.Duplicates(settings.duplicates.documents, [str(other)])
    for workers in (1, 2):
        (tmp_path / f"{workers}").mkdir()
        monkeypatch.setattr(duplicate_rules, "TASK_BYTES", 100)
        rule.prepare(tmp_path / f"{workers}", workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")


@pytest.mark.parametrize("action", ["keep-one", "drop-all"])
def test_documents_of_which_nothing_is_left_are_no_duplicates(action: str, tmp_path: Path) -> None:
    texts = ["no", sentence(0), "nor", "or", sentence(0)]
    source = write(tmp_path, [Document((Text(text),)) for text in texts] + [Document((Text(sentence(1)),))])
    settings = rules(text__min_characters="4", duplicates__documents__action=action)
    curate(source, tmp_path / "out", settings, task_bytes=100)
    found = {document: rule for document, item, rule, _ in removals(tmp_path / "out") if item == -1}
    assert found.pop(1, None) == ("document.duplicates" if action == "drop-all" else None)
    assert found == {0: "document.empty", 2: "document.empty", 3: "document.empty", 4: "document.duplicates"}


def test_pairs_of_different_images_with_one_caption_stay(tmp_path: Path) -> None:
    """Captions are short, so many images have the same one: a pair is its image."""
    other, same = "A photo of a cat.", "a PHOTO of a cat"
    images = [encoded(picture(seed)) for seed in range(3)]
    shown = Image(encoded(picture(3)))
    pairs = [Document((Image(image), Text(other)), kind="pairs") for image in images]
    captions = [Document((Image(image), shown, Text(other), Text("a cat")), kind="captions") for image in images]
    again = [
        Document((Image(images[1]), Text(same)), kind="pairs"),  # its text is not the same, but nearly so
        Document((Image(images[1]), shown, Text(same), Text("a cat!")), kind="captions"),
        Document((Text(other),), kind="pairs"),  # of a pair without an image only the text is left
        Document((Text(same),), kind="pairs"),
    ]
    source = write(tmp_path, [*pairs, *captions, *again], shard_documents=3)
    assert open_corpus(source).kinds == ("pairs", "captions", "pairs", "captions")
    curate(source, tmp_path / "out", rules(duplicates__documents__action="keep-one"), task_bytes=100)
    found = [(document, matched) for document, _, _, matched in removals(tmp_path / "out")]
    # the last of the captions is in a shard of its own, after the pairs
    assert found == [(number, f"{source}: document {of}") for number, of in ((6, 1), (8, 7), (9, 4))]


def test_how_texts_are_divided(tmp_path: Path) -> None:
    """A near-duplicate may be divided otherwise, a document of the same texts not; without a text none is near."""
    parts = sentence(0).split()
    documents = [
        Document((Text(sentence(0)),)),
        Document(tuple(Text(" ".join(parts[k : k + 5])) for k in range(0, len(parts), 5))),
        *(Document((Image(encoded(picture(seed))),)) for seed in range(2)),
        *(Document((Text(one), Text(other))) for one, other in (("ab", "c"), ("a", "bc"))),
    ]
    source = write(tmp_path, documents)
    curate(source, tmp_path / "near", rules(duplicates__documents__action="keep-one"))
    assert removals(tmp_path / "near") == [(1, -1, "document.duplicates", f"{source}: document 0")]
    exact = rules(duplicates__documents__action="keep-one", duplicates__documents__threshold="null")
    curate(source, tmp_path / "exact", exact)
    assert removals(tmp_path / "exact") == []


def near_duplicates(text: str, changed: str) -> list[str]:
    """The text, and the text with one of every 100 letters changed."""
    letters = list(text)
    letters[50::100] = changed * len(letters[50::100])
    return [text, "".join(letters)]


def test_near_duplicates_in_scripts_without_spaces(tmp_path: Path) -> None:
    """Where punctuation is rare, and there is none, a text is few words or one, if white space were to say so."""
    rng = np.random.default_rng(0)
    texts: list[str] = []
    for first, num, changed in ((0x4E00, 400, "\u6f22"), (0x3041, 80, "\u6f22"), (0x0E01, 46, "x"), (0x1780, 34, "x")):
        texts += near_duplicates("".join(map(chr, rng.integers(first, first + num, 600))), changed)
    clauses = "".join(map(chr, rng.integers(0x4E00, 0x9FA0, 600)))
    texts += near_duplicates("\u3002".join(clauses[k : k + 14] for k in range(0, 600, 14)), "\u6f22")
    source = write(tmp_path, [Document((Text(text),)) for text in texts])
    curate(source, tmp_path / "out", rules(duplicates__documents__action="keep-one"))
    found = [(document, matched) for document, _, _, matched in removals(tmp_path / "out")]
    assert found == [(k + 1, f"{source}: document {k}") for k in range(0, len(texts), 2)]


@pytest.mark.parametrize(
    ("given", "version"),
    [
        ({"duplicates__documents__action": "keep-one"}, 6),
        ({"duplicates__documents__action": "keep-one", "duplicates__documents__threshold": "null"}, 4),
        ({"duplicates__images__action": "keep-one"}, 5),
        ({"text__min_words": "1"}, 5),
        ({"document__min_plain_words": "1"}, 5),
        ({"document__min_characters": "1", "text__max_word_repetition": "1"}, 4),
    ],
)
def test_rules_differ_only_where_documents_may(
    source: Path, tmp_path: Path, given: dict[str, str], version: int
) -> None:
    curate(source, tmp_path / "out", rules(**given))
    assert open_corpus(tmp_path / "out").manifest["recipe"]["rules"] == version


def test_what_another_corpus_has_is_removed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    again = Document((Text(sentence(2)), Image(encoded(picture(1)))))
    other = write(tmp_path / "other", [again] * 2, shard_documents=1)  # the first place is named
    settings = rules(
        duplicates__against=f"[{other}]",
        duplicates__documents__action="keep-one",
        duplicates__images__action="drop-all",
    )
    curate(source, tmp_path / "out", settings)
    found = {(document, item): matched for document, item, _, matched in removals(tmp_path / "out")}
    assert found[2, 1] == f"{other}: document 0, piece 1"
    assert found[3, -1] == f"{other}: document 0"
    assert {(0, 0), (1, 1)} <= found.keys(), "the same picture twice, of which none stays"


def test_evaluation_images_are_removed_and_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for seed in (2, 9):
        (tmp_path / "set" / f"{seed}.jpg").write_bytes(encoded(picture(seed)))
    settings = rules(evaluation__sets=f"[{tmp_path / 'set'}]")
    curate(source, tmp_path / "out", settings, workers=2, task_bytes=100)
    assert removals(tmp_path / "out") == [(3, 1, "image.evaluation", str(tmp_path / "set" / "2.jpg"))]
    (found,) = [r for r in curate(source, None, settings).rules if r.rule == "image.evaluation"]
    assert (found.images, found.documents) == (1, 0)


def test_other_evaluation_images_with_the_same_output(source: Path, tmp_path: Path) -> None:
    """In one process, which has opened an index at the same path before."""
    for seed in (2, 3):
        (tmp_path / f"set-{seed}").mkdir()
        (tmp_path / f"set-{seed}" / "a.jpg").write_bytes(encoded(picture(seed)))
        curate(source, tmp_path / "out", rules(evaluation__sets=f"[{tmp_path / f'set-{seed}'}]"))
        matched = str(tmp_path / f"set-{seed}" / "a.jpg")
        assert [(document, name) for document, *_, name in removals(tmp_path / "out")] == [(seed + 1, matched)]
        shutil.rmtree(tmp_path / "out")


def test_a_corpus_of_earlier_rules_is_recognized_and_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "2.jpg").write_bytes(encoded(picture(2)))
    settings = rules(evaluation__sets=f"[{tmp_path / 'set'}]")
    with monkeypatch.context() as patch:
        patch.setattr(run, "EVALUATION_RULES", 1)
        curate(source, tmp_path / "out", settings)
    assert curate(source, tmp_path / "out", settings).reused
    assert "another version's rules for curate and stays as it is" in caplog.text


def test_what_else_is_looked_at_decides_whether_it_is_the_same(source: Path, tmp_path: Path) -> None:
    """An evaluation set that has grown, or another corpus in its place, is not what a corpus was curated with."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "1.jpg").write_bytes(encoded(picture(7)))
    for name, seed in (("other", 8), ("third", 9)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, [Document((Text(sentence(seed)), Image(encoded(picture(seed)))))])
    against = shutil.copytree(tmp_path / "other" / "corpus", tmp_path / "against")
    settings = rules(
        evaluation__sets=f"[{tmp_path / 'set'}]",
        duplicates__against=f"[{against}]",
        duplicates__documents__action="keep-one",
    )
    assert not curate(source, tmp_path / "out", settings).reused
    assert curate(source, tmp_path / "out", settings).reused
    (tmp_path / "set" / "2.jpg").write_bytes(encoded(picture(2)))
    with pytest.raises(UserError, match="out"):
        curate(source, tmp_path / "out", settings)
    (tmp_path / "set" / "2.jpg").unlink()
    assert curate(source, tmp_path / "out", settings).reused
    shutil.rmtree(against)
    shutil.copytree(tmp_path / "third" / "corpus", against)
    with pytest.raises(UserError, match="out"):
        curate(source, tmp_path / "out", settings)


def test_images_that_a_json_file_names_are_looked_at_too(source: Path, tmp_path: Path) -> None:
    """A corpus was curated with the images, not with their names."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "1.jpg").write_bytes(encoded(picture(7)))
    content = {"images": [{"id": 1, "file_name": "val/1.jpg"}], "annotations": [{"image_id": 1, "caption": "a"}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    settings = rules(evaluation__sets=f"[{tmp_path / 'captions.json'}]")
    assert not curate(source, tmp_path / "out", settings).reused
    assert curate(source, tmp_path / "out", settings).reused
    (tmp_path / "val" / "1.jpg").write_bytes(encoded(picture(2)))
    with pytest.raises(UserError, match="out"):
        curate(source, tmp_path / "out", settings)


def test_another_corpus_or_set_that_is_not_there(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        curate(source, tmp_path / "out", rules(duplicates__against="[nowhere]", duplicates__images__action="keep-one"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        curate(source, tmp_path / "out", rules(evaluation__sets=f"[{tmp_path / 'empty'}]"))
    assert not (tmp_path / "out").exists()
