"""A corpus as a source of sequences: the size of every document, kept in the cache folder.

    <cache>/documents-<hash>/   tokens.npy, images.npy int32 [D], placements.npy int64 [D], source.json: see `Source`

The hash is over all that the files depend on, so a changed corpus or config never meets old ones.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_lcl.config import Data
from megatron_lcl.data.corpus.corpus_manifest import KIND
from megatron_lcl.data.corpus.document import KINDS, Kind
from megatron_lcl.data.corpus.files import new_array
from megatron_lcl.data.corpus.indexed import map_array
from megatron_lcl.data.corpus.shard import Shard
from megatron_lcl.data.corpus.store import Corpus
from megatron_lcl.data.loading.cache import build_and_open, cache_folder, fingerprint, using
from megatron_lcl.data.loading.hashes import mix, mix_each
from megatron_lcl.data.loading.rules import INTERLEAVED, Rules, Sequences, rules_for
from megatron_lcl.data.loading.sequence import (
    END,
    IMAGE_ROW,
    SEQUENCE,
    START,
    STOP,
    arrange,
    arranged_sizes,
    has_ends,
    in_turn,
    measure,
    texts_in_turn,
)
from megatron_lcl.errors import UserError

VERSION = 4
"""of the rules by which documents become packs; a run keeps that with which it began (`Ledger.settings`). 1: a text too
long for one sequence with the image of its segment stood in another one (`Rules.cut_beside_images`), and an image whose
similarity is `data.min_similarity` was skipped where its float32 is the lower number. 1 and 2: the packs of a window
were in the order in which they were filled, and filled otherwise (`packing.best_fit`). 1 to 3: each epoch drew one of a
document's captions, as held-out evaluation does, whatever others had read (`Rules.in_turn`), and of a natural
document's text that was too long for a pair the first tokens were read, also before its image (`Rules.last_of_text`)"""
_SIZES_VERSION = 1
"""of the rules by which whole documents are measured: caches are named by it"""
_MORE_IMAGES = "its pieces name more images than the shard has placements"
_TURNS = 1 << 61
"""in place of an epoch, for what is drawn of a document for several epochs: in which turn its captions are read"""
_THREADS = 16
"""shards that are measured at once: of a billion documents 130 GB are read, while other processes wait"""


def key(*values: int) -> Any:
    """A 64-bit hash of some integers (np.uint64), for whatever is random."""
    result = np.uint64(0)
    for value in values:
        result = np.uint64(mix(result, np.uint64(int(value) % (1 << 64))))
    return result


def source_key(seed: int, fingerprint: str) -> Any:
    """What is drawn of a corpus is drawn from this."""
    return key(seed, int(fingerprint[:16], 16))


# --- sources -----------------------------------------------------------------------------------------------------


def plain(array: np.ndarray) -> np.ndarray:
    """The array aligned and read-only, whatever it was: compiled functions then see one type and compile once."""
    view = np.require(array, requirements=["A", "C"]).view(np.ndarray)
    view.flags.writeable = False
    return view


def pieces_of(shard: Shard) -> Any:
    """A shard's lengths, modes, document offsets, similarities and matched texts, as `measure` takes them."""
    arrays = shard.lengths, shard.modes, shard.document_offsets, shard.similarity, shard.matched_text
    return tuple(map(plain, arrays))


def _pieces_of_some(shard: Shard, documents: np.ndarray, placements: np.ndarray) -> Any:
    """`pieces_of` a shard that had only these documents, and of each its first placement in it.

    placements: of each its first in the shard. A window of a large corpus has a few documents of every shard, so what
    others have is not copied.
    """
    first, last = shard.document_offsets[documents], shard.document_offsets[documents + 1]
    for local in documents[(first < 0) | (first > last) | (last > shard.num_pieces)]:
        shard.bounds(local)  # raises
    pieces, offsets = one_after_another(first, last - first)
    modes = shard.modes[pieces]
    shard.check_modes(modes, pieces)
    images = np.concatenate([[0], np.cumsum(modes, dtype=np.int64)])[offsets]
    numbers = np.diff(images)
    for local in documents[placements + numbers > len(shard.similarity)]:
        raise shard.damaged(local, _MORE_IMAGES)
    chosen, _ = one_after_another(placements, numbers)
    arrays = shard.lengths[pieces], modes, offsets, shard.similarity[chosen], shard.matched_text[chosen]
    return *map(plain, arrays), images[:-1]


def one_after_another(starts: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers from starts[i] on, sizes[i] of them, of one i after another; and where those of each i begin and the
    last end, int64."""
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return np.repeat(starts - offsets[:-1], sizes) + np.arange(offsets[-1]), offsets


class Source:
    """A corpus with the rules for its sequences, and the size of each document (D documents), memory-mapped.

    kinds: of each shard's documents, which decides the shard's rules; rules: what these have in common.
    tokens int32 [D]: token slots were the document one sequence, 0 if it is skipped; images int32 [D]: images that
    stay; placements int64 [D]: number, in its shard, of its first placement.
    """

    def __init__(self, corpus: Corpus, rules: Mapping[Kind, Rules], seed: int, cache: Path) -> None:
        self.corpus, self.rules, self._rules = corpus, rules["natural"], rules
        self.key = source_key(seed, corpus.fingerprint)
        # caches of corpora without captions are those of releases that had no such kind
        has_captions = any(shard.get(KIND) == "captions" for shard in corpus.manifest["shards"])
        whole = {
            kind: of_kind.of_whole_documents() for kind, of_kind in rules.items() if kind != "captions" or has_captions
        }
        inputs = {"version": _SIZES_VERSION, "corpus": corpus.fingerprint, "rules": whole}
        build_and_open(cache / f"documents-{fingerprint(inputs)}", self._measure, self._open)

    def _open(self, folder: Path) -> None:
        self.use = using(folder, "source.json")
        self.kinds: list[Kind] = json.loads((folder / "source.json").read_text())["kinds"]
        self.tokens, self.images, self.placements = (
            map_array(folder / f"{name}.npy") for name in ("tokens", "images", "placements")
        )

    def _measure(self, folder: Path) -> None:
        arrays = {
            name: new_array(folder / f"{name}.npy", dtype, (len(self.corpus),))
            for name, dtype in (("tokens", np.int32), ("images", np.int32), ("placements", np.int64))
        }
        kinds, starts = self.corpus.kinds, self.corpus.document_starts

        def measure_shard(k: int) -> None:
            sizes = (a[starts[k] : starts[k + 1]] for a in arrays.values())
            # mapped no longer than it takes: of ten million documents all shards together would be 1.5 GiB
            measure(*pieces_of(self.corpus.open_shard(k)), self._rules[kinds[k]], *sizes)  # type: ignore[call-arg]

        with ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(measure_shard, range(self.corpus.num_shards)):
                pass
        for array in arrays.values():
            array.flush()
        (folder / "source.json").write_text(json.dumps({"kinds": kinds}))

    def rules_of(self, k: int) -> Rules:
        """The rules for shard k's documents."""
        return self._rules[self.kinds[k]]

    @functools.cached_property
    def mean_tokens(self) -> float:
        """Token slots of a document, skipped ones counted as 0. UserError if all are skipped."""
        total = int(self.tokens.sum(dtype=np.int64))
        if total == 0:
            none, lower = f"no document of {self.corpus.where}", "lower data.min_similarity or data.min_images"
            if self.rules.num_patches:
                raise UserError(f"{none} is left after selection; {lower}")
            selected, remedy = (" after selection", f"{lower}, or ") if "matched" in self.kinds else ("", "")
            raise UserError(
                f"{none} has an image with a text{selected}, and the run's objective reads only such pairs; {remedy}"
                "leave the corpus out"
            )
        return total / len(self.tokens)

    def document_key(self, document: int, epoch: int) -> Any:
        """What the selection and placement of a document in an epoch are drawn from."""
        return key(int(self.key), epoch, document)

    def arranged(
        self, document: int, epoch: int, begin: int = 0, until: int = END
    ) -> tuple[np.ndarray, bool, bool, int, Shard]:
        """A document's rows in an epoch (`arrange`), whether `<sot>` and `<eot>` are around each of its sequences, the
        piece of its shard that row piece 0 is, and the shard."""
        k, local = self.corpus.locate(document)
        shard = self.corpus.shard(k)
        a, b = shard.bounds(local)
        modes = plain(shard.modes[a:b])
        shard.check_modes(modes, range(a, b))
        p = int(self.placements[document])
        q = p + int(modes.sum())
        if q > len(shard.similarity):
            raise shard.damaged(local, _MORE_IMAGES)
        arrays = plain(shard.lengths[a:b]), modes, plain(shard.similarity[p:q]), plain(shard.matched_text[p:q])
        rules = self.rules_of(k)
        text = -1
        if rules.in_turn:
            text = in_turn(self.document_key(document, _TURNS), len(modes) - int(modes.sum()), epoch)
        rows = arrange(*arrays, self.document_key(document, epoch), rules, begin, until, text)
        return rows, *has_ends(rows, modes, rules), a, shard

    def cuts(self, document: int, epoch: int, begin: int = 0, until: int = END) -> list[int]:
        """The positions in a document at which its sequences begin in an epoch, and that at which the last one ends.

        What stands between two of them is the same whatever else the rules say of sequences' lengths (`arrange`).
        """
        rows, *_ = self.arranged(document, epoch, begin, until)
        firsts = np.flatnonzero(np.diff(rows[:, SEQUENCE], prepend=-1))
        sizes = np.where(rows[:, STOP] == IMAGE_ROW, 1, rows[:, STOP] - rows[:, START])
        if self.rules.num_patches == 0:
            sizes[1::2] = 0  # a pair's two rows are one position
            sizes[::2] = 1
        ends = begin + np.cumsum([0, *sizes])
        return [int(ends[row]) for row in (*firsts, len(rows))]

    def sizes(self, documents: np.ndarray, epoch: int, ranges: np.ndarray | None = None) -> np.ndarray:
        """Sizes of sequences, int32 [N, 4]: rows (document's index in the list, part, tokens, images).

        documents: int64, numbers in the corpus; skipped ones give no row. ranges: int64 [documents, 2], of each the
        positions that are read (`arrange`); None: all.
        """
        if ranges is None:
            ranges = np.broadcast_to(np.array([0, END]), (len(documents), 2))
        tokens, images = self.tokens[documents], self.images[documents]
        rules = self.rules
        several = images > 1  # of pairs each is a sequence
        if rules.num_patches:
            several = (tokens > rules.max_tokens) | (images > rules.max_images)
        if "captions" in self.kinds:  # of which each epoch draws another text
            drawn = np.array([self._rules[kind].alternatives for kind in self.kinds])
            several |= drawn[np.searchsorted(self.corpus.document_starts, documents, "right") - 1]
        several |= (ranges != (0, END)).any(1)
        whole = np.flatnonzero((tokens > 0) & ~several)
        blocks = [np.stack([whole, np.zeros_like(whole), tokens[whole], images[whole]], 1).astype(np.int32)]
        places = np.flatnonzero(several & (tokens > 0))
        shards = np.searchsorted(self.corpus.document_starts, documents[places], "right") - 1
        by_shard = np.argsort(shards, kind="stable")
        bounds = np.searchsorted(shards[by_shard], np.arange(self.corpus.num_shards + 1))
        for k in np.flatnonzero(np.diff(bounds)).tolist():
            mine = places[by_shard[bounds[k] : bounds[k + 1]]]
            chosen = documents[mine]
            of_these = _pieces_of_some(
                self.corpus.shard(k), chosen - self.corpus.document_starts[k], self.placements[chosen]
            )
            keys = mix_each(key(int(self.key), epoch), chosen)  # `document_key` of each
            texts = np.full(len(mine), -1)
            if self.rules_of(k).in_turn:
                _, modes, offsets, *_ = of_these
                texts = texts_in_turn(mix_each(key(int(self.key), _TURNS), chosen), modes, offsets, epoch)
            rows = arranged_sizes(  # type: ignore[call-arg]
                *of_these, np.arange(len(mine)), keys, np.ascontiguousarray(ranges[mine]), self.rules_of(k), texts
            )
            first = np.searchsorted(rows[:, 0], np.arange(len(mine)))
            part = np.arange(len(rows)) - first[rows[:, 0]]
            blocks.append(np.stack([mine[rows[:, 0]], part, rows[:, 1], rows[:, 2]], 1).astype(np.int32))
        return np.concatenate(blocks)


def open_source(
    corpus: Corpus,
    data: Data,
    num_patches: int,
    context_length: int,
    images_per_pack: int,
    sequences: Sequences = INTERLEAVED,
    carry_text: bool = False,
    version: int = VERSION,
) -> Source:
    """A corpus as a source of sequences. version: see `VERSION`."""
    rules = rules_of_kinds(data, num_patches, context_length, images_per_pack, sequences, carry_text, version)
    if corpus.remote:
        corpus.remote.room.limit = data.storage_cache_gb * 1e9
    return Source(corpus, rules, data.seed, cache_folder(data))


def rules_of_kinds(
    data: Data,
    num_patches: int,
    context_length: int,
    images_per_pack: int,
    sequences: Sequences = INTERLEAVED,
    carry_text: bool = False,
    version: int = VERSION,
) -> dict[Kind, Rules]:
    """The rules for documents of each kind."""
    second, fourth = (version >= since and not carry_text for since in (2, 4))  # evaluation has rules of its own
    as_stored = replace(data, min_similarity=float(np.float32(data.min_similarity)))
    return {
        kind: rules_for(
            as_stored if second and kind == "matched" else data,
            num_patches,
            context_length,
            images_per_pack,
            pairs=kind in ("pairs", "captions"),
            matched=kind == "matched",
            alternatives=kind == "captions",
            sequences=sequences,
            carry_text=carry_text,
            cut_beside_images=second,
            last_of_text=fourth and kind == "natural",
            in_turn=fourth and kind == "captions",
        )
        for kind in KINDS
    }
