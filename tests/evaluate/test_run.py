"""All tasks in one call, on real digits and a real checkpoint."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import struct
import sys
import tarfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data.corpora import random_documents, write_corpus
from evaluate.conftest import WORDS
from PIL import Image

from megatron_lcl import LCL, load_model
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Data, Language, Model, Vision
from megatron_lcl.convert.export import export_model, save_checkpoint
from megatron_lcl.convert.find import step_in_run
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import run
from megatron_lcl.evaluate.checking import find_bad
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.evaluate.image_set import FileBlob
from megatron_lcl.evaluate.run import evaluate
from megatron_lcl.evaluate.settings import AttentiveSettings, CaptioningSettings, KnnSettings, Settings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.train.telemetry.lines import remove_results_after


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_sentencepiece([f"a photo of a {i}" for i in range(10)] * 3 + ["zero one two three four"] * 3, 400)
    model = LCL(Model(Vision(16, 4, 64, 2, 4, 128), Language(64, tokenizer.vocab_size, 48, 1, 4, 96), 4))
    save_checkpoint(model, Config(model=model.config), folder)
    tokenizer.save(folder / "words.model")
    return folder


def test_labeled_images(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    export_model(load_model(checkpoint), "timm", tmp_path / "timm")
    results = evaluate(
        [checkpoint, f"timm:local-dir:{tmp_path / 'timm'}"],
        ["knn", "linear-probe", "attentive-probe"],
        folder,
        output=tmp_path / "out",
        settings=Settings(
            knn=KnnSettings(k=5),
            attentive_probe=AttentiveSettings(epochs=15, batch_size=32, lr=3e-3, seeds=(0,)),
        ),
        cache=tmp_path / "cache",
        progress=False,
    )
    values = {(r.task, r.encoder): r.metrics["accuracy"].value for r in results}
    assert len(values) == 6
    assert min(values.values()) > 0.3, values  # an untrained encoder still sees pixels; chance is 0.1
    assert sorted(os.listdir(tmp_path / "out")) == ["results.json", "results.png", "results.txt"]
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 6


def test_results_in_a_run_folder_name_the_step(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Of the run's own checkpoint, also in a folder inside; going back behind it removes them."""
    own = tmp_path / "run" / "checkpoints" / "step-00000003"
    shutil.copytree(checkpoint, own)
    for output, step in ((tmp_path / "run", 3), (tmp_path / "run" / "sketches", 3), (tmp_path / "elsewhere", None)):
        evaluate(
            [own, checkpoint],
            ["zero-shot"],
            folder,
            output=output,
            tokenizer=str(checkpoint / "words.model"),
            class_names=WORDS,
            cache=tmp_path / "cache",
            progress=False,
        )
        results = json.loads((output / "results.json").read_text())
        assert [result["step"] for result in results] == [step, None]
        assert json.loads((output / "gallery.json").read_text())["result"]["step"] == step
    average = own / "averages" / "ema"
    assert [step_in_run(tmp_path / "run", path) for path in (average, Path("hf:run/checkpoints/step-3"))] == [3, None]
    remove_results_after(tmp_path / "run", 2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "sketches"]
    assert not list((tmp_path / "run" / "sketches").iterdir())


def test_texts(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    images = sorted((folder / "test").rglob("*.png"))[:12]
    entries = [
        {"filepath": "", "filename": str(p.relative_to(folder)), "split": "test", "sentences": [{"raw": p.parent.name}]}
        for p in images
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    results = evaluate(
        [str(checkpoint)],
        ["retrieval", "captioning"],
        tmp_path / "coco.json",
        output=tmp_path / "out",
        images=folder,
        tokenizer=str(checkpoint / "words.model"),
        settings=Settings(captioning=CaptioningSettings(max_tokens=5)),
        cache=tmp_path / "cache",
        progress=False,
    )
    assert [r.task for r in results] == ["retrieval", "captioning"]
    captions = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert [Path(c["image"]) for c in captions] == images


def on_device(device: str, folder: Path, checkpoint: Path, output: Path) -> dict[str, Any]:
    """What `evaluate` says on a device of all tasks, by task, and of held-out documents; and the captions."""
    pytest.importorskip("pycocoevalcap")
    images = sorted((folder / "test").rglob("*.png"))[::10]
    entries = [
        {"filename": str(path.relative_to(folder)), "split": "test", "sentences": [{"raw": path.parent.name}]}
        for path in images
    ]
    output.mkdir()
    (output / "coco.json").write_text(json.dumps({"images": entries}))
    words = ["evaluate", str(checkpoint), "--device", device, "--tokenizer", str(checkpoint / "words.model")]
    words += ["--cache", str(output / "cache")]
    # one strength: of several a rounding could choose another
    probes = ["--attentive-probe.epochs", "3", "--attentive-probe.seeds", "0", "--linear-probe.strengths", "[1]"]
    for name, data, more, tasks in (
        ("labels", folder, probes, ("zero-shot", "knn", "linear-probe", "attentive-probe")),
        ("texts", output / "coco.json", ["--images", str(folder)], ("retrieval", "captioning")),
    ):
        named = [word for task in tasks for word in ("--task", task)]
        assert main([*words, "--data", str(data), *more, *named, "--output", str(output / name)]) == 0
    results = [
        result for name in ("labels", "texts") for result in json.loads((output / name / "results.json").read_text())
    ]
    found = {result["task"]: {n: metric["value"] for n, metric in result["metrics"].items()} for result in results}
    assert len(found) == 6
    captions = (output / "texts" / "captions.jsonl").read_text().splitlines()
    write_corpus(output / "corpus", random_documents(40, seed=5, mean_text=12.0))
    model = LCL(Model(Vision(16, 8, 32, 1, 2, 64), Language(48, 517, 32, 1, 2, 64), 2))
    (output / "run").mkdir()
    save_checkpoint(model, Config(model.config, Data(workers=0, cache=str(output / "documents"))), output / "run")
    for processes in ("1", "2"):
        words = ["evaluate", str(output / "run"), "--device", device, "--corpus", str(output / "corpus")]
        assert main([*words, "--processes", processes, "--output", str(output / f"heldout-{processes}")]) == 0
        found[processes] = json.loads((output / f"heldout-{processes}" / "heldout.json").read_text())
    return {**found, "captions": captions}


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_gpu_measures_what_the_cpu_does(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Both compute in float32 and add in other orders, so that features differ by 1e-6, or by 1e-3 where the device
    rounds products to TF32. No loss changes by more; a share does by the images that lie between two classes as near:
    allowed are 3 of 200 (probes, which add up their steps' differences, 6), 1 of 20 captions, and as many of the pairs
    of the documents as are 1 of 20."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = on_device("cpu", folder, checkpoint, tmp_path / "cpu")
    found = on_device("cuda", folder, checkpoint, tmp_path / "cuda")
    same_on_devices(found, expected)


def same_on_devices(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """As `test_a_gpu_measures_what_the_cpu_does` says."""
    assert found.keys() == expected.keys()
    assert sum(a != b for a, b in zip(found["captions"], expected["captions"], strict=True)) <= 1
    probe = 6 / 200
    shares = {"zero-shot classification": 3 / 200, "k-NN": 3 / 200, "linear probe": probe, "attentive probe": probe}
    for task, bound in {**shares, "retrieval": 1 / 10}.items():  # of 20 images, or of 10 texts
        for name, value in expected[task].items():
            wide = 5 if "per-class" in name else 1  # a class has 15 images at least
            assert found[task][name] == pytest.approx(value, abs=wide * bound + 1e-9), (task, name)
    for processes in ("1", "2"):
        ours, theirs = found[processes], expected[processes]
        assert theirs["pairs"] > 20
        for name in ("documents", "pairs", "targets", "images", "rules", "dtype"):
            assert ours[name] == theirs[name], name
        for name in ("contrastive_loss", "bits_per_token"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
        for name in (name for name in theirs if "recall_at" in name):
            assert ours[name] == pytest.approx(theirs[name], abs=1 / min(20, theirs["pairs"])), name


def test_what_does_not_fit(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    def refused(words: str, *tasks: str, data: Path = folder, **options: object) -> None:
        with pytest.raises(ValueError, match=words) as error:
            evaluate([str(checkpoint)], tasks, data, tmp_path / "out", cache=tmp_path, progress=False, **options)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
        assert os.listdir(tmp_path) == []

    refused("unknown task segmentation", "segmentation")
    refused("none given")
    with pytest.raises(UserError, match="tasks = 'knn' is one, where there may be several"):
        evaluate([checkpoint], "knn", folder)
    with pytest.raises(UserError, match=f"models = '{checkpoint}' is one"):
        evaluate(checkpoint, ["knn"], folder)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least one"):
        evaluate([], ["knn"], folder)
    refused(r"devices = 'cuda:0' is one.*\['cuda:0'\]", "knn", devices="cuda:0")
    refused("at least one", "knn", devices=())
    refused("no captions", "retrieval")
    refused("no folder 'train'", "knn", data=folder / "test")
    refused("k = 1000", "knn", settings=Settings(knn=KnnSettings(k=1000)))
    refused("--tokenizer", "zero-shot")
    refused("no split 'tset'", "knn", split="tset")
    for task in ("knn", "linear-probe", "attentive-probe"):
        refused("300 of the 300 images to be measured on .* give another --split or --train-split", task, split="train")


def test_what_ends_an_evaluation_is_known_before_any_image_is_encoded(
    folder: Path, checkpoint: Path, resnet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever model and task: those before have no features in the cache."""
    images = sorted((folder / "test").rglob("*.png"))[:4]
    entries = [{"filename": str(p), "split": "test", "sentences": [{"raw": p.parent.name}]} for p in images]
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    (tmp_path / "file").write_text("x")
    words, cache = str(checkpoint / "words.model"), tmp_path / "cache"

    def refused(said: str, tasks: tuple[str, ...], data: Path, *models: str, **options: Any) -> None:
        given = {"output": tmp_path / "out", "progress": False, "cache": cache, "tokenizer": words, **options}
        with pytest.raises(UserError, match=said) as error:
            evaluate([str(checkpoint), *models], tasks, data, **given)
        assert "\n" not in str(error.value)
        assert not list(cache.rglob("*.npy"))

    of_texts = ("retrieval", "captioning"), tmp_path / "coco.json"
    of_probes = ("knn", "attentive-probe"), folder
    refused("resnet.* gives no patch tokens", *of_probes, resnet)
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        refused(f"cannot write results into {output}: ", *of_probes, output=output)
    long = Settings(captioning=CaptioningSettings(prompt="zero one two three " * 20))
    refused("give a prompt of fewer than its", *of_texts, settings=long)
    language = dataclasses.replace(load_model(checkpoint).config.language, context_length=19)
    short = LCL(dataclasses.replace(load_model(checkpoint).config, language=language))
    (tmp_path / "short").mkdir()
    save_checkpoint(short, Config(model=short.config), tmp_path / "short")
    refused("a caption's start has 19 tokens", *of_texts, str(tmp_path / "short"))
    for library in ("pycocoevalcap", "sacrebleu"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, library, None)
            refused(f"captioning needs {library}", *of_texts)


def test_seed_reaches_the_attentive_probe_and_results_name_the_weights(
    folder: Path, checkpoint: Path, tmp_path: Path
) -> None:
    settings = Settings(attentive_probe=AttentiveSettings(epochs=1, lr=3e-3, seeds=(0, 1)))
    first, same, other = (
        evaluate([str(checkpoint)], ["attentive-probe"], folder, settings=settings, seed=seed, cache=tmp_path)[0]
        for seed in (0, 0, 1)
    )
    assert first == same
    assert (first.settings["seeds"], other.settings["seeds"]) == ((0, 1), (2, 3)), "no probe of both"
    assert other.settings["accuracy by seed"] != first.settings["accuracy by seed"]
    assert first.fingerprint == load_encoder(checkpoint).fingerprint


def test_a_run_that_saves_meanwhile_is_evaluated_as_it_was_found(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models after the first are loaded twice: when all are checked, and when their turn comes."""

    def save(step: int) -> Path:
        path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(checkpoint, path)
        model = load_model(checkpoint)
        model.pool.query.data += step
        save_checkpoint(model, Config(model=model.config), path)
        (path / "manifest.json").write_text("{}")
        return path

    def saves_meanwhile(*given: Any) -> Any:
        if not (tmp_path / "run/checkpoints/step-00000002").exists():
            save(2)
        return find_bad(*given)

    first = load_encoder(save(1)).fingerprint
    monkeypatch.setattr(run, "find_bad", saves_meanwhile)
    models = [str(checkpoint), str(tmp_path / "run")]
    results = evaluate(models, ["knn"], folder, settings=Settings(knn=KnnSettings(k=5)), cache=tmp_path, progress=False)
    assert [result.encoder for result in results] == models
    assert results[1].fingerprint == first != load_encoder(tmp_path / "run").fingerprint


@pytest.mark.parametrize("lacking", ["train", "test"])
def test_classes_that_are_numbers_may_lack_the_last_one_in_a_split(
    folder: Path, checkpoint: Path, tmp_path: Path, lacking: str
) -> None:
    image = next((folder / "test").rglob("*.png")).read_bytes()
    num = {"train": 3, "test": 3, lacking: 2}
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as tar:
            for label in range(num[split]):
                for name, data in (("png", image), ("cls", b"%d" % label)):
                    member = tarfile.TarInfo(f"{label}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (result,) = evaluate(
        [str(checkpoint)],
        ["knn"],
        tmp_path,
        settings=Settings(knn=KnnSettings(k=2)),
        cache=tmp_path / "cache",
        progress=False,
    )
    assert result.metrics["accuracy"].chance == pytest.approx(1 / 3)
    said = rf"test has no names of its {num['test']} classes, only numbers.*--class-names FILE"
    with pytest.raises(UserError, match=said):
        evaluate([str(checkpoint)], ["zero-shot"], tmp_path, cache=tmp_path / "cache", progress=False)


def test_command_line(
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Splits, seed and nucleus sampling reach the tasks; one line for what cannot be."""
    from megatron_lcl.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "learn").symlink_to(folder / "train")
    (tmp_path / "data" / "measure").symlink_to(folder / "test")
    command = [
        "evaluate",
        "--model",
        str(checkpoint),
        "--data",
        str(tmp_path / "data"),
        "--output",
        str(tmp_path / "out"),
    ]
    splits = ["--split", "measure", "--train-split", "learn", "--seed", "3"]
    assert main([*command, *splits, "--task", "linear-probe", "--linear-probe.strengths", "[1]"]) == 0
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (result["num_items"], result["settings"]["seed"]) == (200, 3)
    assert main([*command, *splits, "--task", "captioning", "--top-p", "1.5"]) == 2
    capsys.readouterr()
    model, other = ["evaluate", "--model", str(checkpoint)], ["--model", f"hf:{tmp_path}"]
    for arguments, words in (
        ([*model, *other, "--corpus", str(tmp_path)], "no LCL model"),
        ([*model, *model[1:], "--corpus", str(tmp_path), "--output", str(tmp_path / "one")], "one MODEL at a time"),
        ([*model, "--corpus", str(tmp_path), "--task", "knn"], "--task goes with --data"),
        ([*model, "--data", str(folder), "--task", "knn", "--device", "cuda:77"], "cuda:77"),
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said.splitlines()[-1]
        assert len(said.splitlines()) == 1
    assert not (tmp_path / "one").exists()


def huge_png(side: int) -> bytes:
    """A PNG whose header says side × side pixels, as a whole file would; nobody should get as far as to read more."""
    out = io.BytesIO()
    Image.new("1", (1, 1)).save(out, "PNG")
    header = struct.pack(">4sIIBBBBB", b"IHDR", side, side, 1, 0, 0, 0, 0)
    data = out.getvalue()
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def test_all_bad_images_are_found_before_any_is_encoded(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are named in one line; or skipped and counted, by option."""
    from megatron_lcl.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    first, *others = sorted((data / "test").rglob("*.png"))
    bad = {
        "huge": (others[-1].with_name("y.png"), huge_png(24_960), "too many pixels"),
        "cut": (others[40].with_name("z.png"), others[40].read_bytes()[:60], "truncated or damaged"),
        "page": (others[90].with_name("a.jpg"), b"<!doctype html><p>not found", "HTML, not an image"),
        "train": (next((data / "train").rglob("*.png")).with_name("x.png"), b"", "empty file"),
    }
    for file, content, _ in bad.values():
        file.write_bytes(content)
    command = ["evaluate", "--model", str(checkpoint), "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*command, "--task", "knn"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "3 of the 203 images of" in said
    for name in ("huge", "cut", "page"):
        file, _, reason = bad[name]
        assert f"{file} ({reason})" in said
    assert not list((tmp_path / "cache").rglob("*.npy"))
    assert os.listdir(tmp_path / "out") == []

    assert main([*command, "--task", "knn", "--task", "linear-probe", "--skip-bad-images"]) == 0
    table = capsys.readouterr().out
    assert "200 (3 bad skipped)" in table
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(r["num_items"], r["num_bad"], r["settings"]["bad train images"]) for r in results} == {(200, 3, 1)}
    named = (tmp_path / "out" / "bad_images.txt").read_text().splitlines()
    assert sorted(named) == sorted(f"{file}: {reason}" for file, _, reason in bad.values())
    # what is left is what it was without them
    for file, *_ in bad.values():
        file.unlink()
    clean = evaluate([str(checkpoint)], ["knn", "linear-probe"], data, progress=False)
    assert [r["metrics"]["accuracy"]["value"] for r in results] == [r.metrics["accuracy"].value for r in clean]

    for file in (*others, first):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"200 of the 200 .* and 180 more"):
        evaluate([str(checkpoint)], ["knn"], data, progress=False)
    with pytest.raises(UserError, match=r"no image of .* can be used"):
        evaluate([str(checkpoint)], ["knn"], data, progress=False, skip_bad_images=True)


def test_names_that_are_not_valid_unicode(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """They come from archives and disks of before Unicode; what was measured is written all the same."""
    data = tmp_path / os.fsdecode(b"caf\xe9")
    for split in ("train", "test"):
        for name in ("0 zero", "1 one"):
            (data / split / name).mkdir(parents=True)
            for i, file in enumerate(sorted((folder / split / name).iterdir())[:12]):
                shutil.copy(file, data / split / name / os.fsdecode(b"\xe9%d.png" % i))
        (data / split / "1 one").rename(data / split / os.fsdecode(b"caf\xe9"))
    bad = data / "test" / "0 zero" / os.fsdecode(b"caf\xe9.png")
    bad.write_bytes(b"")

    def evaluated(names: Path | None = None) -> None:
        evaluate(
            [str(checkpoint)],
            ["knn", "zero-shot"],
            data,
            output=tmp_path / "out",
            class_names=names,
            tokenizer=str(checkpoint / "words.model"),
            cache=tmp_path / "cache",
            progress=False,
            skip_bad_images=True,
        )

    with pytest.raises(UserError, match=r"class name 'caf\\udce9' is not valid UTF-8"):
        evaluated()
    (tmp_path / "names.txt").write_text("zero\none\n")
    evaluated(tmp_path / "names.txt")
    knn, _ = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert (knn["num_items"], knn["num_bad"]) == (24, 1)
    assert "caf\udce9" in knn["data"]
    assert "caf\udce9" in json.dumps(json.loads((tmp_path / "out" / "gallery.json").read_bytes()), ensure_ascii=False)
    named = (tmp_path / "out" / "bad_images.txt").read_text(encoding="utf-8")
    assert named.endswith("caf\\udce9.png: empty file\n")
    assert (tmp_path / "out" / "results.png").is_file()


@pytest.mark.parametrize(("bad", "reads_first", "reads_again"), [(None, 3, 1), (b"", 3, 2), (OSError("gone"), 4, 3)])
def test_what_is_cached_is_read_once(
    bad: bytes | OSError | None,
    reads_first: int,
    reads_again: int,
    folder: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """For the digests, by which both the check and the features are found, and with a bar.

    A check that finds a bad image is made again. Where one cannot be read those that are left are read once more.
    """
    reads: Counter[str] = Counter()
    read = FileBlob.read
    train, test = (open_images(folder, split).images for split in ("train", "test"))

    def counted(blob: FileBlob) -> bytes:
        reads[blob.name] += 1
        if isinstance(bad, OSError) and blob == test[-1]:
            raise bad
        return bad if isinstance(bad, bytes) and blob == test[-1] else read(blob)

    monkeypatch.setattr(FileBlob, "read", counted)
    num_good = len(test) - (bad is not None)
    for most, of_test in ((3, reads_first), (1, reads_again)):  # digest, check, features
        reads.clear()
        settings = Settings(knn=KnnSettings(k=5))
        evaluate([checkpoint], ["knn"], folder, settings=settings, cache=tmp_path, skip_bad_images=True)
        for images, number in ((train, most), (test, of_test)):
            assert {reads[image.name] for image in images[1:-1]} == {number}
            assert reads[images[0].name] == number + (most == 3)  # of a first image their shape
        bars = re.split(r"[\r\n]", capsys.readouterr().err)
        known = len(test) if isinstance(bad, bytes) else num_good
        whole = rf"reading {re.escape(str(folder / 'test'))}: 100%.* {known}/{known} "
        assert any(re.match(whole, bar) for bar in bars)
