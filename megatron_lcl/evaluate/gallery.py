"""Pictures with the names that zero-shot classification gave them, and a map of their features, for the report."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.loading.images import thumbnail
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Result
from megatron_lcl.evaluate.zero_shot import Classified
from megatron_lcl.run_folder import GALLERY

NUM_EXAMPLES = 24
"""of either kind"""
NUM_MARKS = 700
"""pictures on the map"""
_SIDE, _MARK_SIDE = 96, 48
"""pixels: twice what is shown, for screens that have so many"""
_FILL = 0.6
"""share of the map's cells that have a picture"""
_ASPECT = 1.7
_FEWEST = 8
"""pictures of which there is a map"""


@dataclass(frozen=True)
class Named:
    """A picture and its names."""

    picture: str
    """a data: URL"""
    name: str
    given: str
    """the nearest name"""
    rank: int
    """of its own name, 1 is nearest"""


@dataclass(frozen=True)
class Mark:
    """A picture's place on the map."""

    picture: str
    name: str
    given: str
    column: int
    row: int


@dataclass(frozen=True)
class Gallery:
    """A zero-shot classification to look at."""

    result: Result
    about: str
    """what the pictures are, in a sentence; may be empty"""
    num_right: int
    right: tuple[Named, ...]
    """drawn at random of those that got their own name"""
    wrong: tuple[Named, ...]
    """drawn at random of the others, by the rank of their own name"""
    columns: int
    rows: int
    marks: tuple[Mark, ...]
    """of pictures drawn at random; none where there are too few for a map"""


def make_gallery(data: ImageSet, features: np.ndarray, classified: Classified, result: Result, about: str) -> Gallery:
    """Some pictures of each kind, and the map: t-SNE of the pooled `features` [N, D], then the nearest free cells.

    The same in every call: what is drawn is drawn with the seed 0.
    """
    labels, rng = data.need_labels(), np.random.default_rng(0)

    def picture(i: int, side: int) -> str:
        return thumbnail(data.images[i].read(), side, "WEBP")

    def names(i: int) -> tuple[str, str]:
        return data.classes[labels[i]], data.classes[classified.given[i]]

    def drawn(indices: np.ndarray) -> tuple[Named, ...]:
        some = rng.permutation(indices)[:NUM_EXAMPLES].tolist()
        some.sort(key=lambda i: classified.rank[i])
        return tuple(Named(picture(i, _SIDE), *names(i), int(classified.rank[i]) + 1) for i in some)

    is_right = classified.rank == 0
    right, wrong = drawn(np.flatnonzero(is_right)), drawn(np.flatnonzero(~is_right))
    shown = np.sort(rng.permutation(len(labels))[:NUM_MARKS])
    marks: list[Mark] = []
    columns = rows = 0
    if len(shown) >= _FEWEST:
        columns, rows, cells = on_grid(t_sne(np.asarray(features[shown], np.float32)))
        marks = [
            Mark(picture(i, _MARK_SIDE), *names(i), int(c), int(r)) for i, (c, r) in zip(shown, cells, strict=True)
        ]
    return Gallery(result, about, int(is_right.sum()), right, wrong, columns, rows, tuple(marks))


def t_sne(features: np.ndarray) -> np.ndarray:
    """[N, 2] from [N, D] by cosine distances (van der Maaten and Hinton 2008, scikit-learn's)."""
    from sklearn.manifold import TSNE  # takes a second to import

    features = np.nan_to_num(features)
    directions = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    centered = directions - directions.mean(0)
    left, singular, _ = np.linalg.svd(centered, full_matrices=False)
    first = left[:, :2] * singular[:2] / max(singular[0] / len(features) ** 0.5, 1e-12)
    # equal images stand apart by a little: scikit-learn's crashes where all stand in one place
    first += np.random.default_rng(0).normal(scale=0.01, size=first.shape)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init=(1e-4 * first).astype(np.float32), random_state=0).fit_transform(directions)


def on_grid(points: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Columns, rows, and a cell of its own for each of N points [N, 2] (column, row), as near as all together can be.

    The sum of the squared distances from the points, which fill the grid between its borders, is the least possible.
    """
    num_cells = len(points) / _FILL
    columns = round((num_cells * _ASPECT) ** 0.5) + 1
    rows = round((num_cells / _ASPECT) ** 0.5) + 1
    low, high = np.quantile(points, [0.01, 0.99], axis=0)  # a far point would leave no room for the others
    unit = (np.clip(points, low, high) - low) / np.maximum(high - low, 1e-12)
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows), indexing="ij"), -1).reshape(-1, 2)
    wanted = unit * (columns - 1, rows - 1)
    return columns, rows, cells[linear_sum_assignment(cdist(wanted, cells, "sqeuclidean"))[1]]


def write_gallery(gallery: Gallery, folder: Path) -> None:
    """As JSON."""
    replace_text(folder / GALLERY, json.dumps(asdict(gallery), ensure_ascii=False) + "\n")
