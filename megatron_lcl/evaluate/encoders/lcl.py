"""LCL models as encoders of images and texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import PIL.Image
import torch

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.loading.images import square
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder, Features
from megatron_lcl.model.lcl import LCL

_FLAG = "--tokenizer (curate: --models.tokenizer)"


class OurEncoder(Encoder):
    """An LCL model: pooled is the image latent z, texts are read at `<soi>`.

    The model stays the caller's: in training mode or not, what it computes here is the same, and it may be trained on.
    `device`: where it is moved; None: nowhere. `longest_text`: tokens of a text that are read, at most
    (`objectives.longest_text`); None: as many as the context holds.
    """

    module: LCL

    def __init__(
        self,
        name: str,
        model: LCL,
        tokenizer: tokenizers.Tokenizer | None = None,
        device: str | torch.device | None = None,
        longest_text: int | None = None,
    ) -> None:
        super().__init__(name, model, model.pool.query.device if device is None else device)
        self.longest_text = model.config.language.context_length - 2 if longest_text is None else longest_text
        self.tokenizer = tokenizer
        size = model.config.language.vocab_size
        if tokenizer is not None and model.whole and tokenizer.vocab_size != size:
            raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {size}; give its own, by {_FLAG}")

    def need_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer; UserError where none was found."""
        self.module.need_language()
        if self.tokenizer is None:
            raise UserError(
                f"the tokenizer of {self.name} is not known; give clip, or the file of the corpus, by {_FLAG}"
            )
        return self.tokenizer

    def _prepare(self, image: PIL.Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(square(image, self.module.config.vision.image_size)))

    def _encode(self, images: torch.Tensor) -> Features:
        hidden = self.module.vision_tokens(images)
        return Features(self.module.pool.pool(hidden)[0], self.module.pool.patch_features(hidden))

    def token_ids(self, texts: Iterable[str]) -> torch.Tensor:
        """Texts → int64 [N, S], as `LCL.encode_text` takes them: `<sot>`, the text's ids, `<eot>`, padded with 0.

        Of longer texts the first `longest_text` tokens are read. UserError where the tokenizer is not known, ValueError
        for one text in place of several.
        """
        tokenizer = self.need_tokenizer()
        rows = [[tokenizer.sot, *ids[: self.longest_text], tokenizer.eot] for ids in tokenizer.encode_batch(texts)]
        padded = torch.zeros(len(rows), max(map(len, rows), default=2), dtype=torch.int64)
        for row, ids in zip(padded, rows, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return padded

    def _encode_texts(self, texts: list[str]) -> torch.Tensor:
        return self.module.encode_text(self.token_ids(texts).to(self.device)).cpu()

    @property
    def tokenizer_fingerprint(self) -> str:
        return self.need_tokenizer().fingerprint

    @property
    def settings(self) -> Any:
        config = self.module.config
        shortened = self.longest_text != config.language.context_length - 2
        return str(config) + (f", texts of {self.longest_text} tokens" if shortened else "")
