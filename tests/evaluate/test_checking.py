"""Which images of a data set do not decode, and the data set without them."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
import warnings
from pathlib import Path

import pytest

from megatron_lcl.evaluate import checking, image_set
from megatron_lcl.evaluate.checking import find_bad, without_bad
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.sources import open_images


def test_threads_leave_the_filters_of_warnings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to come in is the first to go, so that the second puts back what the first had set."""
    inside, entered, left = threading.Barrier(2), threading.Event(), threading.Event()

    def overlapping(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if data == b"second":
                inside.wait(20)
                assert left.wait(20)
                return
            entered.set()
            inside.wait(20)
        left.set()

    class Second:
        name = "second"

        def read(self) -> bytes:
            assert entered.wait(20)
            return b"second"

    (tmp_path / "first").write_bytes(b"first")
    monkeypatch.setattr(checking, "probe", overlapping)
    monkeypatch.setattr(checking, "num_cores", lambda: 2)
    monkeypatch.setattr(image_set, "content_digests", lambda *_: b"known")
    filters = warnings.filters
    before = list(filters)
    images = ImageSet("", (FileBlob(tmp_path / "first"), Second()))
    assert find_bad(images, tmp_path / "cache") == []
    assert warnings.filters is filters
    assert list(warnings.filters) == before


def test_captions_stay_with_their_images_where_bad_ones_are_left_out(folder: Path, tmp_path: Path) -> None:
    images = sorted((folder / "test").rglob("*.png"))[:6]
    for i, file in enumerate(images):
        (tmp_path / f"{i}.png").write_bytes(b"" if i in (0, 3) else file.read_bytes())
    sentences = [[{"raw": f"caption {i}"}] for i in range(6)]
    entries = [{"filename": f"{i}.png", "split": "test", "sentences": s} for i, s in enumerate(sentences)]
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    data = open_images(tmp_path / "coco.json")
    left = without_bad(data, find_bad(data, tmp_path / "cache"), skip=True)
    assert [blob.name for blob in left.images] == [str(tmp_path / f"{i}.png") for i in (1, 2, 4, 5)]
    assert left.captions == tuple((f"caption {i}",) for i in (1, 2, 4, 5))
    assert left.digests == image_set.content_digests(left.images)
    assert find_bad(left, tmp_path / "cache") == []
    assert len(list((tmp_path / "cache").iterdir())) == 1  # that these are good is known from now on
    (tmp_path / "4.png").unlink()
    (unread,) = find_bad(dataclasses.replace(left), tmp_path / "cache")
    assert (unread.index, unread.reason) == (2, "No such file or directory")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_fault_of_the_storage_is_none_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `--skip-bad-images` would measure on fewer images than there are."""
    (tmp_path / "0.png").write_bytes(b"")

    def fails(_blob: FileBlob) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileBlob, "read", fails)
    with pytest.raises(OSError, match=r"0\.png") as raised:
        find_bad(ImageSet("", (FileBlob(tmp_path / "0.png"),)), tmp_path / "cache")
    assert raised.value.errno == errno.EIO
