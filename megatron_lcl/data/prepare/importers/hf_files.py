"""Which files of a folder of Hugging Face's `datasets` are read: those of the data set, and of these one split's."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_lcl.data.prepare.importers.files import Files
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_file, raise_if_passing

_STATE, _DICT, _CARD = "state.json", "dataset_dict.json", "README.md"
_FRONT_MATTER = re.compile(r"---[^\S\n]*\n(.*?)\n---", re.DOTALL)
_SHARD = re.compile(r"(?:.*-)?([^-]+)-\d{5}-of-\d{5}")
_WORD = re.compile(
    r"(?:^|[-._ 0-9])(train(?:ing)?|validation|valid|val|dev|test(?:ing)?|eval(?:uation)?)(?=[-._ 0-9]|$)", re.I
)
"""of a split, between what separates words: as `datasets` knows it, but in capitals too"""
_NOT_LISTED = f"not of the data set: {_STATE} does not list it"
_OTHER_SPLIT = "of another split"


def of_data_set(found: Files) -> Files:
    """Without the files beside a saved data set that do not belong to it, such as the cache of `map`."""
    read, skipped = [], list(found.skipped)
    states: dict[Path, set[str] | None] = {}
    for file in found.read:
        if file.parent not in states:
            states[file.parent] = _data_files(file.parent)
        names = states[file.parent]
        if names is None or file.name in names:
            read.append(found.name(file))
        else:
            skipped.append((file, _NOT_LISTED))
    return replace(found, names=read, skipped=sorted(skipped))


def _data_files(folder: Path) -> set[str] | None:
    """Names of a saved data set's files; None where the folder is none."""
    path = folder / _STATE
    if not exists(path):
        return None
    try:
        state = json.loads(path.read_bytes())
        names = {entry["filename"] for entry in state["_data_files"]}
        indices = state.get("_indices_data_files") or state.get("_indices_files")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged, or not of a saved data set") from None
    if indices:
        raise UserError(f"{folder} has an index of its rows, as old releases of `datasets` wrote; save it anew")
    if missing := sorted(name for name in names if not is_file(folder / name)):
        raise UserError(f"{folder / missing[0]} is missing; {path.name} lists it")
    return names


def of_split(found: Files, split: str) -> Files:
    """Of the files those of a split, or `all`. UserError where none is named and there are several."""
    said = _said_by_card(found.root, found.names)
    splits = {name: said.get(name) or {_split_of(found.path(name), name)} for name in found.names}
    names = sorted(set().union(*splits.values()))
    if split in ("", "all"):
        if split == "" and len(names) > 1:
            some = " and ".join(repr(name) if name else "none" for name in names)
            raise UserError(f"{found.root} has several splits, {some}: name one with --option split=NAME, or split=all")
        return found
    if split not in names:
        raise UserError(f"--option split={split}: {found.root} has {', '.join(filter(None, names)) or 'no splits'}")
    others = [(found.root / name, _OTHER_SPLIT) for name, its in splits.items() if split not in its]
    return replace(
        found, names=[n for n, its in splits.items() if split in its], skipped=sorted([*found.skipped, *others])
    )


def _split_of(file: Path, name: str) -> str:
    """As the folder of a saved data set, or the names of the file and its folders say it; "" where none does.

    name: of the file below the folder that is the input.
    """
    if exists(file.parent.parent / _DICT):
        return file.parent.name
    shard = None if exists(file.parent / _STATE) else _SHARD.match(file.stem)
    if shard and _WORD.search(shard[1]):  # a name such as `train_sft`
        return shard[1]
    for part in (file.stem, *reversed(name.split("/")[:-1])):
        if word := _WORD.search(part):
            return word[1]
    return shard[1] if shard else ""


def _said_by_card(folder: Path, names: Sequence[str]) -> dict[str, set[str]]:
    """The splits of each file of which `configs` in a data set's card says some, in each config the first that fits.

    They are named CONFIG/SPLIT where configs have different files under one split: no data set is two of them.
    """
    files: dict[tuple[str, str], list[str]] = {}
    for config, patterns in _configs_of_card(folder).items():
        for name in names:
            if split := next((split for pattern, split in patterns if fnmatch.fnmatchcase(name, pattern)), None):
                files.setdefault((config, split), []).append(name)
    contents = {(split, tuple(its)) for (_, split), its in files.items()}
    differ = len(contents) > len({split for split, _ in contents})
    said: dict[str, set[str]] = {}
    for (config, split), its in files.items():
        for name in its:
            said.setdefault(name, set()).add(f"{config}/{split}" if differ else split)
    return said


def _configs_of_card(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(pattern of names, split) of each entry of each of `configs`; none where the card says nothing of them."""
    try:
        front = _FRONT_MATTER.match((folder / _CARD).read_text("utf-8", "replace"))
        configs: list[dict[str, Any]] = yaml.safe_load(front[1])["configs"] if front else []
        found: dict[str, list[tuple[str, str]]] = {}
        for config in configs:
            patterns = found.setdefault(str(config.get("config_name", "default")), [])
            for entry in _several(config["data_files"]):
                split, paths = ("train", entry) if isinstance(entry, str) else (str(entry["split"]), entry["path"])
                patterns += [(path.replace("**/", "*"), split) for path in _several(paths)]
        return found
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise_if_passing(error, folder / _CARD)
        return {}


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
