"""Preprocessing text-only documents beside the tokenizer alone, on one core.

Claim: at least 85 % of its speed; else the exit code is 1.

The texts are those of MMC4 shards (or of any JSON lines with a list "text_list"), repeated: as one text a document, and
as one text a sentence. The tokenizer starts from strings in memory (each a string of its own, new in every round, as a
corpus meets its texts once), preprocessing from a JSON-lines file. "Least" is what has to be done in between: read the
lines, parse them, give their texts to the tokenizer, write the ids as the format has them, with an index and a
checksum, durably; no text is checked, no document counted or compared. The three take turns in one process, and CPU
seconds are counted, so that a busy machine does not matter much.

    taskset -c 0 python benchmarks/corpus_text_only.py --texts docs_shard_0_v2.jsonl [--tokenizer clip|FILE.model]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from arguments import existing_file, positive
from claims import exit_with

from megatron_lcl.data.corpus.document import Text
from megatron_lcl.data.corpus.indexed import IndexedWriter
from megatron_lcl.data.corpus.tokenizer import Tokenizer, load
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece

CLAIM = 0.85


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=existing_file, required=True)
    parser.add_argument("--tokenizer", help="default: both clip and a SentencePiece model trained on the texts")
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=positive, default=7)
    arguments = parser.parse_args()
    sentences = [json.loads(line)["text_list"] for line in arguments.texts.read_text("utf-8").splitlines()]
    names = [arguments.tokenizer] if arguments.tokenizer else ["clip", "sentencepiece"]
    worst = 1.0
    print(f"{'':28}{'MB/s':>18}{'of alone':>25}")
    print(f"{'tokenizer':<16}{'text':<12}{'alone':>8}{'least':>10}{'preprocess':>13}{'least':>8}{'preprocess':>13}")
    for name in names:
        if name == "sentencepiece":
            tokenizer: Tokenizer = train_sentencepiece((t for d in sentences for t in d), 8192)
        else:
            tokenizer = load(name)
        for kind, documents in (("document", [["\n".join(d)] for d in sentences]), ("sentence", sentences)):
            size = sum(len(text.encode()) for document in documents for text in document) / 1e6
            repeats = max(1, round(arguments.megabytes / size))
            times = measure(tokenizer, documents * repeats, arguments.rounds)
            _, least, whole = (statistics.median(times[0][k] / t[k] for k in range(arguments.rounds)) for t in times)
            worst = min(worst, whole)
            speeds = "{:>8.2f}{:>10.2f}{:>13.2f}".format(*(size * repeats / statistics.median(t) for t in times))
            print(f"{name:<16}{kind:<12}{speeds}{least:>8.2f}{whole:>13.2f}", flush=True)
    return int(worst < CLAIM)


class Line(msgspec.Struct):
    items: list[Text]


def least(source: Path, output: Path, tokenizer: Tokenizer) -> None:
    decode, encode = msgspec.json.Decoder(Line).decode, tokenizer.joined_encoder()
    writer = IndexedWriter(output, np.int32)
    texts: list[str] = []
    with open(source, "rb") as lines:
        for line in itertools.chain(lines, [b""]):
            if line:
                texts += [text.text for text in decode(line).items]
            if len(texts) >= 256 or not line:
                writer.add_run(*encode(texts), 0)
                texts = []
    writer.finish()


def measure(tokenizer: Tokenizer, documents: list[list[str]], rounds: int) -> tuple[list[float], ...]:
    """CPU seconds of each round: the tokenizer alone, the least that has to be done, preprocessing."""
    times: tuple[list[float], ...] = ([], [], [])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.jsonl"
        with open(source, "w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({"items": [{"text": text} for text in document]}, ensure_ascii=False) + "\n")

        def alone(number: int) -> None:
            for first in range(0, len(documents), 32):
                tokenizer.encode_batch([text for document in documents[first : first + 32] for text in document])

        candidates: tuple[Callable[[int], object], ...] = (
            alone,
            lambda number: least(source, Path(folder) / "least", tokenizer),
            lambda number: preprocess("jsonl", source, Path(folder) / f"out-{number}", tokenizer=tokenizer),
        )
        for number in range(rounds):
            documents = json.loads(json.dumps(documents))  # not in the caches, and not yet asked for their UTF-8
            for seconds, function in zip(times, candidates, strict=True):
                start = time.process_time()
                function(number)
                seconds.append(time.process_time() - start)
    return times


if __name__ == "__main__":
    exit_with(main)
