"""What benchmarks/train_step.py compares: documents counted alike, and open_clip on the pairs of our own step."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lcl import config as configs
from megatron_lcl.data.loading import loader as loading

ROOT = Path(__file__).parents[2]
WORDS = ["maps", "two", "quiet", "windows", "where", "rain", "fell", "on", "paper", "boats", "and", "bright", "stones"]


def write_shard(file: Path) -> list[str]:
    """A shard of MMC4: four documents of three texts and two images; the texts."""
    draw, lines, texts = random.Random(0), [], []
    for number in range(4):
        own = [" ".join(draw.choices(WORDS, k=120)) for _ in range(3)]
        images = [{"image_name": f"{number}-{i}.jpg", "matched_text_index": i, "matched_sim": 0.9} for i in range(2)]
        facts = {"text_list": own, "image_info": images, "similarity_matrix": [[0.1] * 3] * 2}
        lines.append(json.dumps(facts))
        texts += own
    file.write_text("\n".join(lines) + "\n")
    return texts


@pytest.fixture(scope="module")
def ways() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setattr(found := importlib.import_module("train_step_ways"), "num_workers", lambda has_gpu: 0)
        yield found


@pytest.fixture(scope="module")
def arguments(ways: Any, tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    """Of the program, on a corpus of 12 documents: the shard's, three times."""
    work = tmp_path_factory.mktemp("work")
    write_shard(work / "shard.jsonl")
    importlib.import_module("train_step").make_corpus(work / "shard.jsonl", work, 12)
    return argparse.Namespace(work=work, model="b32", depth=1, packs=1, repeats=1)


@pytest.mark.slow  # imports open_clip
@pytest.mark.parametrize("objective", ["clip", "coca"])
def test_open_clip_trains_on_the_pairs_of_our_own_steps(
    ways: Any, arguments: argparse.Namespace, tmp_path: Path, objective: str
) -> None:
    tokenize = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")
    texts = write_shard(tmp_path / "again.jsonl")
    length = 77 if objective == "clip" else 76
    known = {tuple(row.tolist()) for row in tokenize(texts, context_length=length)}
    batches = ways.open_clip_batches(arguments, objective, "float32", torch.device("cpu"))
    ours = list(itertools.islice(ways.loader_for(ways.config_of(arguments, objective, "float32")), len(batches)))
    assert len(batches) == arguments.repeats + 2
    for (pixels, rows, tokens), pack in zip(batches, ours, strict=True):
        assert len(pixels) == len(rows) == pack.num_images == pack.num_pairs > 0
        assert torch.equal(pixels, pack.images[pack.image_valid == 1])
        assert {tuple(row.tolist()) for row in rows} <= known
        of_caption = pack.num_images * (pack.num_patches + 2) if objective == "coca" else 0
        assert pack.num_tokens == tokens * (1 + (objective == "coca")) + of_caption


@pytest.mark.parametrize("has_gpu", [False, True])
def test_beside_a_gpu_images_are_read_into_page_locked_memory(
    ways: Any, arguments: argparse.Namespace, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a run; copies from other memory are waited for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(loading, "loader_of", lambda *_, **options: options)
    assert ways.loader_for(ways.config_of(arguments, "lcl", "float32"))["pin_memory"] is has_gpu


def test_a_divided_document_counts_once_and_is_one_row_of_the_reference(
    ways: Any, arguments: argparse.Namespace
) -> None:
    config = ways.config_of(arguments, "lcl", "float32")
    short = configs.replace(config, model__language__context_length=256)
    loader = ways.loader_for(short)
    packs = list(itertools.islice(loader, 1))
    origins = [origin for pack in packs for n in pack.packs for origin in loader.reader.provenance(n)]
    assert len(origins) > 12
    assert ways.num_documents(origins) == len({(origin.epoch, origin.document) for origin in origins}) == 12

    rows, mask = next(ways.padded_rows(ways.loader_for(config), 256))
    assert mask.shape == (ways.ROWS, 1, 256, 256)
    assert rows.num_tokens <= ways.ROWS * 256
    assert rows.tokens.view(ways.ROWS, 256)[:, 0].eq(rows.tokens[0]).all()  # each begins with <sot>
    assert rows.num_images == len(rows.images) == len(rows.image_start)


def test_a_document_is_cut_before_the_image_that_crosses_the_end_of_its_row(ways: Any) -> None:
    tokens = torch.arange(40, dtype=torch.int32)
    pack = SimpleNamespace(
        tokens=tokens,
        targets=tokens + 1,
        images=torch.arange(3).view(3, 1, 1, 1),
        image_start=torch.tensor([13, 25, -1]),  # <soi> at 12 and 24, four patches, <eoi> at 17 and 29
        image_soi=torch.tensor([12, 24, -1]),
        num_patches=4,
    )
    cut = ways.document_of(pack, 10, 40, 16)
    assert cut["tokens"].tolist() == list(range(10, 24))
    assert cut["targets"].tolist() == [*range(11, 24), -1]
    assert (cut["images"].flatten().tolist(), cut["start"].tolist(), cut["soi"].tolist()) == ([0], [3], [2])
    whole = ways.document_of(pack, 10, 40, 20)
    assert len(whole["tokens"]) == 20
    assert whole["start"].tolist() == [3, 15]
