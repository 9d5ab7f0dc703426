"""What code wrote a checkpoint: versions, the git commit, and a hash of the source."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import xxhash

from megatron_lcl.filesystem import below, exists, is_file

PACKAGE = Path(__file__).parents[2]


@functools.cache
def code_versions() -> dict[str, str]:
    """Versions of what computes: this package (its source, and in a checkout the git commit), PyTorch, DeepSpeed."""
    import deepspeed

    versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
    with contextlib.suppress(OSError):  # it is only said: no reason to end a run
        versions["source"] = source_hash(PACKAGE)
    with contextlib.suppress(PackageNotFoundError):  # run from a checkout that is not installed
        versions["megatron_lcl"] = version("megatron-lcl")
    checkout = PACKAGE.parent
    if exists(checkout / ".git"):
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            versions["commit"] = subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
    return versions


def source_hash(package: Path) -> str:
    """XXH3 (128 bits, hexadecimal) over names and contents of the Python files in a package: the version stays the same
    from commit to commit, and all changes that are not committed have the same name. Hidden files, as editors leave
    them, and links to nothing do not count. OSError where a file cannot be read."""
    digest = xxhash.xxh3_128()
    for path in sorted(below(package, "*.py")):
        relative = path.relative_to(package)
        if any(part.startswith(".") for part in relative.parts) or not is_file(path):
            continue
        content = path.read_bytes()
        digest.update(os.fsencode(f"{relative.as_posix()}\0{len(content)}\0"))
        digest.update(content)
    return digest.hexdigest()


def versions_that_differ(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What to say of each version that a checkpoint was written by and that is another one now. Both: as of
    `code_versions`; what one of them does not say is left out, as the source in checkpoints of earlier releases."""
    return [
        "code of megatron_lcl that differs" if name == "source" else f"{name} {version} (now {now[name]})"
        for name, version in before.items()
        if now.get(name, version) != version
    ]
