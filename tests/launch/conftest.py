"""A tiny model on a tiny corpus, as arguments of `megatron-lcl train`."""

from __future__ import annotations

import pytest
from data.writers import picture, write_jsonl

from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.data.prepare.preprocess import preprocess

WORDS = "a red round stone lies under the green tree while water runs past an old mill".split()  # noqa: SIM905
TINY = """
--model.vision.image_size 16 --model.vision.patch_size 8 --model.vision.width 32 --model.vision.layers 2
--model.vision.heads 2 --model.vision.mlp_width 64 --model.language.width 32 --model.language.layers 1
--model.language.heads 2 --model.language.mlp_width 64 --model.language.context_length 64 --model.pool_heads 2
--data.tokens_per_pack 96 --data.images_per_pack 4 --data.workers 1 --optimizer.lr 1e-2 --optimizer.warmup 1
--parallel.tensor 1 --train.global_batch 8 --train.measure_kernels false --train.log_every 1
""".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of any config; paths with a space."""
    folder = tmp_path_factory.mktemp("tiny corpus")
    words = [" ".join(WORDS[i % 9 : i % 9 + 6]) for i in range(40)]
    write_jsonl([Document((Text(text), Image(picture(i)), Text(text))) for i, text in enumerate(words)], folder / "in")
    vocab_size = preprocess("jsonl", folder / "in", folder / "corpus", vocab_size=400).vocab_size
    places = ["--data.corpora", str(folder / "corpus"), "--data.cache", str(folder / "cache")]
    return [*TINY, *places, "--model.language.vocab_size", str(vocab_size)]
