"""What an encoder says, as rules of `curate`: new matches are written, what is removed is recorded."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from curate.corpora_of_rules import manifests_read, picture, removed, write

from megatron_lcl import LCL, fields
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.curate.documents import Range
from megatron_lcl.curate.models import resolve as models
from megatron_lcl.curate.models.features import feature_facts
from megatron_lcl.curate.models.matching import matching_facts
from megatron_lcl.curate.run import curate, curate_in_jobs
from megatron_lcl.curate.settings import READ_BY, Settings, as_recipe, read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import load as open_tokenizer
from megatron_lcl.data.engines import Engine
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.lcl import OurEncoder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(
        tmp_path,
        [
            Document((Text("no"), Image(picture(0)), Text("one of the texts"), Image(picture(1)), Text("another"))),
            Document((Image(picture(2)), Image(picture(3)), Text("a single text"))),
            Document((Text("without"),)),
        ],
    )


def rules(encoder: tuple[str, str], **more: str) -> Settings:
    given = {"encoder": encoder[0], **({"tokenizer": encoder[1]} if "match" in more else {}), **more}
    return read_settings(overrides={name if "." in name else f"models.{name}": v for name, v in given.items()})


def test_documents_in_reading_order_become_matched_ones(source: Path, encoder: tuple[str, str], tmp_path: Path) -> None:
    curate(source, tmp_path / "out", rules(encoder, match="true", **{"text.min_characters": "3"}))
    assert removed(tmp_path / "out") == [(0, 0, "text.min_characters")], "no image is left over"
    corpus = open_corpus(tmp_path / "out")
    assert corpus.kinds == ("matched",)
    assert verify(tmp_path / "out") == []
    facts = matching_facts(open_corpus(source), Range(0, 0, 0, 3, 0), *encoder, {0: {0}})
    first, second = corpus[0].images, corpus[1].images
    assert sorted(image.matched_text for image in first) == [0, 1], "by the numbers that texts have now"
    assert [image.similarity for image in first] == facts["similarity"][:2].tolist()
    assert [image.matched_text for image in first] == (facts["matched_text"][:2] - 1).tolist()
    assert [(image.data, image.matched_text) for image in second] == [(picture(2), 0), (picture(3), 0)]
    largest = float(matching_facts(open_corpus(source), Range(0, 0, 0, 3, 0), *encoder)["similarity"].max())
    for least, number in (("1.1", 4), (str(largest), 3)):  # an image at the bound stays
        strict = rules(encoder, match="true", min_similarity=least)
        found = {removal.rule: removal.images for removal in curate(source, None, strict).rules}
        assert found["image.matching"] == number


def test_a_head_and_features_remove_images(source: Path, encoder: tuple[str, str], tmp_path: Path) -> None:
    features = feature_facts(open_corpus(source), Range(0, 0, 0, 3, 0), *encoder)["feature"]
    np.savez(tmp_path / "head.npz", weight=features[1], bias=0.0)
    score = features @ features[1]
    head = {"head": str(tmp_path / "head.npz"), "max_score": str(float(np.sort(score)[-2:].mean()))}
    curate(source, tmp_path / "out", rules(encoder, **head))
    assert removed(tmp_path / "out") == [(0, 3, "image.score")]
    cosine = np.triu(features @ features.T, 1)
    _, later = np.unravel_index(cosine.argmax(), cosine.shape)
    least = str(float(cosine.max()) - 1e-3)
    curate(source, tmp_path / "alike", rules(encoder, duplicates="keep-one", min_cosine=least))
    place = [(0, 1), (0, 3), (1, 0), (1, 1)][later]
    assert removed(tmp_path / "alike") == [(*place, "image.features")]


def test_all_rules_of_features_encode_each_image_once(
    source: Path, encoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads and duplicates; what each removes is as of itself alone, what several would, the first's."""
    features = feature_facts(open_corpus(source), Range(0, 0, 0, 3, 0), *encoder)["feature"]
    places = [(0, 1), (0, 3), (1, 0), (1, 1)]
    for k in range(3):
        np.savez(tmp_path / f"{k}.npz", weight=features[k])
    scores = features @ features[:3].T
    least = [float(np.sort(scores[:, k])[:2].mean()) for k in range(3)]
    most = [float(np.sort(scores[:, k])[-2:].mean()) for k in range(3)]
    file = [str(tmp_path / f"{k}.npz") for k in range(3)]
    given = {
        "head": file[0],
        "max_score": str(most[0]),
        "models.nsfw.head": file[1],
        "models.nsfw.max_score": str(most[1]),
    }
    given |= {"models.aesthetics.head": file[2], "models.aesthetics.min_score": str(least[2])}
    expected = {places[scores[:, 2].argmin()]: "aesthetics", places[1]: "nsfw", places[0]: "score"}
    cosine = np.triu(features @ features.T, 1)
    again = places[np.unravel_index(cosine.argmax(), cosine.shape)[1]]
    expected = {again: "features"} | expected
    encoded: list[int] = []
    original = OurEncoder.encode

    def counted(self: OurEncoder, images: Any) -> Any:
        encoded.append(len(images))
        return original(self, images)

    monkeypatch.setattr(OurEncoder, "encode", counted)
    given |= {"duplicates": "keep-one", "min_cosine": str(float(cosine.max()) - 1e-3)}
    curate(source, tmp_path / "out", rules(encoder, **given))
    assert removed(tmp_path / "out") == [(*where, f"image.{rule}") for where, rule in sorted(expected.items())]
    assert sum(encoded) in (4, 5), "four images, and a blank one where the encoder is loaded"
    shutil.copytree(tmp_path, tmp_path / "same", ignore=lambda *_: ["corpus", "in", "out"])
    heads = {"head": "0.npz", "models.nsfw.head": "1.npz", "models.aesthetics.head": "2.npz"}
    moved = as_recipe(rules(encoder, **given | {name: str(tmp_path / "same" / file) for name, file in heads.items()}))
    assert (
        moved
        == as_recipe(rules(encoder, **given))
        != as_recipe(rules(encoder, **given | {"models.nsfw.head": file[0]}))
    )


def test_cores_that_stay_idle_are_told(
    source: Path, encoder: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_lcl.curate.run.num_cores", lambda: 2)
    curate(source, None, read_settings(overrides={"text.min_words": "1"}))
    assert caplog.messages == [], "no rule asks a model"
    for task_bytes, told in ((100, "3 tasks of documents; --workers 2 uses more"), (1 << 25, "1 task of documents")):
        curate(source, None, rules(encoder, duplicates="keep-one"), task_bytes=task_bytes)
        assert caplog.messages.pop() == (
            f"models compute on 1 of 2 cores, in one thread of each process: --workers 1, {told}"
        )
        caplog.clear()
    monkeypatch.setattr("megatron_lcl.curate.run.num_cores", lambda: 1)
    curate(source, None, rules(encoder, duplicates="keep-one"))
    assert caplog.messages == []


def test_manifests_are_not_read_again_for_each_task_of_an_encoder(
    source: Path, encoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    for task_bytes in (1 << 25, 100):  # one task, and as many as documents
        with monkeypatch.context() as patch:
            read = manifests_read(patch)
            given = rules(encoder, match="true", duplicates="keep-one")
            curate(source, tmp_path / f"{task_bytes}", given, task_bytes=task_bytes)
        counted.append(len(read))
    assert counted[0] == counted[1]
    assert removed(tmp_path / "100") == removed(tmp_path / f"{1 << 25}")


def test_work_goes_on_with_the_same_weights_and_tokenizer_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder's name is that of a run, which is trained further while curate is stopped."""
    words = [f"a photo of a {i}" for i in range(10)] * 3
    tokenizers = [train_sentencepiece([w.replace("f", letter) for w in words], 400) for letter in "fg"]
    size = tokenizers[0].vocab_size
    assert size == tokenizers[1].vocab_size
    config = Model(Vision(16, 4, 64, 1, 4, 128), Language(64, size, 48, 1, 4, 96), 4)
    run, words_file, out = tmp_path / "run", tmp_path / "words.model", tmp_path / "out"
    run.mkdir()

    def train(seed: int) -> None:
        save_checkpoint(LCL(config, seed=seed), Config(model=config), run)

    def fails(*_: object) -> None:
        raise RuntimeError

    train(1)
    tokenizers[0].save(words_file)
    given = rules((str(run), str(words_file)), match="true")
    with monkeypatch.context() as patch:
        patch.setattr("megatron_lcl.curate.run._finish", fails)
        with pytest.raises(RuntimeError):
            curate(source, out, given)
    refused = r"another unfinished corpus \(different: thresholds\)"
    train(2)
    with pytest.raises(UserError, match=refused):
        curate(source, out, given)
    train(1)
    tokenizers[1].save(words_file)
    with pytest.raises(UserError, match=refused):
        curate(source, out, given)
    tokenizers[0].save(words_file)
    run = run.rename(tmp_path / "elsewhere")
    curate(source, out, rules((str(run), str(words_file)), match="true"))
    assert curate(source, out, rules((str(run), str(words_file)), match="true")).reused
    train(2)
    with pytest.raises(UserError, match="its thresholds differ"):
        curate(source, out, rules((str(run), str(words_file)), match="true"))


def test_the_weights_are_those_of_the_start(
    source: Path, encoder: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves its next checkpoint before a process loads the encoder."""
    config = Model(Vision(16, 4, 64, 1, 4, 128), Language(64, open_tokenizer(encoder[1]).vocab_size, 48, 1, 4, 96), 4)
    run = tmp_path / "run"

    def save(step: int) -> Path:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_checkpoint(LCL(config, seed=step), Config(model=config), folder)
        (folder / "manifest.json").write_text("{}")
        return folder

    first, check = save(1), models.check

    def then_saved(*given: Any, **options: Any) -> dict[str, str]:
        found = check(*given, **options)
        models.load.cache_clear()  # as of a process that has not loaded it
        save(2)
        return found

    monkeypatch.setattr(models, "check", then_saved)
    curate(source, tmp_path / "out", rules((str(run), encoder[1]), match="true"))
    facts = matching_facts(open_corpus(source), Range(0, 0, 0, 3, 0), str(first), encoder[1])
    corpus = open_corpus(tmp_path / "out")
    assert [image.similarity for d in corpus for image in d.images] == facts["similarity"].tolist()


@pytest.mark.parametrize("action", ["keep-one", "drop-all"])
def test_features_of_another_corpus(source: Path, encoder: tuple[str, str], tmp_path: Path, action: str) -> None:
    """It has one of the images, and one whose features are near: found as by comparing all pairs."""
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more", [Document((Image(picture(7)), Image(picture(2)), Text("other")))])
    facts = [
        feature_facts(open_corpus(path), Range(0, 0, 0, number, 0), *encoder)["feature"]
        for path, number in ((other, 1), (source, 3))
    ]
    features = np.concatenate(facts)
    cosine = features @ features.T
    across = np.sort(cosine[:2, 2:].ravel())
    least = float(across[-3:-1].mean())
    clusters = np.linalg.matrix_power((cosine >= least).astype(int), 6) > 0
    first = clusters.argmax(1)
    expected = {}
    for place, k in (((0, 1), 2), ((0, 3), 3), ((1, 0), 4), ((1, 1), 5)):
        if (action == "drop-all" and clusters[k].sum() > 1) or first[k] < k:
            expected[place] = f"{other}: document 0, piece {first[k]}" if first[k] < 2 else None
    assert expected[1, 0] == f"{other}: document 0, piece {first[4]}"
    given = {"duplicates": action, "min_cosine": str(least), "duplicates.against": f"[{other}]"}
    curate(source, tmp_path / "out", rules(encoder, **given))
    table = pq.read_table(tmp_path / "out" / "removed.parquet").to_pylist()
    assert {row["rule"] for row in table} == {"image.features"}
    found = {(row["document"], row["item"]): row["matched"] for row in table}
    assert found.keys() == expected.keys()
    assert all(found[place] == matched for place, matched in expected.items() if matched)
    assert [row["value"] for row in table if (row["document"], row["item"]) == (1, 0)] == [1], "the same bytes"
    with pytest.raises(UserError, match="nowhere"):
        curate(source, tmp_path / "new", rules(encoder, **given | {"duplicates.against": "[nowhere]"}))


def test_an_encoder_that_does_not_fit_is_refused_before_the_work(
    source: Path, encoder: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    np.savez(tmp_path / "head.npz", weight=np.ones(3))
    without_texts = {"encoder": "timm:test_vit?pretrained=no", "match": "true"}
    of_another = {"encoder": encoder[0], "head": str(tmp_path / "head.npz"), "min_score": "0"}
    before = sorted(tmp_path.iterdir())
    tokenizer = {"encoder": encoder[0], "tokenizer": "clip", "match": "true"}
    for given, said in (
        (without_texts, "has no text encoder"),
        (of_another, "has 3 weights, the encoder 48 features"),
        (tokenizer, "the tokenizer has 49411 ids, the model "),
    ):
        words = [f"--models.{name}={value}" for name, value in given.items()]
        assert main(["curate", str(source), "--output", str(tmp_path / "out"), *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        settings = read_settings(overrides={f"models.{name}": value for name, value in given.items()})
        with pytest.raises(UserError, match=said):
            curate_in_jobs(source, tmp_path / "out", Engine("local", 2), settings)
        assert sorted(tmp_path.iterdir()) == before  # no logs: no job has begun


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models.match": "true"}, "need models.encoder"),
        ({"models.encoder": "hf:x", "models.head": "head.npz"}, "removes nothing; give min_score or max_score"),
        ({"models.encoder": "hf:x", "models.nsfw.head": "head.npz"}, "removes nothing; give min_score or max_score"),
        ({"models.nsfw.max_score": "0.5"}, "are of a head; give its file"),
    ],
)
def test_settings_that_say_half(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_settings(overrides=given)


HEAD = {"models.encoder": "hf:x", "models.head": "head.npz", "models.min_score": "0"}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"duplicates.images.max_bits": "20"}, "duplicates.images.action"),
        ({"duplicates.images.min_detail": "0", "duplicates.documents.action": "drop-all"}, "duplicates.images.action"),
        ({"duplicates.documents.threshold": "null"}, "duplicates.documents.action"),
        ({"duplicates.against": "[a]"}, "duplicates.images.action, duplicates.documents.action or models.duplicates"),
        ({"evaluation.whole_bits": "3"}, "evaluation.sets"),
        ({"models.tokenizer": "clip"}, "models.match"),
        ({"models.tokenizer": "clip", **HEAD}, "models.match"),
        ({"models.min_similarity": "0.2", **HEAD}, "models.match"),
        ({"models.min_cosine": "0.9", "models.encoder": "hf:x", "models.match": "true"}, "models.duplicates"),
        ({"models.encoder": "hf:x"}, "models.match, models.duplicates, models.head, models.nsfw.head or models.aesth"),
        ({"lists.stop_words": "de", "text.min_words": "1"}, "text.min_stop_words or document.min_stop_words"),
        ({"lists.flagged_words": "a.txt"}, "text.max_flagged_words or document.max_flagged_words"),
        ({"language.wanted": "de", "image.min_side": "9"}, "text.min_language or document.min_language"),
        ({"language.among": "[de, en]"}, "text.min_language"),
        (
            {"perplexity.model": "."},
            "text.min_perplexity, text.max_perplexity, document.min_perplexity or document.max",
        ),
    ],
)
def test_settings_that_no_rule_reads(given: dict[str, str], wanted: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"{next(iter(given))} is set, and no rule reads it; give {wanted}")):
        read_settings(overrides=given)


def test_what_reads_a_setting_is_off_by_default() -> None:
    flat = fields.flat(dataclasses.asdict(Settings()))
    for part, readers in READ_BY.items():
        assert any(f"{name}.".startswith(f"{part}.") for name in flat), part
        assert all(not flat[name] for name in readers), part
