"""How full packs are: ours beside a best fit over a window of 512, and one document to a row.

Documents are resampled from real MMC4 annotations (a shard `docs_*.jsonl`; CLIP tokens, 49 patches an image, the
reference's selection), or drawn: texts of log-normal lengths (median 400, sigma 0.9) with one to six images each
("long texts"), or with an image to 130 tokens on average ("images by length"). "bound" is what the integer I allows:
all of the scarcer of the two, and its share of the other. Drift: the mean length of documents in the last tenth of
packs over that in the first, as they are filled; the pack index puts them in a random order.

Claims, else the exit code is 1: of packs of 8,192 tokens at least 98.5 % of the token slots and 98 % of the image
slots of real documents, 97 % of both of drawn ones; of 2,048 at least 96 % of both.

    python benchmarks/packing_efficiency.py docs_no_face_shard_151_v3.jsonl [--documents 1000000]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from arguments import existing_file, positive
from claims import exit_unless, exit_with

from megatron_lcl.data.corpus.tokenizer import load
from megatron_lcl.data.loading.packing import best_fit, choose_images_per_pack, max_sequences

CLAIMS = {
    ("MMC4", 2048): (0.96, 0.96),
    ("MMC4", 8192): (0.985, 0.98),
    ("long texts", 8192): (0.97, 0.97),
    ("images by length", 8192): (0.97, 0.97),
}
"""by documents and tokens of a pack: the shares of token and of image slots that are used"""


def real_sizes(annotations: Path) -> np.ndarray:
    """Tokens and images of each document that selection leaves, int32 [documents, 2]."""
    tokenizer, sizes = load("clip"), []
    for line in annotations.read_text().splitlines():
        record = json.loads(line)
        matched = {i["matched_text_index"] for i in record["image_info"] if i["matched_sim"] >= 0.24}
        num, text = min(6, len(matched)), sum(map(len, tokenizer.encode_batch(record["text_list"])))
        if num:
            sizes.append((text + num * 51 + 2, num))
    return np.array(sizes, np.int32)


def drawn_sizes(by_length: bool, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and images, int32 [documents] each, of texts of log-normal lengths."""
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(np.log(400), 0.9, documents), 20, 5000)
    images = np.clip(rng.poisson(text / 130 if by_length else np.full(documents, 2.4)) + 1, 1, 40 if by_length else 6)
    return np.minimum(text + images * 51 + 2, 8192).astype(np.int32), images.astype(np.int32)


def windowed_best_fit(tokens: np.ndarray, images: np.ndarray, capacity: int, slots: int, window: int = 512) -> int:
    """Packs needed if each takes, of the next `window` documents, the oldest and then always the best fitting one."""
    waiting, following, packs = np.arange(min(window, len(tokens))), window, 0
    while len(waiting):
        room, free, taken = capacity, slots, 0
        while len(waiting):
            left, empty = room - tokens[waiting], free - images[waiting]
            cost = left / capacity + empty / slots + 2 * np.abs(left / capacity - empty / slots)
            cost = np.where((left >= 0) & (empty >= 0), cost, np.inf)
            best = int(cost.argmin()) if taken else 0
            if np.isinf(cost[best]):
                break
            room, free, taken = int(left[best]), int(empty[best]), taken + 1
            waiting = np.delete(waiting, best)
            if following < len(tokens):
                waiting = np.append(waiting, following)
                following += 1
        packs += 1
    return packs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=existing_file)
    parser.add_argument("--documents", type=positive, default=1_000_000)
    arguments = parser.parse_args()
    real = real_sizes(arguments.annotations)
    documents = {
        "MMC4": real[np.random.default_rng(0).integers(0, len(real), arguments.documents)].T.copy(),
        "long texts": drawn_sizes(False, arguments.documents),
        "images by length": drawn_sizes(True, arguments.documents),
    }
    best_fit(*documents["long texts"], 8192, 36, 512)  # compiles
    print(f"{len(real)} real documents, {real.mean(0)[0]:.0f} tokens and {real.mean(0)[1]:.2f} images on average")
    print("documents            T    I                       documents   tokens used   image slots used   seconds")
    claims = {}
    for (kind, capacity), least in CLAIMS.items():
        tokens, images = documents[kind]
        slots = choose_images_per_pack(images.sum() / tokens.sum(), capacity)
        started = time.perf_counter()
        order, offsets = best_fit(tokens, images, capacity, slots, max_sequences(capacity))
        seconds = time.perf_counter() - started
        ours = len(offsets) - 1
        first, last = (
            tokens[part].mean() for part in (order[: offsets[ours // 10]], order[offsets[ours - ours // 10] :])
        )
        part = slice(0, min(len(tokens), 30_000))  # the peer is slow
        started = time.perf_counter()
        window = windowed_best_fit(tokens[part], images[part], capacity, slots)
        peer = time.perf_counter() - started
        bound = max(tokens.sum() / capacity, images.sum() / slots)
        rows = (
            ("ours", slice(None), ours, seconds),
            ("best fit, window of 512", part, window, peer),
            ("one document a row", slice(None), len(tokens), 0.0),
            ("bound", slice(None), bound, 0.0),
        )
        for name, some, packs, took in rows:
            share_t, share_m = tokens[some].sum() / packs / capacity, images[some].sum() / packs / slots
            num = len(tokens[some])
            if name == "ours":
                for what, share, part_of in zip(("token", "image"), (share_t, share_m), least, strict=True):
                    claims[f"{kind}, {capacity}: at least {part_of:.1%} of {what} slots"] = share >= part_of
            print(
                f"{kind:16} {capacity:5} {slots:4}  {name:24} {num:9,}  {share_t:12.2%}  {share_m:17.2%}  {took:8.2f}"
            )
        print(f"{kind:16} {capacity:5} {slots:4}  drift: {last / first:.3f}")
    exit_unless(claims)


if __name__ == "__main__":
    exit_with(main)
