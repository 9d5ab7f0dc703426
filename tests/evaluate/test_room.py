"""The room that features take is known before any is computed; a streamed probe is the cached one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lcl import LCL
from megatron_lcl.cli import main
from megatron_lcl.config import Config, Language, Model, Vision
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.load import load_encoder
from megatron_lcl.evaluate.features import FeatureStore, Shapes
from megatron_lcl.evaluate.image_set import ImageSet
from megatron_lcl.evaluate.patches import StreamedPatches
from megatron_lcl.evaluate.probes import attentive_probe, fit_attentive
from megatron_lcl.evaluate.settings import AttentiveSettings
from megatron_lcl.evaluate.sources import open_images

Usage = namedtuple("Usage", "total used free")
SETTINGS = AttentiveSettings(epochs=2, batch_size=50, lr=3e-3, seeds=(0, 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = LCL(Model(Vision(16, 4, 64, 2, 4, 128), Language(64, 400, 48, 1, 4, 96), 4))
    save_checkpoint(model, Config(model=model.config), folder)
    return folder


@pytest.mark.parametrize(
    ("tokens", "width", "gigabytes"), [(196, 768, 386), (256, 1408, 924)], ids=["ViT-B/16", "ViT-g/14"]
)
def test_imagenet(tokens: int, width: int, gigabytes: int) -> None:
    """1,281,167 training images, a number of 16 bits each: what a site found on its disk."""
    shapes = Shapes("", "", {"pooled": (width,), "patches": (tokens, width)})
    assert round(shapes.num_bytes("patches", 1_281_167) / 1e9) == gigabytes
    assert shapes.num_bytes("pooled", 1_281_167) == 1_281_167 * width * 4


def test_too_little_room_is_refused_before_anything_is_computed(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "not yet" / "there"
    command = ["evaluate", "--model", str(checkpoint), "--data", str(folder), "--task", "knn", "--cache", str(cache)]
    probe = ["--task", "attentive-probe", "--attentive-probe.epochs", "1", "--attentive-probe.seeds", "0"]
    # 500 images of 16 patches of 64 numbers of 2 bytes, and 48 numbers of 4 bytes
    needed, asked = 500 * (16 * 64 * 2 + 48 * 4), []

    def usage(path: Path) -> Usage:
        asked.append(path)
        return Usage(0, 0, max(needed - 1, 0))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert main([*command, *probe]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{cache} would have to hold 0.0011 GB, and 0.0011 GB are free" in line
    assert "patches features, 300 images of 16 x 64 float16: 0.00061 GB" in line
    assert "pooled features, 200 images of 48 float32: 3.8e-05 GB" in line
    assert line.endswith("name another folder (--cache DIR), or have patch features computed in every epoch "
                         "(--attentive-probe.features streamed)")  # fmt: skip
    assert not list(cache.glob("*.npy"))
    assert asked[0] in cache.parents or asked[0] == cache

    # the same model named twice takes room once; what is there already takes none, and what is streamed
    needed = 500 * 48 * 4 + 1
    assert main([*command, *command[1:3], "--knn.k", "3"]) == 0
    needed = 0
    assert main(command) == 0
    assert main([*command, *probe]) == 2
    assert "pooled" not in capsys.readouterr().err.splitlines()[-1]
    assert main([*command, *probe, "--attentive-probe.features", "streamed"]) == 0
    assert not list(cache.glob("*patches*"))


def test_large_caches_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 2 * 10**12))
    data = open_images(folder)
    data.read_digests(progress=False)  # as the check for bad images does before
    shapes = Shapes("x", "x", {"pooled": (768,), "patches": (196, 768 * 10_000)})
    FeatureStore(tmp_path).check_room([shapes], [(data, "patches")])
    assert capsys.readouterr().err.strip() == f"602 GB of features go to {tmp_path} (2,000 GB free)"
    FeatureStore(tmp_path).check_room([shapes], [(data, "pooled")])
    FeatureStore(tmp_path, progress=False).check_room([shapes], [(data, "patches")])
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="would have to hold 4,817 GB"):
        FeatureStore(tmp_path).check_room([dataclasses.replace(shapes, fingerprint=str(i)) for i in range(8)],
                                          [(data, "patches")])  # fmt: skip


def test_streamed_is_bit_for_bit_cached_where_the_encoder_is(folder: Path, encoder, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """An encoder whose features of an image depend on nothing else gives the same probe, parameter for parameter."""
    train = open_images(folder, "train")
    store = FeatureStore(tmp_path, batch_size=32, progress=False)
    cached, streamed = (store.patches(encoder, train, streamed) for streamed in (False, True))
    assert isinstance(streamed, StreamedPatches)
    probes = [fit_attentive(patches, train.need_labels(), 10, SETTINGS, seed=1) for patches in (cached, streamed)]
    for (name, a), (_, b) in zip(*(probe.named_parameters() for probe in probes), strict=True):
        assert torch.equal(a, b), name
    untrained = fit_attentive(cached, train.need_labels(), 10, dataclasses.replace(SETTINGS, lr=1e-9), seed=1)
    assert not torch.allclose(untrained.classifier.weight, probes[0].classifier.weight, atol=1e-4)


def test_streamed_is_cached_with_a_real_encoder(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Its sums may differ in the last bit with the batch; the accuracies may not."""
    encoder = load_encoder(checkpoint)
    sets: tuple[ImageSet, ...] = open_images(folder, "train"), open_images(folder, "test")
    store = FeatureStore(tmp_path, batch_size=64, progress=False)
    results = []
    for streamed in (False, True):
        patches = [store.patches(encoder, data, streamed) for data in sets]
        results.append(attentive_probe("x", *sets, *patches, SETTINGS))
    assert results[0].metrics == results[1].metrics
    chosen = [np.array([5, 2, 100]), np.array([7])]
    for a, b in zip(*(store.patches(encoder, sets[0], s).batches(chosen) for s in (False, True)), strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.allclose(a, b, rtol=2e-3, atol=1e-5)  # at most float16's last bit


def test_the_command_streams(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    values = []
    for features in ("cached", "streamed"):
        words = ["--attentive-probe.epochs", "2", "--attentive-probe.seeds", "[0, 3]"]
        words += ["--attentive-probe.features", features, "--cache", str(tmp_path / features)]
        command = ["evaluate", "--model", str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out")]
        assert main([*command, "--task", "attentive-probe", *words]) == 0
        (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
        assert result["settings"]["features"] == features
        values.append((result["metrics"], result["settings"]["accuracy by seed"]))
    assert values[0] == values[1]
    assert len(list((tmp_path / "cached").glob("*-patches.npy"))) == 2
    assert not list((tmp_path / "streamed").glob("*.npy"))
