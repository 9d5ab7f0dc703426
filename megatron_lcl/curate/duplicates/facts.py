"""What of documents and images decides whether there is another like them: plain functions of a task, for any worker.

Each returns arrays, and `corpus`, its address, by which a join names what it matched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import xxhash
from PIL import Image as Pillow

from megatron_lcl.curate.documents import NOTHING, Gone, Range, address, places
from megatron_lcl.curate.duplicates.minhash import shingle_hashes, signature, word_hashes
from megatron_lcl.curate.duplicates.settings import DocumentDuplicates, ImageDuplicates
from megatron_lcl.data.corpus.document import CAPTIONED
from megatron_lcl.data.corpus.perceptual_hash import perceptual_hash
from megatron_lcl.data.corpus.probe import BadImage
from megatron_lcl.data.corpus.rgb import decode_rgb
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus

THUMBNAIL = 128
"""pixels a side of the gray picture, stretched to a square, that everything is computed from"""
Facts = dict[str, np.ndarray]


def document_facts(corpus: Corpus, task: Range, settings: DocumentDuplicates, gone: Gone = NOTHING) -> Facts:
    """Of the N documents of a range that have items beside those that are gone:

    document int64 [N], its number in the corpus; digest uint32 [N, 4], XXH3-128 of its texts and its images' bytes in
    their order; signature uint32 [N, permutations] and shingles int32 [N], how many it has (see `minhash`; neither
    where the threshold is null). UserError where the shard is not readable.
    Of pairs and captions a shingle is words and the image: many images have the same short caption, so that documents
    of different images have none in common, and those of one image as many as their texts.
    """
    part, start = corpus.shard(task.shard), int(corpus.document_starts[task.shard])
    sizes = np.diff(part.document_offsets[task.first : task.last + 1])
    left = [n for n, size in enumerate(sizes.tolist(), task.first) if size > len(gone.get(start + n, ()))]
    digests = np.empty((len(left), 4), np.uint32)
    signatures = np.empty((len(left), settings.permutations if settings.threshold is not None else 0), np.uint32)
    counts = np.zeros(len(left), np.int32)
    captioned = settings.threshold is not None and corpus.kinds[task.shard] in CAPTIONED
    for k, document in enumerate(left):
        digest, texts, images = xxhash.xxh3_128(), [], b""
        for piece in _pieces(part, document, gone.get(start + document, ())):
            if isinstance(piece, int):
                image = part.image_xxh3[piece].tobytes()
                digest.update(b"\1" + image)
                images += image
            else:
                texts.append(corpus.tokenizer.decode(piece))
                encoded = texts[-1].encode(errors="surrogatepass")
                digest.update(b"\0" + len(encoded).to_bytes(8, "little") + encoded)
        digests[k] = np.frombuffer(digest.digest(), np.uint32)
        if settings.threshold is not None:
            shingles = shingle_hashes(word_hashes("\n".join(texts)), settings.words)
            if captioned and images:
                shingles ^= np.uint64(xxhash.xxh3_64_intdigest(images))
            counts[k], signatures[k] = len(shingles), signature(shingles, settings.permutations)
    return {
        "corpus": np.array(address(corpus)),
        "document": start + np.array(left, np.int64),
        "digest": digests,
        "signature": signatures,
        "shingles": counts,
    }


def image_facts(corpus: Corpus, task: Range, settings: ImageDuplicates, gone: Gone = NOTHING) -> Facts:
    """Of the K places of images in the documents of a range, which show M images, without the items that are gone:

    document int64 [K], number in the corpus; item int32 [K], index of the piece in the document; image int32 [K], which
    of the M. digest uint32 [M, 4], XXH3-128 of its bytes; hash uint32 [M, 10], 64 and then 256 bits of its perceptual
    hash; detail float32 [M], standard deviation of its gray levels, -1 for an image that does not decode (hash and
    detail only where `max_bits` is not null).
    """
    part = corpus.shard(task.shard)
    images, facts = shown_images(corpus, task, gone)
    hashes = np.zeros((len(images), 10), np.uint32)
    detail = np.full(len(images), -1, np.float32)
    if settings.max_bits is not None:
        for k, image in enumerate(images):
            try:
                pixels = thumbnail(bytes(part.image(int(image))))
            except BadImage:
                continue
            hashes[k], detail[k] = _hashes(pixels), pixels.std()
    return {**facts, "hash": hashes, "detail": detail}


def shown_images(corpus: Corpus, task: Range, gone: Gone) -> tuple[np.ndarray, Facts]:
    """Numbers in the shard of the M images that documents of a range show, in the order of their first places, as the
    joins have to go through them however documents are divided into ranges; and of all facts of images those that need
    no pixels: corpus, document, item, image and digest (see `image_facts`)."""
    document, item, shown = places(corpus, task, gone)
    images, first, index = np.unique(shown, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty(len(images), np.int32)
    number[order] = np.arange(len(images), dtype=np.int32)
    images = images[order]
    return images, {
        "corpus": np.array(address(corpus)),
        "document": document,
        "item": item,
        "image": number[index],
        "digest": corpus.shard(task.shard).image_xxh3[images].view(np.uint32).reshape(-1, 4),
    }


def thumbnail(data: bytes) -> np.ndarray:
    """An encoded image as gray levels, uint8 [THUMBNAIL, THUMBNAIL], stretched to a square. BadImage if it does not
    decode."""
    return gray_square(decode_rgb(data, 2 * THUMBNAIL))


def gray_square(image: Pillow.Image) -> np.ndarray:
    """Gray levels, uint8 [THUMBNAIL, THUMBNAIL]."""
    return np.asarray(image.convert("L").resize((THUMBNAIL, THUMBNAIL), Pillow.Resampling.BOX))


def _hashes(pixels: np.ndarray) -> np.ndarray:
    """64 and 256 bits, uint32 [10]."""
    image = Pillow.fromarray(pixels)
    bits = np.concatenate([perceptual_hash(image), perceptual_hash(image, 16)])
    return np.packbits(bits).view(np.uint32)


def _pieces(shard: Shard, document: int, gone: Collection[int]) -> Iterator[np.ndarray | int]:
    start, stop = (int(x) for x in shard.document_offsets[document : document + 2])
    return (shard.piece(k) for k in range(start, stop) if k - start not in gone)
