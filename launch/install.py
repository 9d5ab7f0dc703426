"""Installs packages into the environment that runs this, with uv, in a fraction of pip's time:

    python launch/install.py REQUIREMENT ...

uv does not read pip's configuration; where pip finds packages, and within what bounds, is passed on. Where it says more
than uv has options for, or uv cannot be had or fails, pip does it.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

PIP = [sys.executable, "-m", "pip"]
INSTALL = [*PIP, "install", "--disable-pip-version-check"]
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
"""settings of pip, and uv's variables"""
HARMLESS = {
    "break-system-packages", "cache-dir", "config-file", "disable-pip-version-check", "no-cache-dir", "no-color",
    "no-input", "no-warn-script-location", "progress-bar", "quiet", "require-virtualenv", "retries",
    "root-user-action", "verbose",
}  # fmt: skip
"""settings of pip that do not change what is installed"""
SECTIONS = ("global", "install", ":env:")
"""of pip's configuration that concern an installation; a later one overrides"""


def uv_variables(listed: str) -> dict[str, str] | None:
    """What `pip config list` prints as uv's variables; None where it has a setting that uv has not."""
    settings: dict[str, str] = {}
    lines = [line.partition("=") for line in listed.splitlines() if "=" in line]
    for section in SECTIONS:
        named = {key.removeprefix(f"{section}."): value for key, _, value in lines if key.startswith(f"{section}.")}
        settings |= {key: ast.literal_eval(value) for key, value in named.items()}
    if settings.keys() - VARIABLES.keys() - HARMLESS:
        return None
    separators = {"UV_FIND_LINKS": ","}
    found = {VARIABLES[key]: value.split() for key, value in settings.items() if key in VARIABLES}
    return {name: separators.get(name, " ").join(values) for name, values in found.items()}


def with_uv(requirements: list[str], folder: Path) -> bool:
    """Whether uv has installed them.

    folder: for uv and its cache; on the environment's file system, files of the cache need not be copied.
    """
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False)
    variables = uv_variables(listed.stdout)
    if listed.returncode or variables is None:
        return False
    if subprocess.run([*INSTALL, "--quiet", "--target", str(folder / "uv"), "uv"], check=False).returncode:
        return False
    command = [str(folder / "uv/bin/uv"), "pip", "install", "--python", sys.executable]
    # as pip: the best version that any of the places has
    command += ["--cache-dir", str(folder / "cache"), "--index-strategy", "unsafe-best-match", *requirements]
    return subprocess.run(command, env={**os.environ, **variables}, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    """Exit code."""
    folder = Path(sys.prefix) / "installing"
    try:
        if with_uv(arguments, folder):
            return 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    commands = [[*INSTALL, "--upgrade", "pip", "setuptools", "wheel"], [*INSTALL, "--no-compile", *arguments]]
    return next((code for words in commands if (code := subprocess.run(words, check=False).returncode)), 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
