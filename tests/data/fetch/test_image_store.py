"""A store whose process is killed before any of its file operations, or whose files were damaged, goes on whole."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.fetch.faulty_server import image
from data.fetch.stores import images_in, read_rows

from megatron_lcl.data.fetch import store
from megatron_lcl.data.fetch.run import summary
from megatron_lcl.data.fetch.settings import STORES, Store
from megatron_lcl.data.fetch.store import PartStore, Row
from megatron_lcl.data.prepare.importers.urls import url_key
from megatron_lcl.errors import UserError


class Killed(BaseException):
    pass


def rows(number: int) -> list[tuple[Row, bytes]]:
    found = []
    for k in range(number):
        url, data = f"http://example.org/{k}", image(str(k))
        if k % 3 == 2:
            found.append((Row(url, "dead", "status 404"), b""))
        else:
            digest = hashlib.sha256(data).hexdigest()
            found.append((Row(url, "kept", "", digest, len(data), 8, 6, "PNG"), data))
    return found


def add_all(folder: Path, wanted: list[tuple[Row, bytes]], kind: Store, added: list[str] | None = None) -> int:
    """Whoever goes on; how many were to be done. added: is given the URLs that were."""
    part = PartStore(folder, 3, 4, kind)
    todo = [(row, data) for row, data in wanted if url_key(row.url) not in part.done]
    for row, data in todo:
        part.add(row, data)
        if added is not None:
            added.append(row.url)
    part.finish()
    return len(todo)


def check(folder: Path, wanted: list[tuple[Row, bytes]], kind: Store) -> None:
    assert Counter(row["url"] for row in read_rows(folder)) == Counter(row.url for row, _ in wanted)
    assert images_in(folder) == {url_key(row.url): data for row, data in wanted if data}
    assert {path.suffix for path in folder.iterdir()} == ({".tar", ".parquet"} if kind == "tar" else {".parquet"})


def test_a_part_that_is_completed_while_images_are_looked_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was in no table yet, and is in no log any more."""
    part, wanted = PartStore(tmp_path, 3, 4), rows(3)
    for row, data in wanted:
        part.add(row, data)
    looked = store.matching

    def complete(folder: Path, pattern: str) -> list[Path]:
        found = looked(folder, pattern)
        if pattern == "*.log":
            part.finish()
        return found

    monkeypatch.setattr(store, "matching", complete)
    assert list(store.kept_urls(tmp_path)) == [row.url for row, data in wanted if data]


KINDS = pytest.mark.parametrize("kind", STORES)


@KINDS
def test_killed_before_each_operation(tmp_path: Path, kind: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = rows(11)
    left = [-1]
    real = {name: getattr(os, name) for name in ("rename", "unlink", "fsync")}

    def killing(name: str) -> Any:
        def operation(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                raise Killed
            return real[name](*arguments, **named)

        return operation

    for name in real:
        monkeypatch.setattr(os, name, killing(name))
    write_table, write_images = store.pq.write_table, store.write_image_table
    monkeypatch.setattr(store.pq, "write_table", lambda *a, **b: killing_write(write_table, a[1], left, *a, **b))
    monkeypatch.setattr(store, "write_image_table", lambda *a: killing_write(write_images, a[0], left, *a))
    kills = 0
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        added: list[str] = []
        left[0] = moment
        try:
            add_all(folder, wanted, kind, added)
        except Killed:
            kills += 1
        else:
            break
        finally:
            left[0] = -1
        assert add_all(folder, wanted, kind) == 11 - len(added)
        check(folder, wanted, kind)
    assert kills >= 3 * 5  # in each of three shards


def killing_write(write: Any, file: Path, left: list[int], *arguments: Any, **named: Any) -> None:
    left[0] -= 1
    if not left[0]:
        file.write_bytes(b"PAR1 half")
        raise Killed
    write(*arguments, **named)


def test_a_shard_is_on_the_disk_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the tar, then the table, then both names, and only then the log goes: no failure of power loses a row."""
    done: list[str] = []
    fsync, rename, unlink = os.fsync, os.rename, os.unlink

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        done.append(f"to {new.name}")

    def unlinked(path: Path) -> None:
        unlink(path)
        done.append(f"remove {path.name}")

    for name, function in (("fsync", synced), ("rename", renamed), ("unlink", unlinked)):
        monkeypatch.setattr(os, name, function)
    add_all(tmp_path, rows(3), "tar")
    assert done == [
        "sync 00003.partial", "sync 00003-00000.table", "to 00003-00000.tar", "to 00003-00000.parquet",
        f"sync {tmp_path.name}", "remove 00003.log",
    ]  # fmt: skip


def test_a_summary_is_of_all_shards(tmp_path: Path) -> None:
    wanted = rows(11)
    add_all(tmp_path, wanted, "tar")
    sizes = [len(data) for _, data in wanted if data]
    assert summary(tmp_path) == {
        "kept": 8, "dead": 3, "refused": 0, "bytes": sum(sizes), "reasons": {"dead: status 404": 3},
    }  # fmt: skip


@pytest.mark.parametrize("cut", range(0, 2000, 97))
def test_cut_anywhere(tmp_path: Path, cut: int) -> None:
    """Files of which only a beginning had reached the disk: what is whole is kept."""
    wanted = rows(4)
    part = PartStore(tmp_path, 3, 100)
    for row, data in wanted:
        part.add(row, data)
    part.close()
    for name in ("00003.partial", "00003.log"):
        with open(tmp_path / name, "r+b") as file:
            file.truncate(min(cut, os.path.getsize(file.name)))
    todo = add_all(tmp_path, wanted, "tar")
    assert todo == 4 if cut < 97 else todo <= 4
    check(tmp_path, wanted, "tar")


def test_damaged_image_is_fetched_again(tmp_path: Path) -> None:
    wanted = rows(4)
    part = PartStore(tmp_path, 3, 100)
    for row, data in wanted:
        part.add(row, data)
    part.close()
    with open(tmp_path / "00003.partial", "r+b") as file:
        file.seek(512 + 40)
        file.write(bytes(10))
    assert add_all(tmp_path, wanted, "tar") == 4
    check(tmp_path, wanted, "tar")


@KINDS
def test_two_processes_in_one_part_are_noticed(tmp_path: Path, kind: Store) -> None:
    """Where locks are kept to one machine. Images would get into the store under the names of others."""
    wanted = rows(5)
    first = PartStore(tmp_path, 3, 100, kind)
    first.add(*wanted[0])
    second = PartStore(tmp_path, 3, 100, kind)
    second.add(*wanted[1])
    with pytest.raises(UserError, match=r"00003\.partial: another process has written to the same part"):
        first.add(*wanted[3])
    for part in (first, second):
        part.close()
    assert add_all(tmp_path, wanted, kind) == 3, "the same command goes on"
    check(tmp_path, wanted, kind)


def test_an_image_that_is_not_its_rows_gets_into_no_table(tmp_path: Path) -> None:
    """As where another process wrote to the place that this one took for the end: NFS appends like that."""
    wanted = rows(4)
    part = PartStore(tmp_path, 3, 100, "parquet")
    for row, data in wanted:
        part.add(row, data)
    with open(tmp_path / "00003.partial", "r+b") as file:
        file.seek(512 + 40)
        file.write(bytes(10))
    with pytest.raises(UserError, match=r"00003\.partial: another process has written to the same part"):
        part.finish()
    part.close()
    assert add_all(tmp_path, wanted, "parquet") == 4
    check(tmp_path, wanted, "parquet")


def test_shards_of_all_parts_are_counted_by_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (
        ("00003-00000", 2),
        ("00003-00001", 3),
        ("00004-00000.images", 1),
        ("00012-00000", 7),
        ("123456-00000", 6),
    ):
        pq.write_table(pa.table({"url": [""] * number}), tmp_path / f"{name}.parquet")
    for name in ("00003-00000.tar", "00004-00001.table", "00004.log"):
        (tmp_path / name).touch()
    listed, matching = [], store.matching

    def counted(folder: Path, pattern: str) -> list[Path]:
        listed.append(pattern)
        return matching(folder, pattern)

    monkeypatch.setattr(store, "matching", counted)
    assert store.num_done(tmp_path, (3, 4, 5, 123456)) == {3: 5, 4: 1, 5: 0, 123456: 6}
    assert len(listed) == 1


def test_a_member_is_as_tarfile_writes_it() -> None:
    data = image("1")
    info = tarfile.TarInfo("a.png")
    info.size = len(data)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    ours = store._member("a.png", data)
    assert out.getvalue().startswith(ours + store._END_OF_TAR)


def test_an_error_of_closing_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS says of a file that is closed that its disk is full."""

    class Full:
        def close(self) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    part = PartStore(tmp_path, 3, 100)
    part._log_file.close()
    monkeypatch.setattr(part, "_log_file", Full())
    with pytest.raises(OSError, match=f"Disk quota exceeded: '{tmp_path / '00003.log'}'"):
        part.close()
