"""Held-out retrieval of corpora whose images and contexts repeat: chance, a perfect model, a count one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data.corpora import Piece, jpeg, write_corpus
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtrit

from megatron_lcl.config import Config, Data, Language, Model, Vision
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.evaluate.heldout import HeldOutEvaluation
from megatron_lcl.evaluate.heldout_ranks import Pairs, Ranked
from megatron_lcl.evaluate.heldout_results import Example, HeldOut, num_queries
from megatron_lcl.model.activations import Outputs
from megatron_lcl.parallel.mesh import Axis, Mesh

TINY = Model(Vision(16, 8, 32, 1, 2, 64), Language(48, 517, 32, 1, 2, 64), 2)
RECALLS = (
    ("image_to_context_recall_at_1", "chance_at_1"),
    ("image_to_context_recall_at_10", "chance_at_10"),
    ("context_to_image_recall_at_1", "context_to_image_chance_at_1"),
    ("context_to_image_recall_at_10", "context_to_image_chance_at_10"),
    ("image_in_document_recall_at_1", "chance_in_document"),
)


class Measured:
    """A corpus as any model sees it: what its features depend on, by number, and what an evaluation makes of them."""

    def __init__(self, folder: Path, documents: Sequence[Sequence[Piece]]) -> None:
        write_corpus(folder / "corpus", documents)
        config = Config(TINY, Data(workers=0, cache=str(folder / "cache")))
        self.images: dict[bytes, int] = {}
        self.contexts: dict[tuple[bytes, ...], int] = {}
        self.pairs: list[tuple[int, int]] = []
        """number of the image and of the context, in the order of the evaluation"""
        mesh = Mesh(Axis(), Axis())
        self.evaluation = HeldOutEvaluation(config, folder / "corpus", mesh, self._forward, ["retrieval"])
        self.encoded = self.evaluation.encode(lambda _: None)

    def _forward(self, read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
        for batch in read or ():
            pixels = [image.numpy().tobytes() for image in batch.images]
            for slot, soi in enumerate(batch.image_soi.tolist()):
                if soi >= 0:
                    start = soi - int(batch.positions[soi])
                    earlier = [p for p, row in zip(pixels, batch.image_soi.tolist(), strict=True) if start <= row < soi]
                    context = batch.tokens[start:soi].numpy().tobytes(), *earlier
                    numbers = self.images, self.contexts
                    keys = pixels[slot], context
                    image, read_there = (of.setdefault(key, len(of)) for of, key in zip(numbers, keys, strict=True))  # type: ignore[attr-defined]
                    self.pairs.append((image, read_there))
        nothing = torch.zeros(())
        rows = [torch.ones(len(batch.images), 4) for batch in read or ()]
        return [(batch, Outputs(nothing, x, x, nothing)) for batch, x in zip(read or (), rows, strict=True)]

    def by(self, images: torch.Tensor, contexts: torch.Tensor, num_examples: int = 0) -> tuple[HeldOut, list[Example]]:
        """With features [I, D] of its images and [C, D] of its contexts."""
        numbers = torch.tensor(self.pairs)
        self.encoded.features = [(F.normalize(images)[numbers[:, 0]], F.normalize(contexts)[numbers[:, 1]])]
        return self.evaluation.measure(self.encoded, None, num_examples, intervals=num_examples > 0)


def test_a_model_that_knows_nothing_has_what_chance_is_told(tmp_path: Path) -> None:
    """Of 20 documents with five copies of one image, which stands in more than half of all pairs, and one of their own;
    the first two contexts are the same in all."""
    documents: list[list[Piece]] = []
    for d in range(20):
        texts = [[1], [2], *([10 * d + n] for n in (13, 14, 15, 16))]
        images = [jpeg(0)] * 5 + [jpeg(1 + d)]
        documents.append(
            [piece for text, image in zip(texts, images, strict=True) for piece in (text, (image, None, None))]
        )
    measured = Measured(tmp_path, documents)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(200):
        features = (torch.randn(len(of), 16, generator=generator) for of in (measured.images, measured.contexts))
        found.append(measured.by(*features)[0])
    assert (found[0].pairs, found[0].distinct_images, found[0].distinct_contexts) == (120, 21, 20 * 4 + 2)
    assert found[0].contexts_with_rivals == 120
    for recall, chance in RECALLS:
        values, told = [getattr(one, recall) for one in found], {getattr(one, chance) for one in found}
        error = np.std(values, ddof=1) / len(values) ** 0.5
        assert np.mean(values) == pytest.approx(told.pop(), abs=4 * error), recall
        assert not told
        assert error < 0.03


def test_a_perfect_model_finds_all(tmp_path: Path) -> None:
    """Of 60 pictures with four captions among them, and of documents of three pictures, one of them twice, whose texts
    are the same: what stands before a picture differs by the pictures there."""
    documents: list[list[Piece]] = [[[1, 2 + d % 4], (jpeg(d), None, None)] for d in range(60)]
    for d in range(5):
        shown = ([[9, 10 + k], (jpeg(100 + 3 * d + n), None, None)] for k, n in enumerate((0, 1, 2, 1)))
        documents.append([piece for both in shown for piece in both])
    measured = Measured(tmp_path, documents)
    images, contexts = len(measured.images), len(measured.contexts)
    assert (images, contexts) == (60 + 15, 4 + 1 + 15)
    together = torch.zeros(images, contexts)
    together[tuple(torch.tensor(measured.pairs).T)] = 1
    found, examples = measured.by(together, torch.eye(contexts), num_examples=99)
    assert {name: getattr(found, name) for name, _ in RECALLS} == {name: 1.0 for name, _ in RECALLS}
    assert (found.pairs, found.contexts_with_rivals, found.median_rank) == (80, 20, 1)
    assert list(num_queries(found).values()) == [75, 75, 20, 20, 20]
    assert found.chance_at_1 == pytest.approx((60 + 10 + 5 * 2) / 20 / 75)
    assert found.context_to_image_chance_at_1 == pytest.approx((4 * 15 + 5 + 15) / 75 / 20)
    assert found.chance_in_document == pytest.approx(1 / 3)
    sizes = {  # effective numbers of documents: of 60 with one image and five with three, and so on; and their number
        "image_to_context_recall_at_10": (75**2 / (60 + 5 * 3**2), 65),
        "context_to_image_recall_at_10": (20**2 / (4 + 4**2 + 4 * 3**2), 9),
        "image_in_document_recall_at_1": (5, 5),
    }
    for name, (size, number) in sizes.items():
        size *= (1.959964 / stdtrit(number - 1, 0.975)) ** 2
        assert found.intervals[name] == pytest.approx((size / (size + 1.959964**2), 1)), name
    shown = {(example.pair.document, example.pair.image) for example in examples}
    assert len(shown) == len(examples) == images
    assert sorted(example.num_contexts for example in examples) == [1] * 70 + [2] * 5
    for example in examples:
        assert example.rank == 1
        assert example.right == tuple(n < example.num_contexts for n in range(3)), "its own are the nearest"
        assert len({(near.document, near.image, near.context) for near in example.nearest}) == 3
        captions = [near.context for near in example.nearest if near.document < 60]
        assert len(captions) == len(set(captions)), "a caption is shown once, however many pictures it has"


def test_what_does_not_decode_is_not_read(tmp_path: Path) -> None:
    """Two contexts with other undecodable pictures are one."""
    bad = [b"\xff\xd8 was picture %d" % d for d in range(2)]
    documents: list[list[Piece]] = [[[1], (bad[d], None, None), [2], (jpeg(d), None, None)] for d in range(2)]
    measured = Measured(tmp_path, documents)
    found, _ = measured.by(torch.eye(2), torch.eye(2))
    assert (found.pairs, found.distinct_images, found.distinct_contexts) == (2, 2, 1)


def _counted(
    places: np.ndarray, images: dict[int, np.ndarray], contexts: dict[int, np.ndarray]
) -> Iterator[list[tuple[int, int, int, int]]]:
    """Of each way the queries' rank, right answers, answers and first document, sorted."""
    order = sorted(range(len(places)), key=lambda i: tuple(places[i, :3]))
    all_pairs = [(int(places[i, 0]), int(places[i, 3]), int(places[i, 4])) for i in order]
    together = {(i, c) for _, i, c in all_pairs}

    def query(document: int, scores: dict[int, float], right: set[int]) -> tuple[int, int, int, int]:
        best = max(scores[j] for j in right)
        rank = 1 + sum(scores[j] > best - 1e-6 for j in scores if j not in right)
        return rank, len(right), len(scores), document

    first_of_image, first_of_context = {}, {}
    for document, i, c in all_pairs:
        first_of_image.setdefault(i, document)
        first_of_context.setdefault(c, document)
    scored = {(i, c): float(images[i] @ contexts[c]) for i in images for c in contexts}
    yield [
        query(d, {c: scored[i, c] for c in contexts}, {c for c in contexts if (i, c) in together})
        for i, d in first_of_image.items()
    ]
    yield [
        query(d, {i: scored[i, c] for i in images}, {i for i in images if (i, c) in together})
        for c, d in first_of_context.items()
    ]
    inside = []
    for document, c in {(d, c) for d, _, c in all_pairs}:
        answers = {i for d, i, _ in all_pairs if d == document}
        right = {i for i in answers if (i, c) in together}
        if right != answers:
            inside.append(query(document, {i: scored[i, c] for i in answers}, right))
    yield inside


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=25),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_ranks_equal_a_count(drawn: list[tuple[int, int, int]], processes: int, seed: int) -> None:
    """In any order of the pairs and by any number of processes; features of small integers, of which many tie."""
    rng = np.random.default_rng(seed)
    places = np.array([(d, n // 2, n, i, c) for n, (d, i, c) in enumerate(drawn)])
    shuffled = places[rng.permutation(len(places))]
    unit = [{int(k): rng.integers(1, 3, 2).astype(float) for k in np.unique(places[:, of])} for of in (3, 4)]
    images, contexts = ({k: x / np.linalg.norm(x) for k, x in of.items()} for of in unit)
    found: list[list[Ranked]] = []
    for rank in range(processes):
        pairs = Pairs(shuffled)
        of_images = torch.from_numpy(np.stack([images[k] for k in shuffled[pairs.first_image, 3]]))
        of_contexts = torch.from_numpy(np.stack([contexts[k] for k in shuffled[pairs.first_context, 4]]))
        found.append(list(pairs.rank(of_images, of_contexts, Axis(rank=rank, size=processes))))
        first_rows = {row[3]: row for row in sorted(places.tolist(), reverse=True)}
        assert shuffled[pairs.first_image[pairs.images_in_order]].tolist() == sorted(first_rows.values())
    for of_way, expected in zip(zip(*found, strict=True), _counted(places, images, contexts), strict=True):
        ranks = np.concatenate([ranked.ranks for ranked in of_way])  # an axis without a group gathers nothing
        first = of_way[0]
        rows = np.stack(np.broadcast_arrays(ranks, first.right, first.among, first.documents), 1)
        assert sorted(map(tuple, rows.tolist())) == sorted(expected)
