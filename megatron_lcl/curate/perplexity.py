"""How surprising a text is to a causal language model that the user has, a folder in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_lcl.curate.settings import Perplexity
from megatron_lcl.errors import UserError


def perplexity_score(settings: Perplexity) -> Callable[[str], float]:
    """A function of a text: exp of the mean of -log p over its first `settings.tokens` tokens (as many as the model has
    positions for), each given those before it.

    Before them stands the tokenizer's token of a beginning; where it has none, the first token is only given. NaN where
    no token is left to predict. UserError where transformers is missing or the folder holds no such model.
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
        raise UserError(f"{folder} lacks {min(report['missing_keys'])}; transformers would make it up")
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise UserError(f"{folder}: the tokenizer has {len(tokenizer):,} tokens, the model {known:,}")
    model.eval()
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or settings.tokens + len(begin)
    most = min(settings.tokens, positions - len(begin))

    @torch.inference_mode()
    def score(text: str) -> float:
        text = text.encode(errors="replace").decode()  # surrogates that stand alone are no text to a tokenizer
        ids = begin + tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:most]
        if len(ids) < 2:
            return float("nan")
        given = torch.tensor([ids])
        logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, given[0, 1:]).double().exp())

    return score
