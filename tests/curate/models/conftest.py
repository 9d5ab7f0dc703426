"""An encoder for the rules that ask one."""

from __future__ import annotations

import pytest

from megatron_lcl import LCL
from megatron_lcl.config import Config, Language, Model, Train, Vision
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A small untrained model, and its tokenizer."""
    root = tmp_path_factory.mktemp("model")
    tokenizer = train_sentencepiece([f"a photo of a {i}" for i in range(10)] * 3, 400)
    model = LCL(Model(Vision(16, 4, 64, 1, 4, 128), Language(64, tokenizer.vocab_size, 48, 1, 4, 96), 4), seed=7)
    (root / "run").mkdir()
    save_checkpoint(model, Config(model=model.config, train=Train(seed=7)), root / "run")
    tokenizer.save(root / "words.model")
    return f"random:{root / 'run'}?seed=3", str(root / "words.model")
