"""How surprising texts are to a causal language model that the user has, a folder in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_lcl.curate.settings import Perplexity
from megatron_lcl.curate.threads import one_thread
from megatron_lcl.errors import UserError

LOGITS = 1 << 26
"""numbers that the model gives for the texts of a batch at most (268 MB), but for a single text"""


def perplexity_scores(settings: Perplexity) -> Callable[[Sequence[str]], list[float]]:
    """A function of texts, for each: exp of the mean of -log p over its first `settings.tokens` tokens (as many as the
    model has positions for), each given those before it.

    Before them stands the tokenizer's token of a beginning; where it has none, the first token is only given. NaN where
    no token is left to predict. Texts of like length go through the model together, padded at their ends, which a
    causal model does not see before them. UserError where transformers is missing or the folder holds no such model.
    """
    assert settings.model is not None  # a rule without one is refused
    from megatron_lcl.convert.libraries import require
    from megatron_lcl.evaluate.encoders.encoder import loading  # imports torch

    folder = settings.model
    require("transformers", f"perplexity.model {folder}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading(folder, "Hugging Face"):
        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        library: Any = AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model, report = library.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    if report["missing_keys"]:
        raise UserError(f"{folder} lacks {min(report['missing_keys'])}; transformers would initialize it at random")
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer):,} tokens, the model {known:,}")
    model.eval()
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.tokens + len(begin)
    most = min(settings.tokens, positions - len(begin))

    def read(text: str) -> list[int]:
        text = text.encode(errors="replace").decode()  # surrogates that stand alone are no text to a tokenizer
        return begin + tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:most]

    @one_thread()
    @torch.inference_mode()
    def scores(texts: Sequence[str]) -> list[float]:
        found, ids = [float("nan")] * len(texts), list(map(read, texts))
        for batch in _batches(list(map(len, ids)), LOGITS // known):
            longest = max(len(ids[k]) for k in batch)
            given = torch.tensor([ids[k] + [0] * (longest - len(ids[k])) for k in batch])
            mask = torch.tensor([[1] * len(ids[k]) + [0] * (longest - len(ids[k])) for k in batch])
            logits = model(input_ids=given, attention_mask=mask, use_cache=False).logits
            for row, k in enumerate(batch):
                of_text = logits[row, : len(ids[k]) - 1].float()
                loss = torch.nn.functional.cross_entropy(of_text, given[row, 1 : len(ids[k])])
                found[k] = float(loss.double().exp())
        return found

    return scores


def _batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of texts of two tokens or more, by length, in batches of up to `most` tokens with the padding."""
    batch: list[int] = []
    for k in sorted((k for k, length in enumerate(lengths) if length > 1), key=lambda k: lengths[k]):
        if batch and (len(batch) + 1) * lengths[k] > most:
            yield batch
            batch = []
        batch.append(k)
    if batch:
        yield batch
