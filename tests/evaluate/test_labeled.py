"""k-NN and zero-shot on labeled images during a run: in every layout what `evaluate` says of the checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed as dist
from audit_lines import read_audit
from data.corpora import jpeg, random_documents, write_corpus
from processes import run_processes
from train.resilience import fleet

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.loading.batch import PackedBatch
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.labeled import LabeledEvaluation, LabeledSets, open_labeled
from megatron_lcl.evaluate.run import evaluate
from megatron_lcl.evaluate.settings import KnnSettings, Settings, ZeroShotSettings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.zero_shot import class_features
from megatron_lcl.model.activations import Outputs
from megatron_lcl.model.lcl import LCL
from megatron_lcl.parallel.mesh import Axis, Mesh
from megatron_lcl.report.page import write_report
from megatron_lcl.train.engine import init_processes
from megatron_lcl.train.heldout import HeldOutMeter, check_heldout
from megatron_lcl.train.resilience.audit import Audit

CONFIG = """
model:
  vision: {{image_size: 16, patch_size: 8, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  language: {{context_length: 48, vocab_size: 517, width: 32, layers: 1, heads: 2, mlp_width: 64}}
  pool_heads: 2
data: {{corpora: {folder}/corpus, cache: {folder}/cache, tokens_per_pack: 64, workers: 1}}
optimizer: {{lr: 1.0e-2, warmup: 1}}
train: {{steps: 3, global_batch: 4, micro_batch: 2, log_every: 1, progress: false, evaluate_every: 2}}
evaluate: {{labeled: {folder}/labeled, neighbors: 3, prompts: ["a {{c}}", "one {{c}} by the big river"]}}
"""
CLASSES = ("blue lake", "green hill", "red mill")
PROMPTS = ("a {c}", "one {c} by the big river")


def picture(label: int, seed: int) -> bytes:
    """Noise with more of the class's color, so that some are right and some are wrong."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 200, (20, 24, 3))
    pixels[..., 2 - label] += rng.integers(0, 55)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labeled")
    write_corpus(folder / "corpus", random_documents(20, seed=1, mean_text=12.0))
    for split, number in (("train", 9), ("test", 7)):
        for label, name in enumerate(CLASSES):
            (folder / "labeled" / split / name).mkdir(parents=True)
            for i in range(number - label):  # numbers that two replicas cannot halve
                file = folder / "labeled" / split / name / f"{i}.png"
                file.write_bytes(picture(label, 100 * label + i + 1000 * (split == "test")))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def alone(config: configs.Config, model: LCL, rows: int, at_once: int = 1) -> LabeledEvaluation:
    """In this process, as a run without parallelism."""

    def forward(read: Sequence[PackedBatch] | None, num: int) -> list[tuple[PackedBatch, Outputs | None]]:
        assert read is not None
        assert len(read) == num
        return [(batch, model.layers(batch)) for batch in read]

    return LabeledEvaluation(config, Mesh(Axis(), Axis()), forward, rows, at_once)


@pytest.mark.parametrize(("rows", "at_once", "objective"), [(1, 1, "lcl"), (200, 3, "lcl"), (200, 1, "coca")])
def test_features_are_those_of_the_encoder(folder: Path, rows: int, at_once: int, objective: str) -> None:
    short = {"model.language.context_length": "12"} if objective == "coca" else {}  # 4 tokens of text beside a caption
    config = configs.load(folder / "config.yaml", {"objective.name": objective, **short})
    model = LCL(config.model, seed=3).eval()
    measured = alone(config, model, rows, at_once)
    test = measured.sets.test
    longest = 12 - 4 - 4 if short else None
    encoder = OurEncoder("ours", model, open_corpus(folder / "corpus").tokenizer, longest_text=longest)
    images = torch.stack([encoder.prepare(blob.read()) for blob in test.images])
    latents, kept, bad = measured._encode(test)
    assert latents is not None
    assert (len(kept), bad) == (len(test), [])
    torch.testing.assert_close(latents, encoder.encode(images).pooled, rtol=1e-5, atol=1e-6)
    texts = measured._class_features()
    expected = class_features(encoder, CLASSES, PROMPTS)
    torch.testing.assert_close(texts, expected, rtol=1e-5, atol=1e-6)
    assert (expected - expected.roll(1, 0)).norm(dim=1).min() > 1e-3, "or the classes could be exchanged"


def test_the_second_replica_takes_the_labels_of_its_images_that_decode(folder: Path) -> None:
    """Of four images one of the first replica's does not; it was the only one of a class, which the mean leaves out."""
    config = configs.load(folder / "config.yaml")
    measured = alone(config, LCL(config.model).eval(), 1)
    labels, features = np.array([0, 3, 2]), torch.eye(4)[[3, 2]]

    def gather_objects(own: Any) -> list[Any]:
        """With the number of the first replica's images, or the rank of their classes."""
        return [1 if isinstance(own, int) else np.zeros(1, np.int64), own]

    data: Any = SimpleNamespace(rank=1, size=2, gather_objects=gather_objects)
    measured.mesh = dataclasses.replace(measured.mesh, data=data)
    test = ImageSet("x", (FileBlob(Path("unread")),) * 3, labels, tuple("abcd"))
    found = measured._classify(features, test, None, None, torch.eye(4))
    assert found["zero_shot_accuracy"] == found["zero_shot_mean_per_class_recall"] == 1


def test_the_first_five_classes_are_the_top_5(folder: Path) -> None:
    """Of seven; the first image is of the class that is nearest to it, the second of the next, and so on."""
    config = configs.load(folder / "config.yaml")
    measured = alone(config, LCL(config.model).eval(), 1)
    features = torch.nn.functional.normalize(torch.arange(7.0, 0.0, -1.0).expand(7, 7))
    test = ImageSet("x", (FileBlob(Path("unread")),) * 7, np.arange(7), tuple("abcdefg"))
    found = measured._classify(features, test, None, None, torch.eye(7))
    names = ("zero_shot_accuracy", "zero_shot_accuracy_top_5", "chance", "chance_top_5")
    assert [found[name] for name in names] == pytest.approx([1 / 7, 5 / 7, 1 / 7, 5 / 7])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, ("--zero.stage", "3", "--contrast.strategy", "recompute")),
        (4, ("--parallel.pipeline", "2", "--parallel.tensor", "2")),
    ],
    ids=["zero3", "pipeline and tensor"],
)
def test_a_run_measures_what_evaluate_measures(
    folder: Path, size: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    bad = folder / "labeled/train/red mill/bad.png"
    bad.write_bytes(b"\x89PNG was a picture")
    try:
        said = fleet.train(run, "--config", str(folder / "config.yaml"), *layout, size=size)
        settings = Settings(knn=KnnSettings(k=3), zero_shot=ZeroShotSettings(prompts=PROMPTS))
        arguments = {"settings": settings, "cache": tmp_path / "cache", "progress": False, "skip_bad_images": True}
        knn, zero_shot = evaluate([str(run)], ["knn", "zero-shot"], folder / "labeled", **arguments)
    finally:
        bad.unlink()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "labeled/knn_accuracy" in line]
    assert [line["step"] for line in measured] == [2, 3]
    expected = {
        "knn_accuracy": knn.metrics["accuracy"].value,
        "zero_shot_accuracy": zero_shot.metrics["accuracy"].value,
        "zero_shot_accuracy_top_5": zero_shot.metrics["accuracy, top 5"].value,
        "zero_shot_mean_per_class_recall": zero_shot.metrics["mean per-class recall"].value,
        "chance": 1 / 3,
        "chance_top_5": 1.0,
    }
    for name, value in expected.items():
        assert measured[-1][f"labeled/{name}"] == pytest.approx(value, abs=1e-9), name
    assert 0 < expected["knn_accuracy"] < 1, "both kinds of pictures, or a mistake would not show"
    assert said.count("1 labeled images do not decode, first ") == 2
    assert "labeled images, after step 3: knn_accuracy " in said
    recorded = json.loads((run / "labeled.json").read_text())
    assert (recorded["step"], recorded["images"], recorded["train_images"]) == (3, 18, 24)
    assert (recorded["neighbors"], recorded["prompts"]) == (3, list(PROMPTS))
    page = write_report(run).read_text(encoding="utf-8")
    assert "labeled images" in page


NO_IMAGE = "an image that does not decode: not an image, or a format that cannot be read"


class Measuring:
    """A process of a run that measures labeled images: what it says and writes."""

    def __init__(self, config: configs.Config, run: Path, mesh: Mesh | None = None, forward: Any = None) -> None:
        """mesh: None: of one process. forward: None: by a whole model."""
        self.said: list[str] = []
        self.lines: list[dict[str, Any]] = []
        mesh, config = mesh or Mesh(Axis(), Axis()), configs.replace(config, train__output=str(run))
        model = LCL(config.model, seed=3).eval()
        stepper = SimpleNamespace(forward=forward or (lambda batches: [model.layers(batch) for batch in batches]))
        telemetry: Any = SimpleNamespace(say=self.said.append, write=self.lines.append)
        run.mkdir(exist_ok=True)
        audit = Audit(run, mesh.is_first)
        self.meter = HeldOutMeter(config, mesh, stepper, torch.device("cpu"), telemetry, audit, lambda: 0)


def failing_at(name: str) -> Callable[[FileBlob], bytes]:
    """`FileBlob.read` of a file server that has lost a file's handle."""
    read = FileBlob.read

    def fails(blob: FileBlob) -> bytes:
        if blob.path.name == name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(blob)

    return fails


def with_junk(folder: Path, data: Path, label: int, neighbors: int) -> configs.Config:
    """Of a copy of the data with 25 training images, of which one of this class does not decode."""
    shutil.copytree(folder / "labeled", data)
    (data / "train" / CLASSES[label] / "bad.png").write_bytes(b"\x89PNG was a picture")
    own = {"evaluate.labeled": str(data), "evaluate.tasks": "[knn]", "evaluate.neighbors": str(neighbors)}
    return configs.load(folder / "config.yaml", own)


def test_labeled_images_that_became_too_few_do_not_end_the_run(folder: Path, tmp_path: Path) -> None:
    """Files are counted before training; what does not decode is found by the first evaluation, and each later one."""
    run = Measuring(with_junk(folder, tmp_path / "data", 0, 25), tmp_path / "run")
    train = tmp_path / "data/train"
    few = f"k = 25 neighbors, but of {train} 24 images decode; of 1 that do not, the first: "
    few += f"{train / CLASSES[0] / 'bad.png'} ({NO_IMAGE})"
    for step in (1, 2):
        assert run.meter.measure(step), "no signal has broken it off"
        assert run.said == [f"not evaluated after step {step}: {few}"]
        run.said.clear()
    for file in (tmp_path / "data/test").rglob("*.png"):
        file.write_bytes(b"")
    assert run.meter.measure(3)
    assert run.said[0].startswith(f"not evaluated after step 3: no image of {tmp_path / 'data/test'} can be used; ")
    assert run.lines == []
    assert [(line["event"], line["step"]) for line in read_audit(tmp_path / "run")] == [
        ("not evaluated", step) for step in (1, 2, 3)
    ]
    assert read_audit(tmp_path / "run")[0]["reason"] == few


def test_a_fault_of_the_storage_makes_no_image_bad(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers would be those of another set. Once the storage answers again, they are of the whole one."""
    own = {"evaluate.tasks": "[knn]"}
    run, read = Measuring(configs.load(folder / "config.yaml", own), tmp_path / "run"), FileBlob.read
    monkeypatch.setattr(FileBlob, "read", failing_at("3.png"))
    assert run.meter.measure(1)
    named = folder / "labeled/test" / CLASSES[0] / "3.png"
    assert run.said == [
        f"not evaluated after step 1: 3 of the 18 images of {folder / 'labeled/test'} were not read: {named}: "
        "Stale file handle"
    ]
    monkeypatch.setattr(FileBlob, "read", read)
    assert run.meter.measure(2)
    assert "labeled/knn_accuracy" in run.lines[0]
    assert json.loads((tmp_path / "run/labeled.json").read_text())["images"] == 18


def measured_by_two(rank: int, config: configs.Config, run: str) -> list[list[str]]:
    """What a process of two says after three evaluations: in one the storage fails, in one an image more is bad."""
    torch.manual_seed(0)
    mesh = init_processes(config)
    width = config.model.language.width

    def forward(batches: Sequence[PackedBatch]) -> list[Any]:
        if mesh.pipeline.rank + 1 < mesh.pipeline.size:
            return [None] * len(batches)
        return [SimpleNamespace(latents=torch.randn(len(batch.image_valid), width)) for batch in batches]

    process, read = Measuring(config, Path(run), mesh, forward), FileBlob.read
    said = []
    for step, reading in enumerate((failing_at("bad.png"), read, read), 1):
        FileBlob.read = reading  # type: ignore[method-assign]
        if step == 3 and mesh.is_first:
            assert config.evaluate.labeled is not None
            (Path(config.evaluate.labeled) / "train" / CLASSES[0] / "0.png").write_bytes(b"")
        mesh.world.barrier()
        assert process.meter.measure(step)
        said.append(process.said[:])
        process.said.clear()
    dist.destroy_process_group()
    return said


@pytest.mark.parametrize("layout", ["data", "pipeline"])
def test_all_processes_go_on_without_what_one_of_them_cannot_read(layout: str, folder: Path, tmp_path: Path) -> None:
    """The last image, which the second replica reads, or the first pipeline stage."""
    config = with_junk(folder, tmp_path / "data", 2, 24)
    config = configs.replace(config, parallel__pipeline=2 if layout == "pipeline" else 1)
    first, second = run_processes(measured_by_two, 2, config, str(tmp_path / "run"), timeout=120.0)
    bad = tmp_path / "data/train" / CLASSES[2] / "bad.png"
    (stale,), (few,) = first[0], first[2]
    unread = f"1 of the 25 images of {tmp_path / 'data/train'} were not read: {bad}: Stale file handle"
    assert stale == f"not evaluated after step 1: {unread}"
    assert few.startswith("not evaluated after step 3: k = 24 neighbors, but of ")
    assert (second[0], second[2]) == ([stale], [few])
    assert first[1][0] == f"1 labeled images do not decode, first {bad}: {NO_IMAGE}"
    assert first[1][1].startswith("labeled images, after step 2: knn_accuracy ")
    assert second[1] == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"evaluate.neighbors": "25"}, "k = 25 neighbors"),
        ({"objective.name": "generation", "evaluate.tasks": "[zero-shot]"}, "generation does not train what zero-shot"),
        ({"evaluate.labeled": "{folder}/labeled/train"}, None),
        ({"evaluate.labeled": "{folder}/labeled/train", "evaluate.tasks": "[knn]"}, "has no folder 'train'"),
        ({"evaluate.labeled": "{folder}/nowhere"}, "nowhere"),
        ({"evaluate.labeled": "{folder}/corpus"}, "has no labels"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, overrides: dict[str, str], said: str | None) -> None:
    config = configs.load(folder / "config.yaml", {k: v.format(folder=folder) for k, v in overrides.items()})
    if said is None:
        assert open_labeled(config).tasks == ("zero-shot",), "no training images: what can be measured"
        return
    with pytest.raises(UserError) as refused:
        open_labeled(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def write_tar(folder: Path, seed: int = 0) -> None:
    """A WebDataset of an image of each of three classes."""
    with tarfile.open(folder / "0.tar", "w") as tar:
        for label in range(3):
            for name, data in (("png", picture(label, seed + label)), ("cls", b"%d" % label)):
                member = tarfile.TarInfo(f"{label}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def test_classes_without_names_are_not_classified_by_them(folder: Path, tmp_path: Path) -> None:
    """Of a WebDataset without names zero-shot is not chosen; asked for it is refused; with names it is measured."""
    for split, seed in (("train", 0), ("test", 9)):
        (tmp_path / split).mkdir()
        write_tar(tmp_path / split, seed)

    def config(**more: str) -> configs.Config:
        own = {"evaluate.labeled": str(tmp_path), **{f"evaluate.{name}": value for name, value in more.items()}}
        return configs.load(folder / "config.yaml", own)

    def opened(**more: str) -> LabeledSets:
        return open_labeled(config(**more))

    assert opened().tasks == ("knn",)
    said: list[str] = []
    telemetry: Any = SimpleNamespace(say=said.append)
    audit: Any = None
    HeldOutMeter(config(), Mesh(Axis(), Axis()), None, "cpu", telemetry, audit, lambda: 0)
    assert said == [f"zero-shot is not measured on {tmp_path / 'test'}: no classnames.txt gives the classes names"]
    assert opened(tasks="[knn]").left_out == ""
    for asked in ({"tasks": "[zero-shot]"}, {"labeled": str(tmp_path / "train")}):
        with pytest.raises(UserError, match="has no names of its 3 classes"):
            opened(**asked)
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES))
    assert (opened().tasks, opened().left_out) == (("knn", "zero-shot"), "")


def test_ids_in_place_of_names_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """ImageNet's folders have them; `evaluate` and training ask for a photo of each class's name."""
    names = ["n01440764", "n01443537", "mill"]
    for name in names:
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "0.jpg").write_bytes(jpeg(0))
    told = (
        f"{tmp_path / 'test'}: 2 of 3 class names are WordNet ids, and zero-shot asks for 'a photo of a n01440764.'; "
    )
    told += "give the classes names: "
    rename = "rename the folders (evaluate: or give --class-names FILE, a name a line for each folder, in the order of "

    def training(task: Any) -> configs.Config:
        own = configs.Evaluate(labeled=str(tmp_path), tasks=(task,))
        return configs.Config(evaluate=own, train=configs.Train(evaluate_every=1))

    with pytest.raises(UserError, match="train"):
        check_heldout(training("knn"))
    assert not caplog.messages, "k-NN asks for no names"
    check_heldout(training("zero-shot"))
    assert caplog.messages.pop() == f"{told}{rename}`LC_ALL=C ls`)"
    caplog.clear()
    open_labeled(training("zero-shot"))
    assert not caplog.messages, "the run, which does it next, does not repeat it"
    with pytest.raises(UserError, match="there is no"):
        evaluate([str(tmp_path / "model")], ["zero-shot"], tmp_path)
    assert caplog.messages == [f"{told}{rename}`LC_ALL=C ls`)"]
    caplog.clear()
    (file := tmp_path / "classnames.txt").write_text("\n".join(names))
    open_images(tmp_path, class_names=file).warn_of_ids()
    for folder in (tmp_path / "test").iterdir():
        shutil.rmtree(folder)
    write_tar(tmp_path / "test")
    open_images(tmp_path).warn_of_ids()
    assert caplog.messages == [f"{told}in {file}"] * 2
    file.write_text("mill\ntench\nn01443537")
    open_images(tmp_path).warn_of_ids()
    assert len(caplog.messages) == 2


@pytest.mark.slow
def test_tasks_and_data_must_fit_each_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (("--evaluate.labeled", "null"), "or labeled images: --evaluate.labeled DIR"),
        (("--evaluate.tasks", "[retrieval]"), "evaluate.tasks has retrieval, which needs evaluate.corpus"),
        (("--evaluate.tasks", "[knn]", "--evaluate.corpus", str(folder / "corpus")), "has no task on it; add one of"),
    ):
        words = ["--config", str(folder / "config.yaml"), "--train.output", str(folder / "refused")]
        assert main(["train", *words, "--processes", "1", *arguments]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-lcl")]
        assert said in line
        assert not (folder / "refused").exists()


def test_a_password_in_what_has_no_task_is_not_said() -> None:
    tree = {"train": {"evaluate_every": 2}}
    evaluate = {"corpus": "s3://user:planted@bucket/corpus", "labeled": "images", "tasks": ["knn"]}
    with pytest.raises(UserError, match="a URL with a user, a password or a query is not taken") as raised:
        check_heldout(configs.from_dict({**tree, "evaluate": evaluate}))
    assert "planted" not in str(raised.value)
