"""A tiny corpus, through the generic importer."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

from PIL import Image

WORDS = """
a red round stone lies under the green tree while water runs past an old mill and birds sing of rain
""".split()  # noqa: SIM905


def make_corpus(folder: Path, seed: int, tokenizer: Path | None = None) -> Path:
    """A corpus of 24 documents, some without images; with the tokenizer of another corpus, or one of its own."""
    from megatron_lcl.data.prepare.preprocess import preprocess

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    documents = []
    for d in range(24):
        items: list[dict[str, str]] = []
        for i in range(rng.randint(1, 3)):
            items.append({"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 20)))})
            if d % 4:
                buffer = io.BytesIO()
                Image.frombytes("RGB", (24, 20), rng.randbytes(24 * 20 * 3)).save(buffer, "PNG")
                (folder / f"{d}-{i}.png").write_bytes(buffer.getvalue())
                items.append({"image": f"{d}-{i}.png"})
        documents.append(json.dumps({"items": items}))
    (folder / "documents.jsonl").write_text("\n".join(documents))
    file = str(tokenizer / "tokenizer.model") if tokenizer else None
    preprocess("jsonl", folder / "documents.jsonl", folder / "corpus", images=folder, tokenizer=file, vocab_size=400)
    return folder / "corpus"
