"""Every metric against an independent implementation, on scikit-learn's digits."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

from megatron_lcl.evaluate import probes
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.knn import knn, knn_predict
from megatron_lcl.evaluate.patches import CachedPatches
from megatron_lcl.evaluate.probes import (
    AttentiveProbe,
    Linear,
    attentive_probe,
    fit_attentive,
    fit_linear,
    linear_probe,
)
from megatron_lcl.evaluate.results import chance_of_hit, proportion
from megatron_lcl.evaluate.retrieval import retrieval, retrieval_ranks
from megatron_lcl.evaluate.settings import AttentiveSettings, LinearSettings
from megatron_lcl.evaluate.zero_shot import accuracy, by_texts, classify

Digits = tuple[np.ndarray, np.ndarray]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def image_set(labels: np.ndarray, name: str = "digits") -> ImageSet:
    return ImageSet(name, (FileBlob(Path("unread")),) * len(labels), labels, WORDS)


@pytest.fixture(scope="module")
def split(digits: Digits) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    images, labels = digits
    x = images.reshape(len(images), 64).astype(np.float32)
    return x[:1200], labels[:1200], x[1200:], labels[1200:]


def test_zero_shot(encoder: Encoder, split: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.evaluate.zero_shot._ROWS", 250)  # 597 images
    peer = pytest.importorskip("sklearn.metrics")
    _, _, x, y = split
    result = accuracy(encoder, image_set(y), classify(encoder, image_set(y), x))
    centers = encoder.encode_texts(WORDS).numpy()
    scores = x / np.linalg.norm(x, axis=1, keepdims=True) @ centers.T
    assert result.metrics["accuracy"].value == pytest.approx((scores.argmax(1) == y).mean())
    assert result.metrics["accuracy, top 5"].value == pytest.approx(peer.top_k_accuracy_score(y, scores, k=5))
    assert result.metrics["mean per-class recall"].value == pytest.approx(
        peer.balanced_accuracy_score(y, scores.argmax(1))
    )
    assert result.metrics["accuracy"].chance == 0.1
    assert result.metrics["accuracy"].value > 0.7


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn(split: tuple[np.ndarray, ...], k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_lcl.evaluate.knn._ROWS", 250)  # 597 images
    train, train_labels, test, labels = split
    peer = pytest.importorskip("sklearn.neighbors").KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    peer.fit(train, train_labels)
    ours = knn_predict(train, train_labels, test, 10, k)
    assert (ours == peer.predict(test)).mean() > 0.998  # ties
    result = knn("pixels", image_set(train_labels), image_set(labels), train, test, k)
    assert result.metrics["accuracy"].value == pytest.approx((ours == labels).mean())
    assert len(knn_predict(train[:k], train_labels[:k], test, 10, k)) == len(test)  # all are neighbors


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_linear_classifier(split: tuple[np.ndarray, ...], strength: float) -> None:
    train, train_labels, test, _ = split
    train, test = train.astype(np.float64), test.astype(np.float64)
    ours = fit_linear(train, train_labels, 10, strength)
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler().fit(train)
    linear = pytest.importorskip("sklearn.linear_model")
    peer = linear.LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(scaler.transform(train), train_labels)
    assert np.abs(ours.weight - peer.coef_).max() < 1e-3 * np.abs(peer.coef_).max()
    theirs = peer.predict_proba(scaler.transform(test))
    logits = torch.from_numpy(ours.logits(test))
    assert np.abs(logits.softmax(-1).numpy() - theirs).max() < 1e-3


def test_a_linear_classifier_that_is_not_done_says_so(split: tuple[np.ndarray, ...]) -> None:
    with pytest.warns(UserWarning, match="stopped after 3 iterations"):
        fit_linear(split[0], split[1], 10, 1.0, max_iterations=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_linear(split[0], split[1], 10, 1.0)


def test_between_losses_scipy_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two made the fit eight times as slow."""
    threads: list[list[int]] = []

    def watched(*given: Any, **options: Any) -> Any:
        threads.append([pool.num_threads for pool in blas.lib_controllers])
        return minimize(*given, **options)

    monkeypatch.setattr(probes, "minimize", watched)
    blas = ThreadpoolController().select(prefix="libscipy_openblas")
    if not blas.lib_controllers:
        pytest.skip("SciPy has another BLAS here")
    with blas.limit(limits=2):
        fit_linear(np.eye(4), np.arange(4), 4, 1.0)
        assert [pool.num_threads for pool in blas.lib_controllers] == [2] * len(threads[0])
    assert threads == [[1] * len(threads[0])]


@pytest.mark.parametrize("columns", [1, 50, 64, 65, 200])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_features_are_standardized_with_little_memory(columns: int, kind: type) -> None:
    """Of ImageNet's a copy in float64 is 10 GB; the numbers are those of the formula."""
    features = np.random.default_rng(columns).normal(3, 2, (4000, columns)).astype(kind)
    features[:, columns // 2] = 1.5
    before = features.copy()
    tracemalloc.start()
    try:
        standardized, mean, scale = probes._standardized(features)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    x = features.astype(np.float64)
    deviation = np.where(x.std(0) == 0, 1, x.std(0))
    assert np.array_equal(features, before)
    assert np.array_equal(mean, x.mean(0))
    np.testing.assert_allclose(scale, deviation, rtol=1e-13)
    np.testing.assert_allclose(standardized, (x - x.mean(0)) / deviation, rtol=1e-13)
    if columns > 128:
        assert peak < 1.5 * x.nbytes


def test_logits_of_few_images_are_in_memory_at_once(
    split: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit_linear(split[0], split[1], 10, 1.0)
    seen: list[int] = []

    def cross_entropy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        seen.append(len(logits))
        return plain(logits, classes)

    plain = probes.F.cross_entropy
    monkeypatch.setattr(probes.F, "cross_entropy", cross_entropy)
    monkeypatch.setattr(probes, "_ROWS", 500)
    parts = fit_linear(split[0], split[1], 10, 1.0)
    assert set(seen) == {500, 200}
    np.testing.assert_allclose(parts.weight, whole.weight, rtol=0, atol=1e-4 * np.abs(whole.weight).max())
    np.testing.assert_allclose(parts.bias, whole.bias, rtol=0, atol=1e-4 * np.abs(whole.bias).max())


def test_linear_probe(split: tuple[np.ndarray, ...]) -> None:
    train, train_labels, test, labels = split
    result = linear_probe("pixels", image_set(train_labels), image_set(labels), train, test, LinearSettings())
    assert result.metrics["accuracy"].value > 0.9
    assert 1e-4 < result.settings["C"] < 1e4  # neither end: the choice means something
    given = fit_linear(train, train_labels, 10, result.settings["C"]).logits(test).argmax(1)
    peer = pytest.importorskip("sklearn.metrics")
    assert result.metrics["accuracy"].value == pytest.approx(peer.accuracy_score(labels, given))
    assert result.metrics["mean per-class recall"].value == pytest.approx(peer.balanced_accuracy_score(labels, given))
    again = linear_probe("pixels", image_set(train_labels), image_set(labels), train, test, LinearSettings())
    assert again == result


def test_settings_of_the_linear_probe(split: tuple[np.ndarray, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter is held out to choose among two strengths; the steps are as many as asked for."""
    train, train_labels, test, labels = split
    sets = image_set(train_labels), image_set(labels)
    fits: list[tuple[int, float, int]] = []

    def fit(x: np.ndarray, y: np.ndarray, classes: int, strength: float, steps: int, device: str) -> Linear:
        fits.append((len(x), strength, steps))
        return fit_linear(x, y, classes, strength, steps, device)

    monkeypatch.setattr(probes, "fit_linear", fit)
    settings = LinearSettings(strengths=(10.0, 1e-6), validation=0.25, max_iterations=40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = linear_probe("pixels", *sets, train, test, settings)
    assert fits == [(900, 1e-6, 40), (900, 10.0, 40), (1200, 10.0, 40)]
    assert result.settings["C"] == 10.0
    with pytest.warns(UserWarning, match="stopped after 3 iterations"):
        linear_probe("pixels", *sets, train, test, LinearSettings(strengths=(1.0,), max_iterations=3))


@pytest.mark.parametrize(("seed", "best"), [(1, 0.1), (5, 10.0)])
def test_the_strength_is_chosen_on_a_random_part(seed: int, best: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images sorted by class, as folders of classes are: no class may be missing from what is fitted or judged."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 30)
    x = generator.normal(0, 1.5, (90, 12)) + 2 * np.eye(3, 12)[labels]
    strengths = (10.0, 1e-2, 1.0, 1e-3, 100.0, 0.1)
    fitted: list[np.ndarray] = []

    def fit(features: np.ndarray, classes: np.ndarray, *others: Any) -> Linear:
        fitted.append(classes)
        return fit_linear(features, classes, *others)

    monkeypatch.setattr(probes, "fit_linear", fit)
    data = ImageSet("x", (FileBlob(Path("unread")),) * 90, labels, WORDS[:3])
    result = linear_probe("x", data, data, x, x, LinearSettings(strengths=strengths), seed)

    held_out, kept = np.split(np.random.default_rng(seed).permutation(90), [18])
    assert all(np.array_equal(np.unique(classes), [0, 1, 2]) for classes in fitted)
    assert [len(classes) for classes in fitted] == [72] * 6 + [90]
    scaler = pytest.importorskip("sklearn.preprocessing").StandardScaler().fit(x[kept])
    linear = pytest.importorskip("sklearn.linear_model")
    scores = {}
    for c in strengths:
        peer = linear.LogisticRegression(C=c, tol=1e-8, max_iter=5000).fit(scaler.transform(x[kept]), labels[kept])
        scores[c] = peer.score(scaler.transform(x[held_out]), labels[held_out])
    assert [c for c in strengths if scores[c] == max(scores.values())] == [best]
    assert result.settings["C"] == best


def test_of_equal_strengths_the_strongest_regularization_is_chosen() -> None:
    labels = np.arange(40) % 2
    x = np.stack([labels * 2.0 - 1, np.random.default_rng(0).normal(0, 0.1, 40)], 1)
    data = ImageSet("x", (FileBlob(Path("unread")),) * 40, labels, WORDS[:2])
    result = linear_probe("x", data, data, x, x, LinearSettings(strengths=(1.0, 0.01, 100.0)))
    assert result.metrics["accuracy"].value == 1
    assert result.settings["C"] == 0.01


def test_attentive_probe_against_plain_formulas() -> None:
    """The same probe with softmax, einsum and AdamW written out, from the same first values and the same batches."""
    generator = np.random.default_rng(0)
    patches, labels = generator.normal(size=(20, 5, 8)).astype(np.float32), generator.integers(3, size=20)
    settings = AttentiveSettings(epochs=3, batch_size=8, lr=1e-2, weight_decay=0.1, warmup=0.3, heads=2)
    ours = fit_attentive(CachedPatches(patches), labels, 3, settings, seed=4)

    torch.manual_seed(4)
    w = {name: p.detach().clone().requires_grad_() for name, p in AttentiveProbe(8, 3, 2).named_parameters()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def logits(x: torch.Tensor) -> torch.Tensor:
        x = norm(x, "norm_in")
        (wq, wk, wv), (bq, bk, bv) = w["attention.in_proj_weight"].chunk(3), w["attention.in_proj_bias"].chunk(3)
        q = (w["query"][0, 0] @ wq.T + bq).view(2, 4)
        k, v = ((x @ m.T + b).unflatten(-1, (2, 4)) for m, b in ((wk, bk), (wv, bv)))
        shares = (torch.einsum("hd,nphd->nhp", q, k) / 2).softmax(-1)
        pooled = torch.einsum("nhp,nphd->nhd", shares, v).flatten(1)
        pooled = pooled @ w["attention.out_proj.weight"].T + w["attention.out_proj.bias"]
        return norm(pooled, "norm_out") @ w["classifier.weight"].T + w["classifier.bias"]

    first = {name: torch.zeros_like(p) for name, p in w.items()}
    second = {name: torch.zeros_like(p) for name, p in w.items()}
    order, step, steps, warmup = np.random.default_rng(4), 0, 9, 3
    for _ in range(3):
        shuffled = order.permutation(20)
        for chosen in (np.sort(shuffled[i : i + 8]) for i in (0, 8, 16)):
            x, y = torch.from_numpy(patches[chosen]), torch.from_numpy(labels[chosen])
            (-logits(x).log_softmax(-1)[torch.arange(len(y)), y].mean()).backward()
            lr = 1e-2 * min((step + 1) / warmup, 0.5 * (1 + np.cos(np.pi * max(step - warmup, 0) / (steps - warmup))))
            step += 1
            with torch.no_grad():
                for name, p in w.items():
                    first[name] += 0.1 * (p.grad - first[name])
                    second[name] += 0.001 * (p.grad**2 - second[name])
                    p *= 1 - lr * 0.1
                    p -= lr * first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.999**step)).sqrt() + 1e-8)
                    p.grad = None
    with torch.no_grad():
        assert torch.allclose(ours(torch.from_numpy(patches)), logits(torch.from_numpy(patches)), atol=1e-4)


def test_a_probe_leaves_all_generators_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds those of other devices too, which nobody sets back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    patches = np.ones((4, 2, 8), np.float32)
    fit_attentive(CachedPatches(patches), np.arange(4) % 2, 2, AttentiveSettings(epochs=1, heads=1), seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_attentive_probe_finds_what_a_mean_hides() -> None:
    generator = np.random.default_rng(0)
    n, p, v = 800, 9, 16
    labels = generator.integers(4, size=n)
    patches = generator.normal(size=(n, p, v)).astype(np.float16)
    where = generator.integers(p, size=n)
    patches[np.arange(n), where, :] *= 0.3
    patches[np.arange(n), where, labels] += 4  # the class stands in one patch, marked by its fifth feature
    patches[np.arange(n), where, 8] += 4
    patches[:, :, :4] += 3 * generator.normal(size=(n, p, 4)) * (patches[:, :, 8:9] < 2)  # noise everywhere else
    train, test = slice(0, 600), slice(600, n)
    sets = [ImageSet("x", (FileBlob(Path("x")),) * len(labels[s]), labels[s], WORDS[:4]) for s in (train, test)]
    mean = patches.astype(np.float32).mean(1)
    linear = linear_probe("x", *sets, mean[train], mean[test], LinearSettings())
    settings = AttentiveSettings(epochs=30, batch_size=64, lr=3e-3, seeds=(0, 1))
    cached = CachedPatches(patches[train]), CachedPatches(patches[test])
    attentive = attentive_probe("x", *sets, *cached, settings)
    assert attentive.metrics["accuracy"].value > 0.9 > 0.75 > linear.metrics["accuracy"].value
    assert attentive_probe("x", *sets, *cached, settings) == attentive


def test_the_attentive_accuracy_is_the_mean_over_seeds() -> None:
    """Each probe is the one of its seed; an image that some of them get right counts for that share of them."""
    generator = np.random.default_rng(1)
    labels = np.arange(60) % 3
    patches = generator.normal(size=(60, 4, 8)).astype(np.float32)
    patches[np.arange(60), 0, labels] += 2
    sets = [ImageSet("x", (FileBlob(Path("x")),) * 30, part, WORDS[:3]) for part in (labels[:30], labels[30:])]
    cached = CachedPatches(patches[:30]), CachedPatches(patches[30:])
    settings = AttentiveSettings(epochs=3, batch_size=7, lr=3e-3, heads=2, seeds=(0, 5, 9))
    found = attentive_probe("x", *sets, *cached, settings)
    right = []
    for seed in (0, 5, 9):
        logits = fit_attentive(cached[0], labels[:30], 3, settings, seed)(torch.from_numpy(patches[30:]))
        right.append(logits.argmax(1).numpy() == labels[30:])
    assert len({tuple(each) for each in right}) == 3, "or one seed's would do for all"
    assert found.settings["accuracy by seed"] == pytest.approx([each.mean() for each in right])
    assert found.metrics["accuracy"].value == pytest.approx(np.mean(right))
    assert found.metrics["accuracy"].chance == pytest.approx(1 / 3)
    by_image = proportion(np.mean(right, axis=0))
    assert (found.metrics["accuracy"].low, found.metrics["accuracy"].high) == (by_image.low, by_image.high)


def brute_force_ranks(
    images: torch.Tensor, texts: torch.Tensor, own: np.ndarray
) -> tuple[tuple[list[int], list[int]], float]:
    """own [N, M]: whether they belong together. The ranks of both ways, and how near a wrong one comes to the best."""
    cosine = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=-1).double().numpy()
    both, nearest = [], np.inf
    for scores, mine in ((cosine, own), (cosine.T, own.T)):
        over = [row[~m] - max(row[m]) for row, m in zip(scores, mine, strict=True)]
        both.append([int(sum(row > 0)) for row in over])
        nearest = min([nearest, *abs(np.concatenate(over))])
    return (both[0], both[1]), nearest


@mock.patch("megatron_lcl.evaluate.retrieval._ROWS", 7)
@settings(max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 3))
def test_retrieval_against_a_brute_force_count(seed: int, n: int, per_image: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_texts = int(torch.randint(1, per_image * n + 1, (1,), generator=generator))
    own = torch.rand(n, num_texts, generator=generator).numpy() < 0.2  # several of each other's
    own[np.arange(n), np.arange(n) % num_texts] = own[np.arange(num_texts) % n, np.arange(num_texts)] = True
    images, texts = torch.randn(n, 6, generator=generator), torch.randn(num_texts, 6, generator=generator)
    expected, nearest = brute_force_ranks(images, texts, own)
    assume(nearest > 3e-6)  # nearer ones are ties
    ours = retrieval_ranks(images, texts, np.argwhere(own))
    assert (ours[0].tolist(), ours[1].tolist()) == expected


def test_retrieval_against_torchmetrics() -> None:
    from torchmetrics.retrieval import RetrievalHitRate  # seconds, which not every process of the tests needs

    generator = torch.Generator().manual_seed(0)
    n = 60
    owner = np.repeat(np.arange(n), 3)
    images = torch.randn(n, 8, generator=generator)
    texts = images[owner] + 1.5 * torch.randn(len(owner), 8, generator=generator)
    image_ranks, _ = retrieval_ranks(images, texts, np.stack([owner, np.arange(len(owner))], 1))
    scores = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).t()
    target = torch.from_numpy(owner)[None] == torch.arange(n)[:, None]
    queries = torch.arange(n)[:, None].expand_as(scores)
    for k in (1, 5, 10):
        theirs = RetrievalHitRate(top_k=k)(scores.flatten(), target.flatten(), indexes=queries.flatten())
        assert (image_ranks < k).mean() == pytest.approx(theirs.item())


def test_a_tie_counts_against_us() -> None:
    same = torch.ones(4, 3)
    pairs = np.stack([np.arange(4)] * 2, 1)
    ranks = retrieval_ranks(same, same, pairs)
    assert ranks[0].tolist() == ranks[1].tolist() == [3, 3, 3, 3]  # a collapsed encoder is not perfect
    broken = retrieval_ranks(torch.full((4, 3), np.nan), same, pairs)
    assert broken[0].tolist() == broken[1].tolist() == [3, 3, 3, 3]  # nor is a broken one
    classified = by_texts(same, np.ones((4, 3), np.float32), np.arange(4))
    assert (classified.rank == 3).all()
    assert (classified.given != np.arange(4)).all(), "another class than its own"


def test_chance_of_retrieval_against_a_count_of_all_orders() -> None:
    """Captions of three images (2, 1 and 2 of them, one shared): the share of all orders of the texts that hit."""
    right, total = np.array([2, 1, 2]), 4
    orders = list(itertools.permutations(range(total)))
    for k in (1, 2, 3, 5):
        hits = [np.mean([min(order[:r]) < k for order in orders]) for r in right]  # places of the r right ones
        assert chance_of_hit(right, total, k) == pytest.approx(np.mean(hits))


def blobs(folder: Path, contents: str) -> tuple[FileBlob, ...]:
    """A file of each letter."""
    for i, letter in enumerate(contents):
        (folder / f"{i}.png").write_text(letter)
    return tuple(FileBlob(folder / f"{i}.png") for i in range(len(contents)))


def test_retrieval_tells_chance_and_takes_equal_captions_as_one_text(tmp_path: Path) -> None:
    words = {"a": 0, "b": 1, "c": 2, "d": 3}

    class Perfect:
        name = "perfect"

        def encode_texts(self, texts: Sequence[str]) -> torch.Tensor:
            return torch.eye(4)[[words[text] for text in texts]]

    captions = (("a", "b"), ("a",), ("c", "d"))
    features = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1]], np.float32)
    data = ImageSet("x", blobs(tmp_path, "abc"), captions=captions)
    metrics = retrieval(Perfect(), data, features).metrics  # type: ignore[arg-type]
    assert all(metric.value == 1 for metric in metrics.values())
    assert metrics["image → text recall@1"].chance == pytest.approx((2 + 1 + 2) / 3 / 4)  # own of 4 texts
    assert metrics["text → image recall@1"].chance == pytest.approx((2 + 1 + 1 + 1) / 4 / 3)  # own of 3 images
    assert metrics["image → text recall@5"].chance == 1


def test_recall_counts_the_ranks_below_k(tmp_path: Path) -> None:
    generator, letters = torch.Generator().manual_seed(5), "abcdefghijklmnopqrst"
    images, texts = torch.randn(20, 6, generator=generator), torch.randn(20, 6, generator=generator)
    data = ImageSet("x", blobs(tmp_path, letters), captions=tuple((letter,) for letter in letters))

    class Encoder:
        name = "some"

        def encode_texts(self, asked: Sequence[str]) -> torch.Tensor:
            return texts[[letters.index(text) for text in asked]]

    metrics = retrieval(Encoder(), data, images.numpy()).metrics  # type: ignore[arg-type]
    for way, ranks in zip(
        ("image → text", "text → image"), brute_force_ranks(images, texts, np.eye(20, dtype=bool))[0], strict=True
    ):
        assert {1, 5, 10} & set(ranks), "or a rank of k would not show"
        for k in (1, 5, 10):
            assert metrics[f"{way} recall@{k}"].value == pytest.approx(np.mean(np.array(ranks) < k))


def test_copies_of_an_image_are_one_image_with_all_their_captions(tmp_path: Path) -> None:
    """As a corpus of COCO's has them, a document a caption: the numbers of the data set with an image once."""
    texts = ("a", "b", "c", "d", "e")
    vectors = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))

    class Encoder:
        name = "some"

        def encode_texts(self, asked: Sequence[str]) -> torch.Tensor:
            return vectors[[texts.index(text) for text in asked]]

    features = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    once = ImageSet("x", blobs(tmp_path, "xyz"), captions=(("a", "b"), ("c",), ("d", "e")))
    copied = ImageSet("x", blobs(tmp_path, "xyzxz"), captions=(("a",), ("c",), ("d",), ("b",), ("e",)))
    expected = retrieval(Encoder(), once, features)  # type: ignore[arg-type]
    found = retrieval(Encoder(), copied, features[[0, 1, 2, 0, 2]])  # type: ignore[arg-type]
    assert (found.num_items, found.metrics) == (3, expected.metrics)
    assert (found.settings["image copies"], expected.settings["image copies"]) == (2, 0)
    perfect = ImageSet("x", blobs(tmp_path, "xyzxz"), captions=(("a",), ("c",), ("d",), ("a",), ("e",)))
    of_them = vectors[[0, 2, 3]].numpy()
    vectors[4] = vectors[3]
    found = retrieval(Encoder(), perfect, of_them[[0, 1, 2, 0, 2]])  # type: ignore[arg-type]
    assert {metric.value for metric in found.metrics.values()} == {1.0}


def test_classes_must_match(split: tuple[np.ndarray, ...]) -> None:
    train, train_labels, test, labels = split
    other = ImageSet("other", (FileBlob(Path("x")),) * len(labels), labels, (*WORDS[:9], "ten"))
    with pytest.raises(ValueError, match="differ: nine, ten"):
        knn("pixels", image_set(train_labels), other, train, test)
