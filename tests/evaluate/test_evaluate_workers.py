"""Images are decoded ahead of the encoder, and let go when it has them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lcl.evaluate import labeled, workers


class Picture:
    name = "picture"

    def read(self) -> bytes:
        return b""


Decode = Callable[..., torch.Tensor]


def direct(decode: Decode, pictures: list[Picture]) -> Iterator[Any]:
    return workers.ahead(decode, pictures, 2, 1)


def through_an_encoder(decode: Decode, pictures: list[Picture]) -> Iterator[Any]:
    encoder: Any = SimpleNamespace(prepare=decode)
    return workers.run_batches(encoder, pictures, lambda *_: None, 2, 0, 1)


def of_a_labeled_set(decode: Decode, pictures: list[Picture]) -> Iterator[Any]:
    return labeled._decoded(pictures, 0, 4, 2, [], [])


@pytest.mark.parametrize("read", [direct, through_an_encoder, of_a_labeled_set])
def test_two_batches_are_decoded_while_one_is_encoded_of_which_none_is_kept(
    read: Callable[[Decode, list[Picture]], Iterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one thread, which has let go what it made before it begins the next."""
    made: list[weakref.ref[torch.Tensor]] = []
    third_batch = threading.Event()

    def decode(*_: Any, **__: Any) -> torch.Tensor:
        pixels = torch.zeros(3, 4, 4, dtype=torch.uint8)
        made.append(weakref.ref(pixels))
        if len(made) == 6:
            third_batch.set()
        return pixels

    monkeypatch.setattr(workers, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    monkeypatch.setattr(labeled, "decode_eval", decode)
    batches = read(decode, [Picture() for _ in range(10)])
    next(batches)
    assert third_batch.wait(20)
    assert [of_image() for of_image in made[:2]] == [None, None]
    assert len(made) == 6
