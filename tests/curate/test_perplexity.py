"""Protects perplexity through a user's model: it is that of the tokens' probabilities, one prefix at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from curate.corpora_of_rules import computing_in_one_thread, picture, write

from megatron_lcl.cli import main
from megatron_lcl.curate import first_rule, perplexity
from megatron_lcl.curate.first_rule import Removal, first_rules
from megatron_lcl.curate.measures import Measured
from megatron_lcl.curate.perplexity import perplexity_scores
from megatron_lcl.curate.run import curate
from megatron_lcl.curate.settings import Perplexity, Rule, as_recipe, read_settings
from megatron_lcl.data.corpus.document import Document, Image, Text
from megatron_lcl.errors import UserError

TEXTS = ["the old mill stands by the river", "mill mill mill mill", "a river", "no word of it"]


def save_model(folder: Path, beginning: bool = True, seed: int = 0, vocab: int = 0) -> Path:
    """A random GPT-2 of 24 positions whose tokens are words."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: k for k, word in enumerate(["<s>", "?", *dict.fromkeys(" ".join(TEXTS).split())])}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>"} if beginning else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **special).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 1.0}
    GPT2LMHeadModel(GPT2Config(vocab_size=vocab or len(words), **sizes)).save_pretrained(folder)
    return folder


def expected(folder: Path, text: str, most: int) -> float:
    """(∏ p)^(-1/n), each p by a forward of the tokens before it alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    words = tokenizer.convert_tokens_to_ids([word if word in tokenizer.get_vocab() else "?" for word in text.split()])
    ids = [*([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), *words[:most]]
    product, n = 1.0, 0
    for k in range(1, len(ids)):
        with torch.no_grad():
            product *= float(model(torch.tensor([ids[:k]])).logits[0, -1].double().softmax(0)[ids[k]])
        n += 1
    return product ** (-1 / n)


def one_by_one(folder: Path, **options: int) -> Callable[[str], float]:
    scores = perplexity_scores(Perplexity(str(folder), **options))
    return lambda text: scores([text])[0]


@pytest.mark.parametrize("beginning", [True, False])
def test_it_is_the_inverse_of_the_mean_probability(beginning: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", beginning)
    score = one_by_one(folder)
    for text in (*TEXTS, "an unknown\n\nword \ud800"):
        assert score(text) == pytest.approx(expected(folder, text, 24), rel=1e-4)
    few = one_by_one(folder, tokens=3)
    assert few(TEXTS[0]) == pytest.approx(expected(folder, TEXTS[0], 3), rel=1e-4) != score(TEXTS[0])
    long = " ".join(TEXTS * 4)  # longer than the model's positions
    assert score(long) == pytest.approx(expected(folder, long, 24 - beginning), rel=1e-4)
    assert math.isnan(score(""))
    assert math.isnan(score("mill")) != beginning


def test_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model")
    words = " ".join(TEXTS).split()
    texts = ["", *(" ".join(random.Random(k).choices(words, k=k % 23)) for k in range(40)), "mill"]
    sizes: list[tuple[int, int]] = []

    def seen(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        sizes.append(tuple(given[0].shape))

    known = len(dict.fromkeys(words)) + 2
    monkeypatch.setattr(perplexity, "LOGITS", 100 * known)
    alone = one_by_one(folder)
    expected = [alone(text) for text in texts]
    scores = perplexity_scores(Perplexity(str(folder)))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: seen(module, given) if isinstance(module, torch.nn.Embedding) else None
    )
    with hook, computing_in_one_thread():
        found = scores(texts)
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert len({round(value, 3) for value in found}) > 30
    batches = [size for size in sizes if size[0] > 1]
    assert 3 < len(batches) < 20
    assert max(rows * longest for rows, longest in batches) <= 100


def test_texts_wait_for_the_model_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a rule before it removes are not scored; no more wait than may."""
    monkeypatch.setattr(first_rule, "LOOK_AHEAD", 5)
    scored: list[list[str]] = []

    def perplexities(texts: Sequence[str]) -> list[float]:
        scored.append([*texts])
        return [float(len(text)) for text in texts]

    context = SimpleNamespace(perplexities=perplexities)
    rules = [Rule("text", name, 4) for name in ("min_characters", "min_perplexity", "max_perplexity")]
    texts = ["a", "bbbb", None, "ccccc", "ddd", "eeee", "ffffff"]
    given = [(k, None if text is None else Measured(lambda text=text: text, context)) for k, text in enumerate(texts)]
    found = list(first_rules(rules, given))
    short, long = ("text.min_characters", 1.0), "text.max_perplexity"
    assert found == [
        (0, Removal(*short)), (1, None), (2, None), (3, Removal(long, 5.0)), (4, Removal(short[0], 3.0)), (5, None),
        (6, Removal(long, 6.0)),
    ]  # fmt: skip
    assert scored == [["bbbb", "ccccc"], ["eeee", "ffffff"]]


def test_texts_and_documents_out_of_bounds_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("megatron_lcl.curate.run.num_cores", lambda: 2)
    folder = save_model(tmp_path / "model")
    source = write(tmp_path, [Document((Text(text), Image(picture(k)))) for k, text in enumerate(TEXTS)])
    values = [expected(folder, text, 24) for text in TEXTS]
    low, *_, high = sorted(values)
    of_texts = {"text.max_perplexity": str(high * 0.99), "document.min_perplexity": str(low * 1.01)}
    settings = read_settings(overrides={**of_texts, "perplexity.model": str(folder)})
    curate(source, tmp_path / "out", settings)
    assert "models compute on 1 of 2 cores" in caplog.text
    table = pq.read_table(tmp_path / "out" / "removed.parquet").to_pylist()
    found = {(row["document"], row["item"], row["rule"]): row["value"] for row in table}
    assert found == {
        (values.index(high), 0, "text.max_perplexity"): pytest.approx(high, rel=1e-4),
        (values.index(low), -1, "document.min_perplexity"): pytest.approx(low, rel=1e-4),
    }, "a document without texts has none, and stays"
    recipe = as_recipe(settings)
    assert recipe == as_recipe(
        read_settings(overrides={**of_texts, "perplexity.model": str(save_model(tmp_path / "same"))})
    )
    save_model(tmp_path / "same", seed=1)
    assert recipe != as_recipe(read_settings(overrides={**of_texts, "perplexity.model": str(tmp_path / "same")}))


def no_model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder, "there is no such folder"),
        (no_model, "does not load as a Hugging Face model"),
        (lambda folder: save_model(folder, vocab=5), "the tokenizer has 13 tokens, the model 5"),
    ],
)
def test_refusals_are_one_line(
    make: Callable[[Path], Path], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, [Document((Text(TEXTS[0]),))])
    words = ["curate", str(source), "--output", str(tmp_path / "out"), "--text.max_perplexity", "9"]
    folder = make(tmp_path / "model")
    capsys.readouterr()
    assert main([*words, "--perplexity.model", str(folder)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_bound_needs_a_model() -> None:
    with pytest.raises(UserError, match=r"need perplexity\.model"):
        read_settings(overrides={"document.max_perplexity": "9"})
