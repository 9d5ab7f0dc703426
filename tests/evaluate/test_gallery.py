"""Protects what a report shows of a zero-shot evaluation: the names are those that were given, and the map keeps
together what is alike."""

from __future__ import annotations

import base64
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate.conftest import WORDS, PixelEncoder
from PIL import Image

from megatron_lcl.evaluate.features import FeatureStore
from megatron_lcl.evaluate.gallery import NUM_EXAMPLES, make_gallery, on_grid, t_sne, write_gallery
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Result
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.zero_shot import accuracy, classify


def gallery_of(encoder: PixelEncoder, folder: Path, output: Path) -> tuple[dict[str, Any], Result]:
    data = open_images(folder, class_names=WORDS)
    features = FeatureStore(output, progress=False).features(encoder, data)
    classified = classify(encoder, data, features)
    result = accuracy(encoder, data, classified)
    write_gallery(make_gallery(data, features, classified, result, "Digits."), output)
    return json.loads((output / "gallery.json").read_text()), result


def test_the_gallery_of_real_digits(encoder: PixelEncoder, folder: Path, tmp_path: Path) -> None:
    gallery, result = gallery_of(encoder, folder, tmp_path)
    assert gallery["about"] == "Digits."
    assert gallery["num_right"] == round(result.metrics["accuracy"].value * 200)
    assert 100 < gallery["num_right"] < 200
    assert len(gallery["right"]) == NUM_EXAMPLES
    assert len(gallery["wrong"]) == min(NUM_EXAMPLES, 200 - gallery["num_right"])
    pixels = encoder.module[0].detach().numpy()  # type: ignore[index]
    for one in gallery["right"] + gallery["wrong"]:
        kind, _, data = one["picture"].partition(";base64,")
        assert kind == "data:image/webp"
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), float).ravel() / 255
        scores = pixels @ shown / np.linalg.norm(pixels, axis=1)
        # a WEBP is not the picture to the last level: of two names that are about as near either may be first
        assert scores[WORDS.index(one["given"])] > scores.max() - 0.02 * np.linalg.norm(shown)
    assert all(one["given"] == one["name"] and one["rank"] == 1 for one in gallery["right"])
    assert all(one["given"] != one["name"] and one["rank"] > 1 for one in gallery["wrong"])
    assert [one["rank"] for one in gallery["wrong"]] == sorted(one["rank"] for one in gallery["wrong"])
    marks = gallery["marks"]
    assert len({(mark["column"], mark["row"]) for mark in marks}) == len(marks) == 200
    assert max(mark["column"] for mark in marks) < gallery["columns"]
    assert max(mark["row"] for mark in marks) < gallery["rows"]
    # what is alike lies together: the nearest mark is of the same digit far more often than the tenth of chance
    places = np.array([(mark["column"], mark["row"]) for mark in marks], float)
    distances = ((places[:, None] - places) ** 2).sum(-1) + np.diag([np.inf] * len(marks))
    same = [mark["name"] == marks[near]["name"] for mark, near in zip(marks, distances.argmin(1), strict=True)]
    assert np.mean(same) > 0.5
    assert gallery_of(encoder, folder, tmp_path)[0] == gallery  # nothing in it is left to chance


def test_a_wrong_name_is_never_the_own_one() -> None:
    """A tie counts as a miss; the name shown is then the other one."""
    prototypes = torch.eye(10, 64)
    prototypes[1] = prototypes[0]  # "zero" and "one" have one text feature
    data = ImageSet("made", (), np.array([0, 1, 2, 3]), WORDS)
    features = torch.eye(10, 64)[[0, 0, 2, 4]].numpy()
    found = classify(PixelEncoder(prototypes), data, features)
    assert found.rank.tolist()[:3] == [1, 1, 0]
    assert found.given.tolist() == [1, 0, 2, 4]


def test_cells_are_the_nearest_that_all_can_have() -> None:
    points = np.array([(0.3, 0.2), (0.3, 0.2), (0.31, 0.22), (0.9, 0.7)])  # three that want one cell
    columns, rows, cells = on_grid(points)
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    wanted = (np.clip(points, low, high) - low) / (high - low) * (columns - 1, rows - 1)
    every = list(itertools.product(range(columns), range(rows)))
    least = min(((wanted - np.array(some)) ** 2).sum() for some in itertools.permutations(every, 4))
    assert ((wanted - cells) ** 2).sum() == pytest.approx(least)
    assert len({tuple(cell) for cell in cells.tolist()}) == 4


def test_equal_features_have_a_map_too() -> None:
    columns, rows, cells = on_grid(t_sne(np.ones((9, 4), np.float32)))
    assert len({tuple(cell) for cell in cells.tolist()}) == 9
    assert (cells < (columns, rows)).all()
