"""What the name of the encoder that rules ask stands for today."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_lcl.convert.find import find_checkpoint
from megatron_lcl.convert.remote import pinned
from megatron_lcl.curate.models.encoder import load
from megatron_lcl.curate.models.settings import ModelRules
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.evaluate.encoders.spec import parse_spec


def resolved(rules: ModelRules) -> ModelRules:
    """With the newest checkpoint named in place of its run: all processes ask the same weights, and those that `check`
    tells, while the run saves others. UserError where there is none."""
    if rules.encoder is None or parse_spec(rules.encoder).kind:
        return rules
    url = url_of(rules.encoder)
    return replace(rules, encoder=pinned(url) if url else str(find_checkpoint(Path(rules.encoder))))


def check(rules: ModelRules, *, keep: bool) -> dict[str, str]:
    """What the encoder's name stands for today, by the settings' dotted names, for the recipe: its weights change while
    it is trained, and a folder's when it is exported again.

    UserError where the encoder does not load, has no texts for `match`, or other features than a head.
    keep: this process needs the encoder soon.
    """
    if rules.encoder is None:
        return {}
    load.cache_clear()  # the weights may have changed since this process read them
    model, width = load(rules.encoder, rules.tokenizer)
    found = {"models.encoder": model.fingerprint}
    if not keep:
        load.cache_clear()
    if rules.match:
        model.encode_texts(["a text"])
        found["models.tokenizer"] = model.tokenizer_fingerprint
    if rules.heads:
        from megatron_lcl.curate.models.features import check_width, read_head  # imports numba and SciPy

        for head in rules.heads.values():
            check_width(head.head, read_head(head.head)[0], width)
    return found
