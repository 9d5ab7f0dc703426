"""Held-out retrieval, among distinct images and distinct contexts: what stands together, and the ranks of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from megatron_lcl.evaluate.results import chance_of_hit
from megatron_lcl.evaluate.retrieval import best_ranks
from megatron_lcl.parallel.mesh import Axis


@dataclass(frozen=True)
class Ranked:
    """What was asked one way round, [Q] each."""

    ranks: np.ndarray
    """of the best right answer among the wrong ones, 1 is best"""
    right: np.ndarray
    """answers that are right"""
    among: np.ndarray | int
    """answers that there are, of all queries or of each"""
    documents: np.ndarray
    """the query's (first) document"""

    def hits(self, k: int) -> np.ndarray:
        """Whether a right answer is among the first k."""
        return self.ranks <= k

    def chance_at(self, k: int) -> float:
        """The expected share of hits among the first k of a random order."""
        return chance_of_hit(self.right, self.among, k)


class Pairs:
    """All pairs of a corpus: their distinct images and contexts, and which of these stand together.

    Distinct ones are numbered in an order that depends on the corpus alone, as all that follows from it.
    """

    def __init__(self, places: np.ndarray) -> None:
        """places [N, 5]: of each pair its document, where in that it stands (part, row), and hashes of its image and
        its context, in any order of the pairs."""
        document, part, row, content, context = places.T
        order = np.lexsort((row, part, document))  # the corpus's
        self._document = document[order]
        first_images, self._image = _distinct(content[order])
        first_contexts, self._context = _distinct(context[order])
        self._num_contexts = len(first_contexts)
        self.first_image, self.first_context = order[first_images], order[first_contexts]
        """index of the first pair of each distinct image [I], of each distinct context [C]"""
        self.images_in_order, self.contexts_in_order = np.argsort(first_images), np.argsort(first_contexts)
        """numbers of the images [I], of the contexts [C], in the corpus's order of those first pairs"""
        self._documents_of = document[self.first_image], document[self.first_context]
        self._keys = np.unique(self._image * self._num_contexts + self._context)
        self.together = np.stack([self._keys // self._num_contexts, self._keys % self._num_contexts], 1)
        """[K, 2]: numbers of an image and a context, each couple once"""

    def are_together(self, images: np.ndarray | int, contexts: np.ndarray) -> np.ndarray:
        """[n] whether the image and the context of these numbers, [n] each or one image, stand together in a pair."""
        return np.isin(images * self._num_contexts + contexts, self._keys)

    def rank(self, images: torch.Tensor, contexts: torch.Tensor, data: Axis) -> tuple[Ranked, Ranked, Ranked]:
        """image → context, context → image, and context → image of its document.

        images [I, D], contexts [C, D]: features of the distinct ones. Every process of the axis calls it with the same,
        and ranks a part of the queries.
        """
        images, contexts = F.normalize(images.float(), dim=-1), F.normalize(contexts.float(), dim=-1)
        back = self.together[:, ::-1]
        forward = Ranked(
            _ranks(data, images, contexts, self.together),
            np.bincount(self.together[:, 0]),
            len(contexts),
            self._documents_of[0],
        )
        backward = Ranked(
            _ranks(data, contexts, images, back),
            np.bincount(back[:, 0]),
            len(images),
            self._documents_of[1],
        )
        return forward, backward, self._rank_in_documents(images, contexts, data)

    def _rank_in_documents(self, images: torch.Tensor, contexts: torch.Tensor, data: Axis) -> Ranked:
        """Of each context of each document, among the document's images: where one of them is wrong."""
        asked, _ = _distinct(self._document, self._context)
        shown, _ = _distinct(self._document, self._image)
        of_asked, of_shown = self._document[asked], self._document[shown]  # both ascending
        first, end = (np.searchsorted(of_shown, of_asked, side) for side in ("left", "right"))
        among = end - first
        query = np.repeat(np.arange(len(asked)), among)
        answer = np.arange(len(query)) + np.repeat(first - (among.cumsum() - among), among)
        is_right = self.are_together(self._image[shown[answer]], self._context[asked[query]])
        right = np.bincount(query[is_right], minlength=len(asked))
        rivalled = right < among
        kept = is_right & rivalled[query]
        pairs = np.stack([(rivalled.cumsum() - 1)[query[kept]], answer[kept]], 1)
        asked, device = asked[rivalled], images.device
        queries = contexts[torch.from_numpy(self._context[asked]).to(device)]
        answers = images[torch.from_numpy(self._image[shown]).to(device)]
        groups = of_asked[rivalled], of_shown
        return Ranked(_ranks(data, queries, answers, pairs, groups), right[rivalled], among[rivalled], groups[0])


def _ranks(
    data: Axis,
    queries: torch.Tensor,
    answers: torch.Tensor,
    pairs: np.ndarray,
    groups: tuple[np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """1-based ranks [N] as `best_ranks` counts them, each process of the axis those of its part of the queries."""
    bounds = [len(queries) * r // data.size for r in range(data.size + 1)]
    low, high = bounds[data.rank], bounds[data.rank + 1]
    own = pairs[(pairs[:, 0] >= low) & (pairs[:, 0] < high)] - [low, 0]
    ranks = best_ranks(queries[low:high], answers, own, groups and (groups[0][low:high], groups[1]))
    return 1 + data.gather_ragged(ranks, np.diff(bounds).tolist()).cpu().numpy()


def _distinct(*columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of rows of integers [N] each: index of the first row of each distinct one, ascending by the columns; and of each
    row the number of the distinct one that it is."""
    firsts, numbers = np.zeros(1, np.int64), np.zeros(len(columns[0]), np.int64)
    for column in columns:
        _, here = np.unique(column, return_inverse=True)
        _, firsts, numbers = np.unique(numbers * len(here) + here, return_index=True, return_inverse=True)
    return firsts, numbers
