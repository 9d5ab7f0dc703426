"""The rules of a held-out evaluation: its own, so that its numbers depend on the corpus and the weights alone.

No setting of training enters (`data.*`, the objective, the layout); what depends on the model follows from its config.
They are written with the results. Numbers of one corpus can be compared where the rules are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megatron_lcl.config import Config, Corpus, Data, Model
from megatron_lcl.data.loading.packing import max_sequences

VERSION = 3
"""to be raised when what follows, or how a document is cut, changes"""
OF_LINE = "heldout/rules"
"""key of a line of metrics.jsonl that has held-out numbers: the version of the rules"""
FIRST_OF_LINE = 3
"""the first version that lines name; those of its first revisions are known by its chances"""
NOT_COMPARABLE = "not to be compared (docs/evaluation.md, “Earlier versions”)"
"""what is said of numbers by other versions"""

_FIXED: dict[str, Any] = {
    "min_similarity": 0.24,
    "max_images_per_segment": 1,
    "max_images": 6,
    "min_images": 1,
    "image_first": 0.0,  # an image before its text has no context: it would not be measured
    "pair_layout": "document",
    "contrast_leading_images": False,
    "seed": 0,
}
"""fields of `data`; selection (which only sources with similarities have) is the reference's"""


def version_of_line(line: Mapping[str, Any]) -> int | None:
    """By which version of the rules a line of metrics.jsonl was measured that has held-out numbers; None: not recorded,
    as in earlier revisions. Versions before the first that lines name differ in the numbers of pairs only."""
    is_older = "heldout/chance_at_10" in line and "heldout/context_to_image_chance_at_10" not in line
    version = line.get(OF_LINE, None if is_older else FIRST_OF_LINE)
    return version if isinstance(version, int) else None


def called(versions: Iterable[int | None]) -> str:
    """Versions of the rules in their order, for a message; None: not recorded."""
    return ", then ".join("an unrecorded version" if v is None else f"version {v}" for v in versions)


def heldout_rules(model: Model) -> dict[str, Any]:
    """The rules for a model, as plain values.

    `sequences`: `documents`, cut at `sequence_tokens` (the model's context length) and never for their images;
    or, where the context cannot hold an image, `pairs`: `<sot> text <soi>`, each image with its nearest text. A cut
    gives an image that would begin a sequence the end of the text before it (`cut`).
    """
    context, num_patches = model.language.context_length, model.vision.num_patches
    documents = context >= num_patches + 5
    return {
        "version": VERSION,
        "sequences": "documents" if documents else "pairs",
        "sequence_tokens": context,
        "sequence_images": (context - 2) // (num_patches + 2) if documents else max_sequences(context),
        "cut": "between segments; an image takes the end of the text before it along",
        "candidates": "distinct images, by their bytes; distinct contexts, by what the model reads before the image",
        "right": "every image and context that stand together in a pair",
        **_FIXED,
    }


def heldout_data(config: Config, corpus: str) -> Data:
    """The `data` section of an evaluation on `corpus`: the rules; of the run's, its workers, and where, how
    much and how far ahead it reads.

    Images that do not decode are skipped and counted, however many they are.
    """
    rules = heldout_rules(config.model)
    return Data(
        corpora=(Corpus(path=corpus),),
        tokens_per_pack=rules["sequence_tokens"],
        images_per_pack=rules["sequence_images"],
        workers=config.data.workers,
        cache=config.data.cache,
        storage_cache_gb=config.data.storage_cache_gb,
        look_ahead=config.data.look_ahead,
        max_bad_images=1 << 62,
        max_bad_fraction=1.0,
        **_FIXED,
    )
