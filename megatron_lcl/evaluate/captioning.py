"""Captions written by the language model itself, and how good they are (BLEU, CIDEr)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from megatron_lcl.convert.libraries import require
from megatron_lcl.data.corpus.words import spaced
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.image_set import Blob, ImageSet
from megatron_lcl.evaluate.results import Metric, Result, bootstrap
from megatron_lcl.evaluate.settings import CaptioningSettings
from megatron_lcl.evaluate.workers import map_batches
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.lcl import LCL, pack_padded

ENTIRE = "entire"
"""what NoCaps calls all domains together"""
TOKENIZATION = "13a, letters"
"""how `tokenize` splits texts; "13a", of earlier versions, took a sentence of a script without spaces for a word"""
_APOSTROPHE = re.compile(r"(?<=[^\W\d_])’(?=[^\W\d_])")


@torch.no_grad()
def generate(
    model: LCL, images: torch.Tensor, settings: CaptioningSettings, seed: int = 0, prompt: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids that follow `<sot> <soi> image <eoi>` and the prompt's ids, one list an image, without `<eot>`.

    images: [N, 3, H, W], normalized float or uint8. prompt: the ids of `settings.prompt`. Only text tokens and `<eot>`
    can come. Images are encoded once, and keys and values of the rows before are kept, so a token costs one row of each
    sequence.
    """
    special, start = model.special, _start(model, prompt)
    room = min(settings.max_tokens, model.config.language.context_length - len(start))
    device = model.pool.query.device
    generator = torch.Generator().manual_seed(seed)
    rows = _start_rows(model, start, images)
    caches = [_Cache() for _ in model.language_blocks]
    written = torch.empty(len(images), 0, dtype=torch.int64, device=device)
    finished = torch.zeros(len(images), dtype=torch.bool, device=device)
    for step in range(room):
        for block, cache in zip(model.language_blocks, caches, strict=True):
            rows = block.residual(rows, len(rows), cache.attend)
        logits = model.head.logits(rows[:, -1]).float()
        logits[:, [special.sot, special.placeholder, special.soi, special.eoi]] = -torch.inf
        chosen = _choose(logits.cpu(), settings, generator).to(device)
        chosen = torch.where(finished, special.eot, chosen)
        finished |= chosen == special.eot
        if finished.all():
            break
        written = torch.cat([written, chosen[:, None]], 1)
        if step + 1 < room:
            rows = (model.pool.embedding(chosen) + model.pool.positions[len(start) + step])[:, None]
    return [ids[: ids.index(special.eot)] if special.eot in ids else ids for ids in written.tolist()]


def _start(model: LCL, prompt: Sequence[int]) -> list[int]:
    """Token ids before a caption. UserError where they leave no room for one."""
    special, config = model.special, model.config
    start = [special.sot, special.soi, *[special.placeholder] * config.vision.num_patches, special.eoi, *prompt]
    if len(start) >= config.language.context_length:
        raise UserError(
            f"a caption's start has {len(start)} tokens, which leaves none of the model's context of "
            f"{config.language.context_length}"
            + (f"; give a prompt of fewer than its {len(prompt)} tokens" if prompt else "")
        )
    return start


def _start_rows(model: LCL, start: Sequence[int], images: torch.Tensor) -> torch.Tensor:
    """What the first language block is given for the start of every sequence: [N, S, D]."""
    device = model.pool.query.device
    tokens = torch.tensor(start, device=device).repeat(len(images), 1)
    lengths = torch.full((len(images),), len(start), device=device)
    batch = pack_padded(tokens, lengths, images.to(device), model.config)
    x = model.pool(Activations.of(batch)._replace(hidden=model.vision_tokens(images).flatten(0, 1)))
    return x.hidden[: tokens.numel()].unflatten(0, tokens.shape)


class _Cache:
    """Attention of new rows [N, S, H, K] over themselves and all rows before, whose keys and values it keeps."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def attend(self, *qkv: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        first = self.kept is None
        assert first or q.shape[2] == 1, "after the first rows they come one at a time"
        if self.kept is not None:
            k, v = torch.cat([self.kept[0], k], 2), torch.cat([self.kept[1], v], 2)
        self.kept = k, v
        return F.scaled_dot_product_attention(q, k, v, is_causal=first).transpose(1, 2)


def _choose(logits: torch.Tensor, settings: CaptioningSettings, generator: torch.Generator) -> torch.Tensor:
    if settings.top_p == 0:
        return logits.argmax(-1)
    return torch.multinomial(nucleus(logits / settings.temperature, settings.top_p), 1, generator=generator)[:, 0]


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Probabilities [N, vocabulary], zero outside the smallest set of likeliest tokens that reaches top_p."""
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def check_captioning(encoder: OurEncoder, prompt: str = "") -> None:
    """UserError where a library, the tokenizer, or room for captions in the model's context is missing."""
    _require_scorers()
    _start(encoder.module, _ids(encoder, prompt))


def _ids(encoder: OurEncoder, prompt: str) -> list[int]:
    tokenizer = encoder.need_tokenizer()
    return tokenizer.encode(prompt) if prompt else []


def caption(
    encoder: OurEncoder,
    images: Sequence[Blob],
    settings: CaptioningSettings,
    seed: int = 0,
    batch_size: int = 32,
    processes: int = 1,
    progress: bool = True,
) -> list[str]:
    """One caption an image. UserError naming an image that is broken, or where the tokenizer is not known.

    images: `FileBlob(path)`, or others with a name and a `read` that gives encoded bytes. seed: of nucleus sampling.
    processes: more than one need an encoder of `load_encoder`, which each of them loads. progress: a bar on stderr.

    The number of processes changes neither batches nor draws, but the threads that each has, and so the last bits of
    logits: where two tokens are as likely, a caption may be another one.
    """
    write = partial(_write, settings, seed, tuple(_ids(encoder, settings.prompt)))
    batches = map_batches(encoder, images, write, batch_size, processes, "captions", progress)
    return [text for texts in batches for text in texts]


def _write(
    settings: CaptioningSettings, seed: int, prompt: Sequence[int], encoder: Encoder, first: int, images: torch.Tensor
) -> list[str]:
    assert isinstance(encoder, OurEncoder)
    tokenizer = encoder.need_tokenizer()
    written = generate(encoder.module, images.to(encoder.device), settings, _seed_of(seed, first), prompt)
    return [tokenizer.decode(row).strip() for row in written]


def _seed_of(seed: int, first: int) -> int:
    """Of the draws of the batch that begins with this image: no two batches of any seeds have the same."""
    return int(np.random.SeedSequence([seed, first]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def captioning(
    encoder: OurEncoder,
    data: ImageSet,
    settings: CaptioningSettings,
    seed: int = 0,
    batch_size: int = 32,
    processes: int = 1,
    progress: bool = True,
) -> tuple[Result, list[str]]:
    """BLEU-4 and CIDEr of the model's captions against the data's, and a caption for each of the data's images.

    Images with the same bytes are one image, to which all their captions belong: it is captioned, and counts, once.
    Of data with domains (NoCaps) also those of each domain, as if its images were all there are.
    """
    _, firsts = np.unique(data.numbers, return_index=True)
    references: list[list[str]] = [[] for _ in firsts]
    for number, several in zip(data.numbers, data.need_captions(), strict=True):
        references[number] += several
    images = [data.images[i] for i in firsts]
    written = caption(encoder, images, settings, seed, batch_size, processes, progress)
    copies = len(data) - len(firsts)
    recorded = {**asdict(settings), "seed": seed, "tokenization": TOKENIZATION, "image copies": copies}
    metrics = caption_metrics(written, references, seed)
    if data.domains is not None:
        domains = [data.domains[i] for i in firsts]
        metrics = {f"{name}, {ENTIRE}": metric for name, metric in metrics.items()}
        for domain in sorted(set(domains)):
            own = [i for i, other in enumerate(domains) if other == domain]
            of_domain = caption_metrics([written[i] for i in own], [references[i] for i in own], seed)
            metrics |= {f"{name}, {domain}": metric for name, metric in of_domain.items()}
    result = Result("captioning", encoder.name, data.name, len(firsts), metrics, recorded)
    return result, [written[number] for number in data.numbers]


def _require_scorers() -> None:
    for library in ("pycocoevalcap", "sacrebleu"):
        require(library, "captioning")


def caption_metrics(written: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0) -> dict[str, Metric]:
    """BLEU-4 (corpus level, with an interval by resampling images) and CIDEr (mean over images), by pycocoevalcap.

    Both compare the words of `tokenize`.
    """
    _require_scorers()
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    pairs = list(zip(tokenize(written), map(tokenize, references), strict=True))
    cider = CiderScorer()
    for hypothesis, several in pairs:
        cider.cook_append(hypothesis, several)
    per_image = np.asarray(cider.compute_score()[1])

    def bleu4(chosen: Sequence[int]) -> float:
        scorer = BleuScorer(n=4)
        scorer.crefs, scorer.ctest = [cooked.crefs[i] for i in chosen], [cooked.ctest[i] for i in chosen]
        return scorer.compute_score(option="closest", verbose=0)[0][3]

    cooked = BleuScorer(n=4)
    for hypothesis, several in pairs:
        cooked += (hypothesis, several)
    generator = np.random.default_rng(seed)
    n = len(pairs)
    resampled = [bleu4(generator.integers(n, size=n).tolist()) for _ in range(_BLEU_RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"BLEU-4": Metric(bleu4(range(n)), float(low), float(high)), "CIDEr": bootstrap(per_image, seed)}


_BLEU_RESAMPLES = 200


def tokenize(texts: Sequence[str]) -> list[str]:
    """Lower-case words with a space between: mteval's 13a tokenization by sacrebleu, without punctuation.

    In place of the Penn Treebank tokenizer of the COCO script, which needs Java and drops punctuation, too. A letter of
    a script that is written without spaces between words (Chinese, Japanese, Thai …) is a word, as 13a would take a
    sentence for one.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = Tokenizer13a()
    lines = (_by_letters(text.lower()) for text in texts)
    return [" ".join(w for w in split(line).split() if any(c.isalnum() for c in w)) for line in lines]


def _by_letters(text: str) -> str:
    """`spaced`, and the punctuation of such a text, of which 13a knows ASCII's alone, as spaces, but for apostrophes in
    words. A text without such letters is returned as it is."""
    if (apart := spaced(text)) == text:
        return text
    kept = {found.start() for found in _APOSTROPHE.finditer(apart)}
    return "".join(
        " " if not c.isascii() and at not in kept and _is_between_words(c) else c for at, c in enumerate(apart)
    )


def _is_between_words(character: str) -> bool:
    """Punctuation, a symbol, or the space of no width that Thai, Khmer and Burmese texts have between words."""
    return unicodedata.category(character)[0] in "PS" or character == "\u200b"
