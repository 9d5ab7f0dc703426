"""A manifest that somebody has edited, or written with other tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from data.corpus.conftest import DOCUMENTS

from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.verify import verify
from megatron_lcl.errors import UserError


@pytest.mark.parametrize(
    "damage",
    [
        lambda m: m["files"].update({"tokens-00000.bin": 3}),
        lambda m: m.update(shards=3),
        lambda m: m["tokenizer"].update(vocab_size="5"),
        lambda m: m["shards"][0].update(documents=4.0),
    ],
)
def test_an_edited_manifest_is_damaged(corpus: Path, damage: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((corpus / "corpus.json").read_text())
    damage(manifest)
    (corpus / "corpus.json").write_text(json.dumps(manifest))
    remedy = (
        "copy it again from where the corpus came from, or remove the folder and run `megatron-lcl preprocess` again"
    )
    assert verify(corpus) == [f"{corpus / 'corpus.json'} is damaged; {remedy}"]
    with pytest.raises(ValueError, match="is damaged"):
        open_corpus(corpus)


def test_a_key_that_a_manifest_lacks_is_named(corpus: Path) -> None:
    """All that `preprocess` writes is needed, but for what docs/corpus-format.md says a writer may leave out."""
    whole = json.loads((corpus / "corpus.json").read_text())
    parts = ((), ("tokenizer",), ("counts",), ("drops",), ("shards", 0), ("files", "tokens-00000.bin"))
    free = {"contents", "recipe", "samples", "kind"}  # no kind: as in corpora of earlier releases
    places = [(*part, key) for part in parts for key in reduce(getitem, part, whole)]
    places += [("files", "names-00000.bin"), ("files", "drops.jsonl")]
    assert free < {key for *_, key in places}
    for *part, key in places:
        changed = json.loads(json.dumps(whole))
        reduce(getitem, part, changed).pop(key)
        (corpus / "corpus.json").write_text(json.dumps(changed))
        if key in free or part == ["files"]:
            assert len(open_corpus(corpus)) == len(DOCUMENTS), key
            continue
        with pytest.raises(UserError, match=rf"/corpus.json is damaged \(it has no '{key}'\); copy it again"):
            open_corpus(corpus)
    (corpus / "corpus.json").write_text(json.dumps({**whole, "source": {}}))
    assert len(open_corpus(corpus)) == len(DOCUMENTS)
