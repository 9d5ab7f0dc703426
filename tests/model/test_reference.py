"""The model against numbers that the method's public reference implementation gave on a small random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_lcl import LCL, from_open_clip
from megatron_lcl import config as configs
from megatron_lcl.train.optimizer import parameter_groups

BOUND = 1e-5


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, torch.Tensor]:
    return load_file(shared / "reference" / "lcl_tiny.safetensors")


@pytest.fixture(scope="module")
def metadata(shared: Path) -> dict[str, Any]:
    with safe_open(shared / "reference" / "lcl_tiny.safetensors", "pt") as file:
        return {key: json.loads(value) for key, value in file.metadata().items() if value[0] in "{["}


@pytest.fixture(scope="module")
def parameters(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[6:]: value for name, value in tensors.items() if name.startswith("param/")}


@pytest.fixture
def model(parameters: dict[str, torch.Tensor], metadata: dict[str, Any]) -> LCL:
    return from_open_clip(parameters, metadata["config"])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float(((ours - theirs).norm() / theirs.norm()).detach())


def test_parameters_survive_the_round_trip(model: LCL, parameters: dict[str, torch.Tensor]) -> None:
    back = model.state_dict_open_clip()
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], value) for name, value in parameters.items())


def test_published_names_and_shapes(shared: Path) -> None:
    from megatron_lcl.model.reference_format import model_config

    pool = {"pool_proj_type": "attn", "attn_num_heads": 8}
    for file, patch, context, width in (("ViT-B-32_mmc4", 32, 2048, 512), ("ViT-B-16_laion", 16, 280, 768)):
        config = {
            "embed_dim": width,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": patch},
            "text_cfg": {"context_length": context, "vocab_size": 49411, "width": width, "heads": 8, "layers": 12},
            "pool_project_cfg": pool,
        }
        published = json.loads((shared / "reference" / f"LCL_{file}.shapes.json").read_text())
        with torch.device("meta"):
            ours = LCL(model_config(config), seed=None).state_dict_open_clip()
        assert {name: list(value.shape) for name, value in ours.items()} == published


def test_initial_parameters_are_of_the_published_sizes() -> None:
    """CLIP's for its text tower (open_clip, `TextTransformer.init_parameters`), for both encoders."""
    vision = {"image_size": 32, "patch_size": 8, "width": 96, "layers": 2, "heads": 4, "mlp_width": 128, "registers": 4}
    language = {"context_length": 40, "vocab_size": 103, "width": 64, "layers": 5, "heads": 4, "mlp_width": 160}
    model = LCL(configs.from_dict({"model": {"vision": vision, "language": language, "pool_heads": 4}}).model, seed=0)
    v, d = 96**-0.5, 64**-0.5
    sizes = {"patches.projection.weight": (3 * 8 * 8) ** -0.5}
    sizes |= {f"patches.{name}": v for name in ("class_embedding", "registers", "positions")}
    for tower, count, width in (("vision", 2, v), ("language", 5, d)):
        block = {f"attention.{x}.weight": width for x in "qkv"} | {"mlp.up.weight": width / math.sqrt(2)}
        block |= dict.fromkeys(("attention.out.weight", "mlp.down.weight"), width / math.sqrt(2 * count))
        sizes |= {f"{tower}_blocks.{n}.{name}": size for n in range(count) for name, size in block.items()}
    sizes |= {"pool.query": 0.02, "pool.embedding.weight": 0.02, "pool.positions": 0.01, "pool.out.weight": d}
    sizes |= {f"pool.{x}.weight": v for x in "qkv"} | {"head.projection.weight": d, "head.vocabulary": 0.02}
    parts = {"patches": model.patches, "pool": model.pool, "head": model.head}
    parts |= {f"vision_blocks.{n}": block for n, block in enumerate(model.vision_blocks)}
    parts |= {f"language_blocks.{n}": block for n, block in enumerate(model.language_blocks)}
    found = {f"{part}.{name}": p.detach() for part, module in parts.items() for name, p in module.named_parameters()}
    assert len(found) == len(list(model.parameters()))
    assert sizes.keys() < found.keys()
    for name, values in found.items():
        if size := sizes.get(name):  # within four standard errors
            n = values.numel()
            assert float(values.std(correction=0)) == pytest.approx(size, rel=4 / math.sqrt(2 * n)), name
            assert float(values.mean()) == pytest.approx(0, abs=4 * size / math.sqrt(n)), name
        elif name != "head.log_scale":
            assert values.unique().tolist() == [float(name.endswith(".weight"))], f"{name}: norms 1, biases 0"


def test_outputs_and_losses(model: LCL, tensors: dict[str, torch.Tensor]) -> None:
    images, text = tensors["batch0/images"], tensors["batch0/text"]
    out = model(images, text)
    pooled, embeds = model.pool.pool(model.vision_tokens(images))
    assert relative(pooled, tensors["out/pooled"]) < BOUND
    assert relative(embeds, tensors["out/image_embeds"]) < BOUND
    assert relative(out.image_features, tensors["out/image_features"]) < BOUND
    assert relative(out.text_features, tensors["out/text_features"]) < BOUND
    assert relative(out.logit_scale, tensors["out/logit_scale"]) < BOUND
    assert relative(0.1 * out.contrastive_loss, tensors["out/contrastive_loss"]) < BOUND
    assert relative(out.generation_loss, tensors["out/generation_loss"]) < BOUND


def test_logits_and_labels(model: LCL, tensors: dict[str, torch.Tensor]) -> None:
    from megatron_lcl.model.activations import Activations
    from megatron_lcl.model.lcl import pack_padded

    text = tensors["batch0/text"]
    batch = pack_padded(text, (text != 0).sum(1), tensors["batch0/images"], model.config)
    x: Any = Activations.of(batch)
    for layer in model.layers[:-1]:
        x = layer(x)
    logits = model.head.logits(x.hidden[x.target_positions])
    assert torch.equal(x.targets[x.target_positions], tensors["out/labels"])
    assert relative(logits, tensors["out/logits"]) < BOUND


def test_gradients(model: LCL, tensors: dict[str, torch.Tensor]) -> None:
    out = model(tensors["batch0/images"], tensors["batch0/text"])
    (0.1 * out.contrastive_loss + out.generation_loss).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    ours = model.state_dict_open_clip()
    theirs = {name: tensors[f"grad/{name}"] for name in ours}
    total = float(torch.stack([g.double().norm() for g in theirs.values()]).norm())
    for name, gradient in theirs.items():
        error = float((ours[name] - gradient).norm())
        assert error <= 1e-5 * float(gradient.norm()) + 1e-8 * total, name


def test_five_optimizer_steps(
    model: LCL, tensors: dict[str, torch.Tensor], metadata: dict[str, Any], parameters: dict[str, torch.Tensor]
) -> None:
    settings = metadata["optimizer"]
    groups = parameter_groups(model.layers.named_parameters(), settings["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=settings["betas"], eps=settings["eps"])
    for step, expected in enumerate(tensors["traj"]):
        batch = f"batch{step % 2}"
        out = model(tensors[f"{batch}/images"], tensors[f"{batch}/text"])
        total = 0.1 * out.contrastive_loss + out.generation_loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        model.head.log_scale.data.clamp_(0, math.log(100))
        assert float(total.detach()) == pytest.approx(float(expected[2]), rel=5e-5)
        assert float(model.head.log_scale.detach()) == pytest.approx(float(expected[3]), rel=1e-5)


def test_decay_groups_are_the_references(model: LCL, metadata: dict[str, Any]) -> None:
    no_decay, _ = sorted(parameter_groups(model.layers.named_parameters(), 0.2), key=lambda g: g["weight_decay"])
    marked = {id(p) for p in no_decay["params"]}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.0 if id(parameter) in marked else 1.0)
    ours = {name for name, value in model.state_dict_open_clip().items() if not value.any()}
    assert ours == set(metadata["no_decay"])


def test_a_text_is_read_at_soi_in_place_of_eot(model: LCL) -> None:
    sot, eot, _, soi, _ = model.special
    texts = torch.tensor([[sot, 5, 6, 7, eot, 0, 0], [sot, 9, 8, 0, 0, 0, 0], [sot, 5, 6, eot, 0, 0, 0]])
    features = model.encode_text(texts)
    assert features.shape == (3, model.config.language.width)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    longer = model.encode_text(torch.tensor([[sot, 5, 6, 7, eot, 9, 8]]))
    assert relative(longer, features[:1]) < 1e-6, "what follows on its `<eot>` is not read"
    # the same feature is read at the `<soi>` of a document that begins so and goes on with an image
    p = model.config.vision.num_patches
    image = [soi] + [model.special.placeholder] * p + [model.special.eoi]
    document = torch.tensor([[sot, 5, 6, 7, *image, 4, eot]])
    size = model.config.vision.image_size
    out = model(torch.randn(1, 3, size, size), document)
    torch.testing.assert_close(features[:1], out.text_features)
    assert relative(features[1:2], model.encode_text(torch.tensor([[sot, 9, soi]]))) < 1e-6  # its last token gave way


def test_features_of_a_model_in_bfloat16_have_unit_norm(model: LCL) -> None:
    size = model.config.vision.image_size
    model.bfloat16()
    for features in (
        model.encode_image(torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))),
        model.encode_text(torch.tensor([[206, 5, 6, 207], [206, 9, 207, 0]])),
    ):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.double().norm(dim=1), torch.ones(len(features)).double(), rtol=0, atol=1e-6)


def test_mismatched_images_are_named(model: LCL) -> None:
    size = model.config.vision.image_size
    with pytest.raises(ValueError, match="2 images, but token_ids hold 0 `<soi>`"):
        model(torch.zeros(2, 3, size, size), torch.tensor([[206, 5, 207]]))
    p = model.config.vision.num_patches
    document = [206, 5, model.special.soi, *[model.special.placeholder] * p, model.special.eoi, 7, 207]
    for images in (torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, size, size)):
        with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\]"):
            model.encode_image(images)
        with pytest.raises(ValueError, match=r"\[N, 3, 32, 32\]"):
            model(images, torch.tensor([document]))


def test_under_autocast(model: LCL) -> None:
    """Linear layers give bfloat16 and embeddings float32; not every device's autocast brings them together."""
    size, p = model.config.vision.image_size, model.config.vision.num_patches
    image = [model.special.soi] + [model.special.placeholder] * p + [model.special.eoi]
    ids = torch.tensor([[206, 5, *image, 7, 9, 207], [206, 8, *image, 11, 207, 0]])
    images, texts = torch.randn(2, 3, size, size), torch.tensor([[206, 5, 6, 207], [206, 9, 207, 0]])

    def outputs() -> list[torch.Tensor]:
        out = model(images, ids)
        return [model.encode_image(images), model.encode_text(texts), *out[:4]]

    with torch.no_grad():
        expected = outputs()
        with torch.autocast("cpu", torch.bfloat16):
            found = outputs()
        hook = model.pool.out.register_forward_hook(lambda _module, _inputs, output: output.bfloat16())
        try:  # as on CUDA, whose autocast leaves `index_copy` alone
            rounded = outputs()
        finally:
            hook.remove()
    for several in (found, rounded):
        for ours, theirs in zip(several, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_missing_and_unknown_tensors_are_named(parameters: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    broken = {("extra" if name == "logit_scale" else name): value for name, value in parameters.items()}
    with pytest.raises(ValueError, match="lacks logit_scale and has the unknown extra"):
        from_open_clip(broken, metadata["config"])
    broken = {**parameters, "visual.class_embedding": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"visual\.class_embedding"):
        from_open_clip(broken, metadata["config"])
