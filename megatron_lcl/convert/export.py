"""Checkpoints out of and into our format, each a function that one command calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_lcl.config import Config, to_yaml
from megatron_lcl.convert import hf, open_clip, timm
from megatron_lcl.convert.card import Card, card_of
from megatron_lcl.convert.certificate import Features, check_images, compare, our_features
from megatron_lcl.convert.find import find_checkpoint, known_config
from megatron_lcl.convert.folder import HAS_RUN, IMPORT, new_folder, write_record
from megatron_lcl.convert.libraries import require, usual_defaults
from megatron_lcl.convert.load import load_model
from megatron_lcl.convert.resolution import at_image_size, on_cpu_in_float32
from megatron_lcl.convert.weights import save_parts
from megatron_lcl.errors import UserError
from megatron_lcl.model.lcl import LCL
from megatron_lcl.run_folder import CONFIG, WEIGHTS


class Writer(Protocol):
    """What the module of a format has."""

    @property
    def LIBRARY(self) -> str:
        """The library's package, as `libraries.require` takes it."""

    def check(self, model: LCL) -> None:
        """UserError where the format has no place for something of the model; asked on exports to any format."""

    def write(self, model: LCL, folder: Path, dtype: torch.dtype, card: Card) -> None:
        """All files but the certificate: the weights in `dtype`, the library's configs, and the model card."""

    def features(self, folder: Path, size: int) -> Features:
        """What the library computes of `check_images(size)`, from these files."""


_FORMATS: dict[str, Writer] = {"hf": hf, "timm": timm, "open_clip": open_clip}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(
    checkpoint: str | Path,
    format: str,
    output: str | Path,
    dtype: str = "float32",
    image_size: int | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another library's format, run both models on the same images, return the certificate.

    `checkpoint`: whatever `load_model` takes. `format`: hf, timm or open_clip. `dtype`: of the weights, float32
    or bfloat16. `image_size`: interpolate the position embedding to this size. `card`: default: `card_of` the
    checkpoint. The folder appears whole or not at all; UserError over the bound of 1e-5 (relative), or where `output`
    holds something else.
    """

    def load() -> tuple[LCL, Card]:
        found = find_checkpoint(Path(checkpoint))  # once: the run may save another before the card is made
        return load_model(found), card or card_of(found)

    return _export(load, format, Path(output), dtype, image_size)


def export_model(
    model: LCL,
    format: str,
    output: str | Path,
    dtype: str = "float32",
    image_size: int | None = None,
    card: Card | None = None,
) -> dict[str, Any]:
    """`export` of a model in memory, on any device and in any floating-point dtype; it stays as it is."""
    return _export(lambda: (on_cpu_in_float32(model), card or Card()), format, Path(output), dtype, image_size)


def _export(
    load: Callable[[], tuple[LCL, Card]], format: str, output: Path, dtype_name: str, image_size: int | None
) -> dict[str, Any]:
    if format not in _FORMATS:
        raise UserError(f"unknown export format {format!r}; there are {', '.join(_FORMATS)}")
    if dtype_name not in _DTYPES:
        raise UserError(f"unknown dtype {dtype_name!r}; there are {', '.join(_DTYPES)}")
    writer, dtype = _FORMATS[format], _DTYPES[dtype_name]
    versions = {"torch": torch.__version__, **require(writer.LIBRARY, f"format {format}")}
    with usual_defaults(), new_folder(output, format) as folder:
        model, card = load()
        if image_size is not None:
            model = at_image_size(model, image_size)
        _check_place(model, format)
        size = model.config.vision.image_size
        images = check_images(size)
        ours = our_features(model, images)
        rounded = ours if dtype == torch.float32 else our_features(model, images, dtype)
        writer.write(model, folder, dtype, card)
        del model  # one of the two models in memory at a time
        facts = compare(writer.features(folder, size), ours, rounded)
        facts = {"dtype": dtype_name, "image_size": size, "num_images": len(images), "versions": versions, **facts}
        write_record(folder, format, facts)
    return {"format": format, **facts}


def _check_place(model: LCL, format: str) -> None:
    """UserError for what the format has no place for; it names the formats that have."""
    refused = {}
    for name, writer in _FORMATS.items():
        try:
            writer.check(model)
        except UserError as error:
            refused[name] = error
    if format in refused:
        others = " or ".join(name for name in _FORMATS if name not in refused)
        raise UserError(f"{refused[format]}; {f'export to {others}' if others else 'nor has another format'}")


def import_checkpoint(
    format: str, input: str | Path, output: str | Path, model_config: str | Path | Mapping[str, Any] | None = None
) -> LCL:
    """A checkpoint in the reference's format as a folder of ours, which `load_model` reads, and `train.init_from`.

    `input`: whatever `load_model` takes; of a run, its newest weights alone, and its config. `model_config`: see
    `load_model`. Raises UserError as it does, and where `output` holds something else.
    """
    if format != "open_clip":
        raise UserError(f"unknown import format {format!r}; there is open_clip")
    with new_folder(Path(output), IMPORT) as folder:
        found = find_checkpoint(Path(input))
        model, run = load_model(found, model_config), known_config(found)
        model.need_language()
        config = Config(model=model.config) if run is None else replace(run, model=model.config)
        save_checkpoint(model, config, folder)
        write_record(folder, IMPORT, {"source": Path(input).name, HAS_RUN: run is not None})
    return model


def save_checkpoint(model: LCL, config: Config, folder: Path) -> None:
    """`model.safetensors` and `config.yaml` into a folder."""
    save_parts(dict(model.layers.named_parameters()), folder / WEIGHTS, torch.float32)
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
