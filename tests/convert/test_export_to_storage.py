"""An export to object storage is the folder that a disk has, and is complete once its certificate is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lcl import LCL
from megatron_lcl.cli import main
from megatron_lcl.config import Config
from megatron_lcl.convert.export import save_checkpoint
from megatron_lcl.convert.folder import CERTIFICATE
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text
from megatron_lcl.data.storage.store import Store


def test_an_export_is_that_of_the_disk(
    model: LCL, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkpoint, put, order = tmp_path / "checkpoint", Store.put, list[str]()
    checkpoint.mkdir()
    save_checkpoint(model, Config(model=model.config), checkpoint)
    listed = {file.name: fingerprint(file) for file in checkpoint.iterdir()}
    (checkpoint / MANIFEST).write_text(manifest_text(listed))
    command = ["export", str(checkpoint), "--format", "timm", "--output"]
    monkeypatch.setattr(Store, "put", lambda self, name, content: (order.append(name), put(self, name, content)))
    assert main([*command, str(tmp_path / "out")]) == 0
    for file in checkpoint.iterdir():  # whose weights are elsewhere, too
        Store(f"{place}/checkpoint").put(file.name, file)
    order.clear()
    command[1] = f"{place}/checkpoint"
    assert main([*command, f"{place}/out"]) == 0
    assert f"{place}/out: " in capsys.readouterr().out
    store = Store(f"{place}/out")
    expected = {p.relative_to(tmp_path / "out").as_posix(): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert {name: store.get(name) for name, _ in store.list()} == {n: p.read_bytes() for n, p in expected.items()}
    assert order[-1] == CERTIFICATE
    assert main([*command, f"{place}/out"]) == 2
    assert f"{place}/out holds such an output already" in capsys.readouterr().err
