"""Preprocessing text-only documents beside the tokenizer alone, on one core.

Claim: at least 85 % of its speed; else the exit code is 1. It does not hold for documents of short texts (see
docs/corpus-format.md).

The texts are those of MMC4 shards (or of any JSON lines with a list "text_list"), repeated: as one text a document, and
as one text a sentence. The tokenizer starts from strings in memory, preprocessing from a JSON-lines file; they take
turns in one process, and CPU seconds are counted, so that a busy machine does not matter.

    taskset -c 0 python benchmarks/corpus_text_only.py --texts docs_shard_0_v2.jsonl [--tokenizer clip|FILE.model]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from megatron_lcl.data.preprocess import preprocess
from megatron_lcl.data.tokenizer import Tokenizer, load, train_sentencepiece

CLAIM = 0.85


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--tokenizer", help="default: both clip and a SentencePiece model trained on the texts")
    parser.add_argument("--megabytes", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sentences = [json.loads(line)["text_list"] for line in arguments.texts.read_text("utf-8").splitlines()]
    names = [arguments.tokenizer] if arguments.tokenizer else ["clip", "sentencepiece"]
    worst = 1.0
    print(f"{'tokenizer':<16}{'text':<12}{'alone, MB/s':>12}{'preprocess, MB/s':>18}{'ratio':>8}")
    for name in names:
        if name == "sentencepiece":
            tokenizer: Tokenizer = train_sentencepiece((t for d in sentences for t in d), 8192)
        else:
            tokenizer = load(name)
        for kind, documents in (("document", [["\n".join(d)] for d in sentences]), ("sentence", sentences)):
            size = sum(len(text.encode()) for document in documents for text in document) / 1e6
            repeats = max(1, round(arguments.megabytes / size))
            alone, whole = measure(tokenizer, documents * repeats, arguments.rounds)
            ratio = statistics.median(a / w for a, w in zip(alone, whole, strict=True))
            worst = min(worst, ratio)
            speeds = (size * repeats / statistics.median(times) for times in (alone, whole))
            print(f"{name:<16}{kind:<12}" + "{:>12.2f}{:>18.2f}".format(*speeds) + f"{ratio:>8.2f}")
    return int(worst < CLAIM)


def measure(tokenizer: Tokenizer, documents: list[list[str]], rounds: int) -> tuple[list[float], list[float]]:
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"items": [{"text": text} for text in document]}, ensure_ascii=False) + "\n")
        for number in range(rounds):
            start = time.process_time()
            for first in range(0, len(documents), 32):
                tokenizer.encode_batch([text for document in documents[first : first + 32] for text in document])
            alone.append(time.process_time() - start)
            start = time.process_time()
            preprocess("jsonl", source, Path(folder) / f"out-{number}", tokenizer=tokenizer)
            whole.append(time.process_time() - start)
    return alone, whole


if __name__ == "__main__":
    sys.exit(main())
