"""k-nearest-neighbor classification on frozen features."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.results import Result, proportion
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.filesystem import is_dir

_ROWS = 1024


def knn_predict(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> np.ndarray:
    """Predicted classes [M]. Cosine similarity s; neighbors vote with exp(s / temperature).

    Wu et al. 2018 (arXiv 1805.01978, section 3.4), with DINO's k and temperature (arXiv 2104.14294).
    """
    known = F.normalize(torch.from_numpy(np.array(train)).float().to(device), dim=-1)
    labels = torch.from_numpy(train_labels).to(device)
    predicted = []
    for low in range(0, len(test), _ROWS):
        asked = F.normalize(torch.from_numpy(np.array(test[low : low + _ROWS])).float().to(device), dim=-1)
        similarity, nearest = (asked @ known.t()).topk(k, dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()  # divided by the largest, which overflows
        votes = torch.zeros(len(asked), num_classes, device=device).scatter_add_(1, labels[nearest], weights)
        predicted.append(votes.argmax(1).cpu())
    return torch.cat(predicted).numpy()


def knn(
    encoder: str,
    train: ImageSet,
    test: ImageSet,
    train_features: np.ndarray,
    test_features: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> Result:
    """Accuracy of `knn_predict` on the test images."""
    labels = same_classes(train, test)
    predicted = knn_predict(
        train_features, train.need_labels(), test_features, len(test.classes), k, temperature, device
    )
    metrics = {"accuracy": proportion(predicted == labels, 1 / len(test.classes))}
    settings = {"k": k, "temperature": temperature, "train images": len(train)}
    return Result("k-NN", encoder, test.name, len(test), metrics, settings)


def with_training(
    data: str | Path,
    train_split: str,
    test: ImageSet,
    images: str | Path | None = None,
    class_names: str | Path | None = None,
) -> tuple[ImageSet, ImageSet]:
    """The training images of a data set beside the test ones, with the same classes. UserError where there are none, or
    an image is of both."""
    test.need_labels()  # which says it of what has no splits, such as a corpus
    if not is_dir(Path(data) / train_split):
        raise UserError(
            f"{data} has no folder {train_split!r}; k-NN and probes need training images beside the test ones"
        )
    train, test = _same_numbers(open_images(data, train_split, images, class_names), test)
    if both := set(train.images) & set(test.images):
        raise UserError(
            f"{len(both):,} of the {len(test):,} images to be measured on ({test.name}) are among those that k-NN and "
            f"probes learn on ({train.name}); give another --split or --train-split"
        )
    same_classes(train, test)
    return train, test


def check_neighbors(k: int, train: ImageSet) -> None:
    """UserError where there are fewer training images than neighbors."""
    if k > len(train):
        raise UserError(f"k = {k} neighbors, but {train.name} has {len(train)} images")


def _same_numbers(train: ImageSet, test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Classes without names go as far as the larger split's: it may have images of a last class more."""
    if not (train.numbered and test.numbered):
        return train, test
    longer = max(train.classes, test.classes, key=len)
    return replace(train, classes=longer), replace(test, classes=longer)


def same_classes(train: ImageSet, test: ImageSet) -> np.ndarray:
    """The test labels; UserError where training and test images do not have the same classes."""
    train.need_labels()
    labels = test.need_labels()
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))[:3]
        raise UserError(f"the classes of {train.name} and {test.name} differ: {', '.join(differing) or 'their order'}")
    return labels
