"""The encoder that rules ask, loaded once in a process whichever of them do."""

from __future__ import annotations

import functools
import io
from typing import TYPE_CHECKING

import PIL.Image

if TYPE_CHECKING:
    from megatron_lcl.evaluate.encoders.encoder import Encoder


@functools.lru_cache(1)
def load(encoder: str, tokenizer: str | None) -> tuple[Encoder, int]:
    """The encoder, and the width of its features. UserError where it does not load.

    encoder, tokenizer: as `evaluate` names them.
    """
    from megatron_lcl.evaluate.encoders.load import load_encoder

    model, blank = load_encoder(encoder, tokenizer), io.BytesIO()
    PIL.Image.new("RGB", (32, 32)).save(blank, "PNG")
    return model, model.encode(model.prepare(blank.getvalue())[None]).pooled.shape[1]
