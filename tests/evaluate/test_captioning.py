"""Captions: the decoder against plain recomputation, and the numbers against the libraries they come from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lcl import LCL
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.evaluate.captioning import (
    caption,
    caption_metrics,
    captioning,
    generate,
    nucleus,
    tokenize,
)
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.settings import CaptioningSettings
from megatron_lcl.model.activations import Activations
from megatron_lcl.model.lcl import pack_padded

CONFIG = Model(Vision(16, 8, 32, 1, 2, 64), Language(20, 25, 32, 2, 2, 64), 2)


def images(n: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def naive_greedy(model: LCL, image: torch.Tensor, steps: int) -> list[int]:
    """One image, the whole model again for every token."""
    special = model.special
    ids = [special.sot, special.soi, *[special.placeholder] * 4, special.eoi]
    start = len(ids)
    for _ in range(steps):
        rows = torch.tensor([ids])
        batch = pack_padded(rows, torch.tensor([len(ids)]), image[None], model.config)
        x: Any = Activations.of(batch)
        for stage in list(model.layers)[:-1]:
            x = stage(x)
        logits = model.head.logits(x.hidden[len(ids) - 1])
        allowed = [i for i in range(25) if i not in (special.sot, special.placeholder, special.soi, special.eoi)]
        best = max(allowed, key=lambda i: logits[i].item())
        if best == special.eot:
            break
        ids.append(best)
    return ids[start:]


def test_greedy_is_the_plain_recomputation() -> None:
    model, pictures = LCL(CONFIG, seed=3), images(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        expected = [naive_greedy(model, picture, 8) for picture in pictures]
    assert generate(model, pictures, CaptioningSettings(max_tokens=8)) == expected
    assert (
        generate(model, pictures, CaptioningSettings(max_tokens=8, top_p=1e-9)) == expected
    )  # one token in the nucleus
    assert any(expected)


def test_limits() -> None:
    model = LCL(CONFIG)
    assert all(len(ids) <= 13 for ids in generate(model, images(2), CaptioningSettings(max_tokens=100)))  # 20 - 7
    with pytest.raises(ValueError, match="context of 20"):
        generate(model, images(2), CaptioningSettings(), prompt=[1] * 13)
    drawn = generate(model, images(3), CaptioningSettings(top_p=0.9), 5)
    assert (
        drawn
        == generate(model, images(3), CaptioningSettings(top_p=0.9), 5)
        != generate(model, images(3), CaptioningSettings(top_p=0.9), 6)
    )
    assert all(0 <= i < 20 for ids in drawn for i in ids)  # no special token


@settings(max_examples=30)
@given(st.integers(0, 2**31), st.floats(0.05, 1))
def test_nucleus_against_transformers(seed: int, top_p: float) -> None:
    warper = pytest.importorskip("transformers").TopPLogitsWarper(top_p)
    # float32 would round a sum to the other side of top_p now and then
    logits = 3 * torch.randn(4, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs = warper(torch.zeros(4, 1, dtype=torch.int64), logits.clone()).softmax(-1)
    assert torch.allclose(nucleus(logits, top_p), theirs, atol=1e-5)


def test_a_nucleus_that_reaches_its_share_exactly_takes_no_more() -> None:
    assert sorted(nucleus(torch.zeros(1, 4), 0.5)[0].tolist()) == [0, 0, 0.5, 0.5]


@pytest.mark.slow
def test_a_model_that_has_learned_captions_writes_them() -> None:
    model, pictures = LCL(CONFIG), images(4)
    captions = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5, 8, 9, 7]]
    special = model.special
    rows = torch.zeros(4, 13, dtype=torch.int64)
    for row, ids in zip(rows, captions, strict=True):
        whole = [special.sot, special.soi, *[special.placeholder] * 4, special.eoi, *ids, special.eot]
        row[: len(whole)] = torch.tensor(whole)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        loss = model(pictures, rows).generation_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert generate(model, pictures, CaptioningSettings()) == captions


WRITTEN = ["A dog runs on the green grass.", "two people ride a bike", "it's a red house by the sea", "nothing"]
"""together a word shorter than the nearest references, and longer than the shortest"""
REFERENCES = [
    ["A brown dog runs on green grass", "the dog is running on the grass"],
    ["Two people, riding one bike!", "a man and a woman ride a bike", "two people ride"],
    ["it's a red house", "a house by the sea"],
    ["a bowl of fruit", "fruit on a table"],
]


def test_metrics_against_pycocoevalcap_and_torchmetrics() -> None:
    pytest.importorskip("sacrebleu")
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu").Bleu(4)
    torchmetrics = pytest.importorskip("torchmetrics.text")
    found = caption_metrics(WRITTEN, REFERENCES)
    truth = {i: tokenize(several) for i, several in enumerate(REFERENCES)}
    ours = {i: tokenize([w]) for i, w in enumerate(WRITTEN)}
    assert found["CIDEr"].value == pytest.approx(cider.compute_score(truth, ours)[0])

    def bleu4(chosen: Iterable[int]) -> float:
        given = [dict(enumerate(of[i] for i in chosen)) for of in (truth, ours)]
        return bleu.compute_score(*given, verbose=0)[0][3]

    assert found["BLEU-4"].value == pytest.approx(bleu4(range(4)))
    generator = np.random.default_rng(0)
    resampled = [bleu4(generator.integers(4, size=4)) for _ in range(200)]
    interval = found["BLEU-4"].low, found["BLEU-4"].high
    assert interval == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])))
    theirs = torchmetrics.BLEUScore(4)([ours[i][0] for i in range(4)], [truth[i] for i in range(4)])
    assert found["BLEU-4"].value == pytest.approx(theirs.item(), rel=1e-5)
    for metric in found.values():
        assert metric.low <= metric.value <= metric.high
    perfect = caption_metrics([several[0] for several in REFERENCES], REFERENCES)
    assert perfect["BLEU-4"].value == pytest.approx(1)
    assert np.isfinite(perfect["CIDEr"].value)


@pytest.fixture(scope="module")
def encoder() -> OurEncoder:
    tokenizer = train_sentencepiece([f"some words of {a}" for a in "abcdefghijklmnopqrstuvwxyz"] * 3, 400)
    config = Model(CONFIG.vision, dataclasses.replace(CONFIG.language, vocab_size=tokenizer.vocab_size), 2)
    return OurEncoder("x", LCL(config), tokenizer)


def test_a_broken_image_is_named(encoder: OurEncoder, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"xx")
    with pytest.raises(ValueError, match=r"bad\.png: "):
        caption(encoder, [FileBlob(tmp_path / "bad.png")], CaptioningSettings(), progress=False)


def test_each_batch_has_draws_of_its_own(encoder: OurEncoder, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    drawn = CaptioningSettings(max_tokens=8, top_p=1.0)
    images = [FileBlob(tmp_path / "a.png")] * 3
    written = [caption(encoder, images, drawn, seed, batch_size=1, progress=False) for seed in (0, 1, 2, 0)]
    assert len({text for texts in written for text in texts}) == 9, "nor has another seed any of them"
    assert written[0] == written[3]


def test_copies_of_an_image_are_one_image_with_all_its_references(encoder: OurEncoder, tmp_path: Path) -> None:
    """As a corpus of COCO's has them, a document a caption: the scores of the data set with an image once."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    blobs = []
    for i in range(3):
        PIL.Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        blobs.append(FileBlob(tmp_path / f"{i}.png"))
    shutil.copy(tmp_path / "2.png", tmp_path / "copy.png")
    zero, one, two, copy = *blobs, FileBlob(tmp_path / "copy.png")
    drawn = CaptioningSettings(max_tokens=8, top_p=1.0)  # by numbers that depend on an image's batch
    written = caption(encoder, blobs, drawn, batch_size=2, progress=False)
    references = [(written[0], "some words"), (written[1],), ("words of c", written[2])]
    captions = (references[0][:1], references[1], references[0][1:], references[2][:1], references[2][1:])
    once = ImageSet("x", (zero, one, two), captions=tuple(references), domains=("in", "near", "out"))
    domains = ("in", "near", "in", "out", "out")
    copied = ImageSet("x", (zero, one, zero, two, copy), captions=captions, domains=domains)
    expected, of_once = captioning(encoder, once, drawn, batch_size=2, progress=False)
    found, of_copied = captioning(encoder, copied, drawn, batch_size=2, progress=False)
    assert of_once == written
    assert of_copied == [written[i] for i in (0, 1, 0, 2, 2)]
    assert (found.num_items, found.metrics) == (3, expected.metrics)
    assert (found.settings["image copies"], expected.settings["image copies"]) == (2, 0)


def without_punctuation(split: Callable[[str], str], texts: list[str]) -> list[str]:
    """The words of sacrebleu's tokenizer that have a letter or a digit."""
    return [" ".join(w for w in split(text.lower()).split() if any(map(str.isalnum, w))) for text in texts]


def test_tokenize() -> None:
    pytest.importorskip("sacrebleu")
    assert tokenize(["It's a dog, isn't it?  Yes!"]) == ["it's a dog isn't it yes"]
    assert tokenize(['A black-and-white cat & 3.5 "dogs" (…)', ""]) == ["a black-and-white cat 3.5 dogs", ""]


def test_a_letter_is_a_word_in_scripts_without_spaces() -> None:
    zh = pytest.importorskip("sacrebleu.tokenizers.tokenizer_zh").TokenizerZh()
    chinese = [
        "一只猫坐在桌子上。",
        "“两个”孩子（3.5岁）在公园里踢足球！",
        "iPhone手机、3只狗，和1,000本书……",
        "猫",
        "BBQ烤肉 a-b",
    ]
    assert tokenize(chinese) == without_punctuation(zh, chinese)
    assert tokenize(["猫が、テーブルの上に。", "แมวนั่ง\u200bบน “โต๊ะ” 2 ตัว", "ຫມາ", "ឆ្មា។", "ကြောင်။", "犬🐶。"]) == [
        "猫 が テ ー ブ ル の 上 に",
        "แ ม ว นั่ ง บ น โ ต๊ ะ 2 ตั ว",
        "ຫ ມ າ",
        "ឆ្ មា",
        "ကြော င်",
        "犬",
    ]


def test_words_of_scripts_with_spaces_are_those_of_13a() -> None:
    split = pytest.importorskip("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    texts = [
        "Un chat, c’est l’été — « noir »… 3,5 m²!",
        "It's a dog&amp;cat's “best” friend -\nyes。",
        "Кошка сидит на столе: «мяу».",
        "قطة تجلس على الطاولة، أليس كذلك؟",
        "बिल्ली मेज़ पर बैठी है। क्या?",
        "고양이가 책상 위에 앉아 있다.",
        "Ένα σκυλί·",
        "חתול, יושב",
        "🐶 dog🐶",
    ]
    assert tokenize(texts) == without_punctuation(split, texts)
    assert tokenize(["She’s in a l’été hat 猫"]) == ["she’s in a l’été hat 猫"]


def test_captions_of_scripts_without_spaces_have_scores() -> None:
    """Almost those of the references, and none in order."""
    pytest.importorskip("pycocoevalcap")
    written = ["一只黑猫坐在木桌上", "一个男人在海边骑马", "两个孩子在公园里踢足球"]
    references = [["一只黑色的猫坐在木桌上。"], ["一个男人在海边骑着马。"], ["两个孩子在公园踢足球。"]]
    found = caption_metrics(written, references)
    assert found["BLEU-4"].value > 0.4
    assert found["CIDEr"].value > 2
    turned = caption_metrics([text[::-1] for text in written], references)
    assert turned["BLEU-4"].value < 1e-3
