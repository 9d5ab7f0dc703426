"""What images a model takes, that torch's defaults of device and dtype change nothing of what it computes, and when its
memory is free again."""

from __future__ import annotations

import gc
import re
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torchvision.transforms.functional import normalize as torchvisions

from megatron_lcl import LCL, from_open_clip
from megatron_lcl.config import Language, Model, Vision
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD, normalize

CONFIG = Model(Vision(16, 8, 32, 1, 2, 64, registers=2), Language(16, 99, 24, 1, 2, 48), 2)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_a_model_is_freed_when_nobody_uses_it(pixels: torch.Tensor) -> None:
    """At once, not when Python looks for circles of references: on a GPU two models would be there until then."""
    model = LCL(CONFIG)
    model.encode_image(pixels).sum().backward()
    layers = [weakref.ref(layer) for layer in model.layers]
    gc.disable()
    try:
        del model
        assert [layer() for layer in layers] == [None] * len(layers)
    finally:
        gc.enable()


def test_uint8_and_floats_from_0_to_1_are_normalized_alike(pixels: torch.Tensor) -> None:
    expected = torchvisions(pixels.float() / 255, list(IMAGE_MEAN), list(IMAGE_STD))
    assert torch.equal(normalize(pixels), normalize(pixels / 255))
    assert torch.allclose(normalize(pixels), expected, atol=1e-6)
    assert normalize((pixels / 255).half()).dtype == torch.float32
    assert normalize(pixels[:0] / 255).shape == (0, 3, 16, 16)


def test_images_of_which_nobody_knows_what_they_mean_are_refused(pixels: torch.Tensor) -> None:
    model = LCL(CONFIG)
    for images in (pixels.float(), normalize(pixels), pixels / 255 * float("nan")):
        with pytest.raises(ValueError, match=r"floats from \S+ to \S+; those to be normalized are from 0 to 1: divide"):
            normalize(images)
    for dtype in (torch.int16, torch.int32, torch.int64, torch.bool):
        with pytest.raises(ValueError, match=f"images are {dtype}; give uint8, or floats"):
            normalize(pixels.to(dtype))
        with pytest.raises(ValueError, match=f"images are {dtype}; give uint8, or floats"):
            model.encode_image(pixels.to(dtype))
    assert torch.equal(model.encode_image(pixels), model.encode_image(normalize(pixels)))
    assert model.vision_tokens(pixels).shape == (2, 1 + 2 + 4, 32)  # as its docstring says


def test_patch_features_are_the_normed_patch_tokens_and_have_a_gradient(pixels: torch.Tensor) -> None:
    model = LCL(CONFIG)
    features = model.patch_features(pixels)
    assert features.shape == (2, 4, 32)
    assert torch.equal(features, model.pool.norm(model.vision_tokens(pixels))[:, 3:])
    features.square().sum().backward()
    assert all(p.grad is not None for p in [*model.patches.parameters(), *model.pool.norm.parameters()])


def test_token_ids_that_the_model_cannot_read_are_refused(pixels: torch.Tensor) -> None:
    model, text = LCL(CONFIG), torch.tensor([95, 5, 6, 96])
    expected = model.encode_text(text[None])
    assert torch.equal(model.encode_text(text[None].int()), expected)
    for read in (model.encode_text, partial(model, pixels[:0])):
        for wrong in (text, text[None, None], text[None, :0]):
            with pytest.raises(
                ValueError, match=re.escape(f"token_ids have the shape {tuple(wrong.shape)}; the model")
            ):
                read(wrong)
        with pytest.raises(ValueError, match=r"token_ids are torch\.float32; give int64"):
            read(text[None].float())
        for outside in (99, -1):
            with pytest.raises(
                ValueError, match=f"token_ids hold {outside}; the model's vocabulary has the ids 0 to 98"
            ):
                read(torch.tensor([[95, 5, outside, 96]]))


def test_a_state_dict_goes_back_with_the_models_own_config() -> None:
    model = LCL(replace(CONFIG, vision=replace(CONFIG.vision, registers=0)))
    back = from_open_clip(model.state_dict_open_clip(), model.config)
    assert back.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_the_encoder_is_exported_for_any_number_of_images(pixels: torch.Tensor) -> None:
    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = LCL(CONFIG)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.model.patch_features(images), self.model.encode_image(images)

    encoder = Encoder()
    exported = torch.export.export(encoder, (pixels,), dynamic_shapes=({0: torch.export.Dim("images")},)).module()
    more = torch.cat([pixels, 255 - pixels, pixels[:1]])
    for found, expected in zip(exported(more), encoder(more), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("other_torch_defaults")
def test_a_model_computes_the_same_whatever_torchs_defaults_are() -> None:
    with torch.device("cpu"):
        pixels = torch.arange(2 * 3 * 16 * 16).to(torch.uint8).view(2, 3, 16, 16)
        texts = torch.tensor([[95, 5, 6, 7, 96], [95, 8, 96, 0, 0]])
        in_half = LCL(CONFIG)
    torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        model = LCL(CONFIG)
        expected = model.encode_image(pixels), model.encode_text(texts)
    for name, value in model.state_dict().items():  # the same numbers, rounded
        assert torch.equal(in_half.state_dict()[name], value.to(in_half.state_dict()[name].dtype)), name
    torch.set_default_dtype(torch.bfloat16)
    assert torch.equal(model.encode_image(pixels), expected[0])
    assert torch.equal(model.encode_text(texts), expected[1])
    assert {p.device.type for p in LCL(CONFIG).parameters()} == {"meta"}
