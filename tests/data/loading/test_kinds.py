"""The kind of documents belongs to the shard: it travels, decides the rules, and says whether there is a contrast."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import MakeCorpus, jpeg
from data.writers import picture, write_jsonl, write_webdataset

from megatron_lcl.config import Corpus, Data
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.contrast import corpora_without_pairs
from megatron_lcl.data.loading.ledger import open_ledger
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.rules import INTERLEAVED, longest_text
from megatron_lcl.data.loading.source import VERSION
from megatron_lcl.data.prepare.merge import merge
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError
from megatron_lcl.objectives import objective_class

PAIRS = [Document((Image(picture(k % 20)), Text(f"caption {k}"))) for k in range(40)]
MATCHED = [Document((Image(picture(k), "", 0.5, 0), Text("a"), Image(picture(k + 1), "", 0.1, 0))) for k in range(8)]
NATURAL = [Document((Text("alone"), Text(f"{k}"))) for k in range(7)]
P, SIZE, CONTEXT = 4, 16, 96


def data(*paths: Path, **fields: Any) -> Data:
    corpora = tuple(Corpus(str(path)) for path in paths)
    return Data(corpora=corpora, tokens_per_pack=256, workers=0, **fields)


def counted(path: Path, objective: Any = "lcl", **fields: Any) -> tuple[int, int, int]:
    """Documents, images and pairs of the whole corpus, each document once."""
    sequences = objective_class(objective).sequences
    loader = PackedLoader(data(path, **fields), P, SIZE, CONTEXT, train=False, sequences=sequences)
    batches = list(loader)
    documents = {(o.document) for batch in batches for pack in batch.packs for o in loader.provenance(pack)}
    return len(documents), sum(b.num_images for b in batches), sum(b.num_pairs for b in batches)


def test_packs_of_short_captions_have_no_image_slots_that_stay_empty(tmp_path: Path) -> None:
    """A pack of 256 tokens holds 16 sequences: `<sot> caption 7 <soi>` has four or five tokens."""
    corpus = written(tmp_path, PAIRS * 8, "webdataset")
    for objective, sequences in (("clip", 16), ("coca", 8), ("lcl", 16)):
        ledger = open_ledger(data(corpus), P, CONTEXT, sequences=objective_class(objective).sequences)
        assert ledger.settings["images_per_pack"] <= sequences
    assert open_ledger(data(corpus, images_per_pack=40), P, CONTEXT).settings["images_per_pack"] == 40


def written(folder: Path, documents: Sequence[Document], format: str = "jsonl", **options: Any) -> Path:
    (write_webdataset if format == "webdataset" else write_jsonl)(documents, folder / "in")
    preprocess(format, folder / "in", folder / "corpus", tokenizer="clip", **options)
    return folder / "corpus"


def as_before(corpus: Path) -> None:
    """The manifest as it was before shards said their kind, and it the hash of its contents."""
    manifest = json.loads((corpus / "corpus.json").read_text())
    del manifest["contents"]
    for shard in manifest["shards"]:
        del shard["kind"]
    (corpus / "corpus.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Corpora of pairs, two of WebDataset, of matched and of natural documents."""
    folder = tmp_path_factory.mktemp("parts")
    pairs = [written(folder / f"pairs{k}", PAIRS[20 * k : 20 * k + 20], "webdataset") for k in range(2)]
    return [*pairs, written(folder / "matched", MATCHED), written(folder / "natural", NATURAL)]


def test_merged_pairs_contrast_as_their_parts_do(parts: list[Path], tmp_path: Path) -> None:
    merge(parts[:2], tmp_path / "merged")
    merge([tmp_path / "merged", parts[3]], tmp_path / "again")
    assert open_corpus(tmp_path / "again").kinds == ("pairs", "pairs", "natural")
    for fields in ({"image_first": 0.0}, {"image_first": 0.0, "pair_layout": "reference"}):
        apart = [counted(part, **fields) for part in parts[:2]]
        assert apart == [(20, 20, 20)] * 2
        assert counted(tmp_path / "merged", **fields) == (40, 40, 40)
        assert counted(tmp_path / "again", **fields) == (47, 40, 40)
    assert 8 < counted(tmp_path / "merged")[2] < 32  # half of them, by chance
    loader = PackedLoader(data(tmp_path / "merged", parts[3]), P, SIZE, CONTEXT, global_batch=4, steps=1)
    assert sum(batch.num_pairs for batch in loader) > 0


def test_selection_is_of_matched_documents_alone(parts: list[Path], tmp_path: Path) -> None:
    """Beside them, natural documents without images were skipped."""
    assert counted(parts[2]) == (8, 8, counted(parts[2])[2])  # one image of each is similar enough
    merge(parts[2:], tmp_path / "merged")
    documents, images, _ = counted(tmp_path / "merged")
    assert (documents, images) == (15, 8)


def test_old_corpora_are_of_the_kind_that_can_be_told(parts: list[Path], tmp_path: Path) -> None:
    for number, (part, kind) in enumerate(zip(parts, ("pairs", "pairs", "matched", "natural"), strict=True)):
        old = tmp_path / str(number)
        shutil.copytree(part, old)
        as_before(old)
        opened = open_corpus(old)
        assert opened.kinds == (kind,)
        assert opened.fingerprint == opened.manifest["fingerprint"]  # its batches are what they were
        assert counted(old, image_first=0.0) == counted(part, image_first=0.0)
    for number, (chosen, kinds) in enumerate(
        {(0, 1): ["pairs"] * 2, (0, 2, 3): ["pairs", "matched", "natural"]}.items()
    ):
        merged = tmp_path / f"merged{number}"
        merge([parts[k] for k in chosen], merged)
        said = counted(merged, image_first=0.0)
        as_before(merged)
        opened = open_corpus(merged)
        assert opened.kinds == tuple(kinds)
        assert opened.fingerprint != opened.manifest["fingerprint"]  # a run that saw no pairs in it is told
        assert counted(merged, image_first=0.0) == said
        merge([merged, parts[1]], tmp_path / f"from{number}")
        assert open_corpus(tmp_path / f"from{number}").kinds == (*kinds, "pairs")


def test_json_lines_say_their_kind(tmp_path: Path) -> None:
    documents = [[Text(f"text {k}"), Image(picture(k), "", 0.5, 0)] for k in range(9)]
    kinds = [("matched", "natural", "pairs")[k % 3] for k in range(9)]
    mixed = [Document(tuple(d), kind=kind) for d, kind in zip(documents, kinds, strict=True)]  # type: ignore[arg-type]
    text_only = Document((Text("only a text"),), kind="pairs")
    corpus = written(tmp_path / "mixed", [*mixed, text_only], shard_documents=3)
    opened = open_corpus(corpus)
    assert opened.kinds == ("matched", "natural", "pairs", "natural", "pairs")  # the third of a kind ends the part
    in_shards = [[d.texts[0].text for d in opened[a:b]] for a, b in pairwise(opened.document_starts)]
    first = [["text 0", "text 3", "text 6"], ["text 1", "text 4"], ["text 2", "text 5"]]
    assert in_shards == [*first, ["text 7"], ["text 8", "only a text"]]
    assert [document.images[0].data for document in opened[:3]] == [picture(k) for k in (0, 3, 6)]
    assert verify(corpus) == []
    unsaid = written(tmp_path / "unsaid", [mixed[0], text_only, NATURAL[0]])  # similarities of others say nothing of it
    assert open_corpus(unsaid).kinds == ("matched", "pairs", "natural")


def test_pairs_as_json_lines(tmp_path: Path) -> None:
    natural, pairs = written(tmp_path / "natural", PAIRS), written(tmp_path / "pairs", PAIRS, options={"kind": "pairs"})
    assert counted(natural, image_first=0.0) == (40, 40, 0)
    assert counted(pairs, image_first=0.0) == (40, 40, 40)
    with pytest.raises(ValueError, match="--option kind=pear: give"):
        written(tmp_path / "wrong", PAIRS, options={"kind": "pear"})
    lines = [
        '{"kind": "pear", "items": [{"text": "a"}]}',
        '{"kind": 1, "items": [{"text": "a"}]}',
        '{"items": [{"text": "b"}]}',
    ]
    (tmp_path / "wrong/in/documents.jsonl").write_text("\n".join(lines))
    summary = preprocess("jsonl", tmp_path / "wrong/in", tmp_path / "out", tokenizer="clip", max_bad_fraction=1)
    assert summary.drops.bad_counts == {"document: its kind is none of matched, natural, pairs, captions": 2}
    assert summary.counts["documents"] == 1


def test_corpora_that_give_no_pair_are_named(make_corpus: MakeCorpus) -> None:
    def said(*corpora: Any, objective: Any = "lcl", **fields: Any) -> list[str]:
        run = data(*(c.path for c in corpora), **fields)
        paths = corpora_without_pairs(run, P, CONTEXT, objective_class(objective).sequences, objective)
        return [Path(path).name for path in paths]

    leading = make_corpus("leading", [[(jpeg(k), None, None), [k]] for k in range(30)])
    texts, images = make_corpus("texts", [[[1, 2]]]), make_corpus("images", [[(jpeg(0), None, None)]])
    late = make_corpus("late", [[[k % 500]] for k in range(2000)] + [[[1], (jpeg(0), None, None)]], num_shards=2)
    pairs = make_corpus("pairs", [[(jpeg(k), None, None), [k]] for k in range(9)], source="webdataset")
    unlike = make_corpus("unlike", [[[k], (jpeg(k), 0.1, 0)] for k in range(9)])
    second = make_corpus("second", [[[k], [k], (jpeg(k), 0.5, 1)] for k in range(9)])
    assert said(leading, texts, images, late, pairs, unlike) == ["leading", "texts", "images", "unlike"]
    assert said(leading, texts, objective="generation") == []
    assert said(leading, texts, images, objective="clip") == ["texts", "images"]
    assert said(leading, texts, images, contrast_leading_images=True) == ["texts"]
    assert said(unlike, min_similarity=0.0) == []
    assert said(pairs, second, image_first=1.0) == ["pairs"]
    with pytest.raises(
        ValueError, match=r"objective\.name = lcl .*leading, .*texts no image has a text before it.*kind=pairs"
    ):
        said(leading, texts)
    # whatever is said to give none gives none, and what gives some has some in an epoch
    for corpus in (leading, texts, images, late, pairs, unlike, second):
        for image_first in (0.0, 0.5):
            fields = {"image_first": image_first, "min_images": 0}
            try:
                some = not said(corpus, **fields)
            except ValueError:
                some = False
            assert some == (counted(corpus.path, **fields)[2] > 0), corpus


def test_a_corpus_that_gives_no_sequence_is_refused_by_what_would_help(make_corpus: MakeCorpus) -> None:
    """Where a sequence is an image with its text, selection has no say in documents that are not matched."""
    pairs = make_corpus("pairs", [[(jpeg(k), None, None), [k]] for k in range(9)], source="webdataset")
    texts, unlike = make_corpus("texts", [[[1, 2]]]), make_corpus("unlike", [[[1], (jpeg(0), 0.1, 0)]])
    has, only = " has an image with a text", ", and the run's objective reads only such pairs; "
    after, lower = " after selection", "lower data.min_similarity or data.min_images"
    for corpus, objective, said in (
        (texts, "clip", f"{has}{only}leave the corpus out"),
        (texts, "genlip", f"{has}{only}leave the corpus out"),
        (unlike, "coca", f"{has}{after}{only}{lower}, or leave the corpus out"),
        (unlike, "lcl", f" is left{after}; {lower}"),
    ):
        sequences, read = objective_class(objective).sequences, data(pairs.path, corpus.path)
        with pytest.raises(UserError) as caught:
            next(iter(PackedLoader(read, P, SIZE, CONTEXT, steps=1, global_batch=4, sequences=sequences)))
        assert str(caught.value) == f"no document of {corpus.path}{said}"


def test_the_count_of_pairs_before_the_start_is_no_less_than_there_are(make_corpus: MakeCorpus) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        pieces: list[Any] = [[1]] * int(rng.integers(0, 3)) + [(jpeg(k), None, None) for k in range(rng.integers(0, 3))]
        documents = [[pieces[k] for k in rng.permutation(len(pieces))]] if pieces else [[[1]]]
        corpus = make_corpus(str(number), documents, source=("jsonl", "webdataset")[number % 2])
        try:
            some = not corpora_without_pairs(data(corpus.path, image_first=0.0), P, CONTEXT, INTERLEAVED, "lcl")
        except ValueError:
            some = False
        assert some == (counted(corpus.path, image_first=0.0)[2] > 0), documents


@pytest.mark.parametrize("objective", ["clip", "coca"])
def test_of_a_text_too_long_a_pair_has_what_is_nearest_to_its_image(make_corpus: MakeCorpus, objective: str) -> None:
    """In natural documents; of pairs, and by the rules of versions 1 to 3, its first tokens, wherever the image is."""
    image, sequences, slots = (jpeg(0), None, None), objective_class(objective).sequences, 256
    room = longest_text(sequences, P, CONTEXT, slots)
    for (kind, length), version in product((("jsonl", 200), ("webdataset", 201)), (3, VERSION)):
        text = list(range(length))
        corpus = make_corpus(f"{kind}-{version}", [[text, image], [image, text]], source=kind)
        read = data(corpus.path)
        ledger = open_ledger(read, P, CONTEXT, sequences=sequences, version=version)
        loader = PackedLoader(read, P, SIZE, CONTEXT, steps=1, global_batch=4, sequences=sequences, ledger=ledger)
        found: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
        for batch in loader:
            for o in loader.provenance(batch.packs[0]):
                ids = batch.tokens[o.start : o.stop].tolist()
                found[o.document].add(tuple(i for i in ids if i <= 200))
        first, last = tuple(text[:room]), tuple(text[-room:])
        assert found == {0: {last if (kind, version) == ("jsonl", VERSION) else first}, 1: {first}}
