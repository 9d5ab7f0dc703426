"""The GIMP manual: real documents that Debian and Ubuntu machines fetch without root (package gimp-help-en, GFDL)."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megatron_lcl.errors import UserError

PACKAGE = "gimp-help-en"
LICENSE = "GFDL-1.2-or-later"


@dataclass(frozen=True, slots=True)
class Manual:
    """The unpacked manual: its folder of HTML, and what goes into a corpus manifest."""

    html: Path
    package: str
    version: str
    sha256: str

    @property
    def source(self) -> dict[str, str]:
        return {"package": self.package, "version": self.version, "sha256": self.sha256, "license": LICENSE}


def fetch_manual(folder: str | Path) -> Manual:
    """Download the package into `folder` (kept, and used again) and unpack it there.

    Raises UserError that says how to pass a folder of HTML instead where apt or dpkg is missing or the download fails.
    """
    folder = Path(folder).resolve()
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not on this machine, so {PACKAGE} cannot be fetched; {_REMEDY}")
    folder.mkdir(parents=True, exist_ok=True)
    package = _downloaded(folder) or _download(folder)
    version = _run(["dpkg-deb", "--field", package.name, "Version"], folder)
    unpacked = folder / "unpacked"
    if not unpacked.exists():
        temporary = folder / f"unpacked.{os.getpid()}"
        try:
            _run(["dpkg-deb", "-x", package.name, temporary.name], folder)
            os.replace(temporary, unpacked)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    pages = sorted(unpacked.rglob("index.html"), key=lambda p: len(p.parts))
    if not pages:
        raise UserError(f"{package} holds no HTML; {_REMEDY}")
    return Manual(pages[0].parent, PACKAGE, version, hashlib.sha256(package.read_bytes()).hexdigest())


_REMEDY = "give a folder of HTML pages with their images instead: --html DIR"


def _downloaded(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob(f"{PACKAGE}_*.deb"))), None)


def _download(folder: Path) -> Path:
    temporary = folder / f"download.{os.getpid()}"
    temporary.mkdir()
    try:
        # as root apt drops to a user that may not write here; the warning about it is harmless
        _run(["apt-get", "download", "-q", PACKAGE], temporary)
        package = _downloaded(temporary)
        if package is None:
            raise UserError(f"apt-get downloaded nothing; {_REMEDY}")
        return Path(shutil.move(str(package), str(folder / package.name)))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{' '.join(command)}` failed ({error}); {_REMEDY}") from None
    if result.returncode:
        full = os.strerror(errno.ENOSPC)
        if full in result.stderr or "Wrote only" in result.stderr:  # as apt and tar say it
            raise OSError(errno.ENOSPC, full, str(folder))
        reason = next((line for line in result.stderr.splitlines() if line and not line.startswith("W:")), "no message")
        if command[0] == "apt-get":
            reason += f" (offline, or no package lists: `apt-get update`); {_REMEDY}"
        raise UserError(f"`{' '.join(command)}` in {folder} failed: {reason}")
    return result.stdout.strip()
