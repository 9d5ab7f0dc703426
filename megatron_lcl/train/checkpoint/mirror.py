"""Copies of a run's checkpoints in object storage (`checkpoint.mirror`).

    s3://bucket/run/step-00001000/…   the files that the checkpoint's manifest names, then manifest.json

A checkpoint is written to the run folder first, as always, and copied once it is complete there. An object is whole or
not there, and the manifest is put last, so a copy with a manifest is complete; it is deleted manifest first.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_lcl.config import Checkpoint
from megatron_lcl.convert.remote import pinned
from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.manifest import MANIFEST, read_manifest, verify
from megatron_lcl.data.storage.store import Store, url_of
from megatron_lcl.data.storage.upload import put_files
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.checkpoint.folder import list_checkpoints, step_of, superseded


class Mirror:
    """The copies below a URL; used by one process of a run. Raises StorageError.

    only: the one that is looked at, by its name.
    """

    def __init__(self, url: str, only: str | None = None) -> None:
        self.store, self.only = Store(url), only

    def complete(self) -> list[str]:
        """Names of the checkpoints of which there is a whole copy, oldest first."""
        if self.only is not None:  # a web server lists nothing
            whole = step_of(Path(self.only)) >= 0 and self.store.exists(f"{self.only}/{MANIFEST}")
            return [self.only] if whole else []
        found = (Path(name) for name, _ in self.store.list())
        names = (path.parent.name for path in found if path.name == MANIFEST and len(path.parts) == 2)
        steps = (name for name in names if step_of(Path(name)) >= 0)
        return sorted(steps, key=lambda name: step_of(Path(name)))

    def upload(self, folder: Path, keep: Checkpoint | None) -> None:
        """Copy a checkpoint that is complete, and delete copies that are kept no longer or were interrupted.

        keep: None: all are. Copies of later steps go in any case: the run has gone back from them, by a rewind or to an
        earlier checkpoint, and would be resumed from what it has left.
        """
        self.store.delete([f"{folder.name}/{MANIFEST}"])  # of the same step, saved again after a rewind or a resume
        put_files(self.store, folder, read_manifest(folder), MANIFEST, f"{folder.name}/")
        complete = [Path(name) for name in self.complete() if step_of(Path(name)) <= step_of(folder)]
        kept = {copy.name for copy in complete} - {old.name for old in (superseded(complete, keep) if keep else ())}
        stale = [name for name, _ in self.store.list() if self._is_of_a_step(name) and Path(name).parts[0] not in kept]
        self.store.delete(sorted(stale, key=lambda name: Path(name).name != MANIFEST))

    def _is_of_a_step(self, name: str) -> bool:
        return step_of(Path(Path(name).parts[0])) >= 0

    def restore(self, run: Path) -> Path | None:
        """Fetch the newest copy into a run folder that has no checkpoint; None where there is none, or no need."""
        complete = self.complete()
        if list_checkpoints(run) or not complete:
            return None
        final = run / CHECKPOINTS / complete[-1]
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        source = Store(f"{self.store.url}/{final.name}")
        source.fetch([MANIFEST], temporary)
        names = list(read_manifest(temporary))
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        source.fetch(names, temporary)
        if faults := verify(temporary):
            shutil.rmtree(temporary)
            raise RunError(f"the copy {source.url} is damaged ({'; '.join(faults[:3])}); delete it, or restore it")
        for name in (*names, MANIFEST, "."):
            sync(temporary / name)
        temporary.rename(final)
        sync(final.parent)
        return final


def resumed(resume: str) -> Mirror | None:
    """The checkpoint that `checkpoint.resume` names by a URL, of a run its newest; None where it is no URL.

    UserError where there is none.
    """
    url = url_of(resume)
    if url is None:
        return None
    place, _, name = pinned(url).rpartition("/")
    mirror = Mirror(place, only=name)
    if not mirror.complete():
        raise UserError(
            f"checkpoint.resume = {url} is no checkpoint of a run; begin with its weights by --train.init_from {url}"
        )
    return mirror
