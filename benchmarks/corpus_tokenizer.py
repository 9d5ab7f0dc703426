"""CLIP byte-pair encoding beside open_clip's Python tokenizer. Claim: the same ids, at least twice its warm speed; else
the exit code is 1.

python benchmarks/corpus_tokenizer.py --texts docs_shard_0_v2.jsonl        (JSON lines with a list "text_list")
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from arguments import existing_file, positive
from claims import exit_unless, exit_with
from measuring import versions

from megatron_lcl.data.corpus.tokenizer import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=existing_file, required=True)
    parser.add_argument("--rounds", type=positive, default=9)
    arguments = parser.parse_args()
    from open_clip.tokenizer import SimpleTokenizer

    lines = arguments.texts.read_text("utf-8").splitlines()
    texts = [text for line in lines for text in json.loads(line)["text_list"]]
    size = sum(len(text.encode()) for text in texts) / 1e6
    reference, ours = SimpleTokenizer(), load("clip")
    same = [reference.encode(text) for text in texts] == ours.encode_batch(texts)  # and warms both
    times: dict[str, list[float]] = {"open_clip": [], "megatron_lcl": []}
    for _ in range(arguments.rounds):
        for name, run in (
            ("open_clip", lambda: [reference.encode(text) for text in texts]),
            ("megatron_lcl", lambda: ours.encode_batch(texts)),
        ):
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    print(f"{len(texts):,} texts, {size:.2f} MB; same ids: {same}; medians of {arguments.rounds} rounds, CPU seconds")
    print(versions("tokenizers", "open_clip_torch"))
    for name, values in times.items():
        print(f"{name:<14}{size / statistics.median(values):>8.2f} MB/s")
    pairs = zip(times["open_clip"], times["megatron_lcl"], strict=True)
    ratio = statistics.median(theirs / mine for theirs, mine in pairs)
    print(f"{'ratio':<14}{ratio:>8.2f}")
    exit_unless({"the same ids": same, "at least twice the speed": ratio >= 2})


if __name__ == "__main__":
    exit_with(main)
