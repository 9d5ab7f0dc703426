"""Encoders of every library, through real exports; features by several processes."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_lcl import LCL, objectives
from megatron_lcl.config import Config, Data, Language, Model, Vision, from_dict
from megatron_lcl.config.schedule import EarlyPhase, Schedule
from megatron_lcl.convert.export import export_model, import_checkpoint, save_checkpoint
from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.tokenizer import SentencePieceTokenizer
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.data.prepare.train_tokenizer import train_sentencepiece
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import workers
from megatron_lcl.evaluate.captioning import caption
from megatron_lcl.evaluate.encoders.lcl import OurEncoder
from megatron_lcl.evaluate.encoders.load import EncoderSource, load_encoder
from megatron_lcl.evaluate.features import FeatureStore
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet
from megatron_lcl.evaluate.settings import CaptioningSettings
from megatron_lcl.evaluate.sources import open_images
from megatron_lcl.evaluate.zero_shot import accuracy, classify
from megatron_lcl.model.reference_format import open_clip_config
from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.forks import forkserver


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    words = ["a photo of a", "red", "green", "blue", "square", "circle", "the quick brown fox jumps over the lazy dog"]
    return train_sentencepiece([f"{a} {b}." for a in words for b in words], 400)


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> LCL:
    config = Model(Vision(32, 8, 64, 2, 4, 128), Language(64, tokenizer.vocab_size, 48, 2, 4, 96), 4)
    model = LCL(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def colors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("colors")
    generator = np.random.default_rng(0)
    for c, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir()
        for i in range(6):
            pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
            pixels[..., 2 - c] += 120
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(model: LCL, tokenizer: SentencePieceTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(model, Config(model=model.config), folder)
    tokenizer.save(folder / "words.model")
    return folder


@pytest.mark.parametrize("format", ["hf", "timm", "open_clip"])
def test_an_export_is_the_same_encoder(model: LCL, checkpoint: Path, colors: Path, tmp_path: Path, format: str) -> None:
    pytest.importorskip({"hf": "transformers"}.get(format, format))
    export_model(model, format, tmp_path / "out")
    spec = f"{format}:{'' if format == 'hf' else 'local-dir:'}{tmp_path / 'out'}"
    theirs, ours = load_encoder(spec), load_encoder(checkpoint)
    blobs = open_images(colors).images
    a = theirs.encode(torch.stack([theirs.prepare(b.read()) for b in blobs]))
    b = ours.encode(torch.stack([ours.prepare(b.read()) for b in blobs]))
    assert torch.allclose(a.patches, b.patches, rtol=1e-4, atol=1e-4)
    assert torch.allclose(a.pooled, b.pooled if format == "hf" else b.patches.mean(1), rtol=1e-4, atol=1e-4)
    if format != "open_clip":  # whose text tower is a placeholder
        with pytest.raises(ValueError, match="no text encoder"):
            theirs.encode_texts(["red"])
    assert theirs.fingerprint == load_encoder(spec).fingerprint != ours.fingerprint


def test_our_texts_are_read_at_soi(model: LCL, checkpoint: Path, tokenizer: SentencePieceTokenizer) -> None:
    encoder = load_encoder(checkpoint, checkpoint / "words.model")
    texts = ["a red square", "circle", "the quick brown fox " * 40]
    features = encoder.encode_texts(texts)
    for text, feature in zip(texts, features, strict=True):
        ids = [tokenizer.sot, *tokenizer.encode(text)[:62], tokenizer.eot]
        assert torch.allclose(model.encode_text(torch.tensor([ids]))[0], feature, atol=1e-5)
    assert encoder.encode_texts([]).shape == (0, features.shape[1])
    assert encoder.token_ids([]).shape == (0, 2)
    for read in (encoder.encode_texts, encoder.token_ids):
        assert torch.equal(read(iter(texts)), read(texts))
        with pytest.raises(ValueError, match=r"'a windmill' is one text"):
            read("a windmill")


def test_of_a_coca_run_texts_are_no_longer_than_its_contrast_has_read(
    model: LCL, checkpoint: Path, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Which leaves room for the caption's placeholders; texts of other runs fill the context."""
    words, text = checkpoint / "words.model", ["the quick brown fox " * 40]
    context, patches = model.config.language.context_length, model.config.vision.num_placeholders
    features = {}
    for name, tokens, room in (
        ("clip", 2048, context - 2), ("coca", 2048, context - patches - 4), ("coca", 48, (48 - patches - 6) // 2),
        ("genlip", 2048, context - 2), ("of-another-package", 2048, context - 2),
    ):  # fmt: skip
        folder = tmp_path / f"{name}-{tokens}"
        folder.mkdir()
        config = replace(Config(), data=Data(tokens_per_pack=tokens), model=model.config)
        save_checkpoint(model, replace(config, objective=replace(config.objective, name=name)), folder)
        encoder = load_encoder(folder, words)
        assert encoder.token_ids(text).shape == (1, room + 2), name
        features[name, tokens] = encoder.fingerprint
    assert features["clip", 2048] == features["genlip", 2048] == load_encoder(checkpoint).fingerprint
    assert len(set(features.values())) == 3
    # of smaller images in an early phase more text stood beside the caption's placeholders
    run = replace(config, train=replace(config.train, steps=4), objective=replace(config.objective, name="coca"))
    run = replace(run, data=Data(), schedule=Schedule(phases=(EarlyPhase(2, image_size=16),)))
    assert objectives.longest_text(run) == context - patches // 4 - 4


def test_zero_shot_from_checkpoint_to_result(checkpoint: Path, colors: Path, tmp_path: Path) -> None:
    encoder = load_encoder(checkpoint, checkpoint / "words.model")
    data = open_images(colors)
    result = accuracy(
        encoder, data, classify(encoder, data, FeatureStore(tmp_path, progress=False).features(encoder, data))
    )
    assert result.num_items == 18
    top_5 = result.metrics["accuracy, top 5"]
    assert (top_5.value, top_5.chance) == (1, 1)  # of three
    with pytest.raises(ValueError, match="--tokenizer"):
        load_encoder(checkpoint).encode_texts(["red"])


def test_the_encoder_of_a_callers_model_leaves_it_as_it_is(model: LCL, checkpoint: Path) -> None:
    own = deepcopy(model).train()
    encoder, images = OurEncoder("now", own), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found = encoder.encode(images)
    assert torch.allclose(found.pooled, load_encoder(checkpoint).encode(images).pooled, atol=1e-5)
    assert not found.pooled_on_device.requires_grad
    assert all(module.training for module in own.modules())
    assert all(parameter.requires_grad for parameter in own.parameters())
    elsewhere = LCL(model.config).to("meta")  # from where nothing can be moved
    assert OurEncoder("there", elsewhere).device == elsewhere.pool.query.device == torch.device("meta")
    loaded = load_encoder(checkpoint).module
    assert not any(module.training for module in loaded.modules())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_the_tokenizer_must_fit(model: LCL) -> None:
    other = train_sentencepiece(["other words entirely, and a few more of them"] * 5, 390)
    assert other.vocab_size != model.config.language.vocab_size
    with pytest.raises(ValueError, match="tokenizer has"):
        OurEncoder("x", model, other)


def test_the_tokenizer_is_that_of_the_runs_corpus(model: LCL, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"items": [{"text": "a red square"}]}')
    own = checkpoint / "words.model"
    preprocess("jsonl", tmp_path / "in.jsonl", tmp_path / "corpus", tokenizer=own)
    corpora = {"data": {"corpora": str(tmp_path / "corpus")}}
    (tmp_path / "run").mkdir()
    save_checkpoint(model, replace(from_dict(corpora), model=model.config), tmp_path / "run")
    assert load_encoder(tmp_path / "run", own).fingerprint == load_encoder(tmp_path / "run").fingerprint
    with pytest.raises(UserError, match="clip is another tokenizer than that of"):
        load_encoder(tmp_path / "run", "clip")


def test_the_tokenizer_of_weights_without_a_run_is_clips_by_its_size(
    model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("open_clip")
    monkeypatch.setattr(tokenizers, "load", cache(tokenizers.load))  # which takes seconds
    clip = tokenizers.load("clip")
    sized = LCL(replace(model.config, language=replace(model.config.language, vocab_size=clip.vocab_size)), seed=None)
    torch.save(sized.state_dict_open_clip(), tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(json.dumps(open_clip_config(sized.config)))
    import_checkpoint("open_clip", tmp_path / "m.pt", tmp_path / "imported")
    for name in ("m.pt", "imported"):
        assert load_encoder(tmp_path / name).tokenizer_fingerprint == clip.fingerprint


def test_nucleus_sampling_draws_anew_for_every_batch(checkpoint: Path, colors: Path) -> None:
    encoder = load_encoder(checkpoint, checkpoint / "words.model")
    assert isinstance(encoder, OurEncoder)
    same = open_images(colors).images[:1] * 4
    drawn = CaptioningSettings(max_tokens=4, top_p=1.0)
    written = [caption(encoder, same, drawn, s, batch_size=1, progress=False) for s in (0, 0, 7)]
    assert len(set(written[0])) == 4
    assert written[0] == written[1]
    assert not set(written[0]) & set(written[2])


@pytest.mark.slow
def test_several_processes_give_the_same(
    checkpoint: Path, colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = EncoderSource(str(checkpoint), str(checkpoint / "words.model"))(0)
    data = open_images(colors)
    images = data.images
    one = FeatureStore(tmp_path / "1", 4, progress=False).features(encoder, data)
    two = FeatureStore(tmp_path / "2", 4, processes=2).features(encoder, data)
    assert np.allclose(one, two, rtol=1e-4, atol=1e-5)
    assert [p.name for p in (tmp_path / "1").iterdir()] == [p.name for p in (tmp_path / "2").iterdir()]
    assert "100%" in capsys.readouterr().err
    assert isinstance(encoder, OurEncoder)
    # as from here on nothing new about the start: processes that need not import everything again
    monkeypatch.setattr(workers, "get_context", lambda _: forkserver())
    drawn = CaptioningSettings(max_tokens=5, top_p=0.9)
    captions = [caption(encoder, images, drawn, 0, 4, processes, progress=False) for processes in (1, 2)]
    assert captions[0] == captions[1]
    broken = ImageSet("x", (*images, FileBlob(checkpoint / "config.yaml")))
    with pytest.raises(ValueError, match=r"config\.yaml: "):
        FeatureStore(tmp_path / "3", 4, processes=2, progress=False).features(encoder, broken)
    assert list((tmp_path / "3").iterdir()) == []


def test_the_checkpoint_of_a_run_is_looked_for_once(model: LCL, tmp_path: Path) -> None:
    """The run saves its next one after the main process has loaded: what is cached is of the one that names it."""
    run = tmp_path / "run"

    def save(step: int, model: LCL) -> Path:
        folder = run / CHECKPOINTS / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_checkpoint(model, Config(model=model.config), folder)
        (folder / "manifest.json").write_text("{}")
        return folder

    first = save(1, model)
    for device in ("nowhere", "cuda"):  # no test but those of GPUs sees one
        with pytest.raises(UserError, match=f"^the device '{device}' cannot be used .*; give cpu, or cuda:0"):
            load_encoder(run, device=device)
    encoder = EncoderSource(str(run), devices=("cpu", "cpu:0"))(0)
    save(2, LCL(model.config, seed=2))
    assert (encoder.name, encoder.source) == (str(run), EncoderSource(str(first), devices=("cpu", "cpu:0")))
    assert encoder.source is not None
    again = encoder.source(1)
    assert again.device == torch.device("cpu:0")
    assert again.source == encoder.source
    assert again.fingerprint == encoder.fingerprint == load_encoder(first).fingerprint
    assert load_encoder(run).fingerprint != encoder.fingerprint


def load_refused(spec: str, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        load_encoder(spec)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_code_in_a_models_folder_is_never_run(model: LCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks the user
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import CLIPVisionConfig as C, CLIPVisionModel as M\n"
    export_model(model, "hf", tmp_path / "hf")
    (tmp_path / "hf" / "ev.py").write_text(code + "P = M\n")
    file = tmp_path / "hf" / "config.json"
    config = json.loads(file.read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoConfig": "ev.C", "AutoModel": "ev.M"}}
    file.write_text(json.dumps(config))
    load_refused(f"hf:{tmp_path / 'hf'}", "code of its own", "refused")

    pytest.importorskip("open_clip")
    export_model(model, "open_clip", tmp_path / "oc")
    (tmp_path / "oc" / "ev.py").write_text(code + "class T:\n    pass\n")
    (tmp_path / "oc" / "config.json").write_text('{"model_type": "of_its_own", "auto_map": {"AutoConfig": "ev.C"}}')
    (tmp_path / "oc" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["ev.T", null]}}')
    file = tmp_path / "oc" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"trust_remote_code": True}}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="refused"):
        load_encoder(f"open_clip:local-dir:{tmp_path / 'oc'}").encode_texts(["a text"])
    assert not ran.exists()


def test_models_whose_weights_are_not_all_there(model: LCL, tmp_path: Path) -> None:
    """The libraries fill in random ones; none of these may be evaluated."""
    names = {
        "hf": ("hf:", "model", "vision_model.encoder.layers.1.mlp.fc1.bias", "layers.1.mlp.fc1.bias"),
        "timm": ("timm:local-dir:", "model", "blocks.1.mlp.fc1.bias", "blocks.1.mlp.fc1.bias"),
        "open_clip": ("open_clip:local-dir:", "open_clip_model", "visual.ln_post.bias", "visual.ln_post.bias"),
    }
    for format, (prefix, stem, name, said) in names.items():
        pytest.importorskip({"hf": "transformers"}.get(format, format))
        folder = tmp_path / format
        export_model(model, format, folder)
        file = folder / f"{stem}.safetensors"
        tensors = load_file(file)
        save_file({key: value for key, value in tensors.items() if key != name}, file, {"format": "pt"})
        load_refused(f"{prefix}{folder}", said)
        save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, {"format": "pt"})
        load_refused(f"{prefix}{folder}", said)
        file.unlink()
        load_refused(f"{prefix}{folder}", str(folder))
    load_refused("open_clip:RN50", "open_clip:RN50@PRETRAINED", "openai")


def test_what_decides_the_features_decides_the_fingerprint(model: LCL, tmp_path: Path) -> None:
    """Each change leaves the weights as they are, in another folder; a mere copy has the same fingerprint."""
    changes = {
        "hf": ("hf:", "config.json", ("num_attention_heads",), 2),
        "timm": ("timm:local-dir:", "config.json", ("model_args", "num_heads"), 2),
        "open_clip": ("open_clip:local-dir:", "open_clip_config.json", ("model_cfg", "vision_cfg", "head_width"), 32),
    }
    for format, (prefix, name, path, value) in changes.items():
        pytest.importorskip({"hf": "transformers"}.get(format, format))
        export_model(model, format, tmp_path / format)
        for copy in ("copy", "other"):
            shutil.copytree(tmp_path / format, tmp_path / f"{format}-{copy}")
        file = tmp_path / f"{format}-other" / name
        config = json.loads(file.read_text())
        inner = config
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        file.write_text(json.dumps(config))
        first, copy, other = (load_encoder(f"{prefix}{tmp_path / format}{end}") for end in ("", "-copy", "-other"))
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(first.encode(image).pooled, other.encode(image).pooled, atol=1e-4)
        assert first.fingerprint == copy.fingerprint != other.fingerprint
    pool = tmp_path / "hf-copy" / "lcl" / "attention_pool.safetensors"
    tensors = load_file(pool)
    fingerprints = set()
    for heads, shift in (("4", 0), ("2", 0), ("4", 1)):
        tensors["k.weight"] = tensors["k.weight"].roll(shift, 0)  # the same sum
        save_file(tensors, pool, {"heads": heads})
        fingerprints.add(load_encoder(f"hf:{tmp_path / 'hf-copy'}").fingerprint)
    assert len(fingerprints) == 3


def test_a_model_that_is_trained_on_is_fingerprinted_again(model: LCL) -> None:
    """In any mode it gives the same features, and is what it was when it is loaded and frozen."""
    model = deepcopy(model).eval().requires_grad_(False)
    encoder = OurEncoder("trained on", model)
    frozen = encoder.fingerprint
    model.requires_grad_(True)
    assert [encoder.fingerprint for _ in (model.train(), model.eval())] == [frozen, frozen]
    assert OurEncoder("in training", model.train()).fingerprint == frozen
    with torch.no_grad():
        model.pool.query.add_(1.0)
    model.requires_grad_(False)
    assert encoder.fingerprint != frozen


def test_what_does_not_load(tmp_path: Path) -> None:
    for spec in ("timm:no_such_model", f"hf:{tmp_path}", "open_clip:no-such-model", str(tmp_path / "none")):
        with pytest.raises(ValueError) as error:
            load_encoder(spec)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_other_hugging_face_models(kind: str, tmp_path: Path, colors: Path) -> None:
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    vision = sizes | {"intermediate_size": 64}
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 50,
    }
    if kind == "clip":
        theirs = hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    elif kind == "siglip":
        theirs = hf.SiglipVisionModel(hf.SiglipVisionConfig(**vision))
    else:
        theirs = hf.Dinov2Model(hf.Dinov2Config(**sizes, mlp_ratio=2))
    theirs.eval().save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    images = torch.stack([encoder.prepare(b.read()) for b in open_images(colors).images[:3]])
    found = encoder.encode(images)
    pooled, patches = found.pooled, found.patches
    with torch.no_grad():
        if kind == "clip":
            out = theirs.vision_model(images)
            expected = theirs.vision_model.post_layernorm(out.last_hidden_state)[:, 1:]
            latent = theirs.visual_projection(out.pooler_output)
        else:
            out = theirs(images)
            expected, latent = out.last_hidden_state[:, -16:], out.pooler_output
    assert patches.shape == (3, 16, 32)
    assert torch.allclose(patches, expected, atol=1e-5)
    assert torch.allclose(pooled, latent, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_of_hugging_face_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP is trained on texts padded to one length, CLIP on texts as long as they are."""
    hf, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = ["<pad>", "<s>", "</s>", "a", "red", "green", "square", "circle"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 8, "max_position_embeddings": 9, "pad_token_id": 0, "bos_token_id": 1}
    config = {"vision_config": {**sizes, "image_size": 32, "patch_size": 8}, "text_config": {**text, "eos_token_id": 2}}
    torch.manual_seed(0)
    if kind == "clip":
        theirs = hf.CLIPModel(hf.CLIPConfig(**config, projection_dim=24))
    else:
        theirs = hf.SiglipModel(hf.SiglipConfig(**config))
    theirs.eval().save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    tokenizer = encoder.tokenizer_fingerprint
    texts = {"a red square": [1, 3, 4, 6, 2], "circle": [1, 7, 2], "a " * 20: [1, *[3] * 7, 2]}
    ours = torch.cat([encoder.encode_texts([text]) for text in texts])  # alone, so that no longer one pads it
    for found, ids in zip(ours, texts.values(), strict=True):
        row = torch.tensor([ids + [0] * (9 - len(ids) if kind == "siglip" else 0)])
        with torch.no_grad():
            out = theirs.get_text_features(input_ids=row)
        expected = out if isinstance(out, torch.Tensor) else out.pooler_output
        assert torch.allclose(found, torch.nn.functional.normalize(expected[0], dim=-1), atol=1e-5)
    assert load_encoder(f"hf:{tmp_path}").tokenizer_fingerprint == encoder.tokenizer_fingerprint == tokenizer
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("green", "brown"))
    assert load_encoder(f"hf:{tmp_path}").tokenizer_fingerprint != tokenizer
    assert encoder.encode_texts([]).shape == (0, ours.shape[1])
    with pytest.raises(ValueError, match="'a red square' is one text"):
        encoder.encode_texts("a red square")
    with pytest.raises(UserError, match="no LCL model, whose texts become token ids"):
        encoder.token_ids(["a red square"])
    loads = []
    monkeypatch.setattr(hf.AutoTokenizer, "from_pretrained", lambda *a, **k: loads.append(a))
    assert torch.allclose(encoder.encode_texts(list(texts)), ours, atol=1e-5)
    assert not loads  # kept


def test_a_pooler_without_weights_is_left_out(tmp_path: Path) -> None:
    """A classifier's checkpoint lacks what `AutoModel` puts behind the class token."""
    hf = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    theirs = hf.ViTForImageClassification(hf.ViTConfig(**sizes, intermediate_size=64)).eval()
    theirs.save_pretrained(tmp_path)
    hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = load_encoder(f"hf:{tmp_path}").encode(image)
    pooled, patches = found.pooled, found.patches
    with torch.no_grad():
        hidden = theirs.vit(image).last_hidden_state
    assert torch.allclose(pooled, hidden[:, 0], atol=1e-5)
    assert torch.allclose(patches, hidden[:, 1:], atol=1e-5)


def test_an_encoder_without_patch_tokens(resnet: str, tmp_path: Path, colors: Path) -> None:
    encoder = load_encoder(resnet)
    data, store = ImageSet("x", open_images(colors).images[:2]), FeatureStore(tmp_path / "c", progress=False)
    assert store.features(encoder, data).shape == (2, 16)
    with pytest.raises(ValueError, match="no patch tokens"):
        store.features(encoder, data, "patches")
    texts = encoder.encode_texts(["a red square", "a circle"])
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(texts[0], texts[1])
