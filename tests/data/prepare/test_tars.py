"""Protects: a tar that does not end as a tar ends is never taken for a whole one, by whoever reads it."""

from __future__ import annotations

import gzip
import io
import json
import random
import runpy
import struct
import sys
import tarfile
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
from data import writers
from data.helpers import documents_of
from data.writers import picture

from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.prepare.importers import create, tars
from megatron_lcl.data.prepare.importers.sources import ImageSource
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.sources import open_images

NUM_SAMPLES = 10
LOST = "document: damaged or truncated tar, the samples after it are lost"


def samples_tar(format: int = tarfile.GNU_FORMAT, name: str = "{}") -> tuple[bytes, list[int]]:
    """A tar of samples of an image and a text, and where the header of each image begins, and the end of the last."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as archive:
        starts = []
        for k in range(NUM_SAMPLES):
            starts.append(archive.offset)
            writers._add(archive, f"{name.format(k)}.png", picture(k))
            writers._add(archive, f"{name.format(k)}.txt", b"text %d" % k)
        starts.append(archive.offset)
    return content.getvalue(), starts


WHOLE, STARTS = samples_tar()
AT = STARTS[4]


def header(type: bytes, size: int) -> bytes:
    member = tarfile.TarInfo("x")
    member.type, member.size = type, size
    return member.tobuf(tarfile.GNU_FORMAT)


DAMAGED = {
    "a bit in a header": WHOLE[:AT] + bytes([WHOLE[AT] ^ 4]) + WHOLE[AT + 1 :],
    "cut between members": WHOLE[:AT],
    "cut within a header": WHOLE[: AT + 200],
    "zeros in the middle": WHOLE[:AT] + bytes(8192) + WHOLE[AT + 8192 :],
    "two in one": WHOLE[:AT] + bytes(1024) + WHOLE,
    "400 long names in a row": WHOLE[:AT] + (header(b"L", 1) + b"x".ljust(512, b"\0")) * 400 + WHOLE[AT:],
    "a name of 2^59 bytes": WHOLE[:AT] + header(b"L", 1 << 59) + WHOLE[AT:],
    "a target of 2^59 bytes": WHOLE[:AT] + header(b"K", 1 << 59) + WHOLE[AT:],
    "attributes of 2^59 bytes": WHOLE[:AT] + header(b"x", 1 << 59) + WHOLE[AT:],
    "attributes of all of 2^59 bytes": WHOLE[:AT] + header(b"g", 1 << 59) + WHOLE[AT:],
}
SOUND = {
    "as tarfile writes it": WHOLE,
    "one block of zeros": WHOLE[: STARTS[-1] + 512],
    "many blocks of zeros": WHOLE + bytes(3 << 20),
    "PAX headers": samples_tar(tarfile.PAX_FORMAT, "ü" * 80 + "{}")[0],
    "long names": samples_tar(tarfile.GNU_FORMAT, "n" * 120 + "{}")[0],
}


def texts_of(file: Path) -> tuple[list[str], dict[str, int]]:
    documents, drops = documents_of(create("webdataset", file, None, {}))
    return [text.text for document in documents for text in document.texts], drops.bad_counts


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_samples_of_a_damaged_tar(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"0{suffix}"
    file.write_bytes(gzip.compress(content) if suffix == ".tar.gz" else content)
    assert texts_of(file) == ([f"text {k}" for k in range(4)], {LOST: 1})


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_images_in_a_damaged_tar(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    source = ImageSource(tmp_path)
    assert [source.read(f"{k}.png") for k in range(4)] == [picture(k) for k in range(4)]
    with pytest.raises(BadImage, match=r"file missing, and 0\.tar is damaged or cut"):
        source.read("7.png")


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_an_evaluation_refuses_a_damaged_tar(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"^.*/0\.tar is not a readable \.tar: .*; write or download it again$"):
        open_images(tmp_path)


@pytest.mark.parametrize("content", SOUND.values(), ids=SOUND)
def test_a_sound_tar(content: bytes, tmp_path: Path) -> None:
    """Read by all, to its end; of a compressed one also where gzip was written in several parts, as bgzip does."""
    expected = [f"text {k}" for k in range(NUM_SAMPLES)], {}
    (tmp_path / "0.tar").write_bytes(content)
    assert texts_of(tmp_path / "0.tar") == expected
    assert len(open_images(tmp_path)) == NUM_SAMPLES
    with pytest.raises(BadImage, match=r"^file missing$"):
        ImageSource(tmp_path).read("gone.png")
    assert create("webdataset", tmp_path / "0.tar", None, {}).rules == 2
    (tmp_path / "0.tar").unlink()
    for parts in ([content], [content[:AT], content[AT:]]):
        (tmp_path / "0.tar.gz").write_bytes(b"".join(map(gzip.compress, parts)))
        assert texts_of(tmp_path / "0.tar.gz") == expected
        assert create("webdataset", tmp_path / "0.tar.gz", None, {}).rules == 3  # such corpora may change


def test_files_that_begin_with_the_mark_of_utf8(tmp_path: Path) -> None:
    """As editors of Windows write them."""
    mark = "\ufeff".encode()
    record = json.dumps({"caption": "of the record", "url": "http://x/1"}).encode()
    lists = json.dumps({"texts": ["a text"], "images": [None]}).encode()
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("0.txt", b"of the text"), ("0.json", record), ("1.json", record)):
            writers._add(archive, name, mark + data)
    with tarfile.open(tmp_path / "1.tar", "w") as archive:
        writers._add(archive, "0.json", mark + lists)
    found, _ = documents_of(create("webdataset", tmp_path / "0.tar", None, {}))
    assert [[text.text for text in document.texts] for document in found] == [["of the text"], ["of the record"]]
    assert [document.metadata["id"] for document in found] == 2 * ["http://x/1"]
    found, drops = documents_of(create("mint1t", tmp_path / "1.tar", None, {}))
    assert ([text.text for text in found[0].texts], drops.bad_counts) == (["a text"], {})


def test_a_deep_frame_whose_lowest_level_is_white_is_no_negative(tmp_path: Path) -> None:
    gray, out = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40) // 5, io.BytesIO()
    PIL.Image.fromarray(257 * gray).save(out, "TIFF")
    tiff = out.getvalue().replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        writers._add(archive, "0.json", json.dumps({"texts": [None], "images": [0]}).encode())
        writers._add(archive, "0.tiff", tiff)
    (document,), _ = documents_of(create("mint1t", tmp_path / "0.tar", None, {}))
    (image,) = document.images
    assert np.abs(np.asarray(decode_rgb(image.data))[..., 0] - (255.0 - gray)).max() <= 1


def test_pairs_that_are_in_no_tar(tmp_path: Path) -> None:
    """Files beside one another are to be packed; other folders are told what is read, as by any format."""
    (tmp_path / "a.png").write_bytes(picture(0))
    (tmp_path / "b.txt").write_text("b")
    for text, packs in (("b.txt", False), ("a.txt", True)):
        (tmp_path / text).write_text("a text")
        with pytest.raises(UserError, match=r"no \.tar, \.tar\.gz, \.tgz files in .* The format reads: ") as raised:
            create("webdataset", tmp_path, None, {})
        assert ("`tar cf pairs.tar *` in that folder packs its images" in str(raised.value)) == packs
    (tmp_path / "files/00000").mkdir(parents=True)  # as img2dataset's output `files` has them
    for name in ("a.png", "a.txt"):
        (tmp_path / name).rename(tmp_path / "files/00000" / name)
    with pytest.raises(UserError, match=r"`tar cf pairs\.tar \*` in each folder such as 00000 packs its images"):
        create("webdataset", tmp_path / "files", None, {})


def test_every_cut_and_every_damaged_header_is_seen(tmp_path: Path) -> None:
    """A tar that is whole up to the end of a sample gives so many samples; whatever is wrong behind is counted."""
    rng = random.Random(0)
    broken = {cut: WHOLE[:cut] for start in STARTS for cut in (start, start + 511, start + rng.randrange(512))}
    for at in range(512):
        if not 148 <= at < 156:  # the checksum itself, some of whose bytes do not matter
            raw = bytearray(WHOLE)
            raw[AT + at] ^= 1 << rng.randrange(8)
            broken[AT, at] = bytes(raw)
    file = tmp_path / "0.tar"
    for where, content in broken.items():
        file.write_bytes(content)
        whole = [start for start in STARTS[1:] if start <= (where if isinstance(where, int) else AT)]
        assert texts_of(file) == ([f"text {k}" for k in range(len(whole))], {LOST: 1}), where


@pytest.mark.parametrize("size", [-512, -(1 << 40), 1 << 59, 1 << 90])
def test_sizes_that_no_file_has(size: int, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for k in range(3):
            writers._add(archive, f"{k}.txt", b"text %d" % k)
            if k == 0:
                header = tarfile.TarInfo("0.png")
                header.size = size
                writers.add_header(archive, header)
    assert texts_of(tmp_path / "0.tar") == (["text 0"], {"image: no image in the sample": 1, LOST: 1})
    with pytest.raises(ValueError, match=r"not a readable \.tar"):
        open_images(tmp_path)


def test_a_header_that_is_too_long_is_not_read() -> None:
    """A few hundred KiB of a compressed tar may be as many MiB of a name."""
    read: list[int] = []

    class Stream(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            read.append(size or 0)
            return super().read(size)

    for size, error in (
        (1 << 20, nullcontext()),
        (2 << 20, pytest.raises(tarfile.ReadError, match="size of a header")),
    ):
        name = header(b"L", size) + b"n" * 100 + bytes(size - 100)
        with error:
            list(tars.tar_files(Stream(WHOLE[:AT] + name + WHOLE[AT:])))
    assert max(read) <= 1 << 20


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_compressed_tar_that_is_cut_or_damaged(part: float, tmp_path: Path) -> None:
    raw = gzip.compress(WHOLE)
    at = int(len(raw) * part)
    for content in (raw[:at], raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :]):
        (tmp_path / "0.tar.gz").write_bytes(content)
        texts, bad = texts_of(tmp_path / "0.tar.gz")
        assert bad[LOST] == 1
        assert len(texts) <= NUM_SAMPLES


def test_what_zstandard_raises_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tarfile` opens it too from Python 3.14 on; its error is of no type that others are."""
    module: Any = ModuleType("compression.zstd")
    module.ZstdError = type("ZstdError", (Exception,), {})
    monkeypatch.setitem(sys.modules, "compression", ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    assert module.ZstdError in runpy.run_path(str(tars.__file__))["DAMAGE"]
