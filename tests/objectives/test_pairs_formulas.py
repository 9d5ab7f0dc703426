"""`siglip` and `genlip` against their papers' equations in float64, one sequence after another; what `genlip` reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
from megatron_lcl.convert.export import export_model, save_checkpoint
from megatron_lcl.convert.load import load_model
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.rules import CAPTIONED_PAIRS, CAPTIONS, Sequences, rules_for
from megatron_lcl.data.loading.sequence import END, arrange, arranged_sizes
from megatron_lcl.data.pages.replay import replay_html
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.heldout import evaluate_heldout
from megatron_lcl.model.lcl import LCL


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(make_corpus(tmp_path_factory.mktemp("formulas"), seed=3))


def features(model: LCL, pairs: list[tuple[list[int], torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm features [n, D] of a double model, one image and one text at a time."""
    special, empty = model.special, torch.empty(0, 3, 16, 16, dtype=torch.uint8)
    images = [model.pool.pool(double_tokens(model, pixels[None]))[0][0] for _, pixels in pairs]
    lone = [hidden_rows(model, [special.sot, *text, special.soi], empty)[-1] for text, _ in pairs]
    texts = [model.head.projection(model.head.norm(hidden)) for hidden in lone]
    x, y = (F.normalize(torch.stack(rows), dim=1) for rows in (images, texts))
    return x, y


def sigmoid_equation(model: LCL, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SigLIP's equation, term by term."""
    total, s, b = torch.zeros((), dtype=torch.float64), model.head.log_scale.exp(), model.head.logit_bias
    assert b is not None
    for i in range(len(x)):
        for j in range(len(y)):
            z = 1 if i == j else -1
            total = total + (1 / (1 + (z * (-s[0] * x[i] @ y[j] - b[0])).exp())).log()
    return -total / len(x)


def test_siglip_is_its_equation(corpus: Corpus) -> None:
    config = config_of(corpus, "siglip")
    assert (config.model.logit_bias, config.initial_log_scale) == (-10.0, pytest.approx(np.log(10)))
    loader = loader_of(config)
    batches = list(loader)
    pairs = pairs_in(corpus, loader, batches)
    assert len(pairs) == sum(batch.num_pairs for batch in batches) > 8
    model = LCL(config.model, seed=1, initial_log_scale=config.initial_log_scale)
    loss, value, gradients = step_of(config, model, batches)
    double = in_double(model)
    x, y = features(double, pairs)
    expected = sigmoid_equation(double, x, y)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients, expected, double)
    said = result_of(loss, model)
    assert said.metrics["contrastive"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert said.metrics["logit_bias"] == -10.0
    assert said.metrics["positive_similarity"] == pytest.approx(float((x * y).sum(1).mean()), rel=1e-5)


def test_the_sigmoid_contrast_of_a_model_without_bias_is_refused(corpus: Corpus) -> None:
    """As of an objective of another package, to which the config gives none."""
    config = config_of(corpus, "siglip")
    model = LCL(replace(config.model, logit_bias=None), seed=1)
    with pytest.raises(UserError, match=r"logit_bias is null, .*--model.logit_bias -10 --contrast.initial_log_scale"):
        step_of(config, model, list(loader_of(config)))


def test_a_siglip_model_is_saved_exported_and_measured_with_its_bias(corpus: Corpus, tmp_path: Path) -> None:
    config = config_of(corpus, "siglip")
    model = LCL(config.model, seed=1, initial_log_scale=config.initial_log_scale)
    assert model.head.logit_bias is not None
    with torch.no_grad():
        model.head.logit_bias.fill_(-7.25)
    (tmp_path / "saved").mkdir()
    save_checkpoint(model, config, tmp_path / "saved")
    assert float(load_model(tmp_path / "saved").head.numbers["logit_bias"]) == -7.25
    pytest.importorskip("open_clip")
    export_model(model, "open_clip", tmp_path / "exported")
    assert float(load_model(tmp_path / "exported").head.numbers["logit_bias"]) == -7.25
    import open_clip

    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'exported'}")
    assert float(theirs.logit_bias) == -7.25
    assert "logit_bias" in (tmp_path / "exported/README.md").read_text()

    said, _ = evaluate_heldout(model, config, corpus.path, progress=False)
    assert said.pairs > 8
    heldout = loader_of(config)  # the loss itself, of the pairs of two steps, as the evaluation computes it
    from megatron_lcl.evaluate.retrieval import contrast_losses

    double = in_double(model)
    x, y = features(double, pairs_in(corpus, heldout, list(heldout)))
    scale, bias = float(double.head.log_scale.exp()), -7.25
    both = [contrast_losses(a, b, scale=scale, bias=bias).mean() for a, b in ((x, y), (y, x))]
    assert [float(half) for half in both] == pytest.approx([float(sigmoid_equation(double, x, y))] * 2, rel=1e-7)


def test_a_model_without_a_bias_has_no_such_parameter() -> None:
    config = configs.from_dict({})
    assert config.model.logit_bias is None
    with torch.device("meta"):
        names = [name for name, _ in LCL(config.model, seed=None).named_parameters()]
    assert not [name for name in names if "bias" in name and "logit" in name]


def test_genlip_is_its_equation(corpus: Corpus) -> None:
    config = config_of(corpus, "genlip")
    loader = loader_of(config)
    batches = list(loader)
    pairs = pairs_in(corpus, loader, batches)
    assert len(pairs) == sum(batch.num_images for batch in batches) > 8
    assert sum(batch.num_pairs for batch in batches) == 0
    model = LCL(config.model, seed=1)
    loss, value, gradients = step_of(config, model, batches)
    double, special, patches = in_double(model), model.special, config.model.vision.num_patches
    captions = []
    for text, pixels in pairs:
        start = [special.sot, special.soi, *[special.placeholder] * patches, special.eoi]
        hidden = hidden_rows(double, [*start, *text, special.eot], to_double(pixels[None]))[len(start) - 1 : -1]
        captions.append(log_likelihoods(double, hidden, [*text, special.eot]))
    expected = -torch.cat(captions).mean()
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    assert_same_gradients(gradients, expected, double)
    assert result_of(loss, model).metrics["generation"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_genlip_s_sequences_are_captions_alone(corpus: Corpus) -> None:
    config = config_of(corpus, "genlip")
    loader, special, patches = loader_of(config), corpus.tokenizer, config.model.vision.num_patches
    seen = 0
    for batch in loader:
        tokens, targets = batch.tokens.tolist(), batch.targets.tolist()
        expected = [-1] * len(tokens)
        origins = loader.provenance(batch.packs[0])
        for origin in origins:
            (image,) = origin.images
            ids = tokens[origin.start : origin.stop]
            start = [special.sot, special.soi, *[special.placeholder] * patches, special.eoi]
            assert ids[: len(start)] == start
            assert ids[-1] == special.eot
            expected[origin.start + len(start) - 1 : origin.stop - 1] = ids[len(start) :]
            assert batch.image_start[image.slot] == origin.start + 2
            assert batch.image_soi[image.slot] == -1
            seen += 1
        assert targets == expected
        assert batch.num_tokens == sum(o.stop - o.start for o in origins) <= config.data.tokens_per_pack
    assert seen > 8
    assert replay_html(config, CAPTIONS, 0).count("<figure") == seen
    assert objectives.create(config).trains == ("generation",)


LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=9)


def texts_and_rows(sequences: Sequences, lengths: list[int], patches: int, context: int) -> tuple[list[int], list[int]]:
    """Of pairs with texts of these lengths: what is kept of each, and the rows of a pack of 80 as the packer counts."""
    rules = rules_for(configs.Data(tokens_per_pack=80), patches, context, 3, pairs=True, sequences=sequences)
    pieces = np.array([n for length in lengths for n in (length, 1)], np.int32)
    modes = np.array([0, 1] * len(lengths), np.int8)
    nan, none = np.full(len(lengths), np.nan, np.float32), np.full(len(lengths), -1, np.int32)
    rows = arrange(pieces, modes, nan, none, np.uint64(0), rules)
    arrays = pieces, modes, np.array([0, len(modes)]), nan, none
    of_document = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.uint64), np.array([[0, END]])
    found = arranged_sizes(*arrays, *of_document, rules, np.array([-1]))
    return [int(stop) for _, _, _, stop in rows[::2]], found[:, 1].tolist()


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.integers(9, 80))
def test_the_packer_knows_a_lone_caption_s_size(lengths: list[int], patches: int, context: int) -> None:
    """Any lengths of text, patches and context: text cut to fit, counted exactly."""
    context = max(context, patches + 5)
    kept, rows = texts_and_rows(CAPTIONS, lengths, patches, context)
    assert kept == [min(length, min(context, 80) - patches - 4) for length in lengths]
    assert rows == [text + patches + 4 for text in kept]


@settings(max_examples=60)
@given(LENGTHS, st.integers(1, 9), st.integers(9, 80))
def test_the_packer_knows_the_size_of_a_pair_and_its_caption(lengths: list[int], patches: int, context: int) -> None:
    """`<sot> text <soi>` and `<sot> <soi>`, patches, `<eoi> text <eot>`: the caption fits the context, both fit a pack,
    and no text is cut that would fit."""
    context = max(context, patches + 5)
    kept, rows = texts_and_rows(CAPTIONED_PAIRS, lengths, patches, context)
    fitting = [text for text in range(80) if text + patches + 4 <= context and 2 * text + patches + 6 <= 80]
    assert kept == [min(length, fitting[-1]) for length in lengths]
    assert rows == [2 * text + patches + 6 for text in kept]
