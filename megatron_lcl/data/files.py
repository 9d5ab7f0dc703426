"""Files that must be whole: their hash, and making them durable."""

from __future__ import annotations

import os
from pathlib import Path

import xxhash

_BLOCK = 1 << 22


def hash_file(path: Path) -> str:
    """XXH3-128 of a file's content, hexadecimal."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file's content, or renames inside a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file; whoever reads it, even after a crash, finds it as it was before or as it is now."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
