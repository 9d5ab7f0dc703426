"""Batches: their contents against the rules written out again, equality over world sizes, images that do not decode."""

from __future__ import annotations

import dataclasses
import io
import re
from collections import Counter
from typing import Any
from unittest.mock import Mock

import numpy as np
import PIL.Image
import pytest
import torch
from corpora import MakeCorpus, jpeg, random_documents
from small_loaders import CONTEXT, SIZE, P, T, loader_of

from megatron_lcl import config as configs
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading import reader
from megatron_lcl.data.loading.batch import RUNS, PackedBatch, max_runs
from megatron_lcl.data.loading.images import decode_eval
from megatron_lcl.data.loading.loader import PackedLoader
from megatron_lcl.data.loading.rules import INTERLEAVED
from megatron_lcl.data.pages import replay
from megatron_lcl.data.pages.replay import render_first_packs, replay_html
from megatron_lcl.errors import UserError
from megatron_lcl.objectives import objective_class


def flat(batches: list[PackedBatch], slots: int) -> list[list[np.ndarray]]:
    """Each pack by itself, rows counted from the pack's own start."""
    packs = []
    for batch in batches:
        num = len(batch.packs)
        starts = np.unique(batch.cu_seqlens)
        for b in range(num):
            rows, images = slice(b * T, (b + 1) * T), slice(b * slots, (b + 1) * slots)
            own = [batch.tokens[rows], batch.positions[rows], batch.targets[rows], batch.images[images]]
            own.append(batch.image_valid[images])
            shifted = [batch.image_start[images], batch.image_soi[images]]
            shifted = [torch.where(x >= 0, x - b * T, x) for x in shifted]
            packs.append([np.array(batch.packs[b]), *(x.numpy() for x in own + shifted)])
            packs[-1].append(starts[(starts >= b * T) & (starts < (b + 1) * T)] - b * T)
    return packs


def test_attention_gets_the_sequences_there_are(make_corpus: MakeCorpus) -> None:
    """Beside what they have in rows, its kernels take time and memory for every sequence, empty or not, and for each as
    if it were as long as the longest may be."""
    corpus = make_corpus("c", random_documents(120, 1, mean_text=20))
    loader = loader_of(corpus.path, data={"tokens_per_pack": 1024}, micro_batch=3, global_batch=3, steps=8)
    numbers, longest = set(), set()
    for batch in loader:
        lengths = batch.cu_seqlens.diff().numpy()
        num_documents = sum(len(loader.provenance(pack)) for pack in batch.packs)
        num_runs = np.count_nonzero(lengths)
        assert num_documents <= num_runs
        assert all(lengths[:num_runs]), "the empty ones are the last"
        assert len(lengths) == -(-num_runs // RUNS) * RUNS < 3 * max_runs(1024, CONTEXT)
        assert batch.max_seqlen == lengths.max()
        numbers.add(num_runs), longest.add(batch.max_seqlen)
    assert len(numbers) > 1
    assert min(longest) < CONTEXT


@pytest.mark.parametrize("objective", ["lcl", "generation", "clip"])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("leading", [False, True])
def test_a_batch_is_what_its_documents_say(
    make_corpus: MakeCorpus, objective: Any, matched: bool, leading: bool
) -> None:
    corpus = make_corpus("c", random_documents(120, 1, matched=matched, mean_text=30), num_shards=2)
    options = {"contrast_leading_images": leading}
    sequences = objective_class(objective).sequences
    loader = loader_of(corpus.path, data=options, micro_batch=2, global_batch=4, steps=10, sequences=sequences)
    special, slots = corpus.tokenizer, loader.images_per_pack
    shapes = set()
    pairs = 0
    for batch in loader:
        integers = [x for _, x in batch.integers().items()]
        assert {x.dtype for x in integers} == {torch.int32}
        shapes.add(tuple(tuple(x.shape) for x in [*integers, batch.images]))
        tokens, targets = batch.tokens.tolist(), batch.targets.tolist()
        positions, soi, start = batch.positions.tolist(), batch.image_soi.tolist(), batch.image_start.tolist()
        expected_targets = [-1] * len(tokens)
        bounds = set()
        total = 0
        for b, number in enumerate(batch.packs):
            end = 0
            for o in loader.provenance(number):
                assert o.start == end
                end = o.stop
                rows = list(range(b * T + o.start, b * T + o.stop))
                bounds.add(rows[0])
                assert [positions[r] for r in rows] == list(range(len(rows)))
                ids = [tokens[r] for r in rows]
                assert ids[0] == special.sot
                assert ids[-1] == (special.soi if objective == "clip" else special.eot)
                assert ids.count(special.soi) == len(o.images)
                for row, following in zip(rows, ids[1:], strict=False):
                    if following not in (special.placeholder, special.eoi) and objective != "clip":
                        expected_targets[row] = following
                for image in o.images:
                    row, slot = b * T + image.soi, b * slots + image.slot
                    assert tokens[row] == special.soi
                    if objective != "clip":
                        assert tokens[row + 1 : row + P + 2] == [special.placeholder] * P + [special.eoi]
                    has_text = any(i < special.sot for i in tokens[rows[0] : row])
                    takes_part = objective != "generation" and (has_text or (leading and row > rows[0]))
                    assert soi[slot] == (row if takes_part else -1)
                    assert start[slot] == (-1 if objective == "clip" else row + 1)
                    pairs += takes_part
                    stored = open_corpus(o.corpus).shard(image.shard).image(image.image)
                    assert bytes(stored).startswith(b"\xff\xd8")
            total += end
            assert not any(tokens[b * T + end : (b + 1) * T])
        assert targets == expected_targets
        which = [r for r, t in enumerate(targets) if t >= 0]
        assert batch.target_positions.tolist() == which + [-1] * (len(tokens) - len(which))
        assert batch.num_targets == len(which)
        assert batch.num_tokens == total
        assert batch.num_pairs == sum(s >= 0 for s in soi)
        assert batch.num_images == int(batch.image_valid.sum())
        runs = batch.cu_seqlens.tolist()
        assert runs[0] == 0
        assert runs[-1] == len(tokens)
        assert bounds <= set(runs)
        assert min(np.diff(runs)) >= 0
        assert max(np.diff(runs)) == batch.max_seqlen <= CONTEXT
    assert len(shapes) == 1
    assert (pairs > 0) == (objective != "generation")


def test_the_text_is_the_corpus_s(make_corpus: MakeCorpus) -> None:
    documents = random_documents(60, 2, mean_text=8)
    corpus = make_corpus("c", documents)
    loader = loader_of(corpus.path, steps=8, data={"min_images": 0})
    special = corpus.tokenizer
    seen = Counter[int]()
    for batch in loader:
        for o in loader.provenance(batch.packs[0]):
            ids = [i for i in batch.tokens[o.start : o.stop].tolist() if i < special.sot]
            whole = [i for piece in documents[o.document] if not isinstance(piece, tuple) for i in piece]
            if o.part == 0 and len(ids) == len(whole):
                assert ids == whole
                seen[o.document] += 1
    assert len(seen) > 30


@pytest.mark.slow
def test_the_same_packs_and_pixels_at_every_world_size(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(200, 3, matched=True), num_shards=2)
    slots = loader_of(corpus.path).images_per_pack
    steps, global_batch = 3, 24

    def step_of(world_size: int, micro_batch: int, workers: int = 0, first: int = 0) -> list[list[np.ndarray]]:
        ranks = [
            list(
                loader_of(
                    corpus.path,
                    data={"workers": workers},
                    rank=rank,
                    world_size=world_size,
                    micro_batch=micro_batch,
                    global_batch=global_batch,
                    first_pack=first * global_batch,
                    steps=steps - first,
                )
            )
            for rank in range(world_size)
        ]
        per_step = global_batch // world_size // micro_batch
        assert {len(r) for r in ranks} == {per_step * (steps - first)}
        in_order = [r[m] for m in range(per_step * (steps - first)) for r in ranks]
        return flat(in_order, slots)

    expected = step_of(1, 1)
    assert [int(p[0]) for p in expected] == list(range(steps * global_batch))
    for world_size, micro_batch, workers, first in (
        (1, 24, 0, 0),
        (2, 3, 0, 0),
        (3, 4, 2, 0),
        (8, 1, 0, 0),
        (8, 3, 0, 2),
    ):
        got = step_of(world_size, micro_batch, workers, first)
        for mine, other in zip(got, expected[first * global_batch :], strict=True):
            for x, y in zip(mine, other, strict=True):
                np.testing.assert_array_equal(x, y)


def test_augmentation_differs_between_packs_and_stays_in_a_replay(make_corpus: MakeCorpus) -> None:
    picture = jpeg(1, 64, 64)
    corpus = make_corpus("c", [[[1, 2, 3], (picture, None, None)] for _ in range(40)])
    batches = [list(loader_of(corpus.path, steps=2)) for _ in range(2)]
    assert torch.equal(batches[0][1].images, batches[1][1].images)
    valid = batches[0][0].images[batches[0][0].image_valid == 1]
    assert len(valid.flatten(1).unique(dim=0)) > len(valid) // 2
    other = next(iter(loader_of(corpus.path, steps=1, data={"seed": 5})))
    assert not torch.equal(other.images, batches[0][0].images)


def test_evaluation_shows_each_document_s_own_images_as_they_are(make_corpus: MakeCorpus) -> None:
    """Upright, in the document's order; each image is another one than its mirror image and all others."""
    documents = [[[d], *((jpeg(3 * d + n), None, None) for n in range(d % 4)), [d]] for d in range(24)]
    corpus = make_corpus("c", documents, num_shards=2)
    loader = loader_of(corpus.path, train=False, micro_batch=2, global_batch=2)
    seen = []
    for batch in loader:
        for b, number in enumerate(batch.packs):
            for o in loader.provenance(number):
                for n, image in enumerate(o.images):
                    expected = decode_eval(jpeg(3 * o.document + n), SIZE)
                    assert (expected != expected[..., ::-1]).any()
                    assert (batch.images[b * loader.images_per_pack + image.slot].numpy() == expected).all()
                    seen.append((o.document, n))
    assert seen == [(d, n) for d in range(24) for n in range(d % 4)]


def test_crops_have_the_share_and_the_shape_that_the_config_says(make_corpus: MakeCorpus) -> None:
    """Of a picture whose red is the column and whose green is the row, a crop shows what it is of."""
    side, picture, columns = 250, io.BytesIO(), np.arange(250, dtype=np.uint8)
    levels = np.stack([np.tile(columns, (side, 1)), np.tile(columns, (side, 1)).T, np.zeros((side, side), np.uint8)], 2)
    PIL.Image.fromarray(levels).save(picture, "PNG")
    corpus = make_corpus("c", [[[d], (picture.getvalue(), None, None)] for d in range(80)])
    options = {"crop_scale": [0.1, 0.2], "crop_ratio": [1.8, 2.2]}
    areas, ratios = [], []
    for batch in loader_of(corpus.path, data=options, steps=8):
        for crop in batch.images[batch.image_valid == 1].numpy().astype(float):
            inner = np.arange(3, SIZE - 3)  # the pixels that the border does not reach
            width = np.polyfit(inner, crop[0, 8, inner], 1)[0] * SIZE
            height = np.polyfit(inner, crop[1, inner, 8], 1)[0] * SIZE
            areas.append(width * height / side**2), ratios.append(width / height)
    assert len(areas) > 50
    assert 0.097 < min(areas) < 0.12 < 0.18 < max(areas) < 0.206
    assert 1.75 < min(ratios) < 1.9 < 2.1 < max(ratios) < 2.26


def test_loader_processes_leave_torch_s_generator_as_it_was(make_corpus: MakeCorpus) -> None:
    """Or a run that was resumed would draw other numbers than one that was not."""
    corpus = make_corpus("c", random_documents(20, 7, num_jpegs=2))
    before = torch.get_rng_state()
    assert len(list(loader_of(corpus.path, data={"workers": 2}, steps=2))) == 2
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_document_once_in_order(make_corpus: MakeCorpus, workers: int) -> None:
    corpus = make_corpus("c", random_documents(70, 4, mean_text=60), num_shards=2)
    ranks = [
        loader_of(
            corpus.path, data={"workers": workers}, train=False, rank=r, world_size=2, micro_batch=2, global_batch=4
        )
        for r in range(2)
    ]
    batches = [list(loader) for loader in ranks]
    assert len({len(b) for b in batches}) == 1
    assert [len(loader) for loader in ranks] == [len(b) for b in batches]
    packs = [p for pair in zip(*batches, strict=True) for batch in pair for p in batch.packs]
    assert packs == list(range(len(packs)))
    seen = [(o.document, o.part) for p in packs for o in ranks[0].provenance(p)]
    assert seen == sorted(set(seen))
    assert {d for d, _ in seen} == set(range(70))
    again = [x.images for x in ranks[0]]
    assert all(torch.equal(x, y.images) for x, y in zip(again, batches[0], strict=True))
    assert sum(b.num_tokens for pair in batches for b in pair) == sum(
        o.stop - o.start for p in packs for o in ranks[0].provenance(p)
    )


def test_a_undecodable_image_is_blank_counted_and_in_no_loss(make_corpus: MakeCorpus) -> None:
    undecodable = b"\xff\xd8 this was a picture"
    documents = [[[1, 2, 3], (undecodable if d % 3 == 0 else jpeg(d), None, None), [4, 5]] for d in range(30)]
    corpus = make_corpus("c", documents)
    loader = loader_of(corpus.path, train=False, micro_batch=2, global_batch=2)
    bad: list[str] = []
    for batch in loader:
        for slot, reason in batch.bad_images:
            assert batch.image_valid[slot] == 0
            assert batch.image_soi[slot] == batch.image_start[slot] == -1
            assert not batch.images[slot].any()
            bad.append(reason)
        assert batch.num_pairs == batch.num_images == int((batch.image_start >= 0).sum())
    assert len(bad) == 10
    assert "shard 0, image 0: " in bad[0]
    assert str(corpus.path) in bad[0]


def test_a_fault_in_the_decoder_is_not_taken_for_a_bad_image(
    make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus("c", [[[1, 2], (jpeg(0), None, None)]])
    monkeypatch.setattr(reader, "decode_eval", lambda *_: np.zeros(3) + np.zeros(4))
    with pytest.raises(ValueError, match="could not be broadcast"):
        list(loader_of(corpus.path, train=False, data={"workers": 0}))


def test_too_many_undecodable_images_in_a_row_stop_the_run(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", [[[1, 2], (b"\xff\xd8" + bytes([d]), None, None)] for d in range(30)])
    with pytest.raises(UserError, match=r"6 images in a row did not decode.*max_bad_images"):
        list(loader_of(corpus.path, train=False, data={"max_bad_images": 5}))
    list(loader_of(corpus.path, train=False, data={"max_bad_images": 30, "max_bad_fraction": 1.0}))


def test_too_large_a_share_of_undecodable_images_stops_the_run(make_corpus: MakeCorpus) -> None:
    good = jpeg(0)

    def read(name: str, bad: list[bool], **data: Any) -> int:
        images = [b"\xff\xd8 was picture %d" % i if b else good for i, b in enumerate(bad)]
        corpus = make_corpus(name, [[[1], (image, None, None)] for image in images])
        batches = loader_of(corpus.path, train=False, data={"max_bad_fraction": 0.1, **data})
        return sum(batch.num_bad_images for batch in batches)

    assert read("first", [True] * 19 + [False] * 20) == 19  # few of few say nothing
    with pytest.raises(UserError, match=r"20 of the last 39 images did not decode.*, image 20: .*max_bad_fraction"):
        read("then", [True] * 19 + [False] * 19 + [True])
    share = [n % 10 == 9 for n in range(1500)]  # a tenth, not more
    assert read("tenth", share) == 150
    with pytest.raises(UserError, match=r"101 of the last 1000 images did not decode"):
        read("late", [*share, False, True, True])
    assert read("allowed", [*share, False, True, True], max_bad_fraction=0.11) == 152


def test_a_batch_moves_whole(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(30, 7))
    batch = next(iter(loader_of(corpus.path, micro_batch=2, global_batch=2)))
    assert batch.to("cpu") is batch
    moved = batch.to("meta")  # that values move is in tests/train/test_prefetch.py
    for field in dataclasses.fields(PackedBatch):
        mine, other = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(mine, torch.Tensor):
            assert (other.shape, other.dtype, other.device.type) == (mine.shape, mine.dtype, "meta")
        else:
            assert mine == other


def test_layouts_that_do_not_divide_are_errors(make_corpus: MakeCorpus) -> None:
    corpus = make_corpus("c", random_documents(30, 8))
    with pytest.raises(ValueError, match="nearest that is: 12"):
        loader_of(corpus.path, global_batch=13, world_size=2, micro_batch=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader_of(corpus.path, global_batch=2, world_size=2, rank=2)


def test_pairs_in_the_reference_s_forms(make_corpus: MakeCorpus) -> None:
    documents = [[(jpeg(d), None, None), [d, d + 1, d + 2]] for d in range(40)]
    corpus = make_corpus("c", documents, source="webdataset")
    special, forms = corpus.tokenizer, Counter[str]()
    for layout in ("document", "reference"):
        loader = loader_of(corpus.path, steps=4, data={"pair_layout": layout, "contrast_leading_images": True})
        for batch in loader:
            for o in loader.provenance(batch.packs[0]):
                ids = batch.tokens[o.start : o.stop].tolist()
                image = [special.soi, *[special.placeholder] * P, special.eoi]
                text = [o.document, o.document + 1, o.document + 2]
                first = [image, text] if ids[0] == special.soi or ids[1] == special.soi else [text, image]
                inside = first[0] + first[1]
                if layout == "document":
                    assert ids == [special.sot, *inside, special.eot]
                else:
                    assert ids == ([*inside, special.eot] if first[0] == image else [special.sot, *inside])
                    assert o.images[0].pair == (first[0] == text)  # all but a `<soi>` that is the first token
                forms[f"{layout} {'image' if first[0] == image else 'text'} first"] += 1
    assert len(forms) == 4
    assert min(forms.values()) > 10


def test_replay_shows_the_step(make_corpus: MakeCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [[ord(c) - 33 for c in "abc"]]
    documents = [[*words, (jpeg(d) if d else b"\xff\xd8 rot", None, None), [d, d]] for d in range(12)]
    corpus = make_corpus("c", documents)
    overrides = {
        "data.corpora": str(corpus.path),
        "data.tokens_per_pack": "64",
        "model.vision.image_size": "16",
        "model.vision.patch_size": "8",
        "train.global_batch": "4",
    }
    config = configs.load(overrides=overrides)
    page = replay_html(config, INTERLEAVED, 1)
    assert page.count('<details class="pack" open>') == 1, "the others are folded"
    assert all(f"Pack {n}</summary>" in page for n in range(4, 8))
    assert "--packs" not in page
    shown = re.findall(r"<b>Document (\d+)</b>.*? · source-(\d+)\.txt</header>", page)
    assert len(shown) == page.count("<b>Document")
    assert all(number == source for number, source in shown)
    doubled = {"schedule.phases": '[{"steps": 1, "micro_batch": 2}]', "train.micro_batch": "1"}
    for phases, step, micro_batch in (({}, 1, 1), ({"train.micro_batch": "2"}, 1, 2), (doubled, 0, 2), (doubled, 1, 1)):
        own = configs.load(overrides={**overrides, **phases})
        for rank in range(2):
            layout = {"rank": rank, "world_size": 2, "global_batch": 4, "micro_batch": micro_batch}
            read = PackedLoader(own.data, 4, 16, 2048, **layout, first_pack=4 * step, steps=1)
            part = replay_html(own, INTERLEAVED, step, rank=rank, world_size=2)
            shown = [int(number) for number in re.findall(r"Pack (\d+)</summary>", part)]
            assert shown == [number for batch in read for number in batch.packs]
            assert len(shown) == 2
    # every pack as it is on the page of the whole step
    blocks = r'<details class="pack"[^>]*>(.*?)</details>'
    assert re.findall(blocks, part, re.S) == re.findall(blocks, page, re.S)[1::2]
    whole = replay_html(config, INTERLEAVED, 0)
    loader = PackedLoader(config.data, 4, 16, 2048)
    num_images = sum(len(o.images) for n in range(4) for o in loader.provenance(n))
    assert whole.count("data:image/png;base64,") + whole.count('class="blank"') == num_images > 0
    assert "does not decode" in "".join(replay_html(config, INTERLEAVED, s) for s in range(2))
    first = render_first_packs(config, INTERLEAVED, 3)
    assert first.count("data:image/webp;base64,") > 0 == first.count("data:image/png;"), "of hundreds, for a report"
    assert re.findall(r'class="pack"( open)?>\s*<summary>Pack (\d)<', first) == [(" open", "0"), ("", "1"), ("", "2")]
    skipped = render_first_packs(config, INTERLEAVED, 2, loader.ledger.skip(0, 2))
    assert re.findall(r"<summary>Pack (\d)<", skipped) == ["2", "3"]
    for at, said in (
        ({"step": -1}, "step -1; steps count from 0"),
        ({"step": 0, "rank": 1}, "--rank 1: .* give --world-size"),
        ({"step": 0, "rank": 2, "world_size": 2}, "rank 2 of 2 processes; ranks count from 0"),
        ({"step": 0, "rank": 0, "world_size": 3}, "not a multiple of 3 data-parallel processes"),
    ):
        with pytest.raises(UserError, match=said):
            replay_html(config, INTERLEAVED, **at)
    monkeypatch.setattr(replay, "_FIRST", 3)
    monkeypatch.setattr(replay, "_pack", Mock(wraps=replay._pack))
    for at, packs, left_out in (
        ({}, [4, 5, 6], "3 of 4 packs are shown, 4 to 6 of 4 to 7; --packs A:B shows packs A to B"),
        ({"packs": range(7, 99)}, [7], "1 of 4 packs are shown, 7 to 7 of 4 to 7; --packs A:B shows packs A to B"),
        ({"packs": range(8)}, [4, 5, 6, 7], ""),
        ({"packs": range(5, 7), "rank": 1, "world_size": 2}, [5],
         "1 of 2 packs are shown, 5 to 5 of 5 to 7; --packs A:B shows packs A to B"),
    ):  # fmt: skip
        told: list[str] = []
        replay._pack.reset_mock()  # type: ignore[attr-defined]
        some = replay_html(config, INTERLEAVED, 1, say=told.append, **at)
        assert re.findall(blocks, some, re.S) == [re.findall(blocks, page, re.S)[n - 4] for n in packs]
        assert replay._pack.call_count == len(packs), "what is left out is not read"  # type: ignore[attr-defined]
        assert told == ([left_out] if left_out else [])
        assert left_out in some
    last = configs.replace(config, train__steps=1)
    behind = "step 1 is none of this run's, 0 to 0, whose train.steps is 1; it would read this if it went on"
    told.clear()
    assert "it would read this if" in replay_html(last, INTERLEAVED, 1, packs=range(4, 8), say=told.append)
    assert told == [behind]
    with pytest.raises(UserError, match=r"packs 8 to 9: none .* step 1 of all processes reads 4 packs, 4 to 7"):
        replay_html(config, INTERLEAVED, 1, packs=range(8, 10))
