"""The two things LCL trains, measured on documents that it has not seen: the contrast and the generation.

Every document of a held-out corpus once, in order, without augmentation. Retrieval: each image's latent z against the
context features of all held-out pairs; the true one is the context read at the image's own `<soi>`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from megatron_lcl.config import Config, Corpus, replace
from megatron_lcl.convert.load import find_checkpoint, load_model, read_config
from megatron_lcl.data.batch import PackedBatch
from megatron_lcl.data.loader import PackedLoader
from megatron_lcl.data.store import open_corpus
from megatron_lcl.data.tokenizer import Tokenizer
from megatron_lcl.model.lcl import LCL

RESULT, EXAMPLES = "heldout.json", "heldout_examples.json"
CONTEXT_CHARACTERS = 400


@dataclass(frozen=True)
class Pair:
    """One image of the held-out corpus and the text before it in its sequence."""

    document: int
    shard: int
    image: int
    context: str
    """the end of it, at most CONTEXT_CHARACTERS"""


@dataclass(frozen=True)
class Example:
    """A pair with the contexts that the model finds nearest to its image."""

    pair: Pair
    rank: int
    """place of the true context, 1 is best"""
    nearest: tuple[Pair, ...]


@dataclass(frozen=True)
class HeldOut:
    """What was measured. Recalls are shares of the pairs; `chance` is what a random order gives."""

    documents: int
    pairs: int
    image_to_context_recall_at_1: float
    image_to_context_recall_at_10: float
    context_to_image_recall_at_1: float
    context_to_image_recall_at_10: float
    chance_at_1: float
    chance_at_10: float
    median_rank: float
    contrastive_loss: float
    """nats, over all held-out pairs at once"""
    targets: int
    bits_per_token: float
    """mean negative log2-likelihood of the targets (text tokens, `<soi>`, `<eot>`)"""


def evaluate_checkpoint(checkpoint: Path, corpus: Path, output: Path | None = None) -> str:
    """`evaluate_heldout` of a run or a checkpoint, on CUDA where there is one; returns the table.

    `output`: folder for the numbers and the examples as JSON, which the report shows.
    """
    folder = find_checkpoint(checkpoint)
    model = load_model(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    result, examples = evaluate_heldout(model, read_config(folder), corpus)
    if output is not None:
        write_heldout(output, result, examples)
    return table(result)


def evaluate_heldout(
    model: LCL, config: Config, corpus: str | Path, num_examples: int = 8, progress: bool = True
) -> tuple[HeldOut, list[Example]]:
    """Measure `model` on every document of `corpus`, with the sequence rules of the run's `config`."""
    device = next(model.parameters()).device
    loader, tokenizer = _loader(config, corpus), open_corpus(corpus).tokenizer
    pairs: list[Pair] = []
    image_features, text_features = [], []
    nll, num_targets, documents = 0.0, 0, set()
    model.eval()
    with torch.no_grad():
        for batch in tqdm(loader, desc="evaluate", unit="pack", disable=not progress, total=len(loader)):
            out = model.stages(batch.to(device))
            chosen = (batch.image_soi >= 0).nonzero()[:, 0]
            image_features.append(out.image_features[chosen.to(device)].cpu())
            text_features.append(out.text_features[chosen.to(device)].cpu())
            nll += float(out.generation)
            num_targets += batch.num_targets
            described = dict(_describe(batch, loader, tokenizer))
            pairs += [described[slot] for slot in chosen.tolist()]
            documents |= {o.document for pack in batch.packs for o in loader.provenance(pack)}
    if not pairs or not num_targets:
        raise ValueError(f"{corpus} has no image with text before it; there is nothing to evaluate")
    image, text = torch.cat(image_features), torch.cat(text_features)
    similarity = image @ text.t()
    forward, backward = ranks(similarity), ranks(similarity.t())
    n = len(pairs)
    logits = float(model.head.log_scale.detach().exp()) * similarity
    own = logits.diagonal()
    contrast = 0.5 * (logits.logsumexp(1) + logits.logsumexp(0) - 2 * own).mean()
    result = HeldOut(
        documents=len(documents),
        pairs=n,
        image_to_context_recall_at_1=recall(forward, 1),
        image_to_context_recall_at_10=recall(forward, 10),
        context_to_image_recall_at_1=recall(backward, 1),
        context_to_image_recall_at_10=recall(backward, 10),
        chance_at_1=min(1.0, 1 / n),
        chance_at_10=min(1.0, 10 / n),
        median_rank=float(forward.float().median()),
        contrastive_loss=float(contrast),
        targets=num_targets,
        bits_per_token=nll / num_targets / math.log(2),
    )
    return result, _examples(similarity, forward, pairs, num_examples)


def ranks(similarity: torch.Tensor) -> torch.Tensor:
    """Place [n] of each row's own column in similarity [n, n], 1 is best; a tie counts against it."""
    own = similarity.diagonal()[:, None]
    return (similarity >= own).sum(1)


def recall(ranks: torch.Tensor, k: int) -> float:
    """Share of places that are k or better."""
    return float((ranks <= k).float().mean())


def write_heldout(folder: Path, result: HeldOut, examples: list[Example]) -> None:
    """The numbers and the examples as two JSON files in `folder`, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    (folder / EXAMPLES).write_text(json.dumps([asdict(e) for e in examples]) + "\n", encoding="utf-8")


def table(result: HeldOut) -> str:
    """The numbers for a terminal."""
    rows: list[tuple[str, str]] = [
        ("documents, pairs", f"{result.documents}, {result.pairs}"),
        *(
            (f"{name} recall@{k}", f"{value:6.1%}   chance {chance:5.1%}   {value / chance:4.1f} times chance")
            for name, k, value, chance in (
                ("image → context", 1, result.image_to_context_recall_at_1, result.chance_at_1),
                ("image → context", 10, result.image_to_context_recall_at_10, result.chance_at_10),
                ("context → image", 1, result.context_to_image_recall_at_1, result.chance_at_1),
                ("context → image", 10, result.context_to_image_recall_at_10, result.chance_at_10),
            )
        ),
        ("median rank", f"{result.median_rank:.0f} of {result.pairs}"),
        ("generation", f"{result.bits_per_token:.3f} bits a token over {result.targets} targets"),
    ]
    return "\n".join(f"{name:28}{value}" for name, value in rows)


def _loader(config: Config, corpus: str | Path) -> PackedLoader:
    vision = config.model.vision
    return PackedLoader(
        replace(config, data__corpora=[asdict(Corpus(path=str(corpus)))]).data,
        num_patches=vision.num_patches,
        image_size=vision.image_size,
        context_length=config.model.language.context_length,
        global_batch=1,
        micro_batch=1,
        train=False,
        objective=config.objective.name,
    )


def _describe(batch: PackedBatch, loader: PackedLoader, tokenizer: Tokenizer) -> Iterator[tuple[int, Pair]]:
    """Image slot of the batch → what stands there."""
    places = len(batch.tokens) // len(batch.packs)
    tokens = batch.tokens.numpy()
    for b, pack in enumerate(batch.packs):
        for origin in loader.provenance(pack):
            for image in origin.images:
                before = tokens[b * places + origin.start : b * places + image.soi]
                text = tokenizer.decode(before[before < tokenizer.sot])[-CONTEXT_CHARACTERS:]
                pair = Pair(int(origin.document), int(image.shard), int(image.image), text)
                yield b * loader.images_per_pack + image.slot, pair


def _examples(similarity: torch.Tensor, place: torch.Tensor, pairs: list[Pair], count: int) -> list[Example]:
    """Examples at evenly spaced quantiles of the rank, best first: neither the best nor the worst alone."""
    order = place.argsort()
    quantiles = torch.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().long()
    return [
        Example(pairs[i], int(place[i]), tuple(pairs[j] for j in similarity[i].argsort(descending=True)[:3].tolist()))
        for i in order[quantiles].tolist()
    ]
