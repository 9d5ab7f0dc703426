"""`corpus.json`: what a corpus consists of, and the names of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from megatron_lcl.data.corpus.document import KINDS
from megatron_lcl.data.corpus.files import CORPUS_MANIFEST as MANIFEST
from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.indexed import write_file
from megatron_lcl.data.storage.names import is_within
from megatron_lcl.errors import UserError

FORMAT_VERSION = 1
COUNTS = ("documents", "pieces", "tokens", "placements", "images", "image_bytes")
KIND = "kind"
"""key of a shard's kind of documents, beside its counts"""
TOKENS, IMAGES, NAMES = "tokens-{:05d}", "images-{:05d}", "names-{:05d}.bin"
"""names of a shard's files, the first two without their suffix, by its number"""
ARROW = ".arrow"
PARENTS = "parents"
"""key of what was made of other corpora: of each of them in order what `as_parent` keeps. Not of the recipe, by which a
command recognizes its own result, also one of an earlier version"""


def shard_files(number: int, names: bool = True) -> list[str]:
    """File names of shard `number`; names: with that of the documents' names, which an earlier release's has not."""
    tokens, images = TOKENS.format(number), IMAGES.format(number)
    files = [f"{tokens}.bin", f"{tokens}.idx", f"{images}.bin", f"{images}.idx", f"{images}{ARROW}"]
    return [*files, NAMES.format(number)] if names else files


def has_names(manifest: Mapping[str, Any], number: int) -> bool:
    """Whether shard `number` says where its documents came from."""
    return NAMES.format(number) in manifest["files"]


def total(shards: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Sums of what is counted of shards (COUNTS); one that lacks a count has none of it."""
    shards = list(shards)
    return {name: sum(shard.get(name, 0) for shard in shards) for name in COUNTS}


def manifest_of(
    *,
    source: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    drops: Mapping[str, Any],
    shards: Sequence[Mapping[str, Any]],
    files: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """The manifest of a corpus whose files are written, with its version and counts.

    tokenizer: `Tokenizer.entry`. drops: `Drops.to_dict`. shards: counts and kind of each, in order. files: size and
    hash of each by its name. more: its recipe, and what else it is to say.
    """
    return {
        "format_version": FORMAT_VERSION,
        "source": source,
        "tokenizer": tokenizer,
        "counts": total(shards),
        "drops": drops,
        "shards": shards,
        "files": dict(sorted(files.items())),
        **more,
    }


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with its "contents", fsync it and the folder; with it the corpus exists."""
    whole = {**manifest, "contents": contents_of(manifest)}
    write_file(folder / MANIFEST, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
    sync(folder)


def damaged(where: str | Path, error: Exception) -> UserError:
    """The error for a corpus at a path or URL whose manifest is not one. error: why; a KeyError's key is named."""
    missing = f" (it has no {error.args[0]!r})" if isinstance(error, KeyError) else ""
    return UserError(
        f"{where}/{MANIFEST} is damaged{missing}; copy it again from where the corpus came from, or remove the folder "
        "and run `megatron-lcl preprocess` again"
    )


def read_manifest(folder: Path, where: str | None = None) -> dict[str, Any]:
    """The manifest, with the corpus's "fingerprint" added. UserError where `folder` is not a corpus.

    where: the URL of the corpus whose manifest was copied into the folder.

    The fingerprint is "contents", so that the same documents are shuffled alike wherever and whenever they were
    prepared. In corpora of earlier releases, which do not have it, it is the hash of the manifest.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        version = manifest["format_version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not a corpus: it has no {MANIFEST}; write one with `megatron-lcl preprocess`"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(where or folder, error) from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{where or folder}/{MANIFEST} has format version {version}; this release reads version {FORMAT_VERSION}"
        )
    return {**manifest, "fingerprint": manifest.get("contents") or xxhash.xxh3_128_hexdigest(raw)}


def contents_of(manifest: Mapping[str, Any]) -> str:
    """XXH3-128 of what a run sees of a corpus: tokenizer, and each shard's kind, tokens, images and placements."""
    files = manifest["files"]
    shards = [
        [shard.get(KIND), *(files[name]["xxh3"] for name in shard_files(number, names=False))]
        for number, shard in enumerate(manifest["shards"])
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps([manifest["tokenizer"]["fingerprint"], *shards]).encode())


def names_of(manifest: Mapping[str, Any]) -> str:
    """XXH3-128 of where the documents came from, which "contents" leaves out."""
    files, shards = manifest["files"], range(len(manifest["shards"]))
    hashes = [files[NAMES.format(number)]["xxh3"] if has_names(manifest, number) else None for number in shards]
    return xxhash.xxh3_128_hexdigest(json.dumps(hashes).encode())


def source_text(manifest: Mapping[str, Any]) -> str:
    """The manifest's source in words, on one line; of a merged corpus that of each of its parts, equal ones once."""
    texts = dict.fromkeys(_sources_in(manifest.get("source", {})))
    merged = "merged from " if "merged" in manifest.get("source", {}) else ""
    return merged + "; ".join(texts)


def _sources_in(source: Mapping[str, Any]) -> Iterator[str]:
    if "merged" in source:
        for part in source["merged"]:
            yield from _sources_in(part)
    else:  # earlier versions wrote "licence"
        facts = {"license" if name == "licence" else name: value for name, value in source.items()}
        yield ", ".join(f"{name} {' '.join(str(value).split())}" for name, value in facts.items())


def as_parent(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a corpus that is made of this one keeps of it, beside its source: how it was made, and its own parents."""
    return {key: manifest[key] for key in ("fingerprint", "recipe", PARENTS) if key in manifest}


def filters_of(manifest: Mapping[str, Any]) -> list[str]:
    """The rules with which `curate` has made this corpus, and those that it was made of, as far as they are recorded:
    each with its threshold, where that is a number."""
    recipe, parents = manifest.get("recipe", {}), manifest.get(PARENTS, ())
    thresholds = recipe.get("thresholds", {}).items()
    own = [f"{name} {value}" if isinstance(value, int | float) else name for name, value in thresholds]
    return list(dict.fromkeys([*own, *(rule for parent in parents for rule in filters_of(parent))]))


def check_names(names: Iterable[str], manifest: str | Path) -> None:
    """UserError where a manifest lists what is no file of its folder: it would be written, or removed, elsewhere."""
    for name in names:
        if "/" in name or not is_within(name):
            raise UserError(
                f"{manifest} lists {name!r}, which is no name of a file in its folder: whoever wrote it may mean harm, "
                "and the corpus is not used"
            )


def check_shape(manifest: Mapping[str, Any]) -> None:
    """KeyError, TypeError or ValueError where what readers take for granted is not there, or not of its type."""

    def are(kind: type, *values: object) -> None:
        if not all(type(value) is kind for value in values):
            raise TypeError

    are(dict, manifest["source"], manifest["tokenizer"], manifest["counts"], manifest["files"], manifest["drops"])
    are(dict, *(manifest["drops"][key] for key in ("bad", "left_out", "noted", "names")))
    are(list, manifest["shards"])
    are(dict, *manifest["shards"], *manifest["files"].values())
    tokenizer = manifest["tokenizer"]
    are(str, tokenizer["file"], tokenizer["fingerprint"], *(info["xxh3"] for info in manifest["files"].values()))
    bytes.fromhex(manifest["fingerprint"])
    are(int, tokenizer["vocab_size"], *(info["size"] for info in manifest["files"].values()))
    for counts in (manifest["counts"], *manifest["shards"]):
        are(int, *(counts[name] for name in COUNTS))
    if Path(tokenizer["file"]).suffix not in (".model", ".json"):
        raise ValueError  # it is copied to a cache that a config names, as `x.vim` to where an editor looks for those
    if any(shard.get(KIND, KINDS[0]) not in KINDS for shard in manifest["shards"]):
        raise TypeError
