"""Protects: all folders of an input are read, linked ones too, each once; one that cannot be read is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from data.helpers import TOKENIZER, documents_of, plain
from data.writers import picture

from megatron_lcl.data.prepare.importers import create
from megatron_lcl.data.prepare.importers.files import find_files
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.errors import UserError


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"items": [{{"text": "{name}"}}]}}\n')


def names(folder: Path) -> list[str]:
    return list(find_files(folder, (".jsonl",), "lines").names)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl", "in/sub/b.jsonl", "disk/c.jsonl", "disk/deep/d.jsonl", "other/e.jsonl", "file.jsonl")
    (tmp_path / "in/z").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/more").symlink_to(Path("../other"))
    (tmp_path / "in/f.jsonl").symlink_to(tmp_path / "file.jsonl")
    assert names(tmp_path / "in") == [
        "a.jsonl", "f.jsonl", "sub/b.jsonl", "z/c.jsonl", "z/deep/d.jsonl", "z/more/e.jsonl",
    ]  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert names(tmp_path / "link") == names(tmp_path / "in")


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write(tmp_path, "all/in/a.jsonl", "all/in/sub/b.jsonl", "all/c.jsonl")
    for name, target in (("up", ".."), ("self", "self"), ("over", "../..")):
        (tmp_path / "all/in/sub" / name).symlink_to(target)
    assert names(tmp_path / "all/in") == ["a.jsonl", "sub/b.jsonl", "sub/over/c.jsonl"]


@pytest.mark.parametrize("link", ["a", "z"])
def test_a_folder_is_read_once_by_its_own_name(tmp_path: Path, link: str) -> None:
    """Whatever stands first on the disk; of two links to one the first."""
    write(tmp_path, "in/m/b.jsonl", "disk/c.jsonl")
    (tmp_path / "in" / link).symlink_to("m")
    for name in ("q", "p"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "disk")
    assert names(tmp_path / "in") == ["m/b.jsonl", "p/c.jsonl"]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.jsonl", "closed/b.jsonl")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"cannot read the folder .*closed: Permission denied"):
        names(tmp_path)


def test_images_beside_pages_of_a_linked_folder(tmp_path: Path) -> None:
    """They belong to the input as the page does; what leads out of it by its name does not."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/part").symlink_to(tmp_path / "disk")
    for name in ("disk/a.png", "in/b.png", "c.png"):
        (tmp_path / name).write_bytes(picture(len(name), 80, 70))
    (tmp_path / "disk/p.html").write_text("text<img src=a.png><img src=../b.png><img src=../../c.png>")
    found, drops = documents_of(create("html", tmp_path / "in", None, {}))
    pictures = [((tmp_path / name).read_bytes(), None, None) for name in ("disk/a.png", "in/b.png")]
    assert plain(found) == [["text", *pictures]]
    assert drops.bad_counts == {"image: outside the folder": 1}


def test_links_to_nothing_are_bad_documents(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl")
    for name in ("b.jsonl", "c.txt"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "not there")
    documents, drops = documents_of(create("jsonl", tmp_path / "in", None, {}))
    assert (len(documents), drops.bad_counts) == (1, {"document: file that is a link to a file that is not there": 1})
    (tmp_path / "in/a.jsonl").unlink()
    with pytest.raises(UserError, match=r"b\.jsonl is a link to a file that is not there"):
        names(tmp_path / "in")


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A name without a suffix was a folder's, mostly: a disk that is not mounted."""
    write(tmp_path, "in/a.jsonl")
    (tmp_path / "in/part2").symlink_to(tmp_path / "disk2/part2")
    message = r"in/part2 is a link to .*disk2/part2, which is not there: mount its disk, .* or remove the link"
    with pytest.raises(UserError, match=message):
        create("jsonl", tmp_path / "in", None, {})
    (tmp_path / "in/p.html").write_text("text")  # whose folders are often linked for their scripts alone
    _, drops = documents_of(create("html", tmp_path / "in", None, {}))
    assert drops.bad_counts == {"document: file that is a link to a file that is not there": 1}
    for name in ("v1.0", "2024.01.05"):
        (tmp_path / "in/part2").rename(tmp_path / "in" / name)
        with pytest.raises(UserError, match=f"in/{name} is a link to .*disk2/part2, which is not there"):
            names(tmp_path / "in")
        (tmp_path / "in" / name).rename(tmp_path / "in/part2")
    (tmp_path / "in/part2").rename(tmp_path / "in/.part2")  # hidden, as programs leave links in place of locks
    assert names(tmp_path / "in") == ["a.jsonl"]


@pytest.mark.parametrize("given", [True, False])
def test_a_tar_of_images_that_is_not_there_is_an_error(tmp_path: Path, given: bool) -> None:
    write(tmp_path, "in/a.jsonl")
    (tmp_path / "images").mkdir()
    (tmp_path / ("images" if given else "in") / "0.tar").symlink_to(tmp_path / "disk/0.tar")
    with pytest.raises(UserError, match=r"/0\.tar is a link to .*disk/0\.tar, which is not there: mount its disk"):
        preprocess("jsonl", tmp_path / "in", tmp_path / "out", images=tmp_path / "images" if given else None,
                   tokenizer=TOKENIZER)  # fmt: skip
    assert not (tmp_path / "out").exists()
