"""`coca` and `emu` against their papers' equations in float64, one sequence after another; what `coca` reads."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formulas import (
    assert_same_gradients,
    config_of,
    double_tokens,
    hidden_rows,
    in_double,
    loader_of,
    log_likelihoods,
    pairs_in,
    result_of,
    step_of,
    to_double,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import make_corpus

from megatron_lcl import config as configs
from megatron_lcl import objectives
from megatron_lcl.data.corpus.document import Text
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.packing import best_fit, max_sequences
from megatron_lcl.data.loading.rules import CAPTIONED_PAIRS, INTERLEAVED, rules_for
from megatron_lcl.data.loading.sequence import END, arrange, arranged_sizes, measure
from megatron_lcl.data.pages.replay import replay_html
from megatron_lcl.model.lcl import LCL


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(make_corpus(tmp_path_factory.mktemp("formulas"), seed=3))


def test_coca_is_its_equations(corpus: Corpus) -> None:
    config = config_of(corpus, "coca")
    loader = loader_of(config)
    batches = list(loader)
    pairs = pairs_in(corpus, loader, batches)
    assert len(pairs) == sum(batch.num_pairs for batch in batches) > 8
    model = LCL(config.model, seed=1)
    loss, value, gradients = step_of(config, model, batches)

    double, special, patches = in_double(model), model.special, config.model.vision.num_patches
    empty = torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    images, texts, captions = [], [], []
    for text, pixels in pairs:
        image = pixels[None]
        images.append(double.pool.pool(double_tokens(double, image))[0][0])
        hidden = hidden_rows(double, [special.sot, *text, special.soi], empty)[-1]
        texts.append(double.head.projection(double.head.norm(hidden)))
        start = [special.sot, special.soi, *[special.placeholder] * patches, special.eoi]
        hidden = hidden_rows(double, [*start, *text, special.eot], to_double(image))[len(start) - 1 : -1]
        captions.append(log_likelihoods(double, hidden, [*text, special.eot]))
    x, y = (F.normalize(torch.stack(rows), dim=1) for rows in (images, texts))
    exponentials = (x @ y.t() * double.head.log_scale.exp()).exp()
    positives = exponentials.diagonal()
    both = (positives / exponentials.sum(1)).log().sum() + (positives / exponentials.sum(0)).log().sum()
    contrast = -both / (2 * len(pairs))
    caption = -torch.cat(captions).mean()
    expected = 1 * contrast + 2 * caption
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    said = result_of(loss, model)
    assert (said.metrics["contrastive"], said.metrics["generation"]) == pytest.approx(
        (float(contrast), float(caption)), rel=1e-5
    )
    assert_same_gradients(gradients, expected, double)
    assert step_of(config_of(corpus, "coca", contrastive_weight=0.5, generation_weight=0.0), model, batches)[1] == (
        pytest.approx(0.5 * float(contrast), rel=1e-5)
    )


def test_lcl_without_the_contrast_is_generation(corpus: Corpus) -> None:
    """The claim has one row for both."""
    losses, gradients = [], []
    for config in (config_of(corpus, "lcl", contrastive_weight=0.0), config_of(corpus, "generation")):
        batches = list(loader_of(config))
        _, value, found = step_of(config, LCL(config.model, seed=1), batches)
        losses.append(value)
        gradients.append(found)
    assert losses[0] == losses[1]
    for ours, alone in zip(*gradients, strict=True):
        assert torch.equal(ours, alone)


@pytest.mark.parametrize("leading", [False, True])
def test_emu_is_its_equation(corpus: Corpus, leading: bool) -> None:
    config = config_of(corpus, "emu", regression_weight=0.7)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, contrast_leading_images=leading))
    loader = loader_of(config)
    batches = list(loader)
    model = LCL(config.model, seed=1)
    with torch.no_grad():  # far from their start, so that a latent normalized by mistake is seen
        model.pool.out.weight.mul_(3)
    loss, value, gradients = step_of(config, model, batches)

    double, special = in_double(model), model.special
    distances, latents, likelihoods = [], [], []
    for batch in batches:
        for b, number in enumerate(batch.packs):
            for o in loader.provenance(number):
                ids = batch.tokens[b * 96 + o.start : b * 96 + o.stop].tolist()
                slots = [b * loader.images_per_pack + image.slot for image in o.images]
                images = to_double(batch.images[slots])
                hidden = hidden_rows(double, ids, images)
                z = double.pool.pool(double.vision_tokens(images))[0]
                for n, row in enumerate(i for i, token in enumerate(ids) if token == special.soi):
                    if leading or any(token < special.sot for token in ids[:row]):
                        c = double.head.projection(double.head.norm(hidden[row]))
                        distances.append(((c - z[n]) ** 2).sum() / 24)
                        latents.append(z[n])
                rows = [i for i, t in enumerate(ids[1:]) if t not in (special.placeholder, special.eoi)]
                likelihoods.append(log_likelihoods(double, hidden[rows], [ids[i + 1] for i in rows]))
    regression, generation = torch.stack(distances).mean(), -torch.cat(likelihoods).mean()
    assert len(distances) == sum(batch.num_pairs for batch in batches) > 4
    expected = generation + 0.7 * regression
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients, expected, double)
    said = result_of(loss, model).metrics
    z = torch.stack(latents).detach().numpy()
    std = np.sqrt(z.var(0).mean())
    assert said["regression"] == pytest.approx(float(regression), rel=1e-5)
    assert said["latent_std"] == pytest.approx(std, rel=1e-5)
    assert said["latent_spread"] == pytest.approx(std / np.sqrt((z**2).mean()), rel=1e-5)
    assert "contrastive" not in said


def test_emu_s_metrics_show_latents_that_are_all_the_same(corpus: Corpus) -> None:
    config = config_of(corpus, "emu")
    batches = list(loader_of(config))
    model = LCL(config.model, seed=1)
    with torch.no_grad():  # the pool then gives its bias, whatever the image
        model.pool.v.weight.zero_()
        model.pool.v.bias.normal_()
    said = result_of(step_of(config, model, batches)[0], model).metrics
    assert said["latent_std"] < 1e-5
    assert said["latent_spread"] < 1e-4
    assert said["regression"] > 1e-3


def test_a_pair_is_two_sequences_of_one_pack(corpus: Corpus) -> None:
    config = config_of(corpus, "coca")
    loader, special, patches = loader_of(config), corpus.tokenizer, config.model.vision.num_patches
    slots, texts = loader.images_per_pack, [t for d in range(len(corpus)) for t in corpus[d].items]
    written = [tuple(special.encode(t.text)) for t in texts if isinstance(t, Text)]
    seen = 0
    for batch in loader:
        tokens, targets, positions = (x.tolist() for x in (batch.tokens, batch.targets, batch.positions))
        runs, expected = set(batch.cu_seqlens.tolist()), [-1] * len(tokens)
        origins = loader.provenance(batch.packs[0])
        sizes = [o.stop - o.start for o in origins]
        for text, caption in zip(origins[::2], origins[1::2], strict=True):
            (image,), none = text.images, caption.images
            ids = tokens[text.start : text.stop]
            words = ids[1:-1]
            assert tuple(words) in written
            assert (ids[0], ids[-1], none) == (special.sot, special.soi, ())
            start = [special.sot, special.soi, *[special.placeholder] * patches, special.eoi]
            assert tokens[caption.start : caption.stop] == [*start, *words, special.eot]
            assert caption.start == text.stop
            for o in (text, caption):
                assert {o.start, o.stop} <= runs
                assert positions[o.start : o.stop] == list(range(o.stop - o.start))
            expected[caption.start + len(start) - 1 : caption.stop - 1] = [*words, special.eot]
            assert batch.image_soi[image.slot] == text.stop - 1
            assert batch.image_start[image.slot] == caption.start + 2
            seen += 1
        assert targets == expected
        assert batch.num_tokens == sum(sizes) <= config.data.tokens_per_pack
        assert batch.num_pairs == batch.num_images == len(origins) // 2 <= slots
        assert batch.max_seqlen == batch.cu_seqlens.diff().max() <= 48
    assert seen > 8
    page = replay_html(config, CAPTIONED_PAIRS, 0)
    assert page.count("<figure") == 2 * seen, "the image stands at both"


@settings(max_examples=100)
@given(
    st.lists(st.integers(0, 70), min_size=1, max_size=30), st.integers(1, 9), st.integers(9, 80), st.integers(17, 90)
)
def test_the_packer_knows_a_pair_s_size(lengths: list[int], patches: int, context: int, tokens: int) -> None:
    """Any lengths of text, patches, context and pack: text cut to fit both sequences and the pack, counted exactly."""
    data = configs.Data(tokens_per_pack=max(tokens, patches + 8))
    context = max(context, patches + 5)
    if min(context, data.tokens_per_pack) < patches + 5:
        return
    rules = rules_for(data, patches, context, 3, pairs=True, sequences=CAPTIONED_PAIRS)
    pieces = np.array([n for length in lengths for n in (length, 1)], np.int32)
    modes = np.array([0, 1] * len(lengths), np.int8)
    nan, none = np.full(len(lengths), np.nan, np.float32), np.full(len(lengths), -1, np.int32)
    rows = arrange(pieces, modes, nan, none, np.uint64(0), rules)
    sizes = []
    for (_, text, start, stop), (_, _, _, image) in zip(rows[::2], rows[1::2], strict=True):
        assert (start, image) == (0, -1)
        caption = 1 + 1 + patches + 1 + stop + 1
        assert 0 < stop <= pieces[text]
        assert caption <= context
        size = 1 + stop + 1 + caption
        assert size <= data.tokens_per_pack
        if stop < pieces[text]:  # one token more would not have fitted
            assert caption + 1 > context or size + 2 > data.tokens_per_pack
        sizes.append(size)
    offsets, placements, documents = np.array([0, len(modes)]), np.zeros(1, np.int64), np.zeros(1, np.int64)
    arrays = pieces, modes, offsets, nan, none
    found = arranged_sizes(
        *arrays, placements, documents, np.zeros(1, np.uint64), np.array([[0, END]]), rules, np.array([-1])
    )
    assert found[:, 1].tolist() == sizes
    assert found[:, 2].tolist() == [1] * len(sizes)
    total, images = np.zeros(1, np.int32), np.zeros(1, np.int32)
    pairs = measure(*arrays, rules, total, images, placements)
    assert (int(total[0]), int(images[0]), pairs) == (sum(sizes), len(sizes), len(sizes))
    if sizes:
        most = max_sequences(data.tokens_per_pack, captions=True)
        _, bounds = best_fit(found[:, 1].copy(), found[:, 2].copy(), data.tokens_per_pack, 3, most)
        assert 2 * max(np.diff(bounds)) <= max(2, max_sequences(data.tokens_per_pack)), "runs of a batch"


def test_packs_too_small_for_a_pair() -> None:
    with pytest.raises(ValueError, match=r"data\.tokens_per_pack = 20 .* both sequences .* at least 21"):
        rules_for(configs.Data(tokens_per_pack=20), 13, 64, 1, pairs=True, sequences=CAPTIONED_PAIRS)
    with pytest.raises(ValueError, match=r"at least 18"):
        rules_for(configs.Data(tokens_per_pack=64), 13, 17, 1, pairs=True, sequences=CAPTIONED_PAIRS)
    rules_for(configs.Data(tokens_per_pack=18), 13, 18, 1, pairs=False, sequences=INTERLEAVED)


def test_a_run_does_not_go_on_with_other_sequences(corpus: Corpus) -> None:
    from megatron_lcl.data.loading.ledger import Ledger, open_ledger

    data, patches, context = config_of(corpus, "coca").data, 4, 48
    ledgers = {name: open_ledger(data, patches, context, sequences=reads(name)) for name in ("coca", "clip", "lcl")}
    assert "captions" not in ledgers["clip"].settings, "ledgers of before are what they were"
    for name, ledger in ledgers.items():
        stored = Ledger.from_json(ledger.to_json())
        assert open_ledger(data, patches, context, sequences=reads(name), previous=stored, consumed=4) == ledger
        for other in ledgers.keys() - {name}:
            with pytest.raises(ValueError, match="its packs depend on it; go back to"):
                open_ledger(data, patches, context, sequences=reads(other), previous=stored, consumed=4)


def reads(name: str) -> Any:
    return objectives.objective_class(name).sequences
