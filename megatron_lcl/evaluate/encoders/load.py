"""The encoder that a name stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.convert.find import find_checkpoint, known_config
from megatron_lcl.convert.load import load_model
from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.cache_folders import writable_cache
from megatron_lcl.data.corpus.files import CORPUS_MANIFEST
from megatron_lcl.data.corpus.store import is_corpus, open_corpus
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder, check_device
from megatron_lcl.evaluate.encoders.hf import HfEncoder
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.encoders.open_clip import OpenClipEncoder
from megatron_lcl.evaluate.encoders.spec import Spec, parse_spec
from megatron_lcl.evaluate.encoders.timm import TimmEncoder
from megatron_lcl.evaluate.encoders.untrained import untrained_model
from megatron_lcl.filesystem import is_file
from megatron_lcl.model.lcl import LCL


def load_encoder(spec: str | Path, tokenizer: str | Path | None = None, device: str | torch.device = "cpu") -> Encoder:
    """The encoder that `spec` names.

    `timm:NAME` (also `timm:local-dir:DIR`), `hf:DIR` or `hf:ORG/NAME` (a repository of the Hub),
    `open_clip:NAME[@PRETRAINED]` (also `open_clip:local-dir:DIR`), or the path of an LCL checkpoint, whose tokenizer is
    that of its run's corpus, or CLIP's if its vocabulary has CLIP's size, unless `tokenizer` names another. Untrained:
    `timm:NAME?pretrained=no`, `open_clip:NAME@none`, `random:CONFIG` (see `untrained_model`), each with `?seed=N`.
    Raises UserError where it does not load, or the device cannot be used.

    Of a run, the newest checkpoint is looked for once: `source` of the encoder names that one.
    """
    check_device(device)
    parsed, same = parse_spec(str(spec)), str(spec)
    if parsed.kind in _LIBRARIES:
        encoder: Encoder = _LIBRARIES[parsed.kind](parsed, device)
    elif parsed.seed is not None:
        model, config = untrained_model(parsed.name, parsed.seed)
        encoder = _ours(parsed.text, model, config, tokenizer, device)
    else:
        found = find_checkpoint(Path(spec))
        model, same = load_model(found), str(found)
        encoder = _ours(parsed.text, model, known_config(found), tokenizer, device)
    encoder.module.eval().requires_grad_(False)
    encoder.source = EncoderSource(same, None if tokenizer is None else str(tokenizer), (str(device),))
    return encoder


def _ours(
    name: str, model: LCL, config: Config | None, tokenizer: str | Path | None, device: str | torch.device
) -> OurEncoder:
    """config: of the run, if it is known."""
    longest = None if config is None else objectives.longest_text(config)
    return OurEncoder(name, model, _tokenizer(config, model, tokenizer), device, longest)


_LIBRARIES: dict[str, Callable[[Spec, str | torch.device], Encoder]] = {
    "timm": TimmEncoder,
    "hf": HfEncoder,
    "open_clip": OpenClipEncoder,
}


@dataclass(frozen=True)
class EncoderSource:
    """Makes the encoder of process i, for an evaluation by several processes."""

    spec: str
    tokenizer: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    """process i takes the i-th, round and round"""

    def __call__(self, number: int) -> Encoder:
        encoder = load_encoder(self.spec, self.tokenizer, self.devices[number % len(self.devices)])
        assert isinstance(encoder.source, EncoderSource)
        encoder.source = replace(encoder.source, devices=self.devices)  # of the checkpoint that was found
        return encoder


_CLIP_VOCABULARY = 49411


def _tokenizer(config: Config | None, model: LCL, given: str | Path | None) -> tokenizers.Tokenizer | None:
    """The one that is given, else the run's, else CLIP's where the model's vocabulary has its size.

    config: of the run, if it is known. UserError where a corpus of the run is here and has another than is given.
    """
    corpora, cache = ((), None) if config is None else (config.data.corpora, config.data.cache)
    if given is not None:
        tokenizer = tokenizers.load(given)
        for corpus in corpora:
            if is_file(Path(corpus.path) / CORPUS_MANIFEST):
                if open_corpus(corpus.path).tokenizer.fingerprint == tokenizer.fingerprint:
                    break
                raise UserError(f"{given} is another tokenizer than that of {corpus.path}, the run's corpus; omit it")
        return tokenizer
    for corpus in corpora:
        if is_corpus(corpus.path):
            return open_corpus(corpus.path, writable_cache(cache)).tokenizer
    return tokenizers.load("clip") if model.config.language.vocab_size == _CLIP_VOCABULARY else None
