"""Whether a corpus's manifest holds what its readers take for granted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_lcl.data.corpus.document import KINDS


def check_shape(manifest: dict[str, Any], counted: Sequence[str], kind_key: str) -> None:
    """KeyError or TypeError where something is not there, or of another type.

    counted: what a shard has counts of; kind_key: the key of its documents' kind.
    """

    def are(kind: type, *values: object) -> None:
        if not all(type(value) is kind for value in values):
            raise TypeError

    are(dict, manifest["source"], manifest["tokenizer"], manifest["counts"], manifest["files"], manifest["drops"])
    are(dict, *(manifest["drops"][key] for key in ("bad", "left_out", "noted", "names")))
    are(list, manifest["shards"])
    are(dict, *manifest["shards"], *manifest["files"].values())
    tokenizer = manifest["tokenizer"]
    are(str, tokenizer["file"], tokenizer["fingerprint"], *(info["xxh3"] for info in manifest["files"].values()))
    are(int, tokenizer["vocab_size"], *(info["size"] for info in manifest["files"].values()))
    for counts in (manifest["counts"], *manifest["shards"]):
        are(int, *(counts[name] for name in counted))
    if any(shard.get(kind_key, KINDS[0]) not in KINDS for shard in manifest["shards"]):
        raise TypeError
