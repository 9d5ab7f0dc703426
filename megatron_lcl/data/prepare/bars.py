"""Progress of `preprocess`: a bar for each pass over the input, and a line where there is none."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

from megatron_lcl.data.prepare.importers import Each, Importer
from megatron_lcl.data.prepare.workers import in_order

_LONG = 0.5
"""seconds without a sign of life"""
R = TypeVar("R")


class Bars:
    """What a run says on stderr while it works."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown

    def say(self, text: str) -> None:
        if self._shown and text:
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Say the text if what is done here takes long, for which there is no bar."""
        timer = threading.Timer(_LONG, print, (text,), {"file": sys.stderr, "flush": True})
        if self._shown:
            timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def over(self, results: Iterable[R], title: str, unit: str, sizes: Sequence[int]) -> Iterator[R]:
        """The results as they come; the bar advances by the size of each."""
        with tqdm(desc=title, total=sum(sizes), unit=unit, disable=not self._shown) as bar:
            for result, size in zip(results, sizes, strict=True):
                bar.update(size)
                yield result

    def scan(self, importer: Importer, workers: int) -> Each:
        """What an importer scans with."""

        def each(function: Callable[[Any, Any], R], items: Sequence[Sized]) -> Iterator[R]:
            results = in_order(function, importer, items, workers, ahead=4 * workers)
            return self.over(results, "scan", "file", [len(item) for item in items])

        return each
