"""What looks like a checkpoint, as far as copies are concerned."""

from __future__ import annotations

from pathlib import Path

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.manifest import MANIFEST, fingerprint, manifest_text, read_manifest
from megatron_lcl.run_folder import CONFIG


def saved(folder: Path, step: int) -> Path:
    """What looks like a checkpoint."""
    made = folder / f"step-{step:08d}"
    (made / "state").mkdir(parents=True)
    (made / "state" / "a.pt").write_bytes(bytes([step]) * 1000)
    (made / "model.safetensors").write_bytes(bytes([step]) * 2000)
    files = {name: fingerprint(made / name) for name in ("state/a.pt", "model.safetensors")}
    (made / MANIFEST).write_text(manifest_text(files))
    return made


def with_config(folder: Path, config: Config) -> Path:
    """That checkpoint with the config of its run."""
    (folder / CONFIG).write_text(configs.to_yaml(config))
    files = {**read_manifest(folder), CONFIG: fingerprint(folder / CONFIG)}
    (folder / MANIFEST).write_text(manifest_text(files))
    return folder
