"""`train.init_from` with models of timm, Hugging Face and OpenCLIP: both encoders of a CLIP model, or one of two each.

`convert.warm_start` knows what becomes what. Here the libraries' models are loaded, as `evaluate` loads them, and both
sides are run on the same images and texts, as an export is checked (`convert.certificate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import PIL.Image
import torch

from megatron_lcl.config import Language, Model
from megatron_lcl.convert.certificate import BOUND, check_images, our_features
from megatron_lcl.convert.warm_start import Tower, text_tower, vision_tower
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import Encoder
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.evaluate.encoders.spec import parse_spec
from megatron_lcl.model.activations import unit_norm
from megatron_lcl.model.layers import IMAGE_MEAN, IMAGE_STD, layer_kinds
from megatron_lcl.model.lcl import LCL


@dataclass(frozen=True)
class LibraryWeights:
    """What other libraries' encoders are under our names."""

    model: Model
    """theirs; the run's where they say nothing"""
    tensors: dict[str, torch.Tensor]
    """by our names, `{index}.name`, in that model"""
    unused: list[str]
    towers: Mapping[str, tuple[str, Encoder, Tower]]
    """by part: which library's model it is, the model, and what was made of it"""

    def compare(self) -> tuple[str, ...]:
        """Both sides run on the same images and texts, a line for each encoder. UserError over the bound."""
        has_text = "language" in self.towers
        small = Language(
            context_length=1, vocab_size=5, width=self.model.language.width, layers=1, heads=1, mlp_width=1
        )
        model = LCL(self.model if has_text else replace(self.model, language=small), seed=0, whole=has_text).eval()
        own = dict(model.layers.named_parameters())
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                own[name].copy_(torch.where(tensor.isnan(), own[name], tensor))
        lines = []
        for part, (spec, encoder, tower) in self.towers.items():
            if not tower.faithful:
                lines.append(
                    f"{spec} lacks a part of the {part} encoder that the model has, so the two were not compared"
                )
                continue
            ours, theirs = (_vision if part == "vision" else _text)(model, encoder)
            what = "patch tokens" if part == "vision" else "text features"
            if ours.shape != theirs.shape:
                raise UserError(
                    f"train.init_from: the {what} of {spec} are {_shape(theirs)}, and those of the model with its "
                    f"weights {_shape(ours)}; it is another architecture"
                )
            difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
            if not difference <= BOUND:
                raise UserError(
                    f"train.init_from: the {what} of {spec} and those of the model with its weights differ by "
                    f"{difference:.3g} (relative; the bound is {BOUND:g}); it is another architecture"
                )
            lines.append(f"{what} as {spec} computes them, to {difference:.1e} (relative)")
        return tuple(lines)


def read_libraries(text: str, specs: Mapping[str, str], ours: Model) -> LibraryWeights:
    """The encoders that `train.init_from` names. UserError where one does not load, or computes something else."""
    towers: dict[str, tuple[str, Encoder, Tower]] = {}
    encoders: dict[str, Encoder] = {}
    for part, spec in specs.items():
        if parse_spec(spec).kind == "timm" and part == "language" and specs.get("vision") == spec:
            continue  # a vision encoder alone
        encoder = encoders[spec] = encoders.get(spec) or load_encoder(spec)
        module: Any = encoder.module
        try:
            tower = vision_tower(module, *_pixels(encoder)) if part == "vision" else text_tower(module)
            if part == "vision" and tower is not None:
                _check_pixels(encoder)
        except UserError as error:
            raise UserError(f"train.init_from = {text}: {spec} does not fit the {part} encoder: {error}") from None
        if tower is not None:
            towers[part] = spec, encoder, tower
        elif len(set(specs.values())) > 1 or len(specs) == 1:
            raise UserError(f"train.init_from = {text}: {spec} has no {part} encoder")
    model = ours
    for part, (_, _, tower) in towers.items():
        model = replace(model, **{part: tower.config})  # type: ignore[arg-type]
    tensors = {
        f"{layer_kinds(model).index((kind, number))}.{name}": tensor
        for _, _, tower in towers.values()
        for (kind, number, name), tensor in tower.tensors.items()
    }
    return LibraryWeights(model, tensors, [name for _, _, tower in towers.values() for name in tower.unused], towers)


def _shape(features: torch.Tensor) -> str:
    return " x ".join(map(str, features.shape))


def _pixels(encoder: Encoder) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels that an encoder takes, as shares of white; by its settings."""
    own: Any = encoder
    if not hasattr(own, "_processor"):
        config = own._config if hasattr(own, "_config") else own.module.visual.preprocess_cfg
        return tuple(config["mean"]), tuple(config["std"])
    processor = own._processor  # it multiplies levels of 0 … 255 by a factor, and then normalizes; or not
    white = 255 * processor.rescale_factor if getattr(processor, "do_rescale", False) else 255
    normalizes = getattr(processor, "do_normalize", False)
    mean, std = (processor.image_mean, processor.image_std) if normalizes else ((0,) * 3, (1,) * 3)
    return tuple(m / white for m in mean), tuple(s / white for s in std)


def _check_pixels(encoder: Encoder) -> None:
    """UserError where the library's own preparation makes something else of pixels than `_pixels` says."""
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in _pixels(encoder))
    for color in ((0, 0, 0), (255, 255, 255), (255, 128, 0)):
        # a picture of one color stays that, however it is resized and cropped
        prepared = encoder.prepare(PIL.Image.new("RGB", (64, 64), color))
        found = prepared[:, prepared.shape[1] // 2, prepared.shape[2] // 2].double()
        levels = 255 * (found * std + mean)
        if not torch.allclose(levels, torch.tensor(color).double(), atol=0.1, rtol=0):
            expected = (torch.tensor(color) / 255 - mean) / std
            raise UserError(
                f"its library makes {_numbers(found)} of a pixel {list(color)}, where mean and standard deviation say "
                f"{_numbers(expected)}; what else it does to pixels the model does not do"
            )


def _numbers(values: torch.Tensor) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values.tolist())}]"


@torch.no_grad()
def _vision(model: LCL, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch tokens after the final norm, ours and theirs, of the images that exports are checked by."""
    images = check_images(model.config.vision.image_size)
    mean, std, m, s = (torch.tensor(c).view(3, 1, 1) for c in (*_pixels(encoder), IMAGE_MEAN, IMAGE_STD))
    return our_features(model, images).patches, encoder.encode((images * s + m - mean) / std).patches


@torch.no_grad()
def _text(model: LCL, encoder: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-norm features of random texts of several lengths."""
    special, length = model.special, min(model.config.language.context_length, 16)
    ids = torch.randint(1, special.sot, (4, length), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = special.sot
    for row, end in enumerate((length - 1, length // 2, 2, length - 2)):
        ids[row, end], ids[row, end + 1 :] = special.eot, 0
    module: Any = encoder.module
    if hasattr(module, "get_text_features"):
        out = module.get_text_features(input_ids=ids)
        theirs = out if isinstance(out, torch.Tensor) else out.pooler_output
    else:
        theirs = module.encode_text(torch.nn.functional.pad(ids, (0, _context(module) - length)))
    return model.encode_text(ids), unit_norm(theirs)


def _context(module: Any) -> int:
    """Tokens of a text as OpenCLIP's models take it."""
    return int(module.context_length)
