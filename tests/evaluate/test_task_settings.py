"""Options of the tasks: what `--help` says of them, what is refused, and that each reaches its task."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import zero_shot
from megatron_lcl.evaluate.run import TASKS
from megatron_lcl.evaluate.settings import Settings, describe, read_settings


def test_help_has_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    told = list(describe())
    assert {name.partition(".")[0] for name, *_ in told} <= set(TASKS)
    for name, kind, default, help in told:
        # argparse breaks lines at hyphens
        words = f"--{name} VALUE {help} ({kind}, default: {default or 'none'})"
        assert re.sub(r"-\s+", "-", words) in re.sub(r"-\s+", "-", text)
    for default in ("20", "0.07", "1e-05", "30"):
        assert (default in text) == (default != "1e-05")


def test_types_decide_what_a_text_means() -> None:
    options = {
        "zero-shot.prompts": "{c}: a photo",
        "knn.k": "3",
        "linear-probe.strengths": "[1, 1e-2]",
        "attentive-probe.lr": "1e-4",
        "attentive-probe.seeds": "7",
        "captioning.prompt": "0123",
    }
    settings = read_settings(options, TASKS)
    assert settings.zero_shot.prompts == ("{c}: a photo",)
    assert settings.knn.k == 3
    assert settings.linear_probe.strengths == (1.0, 0.01)
    assert (settings.attentive_probe.lr, settings.attentive_probe.seeds) == (1e-4, (7,))
    assert settings.captioning.prompt == "0123"
    assert read_settings({"zero-shot.prompts": "['a {c}', 'the {c}']"}, TASKS).zero_shot.prompts == ("a {c}", "the {c}")
    assert read_settings({}, ()) == Settings()


@pytest.mark.parametrize(
    ("name", "text", "tasks", "said"),
    [
        ("knn.k", "5", ["zero-shot", "retrieval"], "--knn.k goes with --task knn; the tasks are zero-shot, retrieval"),
        ("captioning.prompt", "x", [], "--captioning.prompt goes with --task captioning; no task is given"),
        ("knn.k", "0", ["knn"], "--knn.k = 0: input should be greater than or equal to 1"),
        ("knn.k", "many", ["knn"], "--knn.k = 'many': input should be a valid integer"),
        ("knn.temperature", "0", ["knn"], "--knn.temperature = 0.0: input should be greater than 0"),
        ("captioning.top-p", "1.5", ["captioning"], "--captioning.top-p = 1.5: input should be less than"),
        ("captioning.temperature", "0.5", ["captioning"], "has no effect on greedy decoding; give captioning.top-p"),
        ("captioning.max-tokens", "0", ["captioning"], "--captioning.max-tokens = 0: "),
        ("zero-shot.prompts", "a photo", ["zero-shot"], "the prompt 'a photo' has no {c}"),
        ("linear-probe.strengths", "[]", ["linear-probe"], "--linear-probe.strengths = []: "),
        ("linear-probe.validation", "1", ["linear-probe"], "--linear-probe.validation = 1.0: "),
        ("attentive-probe.features", "cashed", ["attentive-probe"], "input should be 'cached' or 'streamed'"),
        ("attentive-probe.epoch", "1", ["attentive-probe"], "--attentive-probe.epoch; the nearest is `attentive-"),
    ],
)  # fmt: skip
def test_what_is_refused(name: str, text: str, tasks: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_settings({name: text}, tasks)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_sentencepiece([f"a photo of a {i}" for i in range(10)] * 3 + ["zero one two three four"] * 3, 400)
    model = LCL(Model(Vision(16, 4, 64, 1, 4, 128), Language(64, tokenizer.vocab_size, 48, 1, 4, 96), 4))
    save_checkpoint(model, Config(model=model.config), folder)
    tokenizer.save(folder / "words.model")
    return folder


def measured(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["evaluate", *arguments, "--output", str(folder / "out")]) == 0
    return json.loads((folder / "out" / "results.json").read_text())


def test_each_reaches_its_task(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Results say the settings that they were measured with; what is chosen changes what is measured."""
    common = ["--model", str(checkpoint), "--tokenizer", str(checkpoint / "words.model"), "--data", str(folder)]
    common += ["--cache", str(tmp_path / "cache")]
    tasks = [word for task in ("zero-shot", "knn", "linear-probe", "attentive-probe") for word in ("--task", task)]
    chosen = {
        "knn.k": 3,
        "knn.temperature": 0.5,
        "linear-probe.strengths": [0.5],
        "linear-probe.max-iterations": 500,
        "attentive-probe.epochs": 2,
        "attentive-probe.batch-size": 50,
        "attentive-probe.lr": 0.01,
        "attentive-probe.weight-decay": 0.3,
        "attentive-probe.warmup": 0.2,
        "attentive-probe.heads": 2,
        "attentive-probe.seeds": [4],
    }
    words = [word for name, value in chosen.items() for word in (f"--{name}", json.dumps(value))]
    prompts = ["--zero-shot.prompts", "['{c}', 'a {c}', 'one {c}']"]
    results = measured(tmp_path, *common, *tasks, *words, *prompts)
    said = dict(
        zip(("zero-shot", "knn", "linear-probe", "attentive-probe"), (r["settings"] for r in results), strict=True)
    )
    assert said["zero-shot"]["prompts"] == ["{c}", "a {c}", "one {c}"]
    for name, value in chosen.items():
        task, option = name.split(".")
        assert said[task][option.replace("-", "_")] == value, name
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".npy"] * 4 + [".txt"] * 2

    one = measured(tmp_path, *common, "--task", "zero-shot", "--zero-shot.prompts", "{c}")[0]["metrics"]
    other = measured(tmp_path, *common, "--task", "zero-shot", "--zero-shot.prompts", "zero one {c}")[0]["metrics"]
    assert one != other
    (tmp_path / "prompts.txt").write_text("{c}\n")
    file = ["--templates", str(tmp_path / "prompts.txt")]
    assert measured(tmp_path, *common, "--task", "zero-shot", *file)[0]["metrics"] == one


def test_captions_of_a_prompt(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    image = str(next((folder / "test").rglob("*.png")).relative_to(folder))
    entry = {"filename": image, "split": "test", "sentences": [{"raw": "a zero"}]}
    (tmp_path / "coco.json").write_text(json.dumps({"images": [entry]}))
    common = ["--model", str(checkpoint), "--tokenizer", str(checkpoint / "words.model"), "--images", str(folder)]
    common += ["--data", str(tmp_path / "coco.json"), "--task", "captioning", "--cache", str(tmp_path / "cache")]

    def written(*options: str) -> str:
        (result,) = measured(tmp_path, *common, *options)
        assert result["settings"]["prompt"] == dict(zip(options[::2], options[1::2], strict=True)).get(
            "--captioning.prompt", ""
        )
        return json.loads((tmp_path / "out" / "captions.jsonl").read_text())["caption"]

    plain = written()
    assert written("--captioning.prompt", "one two three") != plain
    assert plain.startswith(written("--captioning.max-tokens", "2"))
    drawn = {written("--captioning.top-p", "1", "--captioning.temperature", t) for t in ("0.01", "1", "5")}
    assert len(drawn) == 3


def test_options_of_data_are_refused_with_a_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--split", "x"], ["--knn.k", "3"], ["--cache", "x"], ["--templates", "x"], ["--skip-bad-images"]):
        assert main(["evaluate", "--model", "m", "--corpus", "c", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{words[0]} goes with --data" in line
    assert main(["evaluate", "--model", "m", "--data", "d", "--task", "knn", "--templates", "x"]) == 2
    assert "--templates goes with --task zero-shot" in capsys.readouterr().err


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_a_class_is_the_mean_of_its_prompts_at_unit_norm(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a class whose prompts agree would lie nearer to every image than one whose prompts differ."""
    classes, prompts = ("mill", "lake", "sea", "hut", "cow"), ("{c}", "a {c}", "the {c} of it")
    texts = [prompt.replace("{c}", name) for name in classes for prompt in prompts]
    features = dict(zip(texts, np.random.default_rng(0).normal(size=(15, 8)).astype(np.float32), strict=True))

    class Encoder:
        def encode_texts(self, asked: Sequence[str]) -> torch.Tensor:
            assert len(asked) <= max(at_once, len(prompts))
            return torch.from_numpy(np.stack([features[text] for text in asked]))

    monkeypatch.setattr(zero_shot, "_TEXTS", at_once)
    found = zero_shot.class_features(Encoder(), classes, prompts)  # type: ignore[arg-type]
    for row, name in zip(found.numpy(), classes, strict=True):
        mean = sum(features[prompt.replace("{c}", name)] for prompt in prompts) / 3
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-5)
