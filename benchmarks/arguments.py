"""Types of arguments, as argparse has them, of several programs: what is wrong is said before anything is measured."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def positives(text: str) -> list[int]:
    """Such numbers with commas between."""
    return [positive(part.strip()) for part in text.split(",")]


def one_of(known: Iterable[T]) -> Callable[[str], T]:
    """What of the known a text stands for. argparse's own `choices` refuse that there is none of `nargs="*"`."""
    by_name = {str(each): each for each in known}

    def chosen(text: str) -> T:
        if text not in by_name:
            raise argparse.ArgumentTypeError(f"{text!r} is none of: {'; '.join(by_name)}")
        return by_name[text]

    return chosen


def existing_file(text: str) -> Path:
    """A file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no file")
    return Path(text)


def existing_folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return Path(text)


def interpreter(text: str) -> str:
    """The Python of an environment."""
    if shutil.which(text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no program: give the Python of an environment")
    return text
