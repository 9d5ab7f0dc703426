"""What a run has not trained is not measured; untrained encoders are, in everything, if they are asked for as such."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lcl import LCL, load_model
from megatron_lcl.cli import main
from megatron_lcl.config import Config, EarlyPhase, Language, Model, Objective, Schedule, Train, Vision, load
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.evaluate.encoders.spec import parse_spec
from megatron_lcl.evaluate.heldout import check_tasks
from megatron_lcl.evaluate.trained import check_trained, untrained_pool
from megatron_lcl.objectives import create

OBJECTIVES = {
    "lcl": Objective(),
    "clip": Objective(name="clip"),
    "generation": Objective(name="generation"),
    "no-generation": Objective(generation_weight=0.0),
    "no-contrast": Objective(contrastive_weight=0.0),
    "coca": Objective(name="coca"),
    "no-captions": Objective(name="coca", generation_weight=0.0),
    "captions-alone": Objective(name="coca", contrastive_weight=0.0),
    "genlip": Objective(name="genlip"),
    "elsewhere": Objective(name="of_a_package_that_is_not_here"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each objective, all with the same weights, and their tokenizer."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer = train_sentencepiece([f"a photo of a {i}" for i in range(10)] * 3 + ["zero one two three four"] * 3, 400)
    model = LCL(Model(Vision(16, 4, 64, 1, 4, 128), Language(64, tokenizer.vocab_size, 48, 1, 4, 96), 4), seed=7)
    for name, objective in OBJECTIVES.items():
        (root / name).mkdir()
        save_checkpoint(model, Config(model=model.config, objective=objective, train=Train(seed=7)), root / name)
    tokenizer.save(root / "words.model")
    return root


def test_only_what_was_trained_is_measured(runs: Path) -> None:
    contrast, captions, images = ("zero-shot", "retrieval"), ("captioning",), ("knn", "linear-probe", "attentive-probe")
    allowed = {
        "lcl": (*contrast, *captions, *images),
        "clip": (*contrast, *images),
        "generation": (*captions, *images),
        "no-generation": (*contrast, *images),
        "no-contrast": (*captions, *images),
        "coca": (*contrast, *captions, *images),
        "no-captions": (*contrast, *images),
        "captions-alone": (*captions, *images),
        "genlip": (*captions, *images),
        "elsewhere": (*contrast, *captions, *images),  # not known
    }
    for name, tasks in allowed.items():
        for task in (*contrast, *captions, *images):
            if task in tasks:
                check_trained(str(runs / name), [task])
                continue
            with pytest.raises(UserError) as error:
                check_trained(str(runs / name), ["knn", task])
            said = str(error.value)
            assert said.startswith(f"{task}: {runs / name} has not learned it: objective.name = ")
            assert f"leave out --task {task}" in said
            assert "\n" not in said
            assert (" = 0 does not train" in said) == (name.startswith("no-") or name == "captions-alone")
        check_trained(f"random:{runs / name}", (*contrast, *captions, *images))
    for other in ("hf:x", "timm:x", "timm:x?pretrained=no", "open_clip:x@none"):
        with pytest.raises(UserError, match=f"captioning: {other.replace('?', '.')} has no language model"):
            check_trained(other, ["captioning"])
        check_trained(other, [*contrast, *images])


def test_weights_that_a_run_began_with_count(runs: Path, tmp_path: Path) -> None:
    """A run of clip from the weights of one that generates can write captions; so it may, where that is not known."""
    config = load(runs / "clip" / "config.yaml")
    for number, (before, fits) in enumerate((("lcl", True), ("no-generation", False), ("gone", True))):
        folder = tmp_path / str(number)
        folder.mkdir()
        begun = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(runs / before)))
        save_checkpoint(LCL(config.model), begun, folder)
        if fits:
            check_trained(str(folder), ["captioning"])
        else:
            with pytest.raises(UserError, match="captioning"):
                check_trained(str(folder), ["captioning"])


@pytest.mark.parametrize(
    "library",
    ["timm:x", "hf:org/x", "open_clip:ViT-B-32@openai", "vision=timm:x", "vision=timm:x,language=open_clip:y@z"],
)
def test_what_a_library_gives_a_run_is_no_training_of_it(runs: Path, tmp_path: Path, library: str) -> None:
    """No library has an attention pool or a head of ours: these are as the run's own objective has left them."""

    def begun(name: str) -> str:
        config = load(runs / name / "config.yaml")
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=library))
        (tmp_path / name).mkdir()
        save_checkpoint(load_model(runs / name), config, tmp_path / name)
        return str(tmp_path / name)

    check_trained(begun("lcl"), ["captioning", "zero-shot", "retrieval", "knn"])
    for name, untrained in (("clip", ["captioning"]), ("generation", ["zero-shot", "retrieval"])):
        folder = begun(name)
        for task in untrained:
            with pytest.raises(UserError, match=f"{task}: .* has not learned it"):
                check_trained(folder, [task])
        assert (untrained_pool(folder, ["knn"]) is not None) == (name == "generation")


def test_a_pool_that_was_not_trained_is_told(runs: Path) -> None:
    """Generation reads values and outputs of the pool; its query, which pooled features depend on, has no gradient."""
    for name in OBJECTIVES:
        said = untrained_pool(str(runs / name), ["linear-probe", "attentive-probe"])
        assert (said is not None) == (name in ("generation", "no-contrast", "captions-alone", "genlip")), name
        assert said is None or said.startswith(f"linear-probe: the attention pool of {runs / name} is untrained (obj")
    assert untrained_pool(str(runs / "generation"), ["attentive-probe", "captioning"]) is None
    assert untrained_pool(f"random:{runs / 'generation'}", ["knn"]) is None
    model = load_model(runs / "generation")
    special, patches = model.special, model.config.vision.num_patches
    ids = [special.sot, 3, special.soi, *[special.placeholder] * patches, special.eoi, 5, special.eot]
    model(torch.randn(1, 3, 16, 16), torch.tensor([ids])).generation_loss.backward()
    pool = model.pool
    for parameter in (pool.query, *pool.q.parameters(), *pool.k.parameters()):
        assert parameter.grad is None or not parameter.grad.any()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in pool.v.parameters())


def test_held_out_tasks_without_a_weight_are_left_out() -> None:
    assert check_tasks(Config(objective=OBJECTIVES["no-generation"]), ()) == ("retrieval",)
    assert check_tasks(Config(objective=OBJECTIVES["no-contrast"]), ()) == ("generation",)
    with pytest.raises(UserError, match=r"lcl with objective.generation_weight = 0 does not train what generation"):
        check_tasks(Config(objective=OBJECTIVES["no-generation"]), ("generation",))
    captions = Config(objective=OBJECTIVES["captions-alone"])  # which are not measured on the text of documents
    with pytest.raises(UserError, match=r"contrastive_weight = 0 does not train .*; leave them out \(of a run: eval"):
        check_tasks(captions, ())
    phases = Schedule(phases=(EarlyPhase(steps=1, contrastive_weight=1.0),))  # one of which contrasts
    assert check_tasks(dataclasses.replace(captions, schedule=phases), ()) == ("retrieval",)
    assert create(Config(objective=OBJECTIVES["no-contrast"])).tasks == ("retrieval", "generation")


def test_the_command_refuses_in_one_line_before_anything_is_read(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--data", str(folder), "--tokenizer", str(runs / "words.model"), "--cache", str(tmp_path / "cache")]
    models = ["--model", str(runs / "lcl"), "--model", str(runs / "generation")]
    assert main(["evaluate", *models, *words, "--task", "knn", "--task", "zero-shot"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "generation does not train image latents and texts' features in one space" in line
    assert not (tmp_path / "cache").exists()


def test_every_evaluation_of_an_untrained_model_of_ours(
    runs: Path, folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """`random:CONFIG` is the model of the config before its first step, with the tokenizer that it would have."""
    pytest.importorskip("pycocoevalcap")
    pytest.importorskip("sacrebleu")
    entries = [
        {"filename": str(p.relative_to(folder)), "split": "test", "sentences": [{"raw": p.parent.name}]}
        for p in sorted((folder / "test").rglob("*.png"))[:6]
    ]
    (tmp_path / "coco.json").write_text(json.dumps({"images": entries}))
    model = f"random:{runs / 'clip' / 'config.yaml'}"
    common = ["evaluate", "--model", model, "--tokenizer", str(runs / "words.model")]
    common += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    labeled = ["--task", "zero-shot", "--task", "knn", "--task", "linear-probe", "--task", "attentive-probe"]
    quick = ["--linear-probe.strengths", "1", "--attentive-probe.epochs", "1", "--attentive-probe.seeds", "0"]
    assert main([*common, "--data", str(folder), *labeled, *quick]) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())) == 4
    captioned = ["--data", str(tmp_path / "coco.json"), "--images", str(folder)]
    short = ["--captioning.max-tokens", "3"]
    assert main([*common, *captioned, "--task", "retrieval", "--task", "captioning", *short]) == 0
    assert [r["encoder"] for r in json.loads((tmp_path / "out" / "results.json").read_text())] == [model] * 2


def test_random_is_the_config_and_the_seed(runs: Path) -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    trained = load_encoder(runs / "lcl")  # whose weights are those of seed 7
    same, other = (load_encoder(f"random:{runs / 'lcl'}?seed={seed}") for seed in (7, 8))
    # not to the last bit: where in memory weights lie decides how some CPUs round
    torch.testing.assert_close(same.encode(images).pooled, trained.encode(images).pooled, rtol=0, atol=1e-6)
    assert not torch.allclose(other.encode(images).pooled, trained.encode(images).pooled, atol=1e-3)
    assert load_encoder(f"random:{runs / 'lcl'}").fingerprint == load_encoder(f"random:{runs / 'clip'}").fingerprint
    with pytest.raises(UserError, match=r"no config file lcl_vitb23_pairs; .* such as lcl_vitb32_pairs"):
        load_encoder("random:lcl_vitb23_pairs")


def test_a_name_of_configs() -> None:
    from megatron_lcl.evaluate.encoders.untrained import _find_config

    assert _find_config("lcl_vitl14_blend").model.vision.layers == 24


def test_untrained_models_of_other_libraries(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the library itself draws them from the seed. Generators are left as they were, those of other devices too."""
    timm, open_clip = pytest.importorskip("timm"), pytest.importorskip("open_clip")
    data = next((folder / "test").rglob("*.png")).read_bytes()
    spec = "timm:vit_tiny_patch16_224?pretrained=no&seed=5"
    seeded: list[int] = []
    before = torch.get_rng_state()
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "manual_seed_all", seeded.append)
        encoder = load_encoder(spec)
    assert seeded == []
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    theirs = timm.create_model("vit_tiny_patch16_224").eval()
    image = encoder.prepare(data)[None]
    with torch.no_grad():
        assert torch.equal(encoder.encode(image).patches, theirs.forward_features(image)[:, 1:])
    assert load_encoder(spec).fingerprint == encoder.fingerprint
    assert load_encoder("timm:vit_tiny_patch16_224?pretrained=no").fingerprint != encoder.fingerprint

    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    before: Any = open_clip.list_models()
    open_clip.add_model_config(tmp_path / "tiny.json")
    assert set(open_clip.list_models()) == {*before, "tiny"}
    encoder = load_encoder("open_clip:tiny@none?seed=5")
    torch.manual_seed(5)
    clip = open_clip.create_model("tiny").eval()
    image = encoder.prepare(data)[None]
    with torch.no_grad():
        assert torch.equal(encoder.encode(image).pooled, clip.encode_image(image))
    assert encoder.encode_texts(["a text"]).shape == (1, 16)


def test_what_a_name_says() -> None:
    assert parse_spec("runs/a?b=c").kind == ""
    assert parse_spec("random:a.yaml").seed == 0
    assert parse_spec("timm:x?pretrained=yes").seed is None
    assert parse_spec("open_clip:ViT-B-32@none?seed=3").seed == 3
    assert parse_spec("open_clip:ViT-B-32@what?.pt").name == "ViT-B-32@what?.pt"
    for text, said in (
        ("timm:x?pretrained=maybe", "neither yes nor no"),
        ("timm:x?sead=1", "takes no option 'sead'"),
        ("timm:x?seed=1", "only an untrained encoder has a seed"),
        ("open_clip:x@openai?seed=1", "only an untrained encoder has a seed"),
        ("hf:x?pretrained=no", "hf takes no option 'pretrained'; untrained encoders are random:CONFIG"),
        ("random:x?seed=-1", "no number from 0"),
    ):
        with pytest.raises(UserError, match=said.replace("?", ".")):
            parse_spec(text)
