"""Several corpora of one tokenizer as one: shards are linked or moved, never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_lcl.data.corpus.corpus_manifest import (
    KIND,
    MANIFEST,
    PARENTS,
    as_parent,
    check_names,
    has_names,
    manifest_of,
    names_of,
    read_manifest,
    shard_files,
    write_manifest,
)
from megatron_lcl.data.corpus.drops import LOG, NAMES_KEPT, Drops
from megatron_lcl.data.corpus.files import blocks
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.corpus.scratch import clear_replaced, whole_folder
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.storage.paths import path_of
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError, naming
from megatron_lcl.filesystem import exists


def merge(corpora: Sequence[str | Path], output: str | Path, move: bool = False) -> dict[str, Any]:
    """Join corpora, in the given order, into the new folder `output`; returns its manifest.

    Files are hard-linked (copied to another file system, or from object storage), so the sources stay as they are; with
    `move` they are removed once the new folder is whole. Done before with the same corpora, it is recognized, and an
    interrupted removal goes on. Until all files are there they are in a folder beside the output; what is left of that
    by a process that was killed, the next one removes. Every shard keeps its kind of documents. Raises UserError where
    the tokenizers differ, a corpus is given twice, has lost a file or part of one, or is in object storage and to be
    moved, or the folder is one of the corpora, holds something else, or cannot be replaced (`whole_folder`).
    """
    sources, output = [Path(c) for c in corpora], Path(output)
    if path_of(output).resolve() in (path_of(source).resolve() for source in sources):
        raise UserError(f"{output} is the output, and given as a corpus to merge as well; leave it out of the corpora")
    if move and (remote := [url for source in sources if (url := url_of(source))]):
        raise UserError(f"--move removes corpora of a disk, and {remote[0]} is none; leave it out")
    if not _is_done(sources, output, move):
        if not sources:
            raise UserError("no corpus to merge")
        if len({s.resolve() for s in sources}) < len(sources):
            raise UserError("a corpus is given twice")
        with whole_folder(output) as folder:
            _join(sources, folder)
    else:
        clear_replaced(output)
    if move:
        for source in sources:
            _remove(source)
    return read_manifest(output)


def _is_done(sources: list[Path], output: Path, move: bool) -> bool:
    """Whether `output` is what joining the sources gave; of moved ones some, or all, may be gone."""
    if not exists(output / MANIFEST):
        return False
    recipe = read_manifest(output).get("recipe", {})
    merged = recipe.get("merged", ())
    names = recipe.get("names", [None] * len(merged))  # an earlier release did not record them
    there = [open_corpus(s).manifest if url_of(s) or exists(s / MANIFEST) else None for s in sources]

    def is_it(manifest: dict[str, Any] | None, fingerprint: str, its_names: str | None) -> bool:
        if manifest is None:
            return move
        return manifest["fingerprint"] == fingerprint and its_names in (None, names_of(manifest))

    return len(there) == len(merged) > 0 and all(map(is_it, there, merged, names))


def _join(sources: list[Path], folder: Path) -> None:
    """The corpus of all shards into an empty folder."""
    recipe: dict[str, Any] = {"merged": [], "names": []}
    opened = [open_corpus(s) for s in sources]
    manifests = [corpus.manifest for corpus in opened]
    tokenizers = {m["tokenizer"]["fingerprint"]: s for m, s in zip(manifests, sources, strict=True)}
    if len(tokenizers) > 1:
        first, second = list(tokenizers.values())[:2]
        raise UserError(
            f"{first} and {second} have different tokenizers; `megatron-lcl retokenize` gives one of them the other's"
        )

    files: dict[str, Any] = {}
    shards: list[dict[str, Any]] = []
    links: list[tuple[Corpus, str, str]] = []
    drops = Drops()
    for corpus in opened:
        corpus.check_sizes()
        manifest = corpus.manifest
        recipe["merged"].append(manifest["fingerprint"])
        recipe["names"].append(names_of(manifest))
        for number, (counts, kind) in enumerate(zip(manifest["shards"], corpus.kinds, strict=True)):
            names = has_names(manifest, number)
            for old, new in zip(shard_files(number, names), shard_files(len(shards), names), strict=True):
                links.append((corpus, old, new))
                files[new] = manifest["files"][old]
            shards.append({**counts, KIND: kind})
        drops.add(corpus.drops)
    tokenizer = manifests[0]["tokenizer"]
    links.append((opened[0], tokenizer["file"], tokenizer["file"]))
    files[tokenizer["file"]] = manifests[0]["files"][tokenizer["file"]]

    for corpus, old, new in links:
        link_file(corpus, old, folder / new)
    files[LOG] = write_file(folder / LOG, drops.log())
    write_manifest(
        folder,
        manifest_of(
            source={"merged": [m["source"] for m in manifests]},
            tokenizer=tokenizer,
            drops=drops.to_dict(NAMES_KEPT),
            shards=shards,
            files=files,
            recipe=recipe,
            **{PARENTS: [as_parent(m) for m in manifests]},
        ),
    )


def _remove(source: Path) -> None:
    """Remove a corpus, and nothing else from its folder; repeatable, should it be interrupted."""
    moved = source / f"{MANIFEST}.moved"
    if exists(source / MANIFEST):
        os.replace(source / MANIFEST, moved)  # first: a corpus is complete or it is not there
    if exists(moved):
        check_names(names := json.loads(moved.read_bytes())["files"], moved)
        for name in names:
            (source / name).unlink(missing_ok=True)
        moved.unlink()
    if exists(source) and not any(source.iterdir()):
        source.rmdir()


def link_file(corpus: Corpus, name: str, target: Path) -> None:
    """Hard-link a corpus's file; copy it where the file system has no links, or is another, or from object storage.

    target: in a folder of this process alone, which it puts on the disk itself. UserError where the file is missing.
    """
    if corpus.remote:
        corpus.remote.download(name, target)
        return
    source = corpus.path / name
    if not exists(source):
        raise UserError(f"{source} is missing; `megatron-lcl verify` says what else is")
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        with naming(target), open(target, "xb") as copy:
            copy.writelines(blocks(source))
