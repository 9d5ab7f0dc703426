"""`curate` by the rules of OBELICS: documents and megabytes a second of CPU, by their number; beside datatrove and NeMo
Curator.

    python benchmarks/curate.py [--documents 1000 10000] [--text-documents 1000 10000] [--datatrove PYTHON]
                                [--nemo-curator PYTHON] [--repeats 3]
    python benchmarks/curate.py --language all four [MODEL …]

A document has six paragraphs of about 55 words, every tenth of which some rule removes; with images each has three
JPEGs of 224 pixels, one in twenty of them in more than ten places. The rule of language, `document.min_language`, is
off. Megabytes are those of token ids and images. CPU time is that of one process without its imports, which are printed
as `start`; the peak of memory is with them, without the pages of the corpus that it maps. The claims: documents a
second do not fall with their number, memory does not grow with it (`claims.flat`); else the exit code is 1.

datatrove reads JSON lines of the same texts, applies its rules of the same kind (repetition of characters, words and
n-grams, number of words, special characters, stop words: Gopher's) to whole documents, and writes JSON lines; it is
given no images, and does not split documents into paragraphs. NeMo Curator has the same rules of Gopher's on the same
files; its stage is called in one process, 1,000 documents at a time, without Ray. PYTHON: of an environment that has
`datatrove[io]` and `spacy`, which splits its words, or `nemo-curator[text-cpu]`.

--language, instead: CPU time of the rule of language alone, for a document of 1,000 characters (pieces of this
project's documentation): by lingua among all its languages or among four, or by a fastText model, a file such as
lid.176.bin.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from arguments import interpreter
from claims import exit_unless, exit_with, flat
from measuring import resident, versions
from PIL import Image as Pillow

from megatron_lcl.curate.languages import language_score
from megatron_lcl.curate.settings import Language

ROOT = Path(__file__).parents[1]
WORDS_A_PARAGRAPH, PARAGRAPHS, IMAGES = (30, 80), 6, 3
LANGUAGE_DOCUMENTS = 200
STOP = "the of and to in is that it was for on are as with his they at be this from have or by one had not".split()  # noqa: SIM905
OURS = """
import sys
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import read_settings
if len(sys.argv) > 1:
    found = curate(sys.argv[1], sys.argv[2], read_settings("obelics", overrides={"document.min_language": "null",
        "document.min_images": "0"}))
    print(found.after["documents"], file=sys.stderr)
"""
PEER = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
if __name__ == "__main__" and len(sys.argv) > 1:
    LocalPipelineExecutor([
        JsonlReader(sys.argv[1]), GopherRepetitionFilter(), GopherQualityFilter(),
        JsonlWriter(sys.argv[2], compression=None),
    ], logging_dir=sys.argv[2] + "-logs").run()
"""
NEMO = """
import sys
from pathlib import Path
import pandas as pd
from nemo_curator.stages.text.filters import ScoreFilter
from nemo_curator.stages.text.filters.heuristic import repetition, string
from nemo_curator.tasks import DocumentBatch
if len(sys.argv) > 1:
    rules = [repetition.RepeatedLinesFilter(), repetition.RepeatedParagraphsFilter()]
    rules += [repetition.RepeatedLinesByCharFilter(), repetition.RepeatedParagraphsByCharFilter()]
    rules += [repetition.RepeatingTopNGramsFilter(n=n, max_repeating_ngram_ratio=r)
        for n, r in ((2, 0.2), (3, 0.18), (4, 0.16))]
    rules += [repetition.RepeatingDuplicateNGramsFilter(n=n, max_repeating_duplicate_ngram_ratio=r)
        for n, r in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))]
    rules += [string.WordCountFilter(), string.MeanWordLengthFilter(), string.SymbolsToWordsFilter()]
    rules += [string.BulletsFilter(), string.EllipsisFilter(), string.WordsWithoutAlphabetsFilter()]
    rules += [string.CommonEnglishWordsFilter()]
    stage, kept = ScoreFilter(rules), 0
    stage.setup(None)
    Path(sys.argv[2]).mkdir()
    for file in sorted(Path(sys.argv[1]).iterdir()):
        for number, part in enumerate(pd.read_json(file, lines=True, chunksize=1000)):
            left = stage.process(DocumentBatch(dataset_name="texts", data=part))
            if left is not None:
                kept += len(left.data)
                left.data.to_json(f"{sys.argv[2]}/{number}.jsonl", lines=True, orient="records", force_ascii=False)
    print(kept, file=sys.stderr)
"""


def paragraphs(rng: random.Random, words: list[str]) -> Iterator[str]:
    for _ in range(PARAGRAPHS):
        count = rng.randint(*WORDS_A_PARAGRAPH)
        said = [rng.choice(STOP) if rng.random() < 0.45 else rng.choice(words) for _ in range(count)]
        for last in range(8, count, 8):  # a comma or a full stop every eight words
            said[last] += rng.choice(",.")
        if rng.random() < 0.1:
            said = [said[0], "***", "12345", "$$$"] * (count // 4)
        yield " ".join(said) + "."


def jpeg(seed: int, side: int = 224) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).resize((side, side)).save(out, "JPEG", quality=85)
    return out.getvalue()


def write(folder: Path, num: int, images: bool) -> float:
    """A corpus, and for datatrove its texts as JSON lines; returns the corpus's megabytes."""
    from megatron_lcl.data.corpus.corpus_manifest import total, write_manifest
    from megatron_lcl.data.corpus.drops import Drops
    from megatron_lcl.data.corpus.store import ShardWriter
    from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece

    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlcumwfgypbvk", k=rng.randint(2, 9))) for _ in range(5000)]
    tokenizer = train_sentencepiece([" ".join(paragraphs(random.Random(k), words)) for k in range(200)], 4096)
    encode, pictures = tokenizer.joined_encoder(), [jpeg(seed) for seed in range(16)]
    (folder / "corpus").mkdir(parents=True)
    (folder / "json").mkdir()
    writer = ShardWriter(folder / "corpus", 0)
    with open(folder / "json" / "a.jsonl", "w") as file:
        for number in range(num):
            texts = list(paragraphs(rng, words))
            file.write(json.dumps({"text": "\n\n".join(texts), "id": str(number)}) + "\n")
            ids, lengths = encode(texts)
            start = 0
            for k, length in enumerate(lengths):
                writer.add_texts([ids[start : start + 4 * length]])
                start += 4 * length
                if images and k < IMAGES:
                    picture = pictures[rng.randrange(16)]
                    if rng.random() > 0.05:  # a comment makes its bytes its own
                        own = number.to_bytes(4, "big") + bytes([k])
                        picture = picture[:2] + b"\xff\xfe\x00\x07" + own + picture[2:]
                    writer.add_image(picture, 224, 224, "JPEG")
            writer.end_document(f"a.jsonl@{number}")
    files, counts = writer.finish()
    tokenizer.save(folder / "corpus" / tokenizer.file_name)
    shards = [{**counts, "kind": "natural"}]
    named = {"file": tokenizer.file_name, "fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size}
    manifest = {"format_version": 1, "source": {"format": "jsonl"}, "tokenizer": named, "counts": total(shards)}
    write_manifest(folder / "corpus", {**manifest, "drops": Drops().to_dict(), "shards": shards, "files": files})
    return (4 * counts["tokens"] + counts["image_bytes"]) / 1e6


def measured(command: list[str]) -> tuple[float, float]:
    """(CPU seconds with those of what it starts, peak of private memory in MiB) of a command."""
    peak = 0.0
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=said, stderr=said)
        pid = 0
        while pid == 0:
            peak = max(peak, resident("RssAnon", process.pid))  # until wait4 has it, there is such a process
            time.sleep(0.05)
            pid, code, used = os.wait4(process.pid, os.WNOHANG)
        if code:
            said.seek(0)
            sys.exit(said.read().decode()[-3000:])
    return used.ru_utime + used.ru_stime, peak


def rates(
    name: str, command: list[str], outputs: Path, inputs: str, num: int, megabytes: float, repeats: int
) -> tuple[float, float]:
    """Print a line; returns documents a second of CPU, the median, and the peak of memory in MiB."""
    start, _ = measured(command)
    runs = [measured([*command, inputs, str(outputs / f"{name}-{k}")]) for k in range(repeats)]
    seconds = statistics.median(seconds for seconds, _ in runs) - start
    peak = max(peak for _, peak in runs)
    print(
        f"{num:>9,}  {name:<22}{num / seconds:>12,.0f}/s{megabytes / seconds:>10,.1f} MB/s{peak:>9,.0f} MiB"
        f"   start {start:.1f} s", flush=True,
    )  # fmt: skip
    return num / seconds, peak


def pieces(characters: int) -> list[str]:
    """Of the documentation, each so long."""
    text = "\n".join(file.read_text() for file in sorted((ROOT / "docs").glob("*.md")))
    return [text[start : start + characters] for start in range(0, len(text) - characters, characters)]


def language(named: str, repeats: int) -> None:
    """Print the time of the rule: `all`, `four`, or the file of a fastText model."""
    among = ("de", "fr", "es") if named == "four" else ()
    settings = Language(model=None if named in ("all", "four") else named, among=among)
    score, documents = language_score(settings), pieces(settings.characters)[:LANGUAGE_DOCUMENTS]
    english = sum(score(document) >= 0.8 for document in documents)  # it also loads what it needs
    runs = []
    for _ in range(repeats):
        began = time.process_time()
        for document in documents:
            score(document)
        runs.append((time.process_time() - began) / len(documents))
    seconds = statistics.median(runs)
    print(
        f"{named:<24}{1e3 * seconds:>8.3f} ms{1 / seconds:>10,.0f} documents/s   "
        f"{english} of {len(documents)} are English", flush=True,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="*", default=[1000, 10_000], help="with images")
    parser.add_argument("--text-documents", type=int, nargs="*", default=[1000, 10_000], help="of text only")
    parser.add_argument("--datatrove", type=interpreter, metavar="PYTHON")
    parser.add_argument("--nemo-curator", type=interpreter, metavar="PYTHON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--language", nargs="+", metavar="all | four | MODEL", help="the rule of language alone")
    options = parser.parse_args()
    if options.language:
        for named in options.language:
            language(named, options.repeats)
        return
    claims: dict[str, bool] = {}
    for package, python in (("datatrove", options.datatrove), ("nemo_curator", options.nemo_curator)):
        if python:
            print(versions(package, python=python))
    print("documents                        documents a second of CPU, MB, peak of memory")
    for images, sizes in ((True, options.documents), (False, options.text_documents)):
        found = {}
        name = "ours, with images" if images else "ours, text only"
        for num in sizes:
            with tempfile.TemporaryDirectory() as folder:
                root = Path(folder)
                megabytes = write(root, num, images)
                found[num] = ours, _ = rates(
                    name, [sys.executable, "-c", OURS], root, str(root / "corpus"), num, megabytes, options.repeats
                )
                peers = (("datatrove", options.datatrove, PEER), ("NeMo Curator", options.nemo_curator, NEMO))
                for peer, python, program in peers:
                    if python and not images:
                        (root / "peer.py").write_text(program)
                        command = [python, str(root / "peer.py")]
                        theirs, _ = rates(peer, command, root, str(root / "json"), num, megabytes, options.repeats)
                        print(f"{'':>11}ours / {peer}: {ours / theirs:.2f}", flush=True)
        claims |= flat(name, found)
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
