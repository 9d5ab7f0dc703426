"""Protects linear heads and duplicates by features: on features made by hand, and on those of an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import threadpoolctl
import torch
from curate.corpora_of_rules import computing_in_one_thread
from curate.duplicates.test_joins import together
from data.corpora import jpeg, write_corpus
from safetensors.numpy import save_file

from megatron_lcl.curate.documents import Range
from megatron_lcl.curate.models import features
from megatron_lcl.curate.models.encoder import load
from megatron_lcl.curate.models.features import feature_facts, join_features, join_scores
from megatron_lcl.curate.models.settings import FeatureDuplicates, HeadScore
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder

ENCODER = "timm:test_vit?pretrained=no&seed=1"


def by_hand(folder: Path, angles: list[float], size: int, seed: int = 0) -> tuple[Corpus, list[Path]]:
    """A corpus with one image a document whose features have these angles in degrees (NaN: it does not decode), and
    their facts by tasks of `size` documents."""
    corpus = write_corpus(folder, [[(jpeg(seed + k), None, None)] for k in range(len(angles))])
    radians = np.deg2rad(angles)
    feature = np.nan_to_num(np.stack([np.cos(radians), np.sin(radians)], 1)).astype(np.float32)
    files = []
    for first in range(0, len(angles), size):
        own = np.arange(first, min(len(angles), first + size))
        files.append(folder.with_name(f"{folder.name}-{first}.npz"))
        facts: dict[str, Any] = {"corpus": np.array(str(folder)), "document": own, "item": np.zeros(len(own), np.int32)}
        facts |= {"image": np.arange(len(own), dtype=np.int32), "feature": feature[own]}
        np.savez(files[-1], digest=corpus.shard(0).image_xxh3[own].view(np.uint32), **facts)
    return corpus, files


@pytest.mark.parametrize("size", [2, 99])
def test_features_within_an_angle_are_duplicates(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of two blocks that are compared, and those of one."""
    monkeypatch.setattr(features, "_BLOCK", size)
    corpus, files = by_hand(tmp_path / "ours", [0, 90, 8, 200, 16, np.nan, np.nan, 91, 250, 251], size)
    _, against = by_hand(tmp_path / "other", [300, 204], 99, seed=100)
    rule = FeatureDuplicates(min_cosine=float(np.cos(np.deg2rad(9))))
    expected = {"keep-one": ([2, 4, 7, 9], [0, 0, 1, 8]), "drop-all": ([0, 1, 2, 4, 7, 8, 9], [2, 7, 0, 0, 1, 9, 8])}
    for action, (documents, matched) in expected.items():
        (scratch := tmp_path / action).mkdir()
        found = together(join_features(files, FeatureDuplicates(rule.min_cosine, action), scratch))  # type: ignore[arg-type]
        assert found.document.tolist() == documents
        assert found.matched == [f"{corpus.path}: document {d}, piece 0" for d in matched]
    (scratch := tmp_path / "against").mkdir()
    found = together(join_features(files, rule, scratch, against))
    assert found.document.tolist() == [2, 3, 4, 7, 9]
    assert found.matched[1] == f"{tmp_path / 'other'}: document 1, piece 0"
    cosines = np.cos(np.deg2rad([8, 4, 16, 1, 1]))  # the third is connected by the image between
    np.testing.assert_allclose(found.value, cosines, atol=1e-6)


class Rounded(np.ndarray):
    """Its products are too large, as another number of threads or another size of the blocks may make them."""

    def __matmul__(self, other: Any) -> Any:
        return np.asarray(self) @ np.asarray(other) + 1e-6


def test_how_a_product_is_rounded_decides_on_no_duplicate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files = by_hand(tmp_path / "corpus", [0, 60, 8], 99)
    with np.load(files[0]) as facts:
        one, other = facts["feature"][[0, 2]].astype(np.float64)
    cosine = float(one @ other)
    found = []
    for k in range(2):  # as it is, and with the other rounding
        for least in (cosine - 1e-9, cosine + 1e-9):
            (scratch := tmp_path / f"{k}-{least}").mkdir()
            found += [list(join_features(files, FeatureDuplicates(least), scratch))]
        gather = features.gather

        def rounded(*given: Any, gather: Any = gather) -> Any:
            rows, starts = gather(*given)
            return {name: rows[name].view(Rounded) if name == "feature" else rows[name] for name in rows}, starts

        monkeypatch.setattr(features, "gather", rounded)
    assert [[(r.document.tolist(), r.value.tolist()) for r in parts] for parts in found] == [
        [([2], [np.float32(cosine)])], [],
    ] * 2  # fmt: skip


@pytest.mark.parametrize("format", ["npz", "safetensors"])
def test_a_head_scores_what_it_is_given(format: str, tmp_path: Path) -> None:
    _, files = by_hand(tmp_path / "corpus", [0, 60, np.nan, 90, 180], 2)
    head = {"weight": np.array([[2.0, 0.0]], np.float32), "bias": np.array([0.5], np.float32)}
    file = tmp_path / f"head.{format}"
    np.savez(file, **head) if format == "npz" else save_file(head, file)
    low = join_scores(files, HeadScore(str(file), min_score=1.0))
    assert low.document.tolist() == [3, 4]
    np.testing.assert_allclose(low.value, [0.5, -1.5], atol=1e-6)
    assert join_scores(files, HeadScore(str(file), max_score=1.0)).document.tolist() == [0, 1]
    assert join_scores(files, HeadScore(str(file), min_score=-1.0, max_score=2.0)).document.tolist() == [0, 4]
    at_the_bounds = HeadScore(str(file), min_score=-1.5, max_score=2.5)
    assert join_scores(files, at_the_bounds).document.tolist() == [], "what has a bound's score stays"
    for content, said in ((np.ones(3), "3 weights, the encoder 2"), (np.zeros((2, 0)), "0 weights")):
        np.savez(tmp_path / "other.npz", weight=content)
        with pytest.raises(UserError, match=said):
            join_scores(files, HeadScore(str(tmp_path / "other.npz"), min_score=1.0))
    (tmp_path / "text.npz").write_text("no head")
    for name, said in (("text.npz", "is no linear head"), ("nowhere.npz", "there is no")):
        with pytest.raises(UserError, match=said):
            join_scores(files, HeadScore(str(tmp_path / name), min_score=1.0))
    with pytest.raises(ValueError, match="removes nothing"):  # pydantic's, of our UserError
        HeadScore(str(file))


def test_scores_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """A product by BLAS does, of which a Slurm job has as many as `--workers`."""
    rng, places = np.random.default_rng(0), np.arange(5000)
    feature = rng.normal(size=(5000, 768)).astype(np.float32)
    facts = {"document": places, "item": np.zeros(5000, np.int32), "image": places.astype(np.int32)}
    np.savez(tmp_path / "facts.npz", feature=feature, **facts)
    np.savez(tmp_path / "head.npz", weight=rng.normal(size=768))
    found = []
    for threads in (1, 2, 3):
        with threadpoolctl.threadpool_limits(threads):
            found.append(join_scores([tmp_path / "facts.npz"], HeadScore(str(tmp_path / "head.npz"), min_score=1e9)))
    np.testing.assert_array_equal(found[0].value, found[1].value)
    np.testing.assert_array_equal(found[0].value, found[2].value)


def test_features_are_those_of_the_encoder(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    pictures = [jpeg(k) for k in range(3)]
    documents = [
        [[1], (pictures[0], None, None), (b"no image", None, None)],
        [(pictures[1], None, None), (pictures[0], None, None)],
        [(pictures[2], None, None)],
    ]
    corpus = write_corpus(tmp_path / "corpus", documents)
    load(ENCODER, None)
    with computing_in_one_thread():
        facts = feature_facts(corpus, Range(0, 0, 0, 3, 0), ENCODER)
    assert facts["document"].tolist() == [0, 0, 1, 1, 2]
    assert facts["item"].tolist() == [1, 2, 0, 1, 0]
    model = load_encoder(ENCODER)
    for place, picture in ((0, 0), (2, 1), (3, 0), (4, 2)):
        expected = model.encode(model.prepare(pictures[picture])[None]).pooled[0]
        np.testing.assert_allclose(
            facts["feature"][facts["image"][place]], torch.nn.functional.normalize(expected, dim=0), atol=1e-5
        )
    assert not facts["feature"][facts["image"][1]].any()
    only_bad = feature_facts(corpus, Range(0, 0, 0, 1, 0), ENCODER)
    assert only_bad["feature"].shape[1] == facts["feature"].shape[1]
