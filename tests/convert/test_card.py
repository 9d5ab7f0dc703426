"""The example of every model card, run as it stands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data.corpora import write_corpus
from PIL import Image

from megatron_lcl import LCL, load_model, open_corpus
from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Corpus, Data, Language, Model, Vision, from_dict
from megatron_lcl.convert import export as exporting
from megatron_lcl.convert import hf
from megatron_lcl.convert.card import Card, Measured, card_of, is_hub_id, write_card
from megatron_lcl.convert.export import export_model, save_checkpoint
from megatron_lcl.convert.find import known_config, read_config
from megatron_lcl.convert.folder import IMPORT, write_record
from megatron_lcl.convert.manifest import MANIFEST
from megatron_lcl.data.corpus.corpus_manifest import read_manifest, write_manifest
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.evaluate.results import Metric, Result, write_json
from megatron_lcl.evaluate.trained import check_trained
from megatron_lcl.model.reference_format import open_clip_config
from megatron_lcl.run_folder import WEIGHTS

hub = pytest.importorskip("huggingface_hub")
ModelCard, ModelCardData, EvalResult = hub.ModelCard, hub.ModelCardData, hub.EvalResult
TINY = Model(Vision(64, 16, 64, 2, 4, 128), Language(64, 211, 48, 2, 4, 96), 4)
LIBRARY = {"hf": "transformers", "timm": "timm", "open_clip": "open_clip"}


@torch.no_grad()
def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


DINO = {"embedding_norm": False, "registers": 3}


@pytest.mark.parametrize(("format", "options"), [*((format, {}) for format in LIBRARY), ("hf", DINO), ("timm", DINO)])
def test_example_computes_our_features(
    make_model: Callable[..., LCL],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    photograph: Callable[[Path], Path],
    format: str,
    options: dict[str, Any],
) -> None:
    pytest.importorskip(LIBRARY[format])
    model = make_model(replace(TINY, vision=replace(TINY.vision, **options)))
    export_model(model, format, tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.syspath_prepend(".")  # as a script or a notebook in this folder has it
    for name in ("lcl", "lcl.attention_pool"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    photograph(Path("image.jpg"))
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(code.splitlines()) <= 13
    assert Path(sys.modules["lcl.attention_pool"].__file__ or "").resolve().is_relative_to(tmp_path)
    images = found["images"]
    assert images.shape == (1, 3, 64, 64)
    patches = model.patch_features(images)
    assert relative(found["patches"], patches) < 1e-5
    assert relative(torch.nn.functional.normalize(found["z"], dim=-1), model.encode_image(images)) < 1e-5
    if "mean" in found:
        assert relative(found["mean"], patches.mean(1)) < 1e-5
    (reading,) = re.findall("^images = .*", code, re.M)
    Image.open("image.jpg").quantize(16).save("image.jpg", "PNG")
    exec(reading, found)
    of_palette = found["images"]
    Image.open("image.jpg").convert("RGB").save("image.jpg", "PNG")
    exec(reading, found)
    assert torch.equal(found["images"], of_palette)


def test_a_runs_card_tells_data_config_and_metrics(model: LCL, tmp_path: Path) -> None:
    corpus, checkpoint = tmp_path / "manual", tmp_path / "run" / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    gimp = {"format": "html", "package": "gimp-help-en", "licence": "GFDL"}
    manual = corpus_of(corpus, 1234, source=gimp)
    write_progress(checkpoint, [(0, {str(corpus): manual, str(tmp_path / "elsewhere"): "e" * 32})])
    corpora = (Corpus(path=str(corpus)), Corpus(path=str(tmp_path / "elsewhere")))
    save_checkpoint(model, Config(model=model.config, data=Data(corpora=corpora)), checkpoint)
    (checkpoint / "manifest.json").write_text("{}")
    heldout = {
        "step": 10, "corpus": str(corpus), "documents": 5, "images": 8, "pairs": 7, "targets": 1234,
        "image_to_context_recall_at_10": 0.5, "chance_at_10": 0.25, "median_rank": None, "bits_per_token": 3.0,
        "context_to_image_recall_at_1": 0.25, "chance_at_1": 0.125,
        "image_in_document_recall_at_1": 0.75, "chance_in_document": 0.5, "pairs_with_rivals": 4,
        "intervals": {"image_to_context_recall_at_10": [0.375, 0.625]}, "rules": {"version": 2},
    }  # fmt: skip
    (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout))
    card = card_of(checkpoint)
    of = ("held-out documents", "manual (5 documents, 8 images, version 2 of the rules)")
    old = "not recorded"  # in files of earlier versions
    assert card.metrics == (
        Measured(*of, "image to context recall@10", 0.5, (0.375, 0.625), 0.25, "7 pairs", dtype=old),
        Measured(*of, "context to image recall@1", 0.25, None, 0.125, "7 pairs", dtype=old),
        Measured(*of, "image in document recall@1", 0.75, None, 0.5, "4 pairs with rivals", dtype=old),
        Measured(*of, "bits per token", 3.0, items="1,234 targets", dtype=old),
        Measured(*of, "perplexity", 8.0, items="1,234 targets", dtype=old),
    )
    numbers = {
        "distinct_images": 6, "distinct_contexts": 5, "contexts_with_rivals": 3, "median_rank": 2.0,
        "context_to_image_recall_at_10": 0.5, "context_to_image_chance_at_10": 0.125, "contrastive_loss": 4.0,
    }  # fmt: skip
    (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout | numbers))
    assert {m.metric: (m.chance, m.items) for m in card_of(checkpoint).metrics[:6]} == {
        "image to context recall@10": (0.25, "6 distinct images"),
        "context to image recall@1": (0.125, "5 distinct contexts"),
        "context to image recall@10": (0.125, "5 distinct contexts"),
        "image in document recall@1": (0.5, "3 contexts with rivals"),
        "median rank": (None, "6 distinct images"),
        "contrastive loss (nats)": (None, "7 pairs"),
    }
    (tmp_path / "run" / "heldout.json").write_text(json.dumps({**heldout, "dtype": "bfloat16"}))
    assert {measured.dtype for measured in card_of(checkpoint).metrics} == {"bfloat16"}
    (tmp_path / "run" / "heldout.json").write_text(json.dumps({**heldout, "rules": {}}))
    before_rules = "manual (5 documents, 8 images, by the run's own data settings)"
    assert {measured.data for measured in card_of(checkpoint).metrics} == {before_rules}
    first, second = card.datasets
    assert first.startswith("manual: format html, package gimp-help-en, license GFDL (documents 1,234, pieces 1,234, ")
    assert first.endswith(f"), fingerprint {manual}")
    assert second == f"elsewhere ({NOT_HERE}), fingerprint {'e' * 32}"
    for other in ({"step": 9}, {"average": "ema"}):  # of an earlier checkpoint; of an average of this one's weights
        (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout | other))
        assert card_of(checkpoint).metrics == ()
    text = to_text(card, tmp_path)
    assert str(tmp_path) not in text  # the config's folders are nobody's business
    assert "path: manual" in text
    read = ModelCard(text).data
    assert read.datasets is None  # folders are nobody's data sets on the Hub
    assert read.metrics == ["perplexity", "recall"]  # neither counts nor chance
    assert read.eval_results is None  # of data that is not on the Hub
    row = "image to context recall@10 | 0.5 | 0.375 – 0.625 | 0.25 | 7 pairs | not recorded |"
    assert f"| held-out documents | {of[1]} | {row}" in text


NOT_HERE = "the corpus is not here, so its manifest is not quoted"


def corpus_of(folder: Path, documents: int, **keys: Any) -> str:
    """A corpus of documents of a token each, and with these keys in its manifest; returns its fingerprint."""
    write_corpus(folder, [[[n % 500]] for n in range(documents)])
    manifest = {key: value for key, value in read_manifest(folder).items() if key != "fingerprint"}
    write_manifest(folder, manifest | keys)
    return open_corpus(folder).fingerprint


def write_progress(checkpoint: Path, blends: list[tuple[int, dict[str, str]]], **more: Any) -> None:
    """blends: first pack; fingerprints by path."""
    entries: list[dict[str, Any]] = [
        {"from_pack": pack, "blend": [{"path": p, "fingerprint": f, "weight": 1.0} for p, f in blend.items()]}
        for pack, blend in blends
    ]
    skipped = {"from_pack": 3, "skip": 2}
    progress = {"step": 10, "packs": 20, "ledger": {"settings": {}, "entries": [skipped, *entries]}, **more}
    (checkpoint / "progress.json").write_text(json.dumps(progress))


def test_a_card_names_what_the_checkpoints_ledger_has_not_what_the_config_names_now(model: LCL, tmp_path: Path) -> None:
    """Corpora that were read before, moved since, or replaced; each once. And which checkpoint of which code it is."""
    run = tmp_path / "run"
    average = run / "checkpoints" / "step-00000010" / "averages" / "ema_0.999"
    average.mkdir(parents=True)
    names = ("first", "moved", "replaced", "last")
    a, b, c, d = (corpus_of(tmp_path / name, 10 + n) for n, name in enumerate(names))
    paths = {name: str(tmp_path / name) for name in names}
    (tmp_path / "replaced").rename(tmp_path / "away")
    corpus_of(tmp_path / "replaced", 500)
    blends = [
        (0, {paths["first"]: a, "/old/place": b}),
        (12, {paths["replaced"]: c, paths["moved"]: b}),
        (30, {paths["last"]: d, paths["moved"]: b}),
    ]
    config = Config(model=model.config, data=Data(corpora=(Corpus(path="/nowhere/in/the/ledger"),)))
    code = {"torch": "2.0", "megatron_lcl": "0.3.1", "commit": "c0ffee"}
    for checkpoint, name in ((average.parent.parent, ""), (average, " (average `ema_0.999`)")):
        save_checkpoint(model, config, checkpoint)
        write_progress(average.parent.parent, blends, code=code)
        card = card_of(checkpoint)
        counts = "pieces {0}, tokens {0}, placements 0, images 0, image_bytes 0"
        assert card.datasets == (
            f"last: format jsonl (documents 13, {counts.format(13)}), from pack 30 on at the earliest, fingerprint {d}",
            f"moved: format jsonl (documents 11, {counts.format(11)}), fingerprint {b}",
            f"first: format jsonl (documents 10, {counts.format(10)}), read earlier, fingerprint {a}",
            f"replaced ({NOT_HERE}), from pack 12 on at the earliest, read earlier, fingerprint {c}",
        )
        text = to_text(card, tmp_path)
        assert f" The weights are those of step 10{name}, written by megatron_lcl 0.3.1, commit c0ffee.\n" in text
        assert str(tmp_path) not in text
        assert ModelCard(text).data.datasets is None
    write_progress(average.parent.parent, blends)  # of a version that did not record its own
    assert "those of step 10.\n" in to_text(card_of(average.parent.parent), tmp_path)


def test_a_card_without_a_ledger_quotes_no_manifest(model: LCL, tmp_path: Path) -> None:
    """As of an import: what is at the path may be another corpus than was read."""
    corpus_of(tmp_path / "corpus", 3)
    config = Config(model=model.config, data=Data(corpora=(Corpus(path=str(tmp_path / "corpus")),)))
    (tmp_path / "import").mkdir()
    save_checkpoint(model, config, tmp_path / "import")
    for damage in (None, "", "{"):
        if damage is not None:
            (tmp_path / "import" / "progress.json").write_text(damage)
        card = card_of(tmp_path / "import")
        assert card.datasets == ("corpus (which corpus this was is not known here, so no manifest is quoted)",)
        assert "The weights are" not in to_text(card, tmp_path)


def test_a_merged_corpus_is_described_by_its_parts_and_filters(model: LCL, tmp_path: Path) -> None:
    """Also of a merge of merges, and of what `curate` did before them."""
    pairs = {"format": "webdataset", "licence": "CC0\n1.0"}
    thresholds = {"text.min_words": 6, "lists.flagged_words": "/home/me/words.txt", "evaluation.sets": {"/home/x": "h"}}
    curated = {"fingerprint": "1", "recipe": {"thresholds": thresholds}}
    parents = [{"fingerprint": "2", "recipe": {"thresholds": {"text.min_words": 6, "image.min_side": 150}}}]
    key = corpus_of(
        tmp_path / "both",
        3,
        source={"merged": [{"format": "jsonl"}, {"merged": [pairs, {"format": "jsonl"}]}]},
        recipe={"merged": ["1", "3"]},
        parents=[curated, {"fingerprint": "3", "recipe": {"merged": ["2"]}, "parents": parents}],
    )
    config = Config(model=model.config)
    (tmp_path / "run").mkdir()
    save_checkpoint(model, config, tmp_path / "run")
    write_progress(tmp_path / "run", [(0, {str(tmp_path / "both"): key})])
    (said,) = card_of(tmp_path / "run").datasets
    assert said.startswith("both: merged from format jsonl; format webdataset, license CC0 1.0 (documents 3, ")
    rules = "text.min_words 6, lists.flagged_words, evaluation.sets, image.min_side 150"
    assert said.endswith(f"), filtered in whole or in part by {rules}, fingerprint {key}")


@pytest.mark.parametrize(
    ("key", "source", "shown"),
    [
        ("train__init_from", "hf:openai/clip-vit-base-patch32", None),
        ("train__init_from", "vision=timm:vit_base,language=hf:openai/clip", None),
        ("train__init_from", "open_clip:hf-hub:org/name", None),
        ("train__init_from", "/home/me/runs/other", "other"),
        ("train__init_from", "s3://bucket/mine/other/", "other"),
        ("train__init_from", "hf:/home/me/clip", "hf:clip"),
        ("train__init_from", "hf:exports/me/clip", "hf:clip"),
        ("train__init_from", "open_clip:ViT-B-32@weights/me/b.pt", "open_clip:ViT-B-32@b.pt"),
        ("train__init_from", "open_clip:ViT-B-32@laion2b_s34b_b79k", None),
        (
            "train__init_from",
            "vision=timm:local-dir:me/vit,language=open_clip:ViT-B-32@/me/b.pt",
            "vision=timm:local-dir:vit,language=open_clip:ViT-B-32@b.pt",
        ),
        ("checkpoint__resume", "/home/me/runs/other", "other"),
    ],
)
def test_whose_weights_a_run_began_with_is_said(tmp_path: Path, key: str, source: str, shown: str | None) -> None:
    """Their license binds whoever takes these; folders are nobody's business."""
    text = to_text(Card(run=configs.replace(Config(model=TINY), **{key: source})), tmp_path)
    shown = source if shown is None else shown
    assert f"A vision transformer trained from the weights of `{shown}`, by Latent" in text
    assert "from scratch" not in text
    assert f"{key.partition('__')[2]}: {shown}\n" in text
    assert "/me/" not in text


def test_runs_that_went_on_from_others_began_as_those_did(tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> Path:
        config = configs.replace(Config(model=TINY), train__output=str(tmp_path / name), **settings)
        step = tmp_path / name / "checkpoints" / "step-00000001"
        step.mkdir(parents=True)
        for folder in (step, tmp_path / name):
            (folder / "config.yaml").write_text(configs.to_yaml(config))
        for name_of_file in (WEIGHTS, MANIFEST):
            (step / name_of_file).write_bytes(b"")
        return step

    def said(step: Path) -> str:
        return to_text(Card(run=read_config(step)), tmp_path).partition("A vision transformer ")[2].partition(" by ")[0]

    library = run("a", train__init_from="hf:org/name")
    begun = run("b", train__init_from=str(tmp_path / "a"))
    assert said(begun) == "trained from the weights of `a`, trained from the weights of `hf:org/name`,"
    assert said(run("c", checkpoint__resume=str(library))) == "trained from the weights of `hf:org/name`,"
    scratch = run("d")
    assert said(run("e", checkpoint__resume=str(scratch))) == "pre-trained from scratch"
    assert said(run("f", checkpoint__resume=str(tmp_path / "f"))) == "pre-trained from scratch"  # its own
    assert said(run("g", train__init_from=str(tmp_path / "g"))) == "trained from the weights of `g`,"


def test_a_run_from_scratch_and_published_weights_say_so(tmp_path: Path) -> None:
    for run in (None, Config(model=TINY)):
        assert "A vision transformer pre-trained from scratch by Latent" in to_text(Card(run=run), tmp_path)


def to_text(card: Card, folder: Path) -> str:
    write_card(folder, hf.USAGE, TINY, card)
    return (folder / "README.md").read_text()


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    metrics = (
        Measured("k-NN", "digits/test", "accuracy", 0.5, hub_data="org/digits"),
        Measured("k-NN", "digits/test", "mean per-class recall", 0.25, hub_data="org/digits"),
        Measured("k-NN", "digits/test", "items", 9, hub_data="org/digits"),
        Measured("k-NN", "at home", "accuracy", 0.75),
        Measured("captioning", "coco.json (test)", "CIDEr", 1.5, hub_data="org/coco"),
    )
    card = Card("A name", "apache-2.0", ("org/some-data: with words", "mmc4 (not here)", "words alone"), metrics)
    read = ModelCard(to_text(card, tmp_path)).data  # checks the model-index too
    assert (read.license, read.license_name, read.model_name) == ("apache-2.0", None, "A name")
    assert read.datasets == ["org/some-data"]
    assert read.metrics == ["accuracy", "cider", "recall"]
    knn, coco = ("image-classification", "org/digits", "digits/test"), ("image-to-text", "org/coco", "coco.json (test)")
    assert read.eval_results == [
        EvalResult(*knn, "accuracy", 0.5, task_name="k-NN", metric_name="accuracy"),
        EvalResult(*knn, "recall", 0.25, task_name="k-NN", metric_name="mean per-class recall"),
        EvalResult(*coco, "cider", 1.5, task_name="captioning", metric_name="CIDEr"),
    ]
    again = ModelCardData(**{k: v for k, v in read.to_dict().items() if k != "model-index"})  # the Hub's own class
    again.model_name, again.eval_results = read.model_name, read.eval_results
    assert again.to_dict() == yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert "| k-NN | digits/test | accuracy | 0.5 |" in (tmp_path / "README.md").read_text()
    for license, expected in (("gpl-3.0", ("gpl-3.0", None)), ("gpl-3.0-only", ("other", "gpl-3.0-only"))):
        read = ModelCard(to_text(Card(license=license), tmp_path)).data
        assert (read.license, read.license_name) == expected
        assert read.eval_results is read.datasets is None


def test_results_of_an_evaluation_reach_the_card(
    model: LCL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    checkpoint, other = tmp_path / "checkpoint", tmp_path / "other"
    for folder, shift in ((checkpoint, 0), (other, 1)):
        folder.mkdir()
        with torch.no_grad():
            model.pool.query.add_(shift)
        save_checkpoint(model, Config(model=model.config), folder)
        with torch.no_grad():
            model.pool.query.sub_(shift)
    numbers = {"accuracy": Metric(0.75, 0.7, 0.8, 0.1)}
    results = [
        Result("k-NN", str(folder), "/data/digits/test", 9, numbers, {}, load_encoder(folder).fingerprint)
        for folder in (checkpoint, other)
    ]
    write_json(results, tmp_path / "both.json")
    write_json(results[1:], tmp_path / "other.json")
    (tmp_path / "none.json").write_text('{"a": 1}')
    command = ["export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(tmp_path / "out")]
    for name, words in (("other.json", "no results of these weights"), ("none.json", "not a results.json")):
        assert main([*command, "--results", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    assert main([*command, "--results", f"{tmp_path / 'both.json'}@digits"]) == 2
    assert "'digits' is no identifier of a data set on the Hub" in capsys.readouterr().err
    assert main([*command, "--results", str(tmp_path / "both.json")]) == 0
    read = ModelCard.load(tmp_path / "out" / "README.md")
    assert read.data.eval_results is None  # nobody said what the data is called on the Hub
    assert "| k-NN | digits/test | accuracy | 0.75 | 0.7 – 0.8 | 0.1 | 9 items | float32 |" in read.text
    assert main([*command, "--results", f"{tmp_path / 'both.json'}@org/digits"]) == 0
    (found,) = ModelCard.load(tmp_path / "out" / "README.md").data.eval_results
    assert (found.task_name, found.dataset_name, found.metric_value) == ("k-NN", "digits/test", 0.75)
    assert (found.dataset_type, found.metric_type) == ("org/digits", "accuracy")


def test_command_line_fills_the_card(model: LCL, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    checkpoint.mkdir()
    save_checkpoint(model, Config(model=model.config), checkpoint)
    command = ["export", "--checkpoint", str(checkpoint), "--format", "timm", "--output", str(output)]
    assert main([*command, "--license", "Apache 2"]) == 2  # not an identifier: one line, nothing written
    assert main([*command, "--name", "two\nlines"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 2
    assert "'Apache 2' is no SPDX identifier" in said
    assert not output.exists()

    given = ["--name", "LCL of manuals", "--license", "cc-by-4.0", "--data", "the GIMP manual", "--data", "a blog"]
    assert main([*command, *given]) == 0
    _, front, body = (output / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert json.loads((output / "config.json").read_text())["pretrained_cfg"]["license"] == "cc-by-4.0"
    assert "# LCL of manuals\n" in body
    assert "## Data\n\n* the GIMP manual\n* a blog\n" in body
    assert "## License\n\ncc-by-4.0\n" in body


def test_an_imports_card_quotes_the_run_or_none(model: LCL, tmp_path: Path) -> None:
    """And so does what asks what was trained: of an import without a run only the config's model is known."""
    trained = {"objective": {"name": "clip"}, "optimizer": {"lr": 0.123}, "data": {"corpora": [{"path": "/x/pairs"}]}}
    (tmp_path / "run").mkdir()
    run = replace(from_dict(trained), model=model.config)
    save_checkpoint(model, run, tmp_path / "run")
    torch.save(model.state_dict_open_clip(), tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(json.dumps(open_clip_config(model.config)))
    for name, source in (("of run", "run"), ("again", "of run"), ("of file", "m.pt"), ("file again", "of file")):
        assert main(["import", str(tmp_path / source), "--output", str(tmp_path / name)]) == 0
        assert read_config(tmp_path / name).model == model.config
    for name in ("of run", "again"):
        assert card_of(tmp_path / name) == card_of(tmp_path / "run")
        assert known_config(tmp_path / name) == run
        with pytest.raises(UserError, match="clip does not train"):
            check_trained(str(tmp_path / name), ["captioning"])
    (tmp_path / "old").mkdir()
    save_checkpoint(model, Config(model=model.config), tmp_path / "old")
    write_record(tmp_path / "old", IMPORT, {"source": "m.pt"})  # as earlier versions wrote it
    for name in ("of file", "file again", "old"):
        assert card_of(tmp_path / name) == Card()
        assert known_config(tmp_path / name) is None
        check_trained(str(tmp_path / name), ["captioning", "zero-shot"])


def test_an_export_and_its_card_are_of_one_checkpoint(
    model: LCL, make_model: Callable[..., LCL], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run saves its next one while the export works."""
    pytest.importorskip("timm")

    def save(step: int, model: LCL) -> Path:
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_checkpoint(model, Config(model=model.config), folder)
        (folder / "manifest.json").write_text("{}")
        return folder

    first, work = save(1, model), exporting.require
    heldout = {"step": 1, "corpus": "c", "pairs": 7, "image_to_context_recall_at_10": 0.5, "chance_at_10": 0.25}
    (tmp_path / "run" / "heldout.json").write_text(json.dumps(heldout))

    def then_saved(*given: Any) -> dict[str, str]:
        save(2, make_model(seed=2))
        return work(*given)

    monkeypatch.setattr(exporting, "require", then_saved)
    command = ["export", str(tmp_path / "run"), "--format", "timm", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert "image to context recall@10 | 0.5" in (tmp_path / "out" / "README.md").read_text()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs, ours, other = (load_model(p).encode_image(images) for p in (tmp_path / "out", first, tmp_path / "run"))
    assert relative(theirs, ours) < 1e-5 < relative(theirs, other)


NAMES = (
    *(
        "org/name",
        "ILSVRC/imagenet-1k",
        "a/b.c_d",
        "name",
        "a/b/c",
        "../x",
        "a/.b",
        "a b/c",
        "a/b-",
        "a--b/c",
        "a/b..c",
    ),
    *("/b", "a/", "a/" + "b" * 96, "a/" + "b" * 97),
)


@pytest.mark.parametrize("name", NAMES)
def test_what_may_be_called_a_data_set_is_what_the_hub_takes(name: str) -> None:
    try:
        hub.utils.validate_repo_id(name)
        legal = "/" in name  # a name alone is a data set of before there were namespaces, or a folder
    except hub.utils.HFValidationError:
        legal = False
    assert is_hub_id(name) == legal
