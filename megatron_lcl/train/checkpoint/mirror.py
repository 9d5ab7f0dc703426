"""Copies of a run's checkpoints in object storage (`checkpoint.mirror`).

    s3://bucket/run/step-00001000/…   the files that the checkpoint's manifest names, then manifest.json
    s3://bucket/run/run.json          the run whose copies these are, as its last start noted it (`Owner`)

A checkpoint is written to the run folder first, as always, and copied once it is complete there. An object is whole or
not there, and the manifest is put last, so a copy with a manifest is complete; it is deleted manifest first.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import NamedTuple

import yaml

from megatron_lcl.config import Checkpoint
from megatron_lcl.convert.manifest import MANIFEST, read_manifest, verify
from megatron_lcl.convert.remote import pinned
from megatron_lcl.data.corpus.files import sync
from megatron_lcl.data.corpus.upload import put_files
from megatron_lcl.data.storage.faults import StorageError
from megatron_lcl.data.storage.store import Store, url_of
from megatron_lcl.errors import RunError, UserError
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG
from megatron_lcl.train.checkpoint.folder import SMALL, give_name, list_checkpoints, step_of, superseded

RUN = "run.json"
_OUTPUT = "train.output"


class Owner(NamedTuple):
    """A run, as `RUN` tells of it. Where an earlier version, or a person, wrote that, only `output` is known."""

    output: str
    """its `train.output`, as the command gave it"""
    host: str = ""
    """the machine on which it was started last"""
    folder: str = ""
    """its run folder there: absolute, without links"""
    inode: int = 0
    """of that: a folder that is renamed keeps it, and a copy, or what another disk has at that place, has its own"""

    @classmethod
    def of(cls, output: str) -> Owner:
        """The run of this process; its folder is there."""
        folder = os.path.realpath(output)
        return cls(output, socket.gethostname(), folder, os.stat(folder).st_ino)

    @classmethod
    def from_json(cls, value: dict[str, object]) -> Owner:
        """TypeError, KeyError or AttributeError where it says no run."""
        inode = value.get("inode", 0)
        if not isinstance(inode, int):
            raise TypeError
        return cls(_text(value[_OUTPUT]), _text(value.get("host", "")), _text(value.get("folder", "")), inode)

    def to_json(self) -> str:
        return json.dumps({_OUTPUT: self.output, "host": self.host, "folder": self.folder, "inode": self.inode})


class Mirror:
    """The copies below a URL; used by one process of a run. Raises StorageError.

    only: the one that is looked at, by its name.
    """

    def __init__(self, url: str, only: str | None = None) -> None:
        self.store, self.only = Store(url), only
        self._older: set[str] = set()
        """whole copies that `keep_every` kept, when they were asked for last: of these thousands may be"""

    def complete(self) -> list[str]:
        """Names of the checkpoints of which there is a whole copy, oldest first."""
        if self.only is not None:  # a web server lists nothing
            whole = step_of(Path(self.only)) >= 0 and self.store.exists(f"{self.only}/{MANIFEST}")
            return [self.only] if whole else []
        return self._whole(self._copies())

    def _copies(self) -> list[str]:
        """Names of the copies, whole or not, oldest first. Nothing below them is listed: thousands may be kept."""
        names = (name for name in self.store.versions(deep=False) if step_of(Path(name)) >= 0)
        return sorted(names, key=lambda name: step_of(Path(name)))

    def _whole(self, copies: list[str], known: AbstractSet[str] = frozenset()) -> list[str]:
        asked = [name for name in copies if name not in known]
        manifests = self.store.head([f"{name}/{MANIFEST}" for name in asked])
        lacking = {name for name, manifest in zip(asked, manifests, strict=True) if not manifest}
        return [name for name in copies if name not in lacking]

    def _kept(self, copies: list[str], keep: Checkpoint | None) -> set[str]:
        """Those of the copies (oldest first) that are whole and stay.

        Of those that only `keep_every` keeps it is not asked again. They are not among the last ones, for which older
        copies go; where they come to be, as after a rewind, it is.
        """
        while True:
            whole = self._whole(copies, self._older)
            if keep is None:
                return set(whole)
            last = set(whole[-keep.keep_last :])
            if last.isdisjoint(self._older):
                break
            self._older -= last
        kept = set(whole) - {old.name for old in superseded([Path(name) for name in whole], keep)}
        self._older = kept - last
        return kept

    def owner(self) -> Owner | None:
        """The run whose copies are here; of copies without RUN, as earlier versions made them, the `train.output` of
        the newest one's config. None: there is no copy, or that is not known.

        UserError where what should say it is damaged, or is somebody else's file.
        """
        name = RUN
        try:
            if self.store.exists(RUN):
                return Owner.from_json(json.loads(self.store.get(RUN)))
            for copy in self.complete()[-1:]:
                if self.store.exists(name := f"{copy}/{CONFIG}"):
                    train = yaml.safe_load(self.store.get(name)).get("train", {})
                    return None if "output" not in train else Owner(_text(train["output"]))
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            raise UserError(
                f"{self.store.url}/{name} does not say of which run the copies there are: write "
                f'{{"{_OUTPUT}": "…"}} to {self.store.url}/{RUN}, with the train.output of that run, or name another '
                "checkpoint.mirror"
            ) from None
        return None

    def check_owner(self, output: str) -> Owner | None:
        """The owner (`owner`), which is the run with this `train.output`, or nobody yet. UserError where the copies
        here are another run's, which this one would go on from and delete.

        The text counts: the same command goes on with them on another machine. On the owner's another text of the same
        folder does too, and that of a folder that has been renamed.
        """
        owner = self.owner()
        if owner is None or Path(owner.output) == Path(output):
            return owner
        is_here = owner.host == socket.gethostname()
        if _is_same(owner.folder if is_here else owner.output, output) or (is_here and self._has_moved(owner, output)):
            return owner
        raise self._not_of(owner.output, output)

    def _has_moved(self, owner: Owner, output: str) -> bool:
        """Whether a run folder is the owner's, of this machine, under another name: there is none at the former name,
        this one has its inode, and the newest copy. (A folder that is deleted leaves its inode to a new one.)"""
        if os.path.lexists(owner.folder) or not os.path.exists(output) or os.stat(output).st_ino != owner.inode:
            return False
        newest = self.complete()[-1:]
        return any(self.has(folder) for folder in list_checkpoints(Path(output)) if folder.name in newest)

    def _not_of(self, owner: str, output: str) -> UserError:
        url, note = self.store.url, f"{self.store.url}/{RUN}"
        is_new = not self._copies()
        here = "is for" if is_new else "has"
        none = ", which has none there yet" if is_new else ""
        gone = f"if that run is given up, delete {note}; " if is_new else ""
        return UserError(
            f"checkpoint.mirror = {url} {here} the copies of the run with train.output = {owner}{none}, and this one "
            f"has train.output = {output}: give it a checkpoint.mirror of its own; to go on with that run, "
            f"--train.output {owner}; {gone}if this is that run under another name, write "
            f"{json.dumps({_OUTPUT: output}, ensure_ascii=False)} to {note}"
        )

    def claim(self, output: str, former: Owner | None = None) -> None:
        """Note that the copies here are those of the run with this `train.output`, whose folder is there; once nothing
        else can refuse it.

        former: what `check_owner` has given. UserError where another run has been noted since. Of two that do so at
        once both may believe it: whoever is not noted then finds that before it copies (`check_owner`).
        """
        this = Owner.of(output)
        if (owner := self.owner()) not in (former, this):
            self.check_owner(output)
        if owner != this:
            self.store.put(RUN, this.to_json().encode())
            self.check_owner(output)

    def has(self, folder: Path) -> bool:
        """Whether there is a whole copy of this very checkpoint, not of another of the same step."""
        name = f"{folder.name}/{MANIFEST}"
        return self.store.exists(name) and self.store.get(name) == (folder / MANIFEST).read_bytes()

    def upload(self, folder: Path, keep: Checkpoint | None, reached: int = 0) -> None:
        """Copy a checkpoint that is complete, and delete copies that are kept no longer or were interrupted.

        keep: None: all are. reached: the last step that this process has begun with or saved. Copies of steps from
        there down to the checkpoint's go in any case: the run has gone back from them, and would be resumed from what
        it has left. Later copies are not this process's, and stay.
        """
        if not self.has(folder):
            files = read_manifest(folder)
            self._older.discard(folder.name)
            self.store.delete([f"{folder.name}/{MANIFEST}"])  # of the same step, saved again after a rewind or a resume
            new = {f"{folder.name}/{name}" for name in files}
            self.store.delete([name for name, _ in self.store.list(folder.name) if name not in new])
            put_files(self.store, folder, files, MANIFEST, f"{folder.name}/")
        own, copies = step_of(folder), self._copies()
        kept = self._kept([name for name in copies if step_of(Path(name)) <= own], keep)
        self._delete([name for name in copies if step_of(Path(name)) <= max(own, reached) and name not in kept])

    def delete_later(self, step: int) -> None:
        """Delete copies of later steps, from which the run has gone back."""
        self._delete([name for name in self._copies() if step_of(Path(name)) > step])

    def _delete(self, copies: list[str]) -> None:
        self._older.difference_update(copies)
        objects = [name for copy in copies for name, _ in self.store.list(copy)]
        self.store.delete(sorted(objects, key=lambda name: Path(name).name != MANIFEST))

    def newest_for(self, run: Path) -> str | None:
        """The name of the copy that a run folder goes on from; None: there is none, or the folder has a checkpoint.

        UserError where the newest copy is later than all that the folder has: the run went on elsewhere, or the copy
        could not be deleted in a rewind, and which of the two is meant is not known.
        """
        complete, own = self.complete(), list_checkpoints(run)
        if own and complete and step_of(Path(complete[-1])) > step_of(own[-1]):
            raise UserError(
                f"the copy {self.store.url}/{complete[-1]} is later than {own[-1]}, the last checkpoint in this "
                f"folder: to go on from the copy, remove {run / CHECKPOINTS}; to go on from the folder, delete the "
                "later copies"
            )
        return complete[-1] if complete and not own else None

    def peek(self, name: str, folder: Path) -> Path:
        """Fetch of a copy what says where its run stood, into a new folder below this one, which it returns. RunError
        where that is damaged."""
        there, source = folder / name, Store(f"{self.store.url}/{name}")
        there.mkdir()
        source.fetch([MANIFEST, *SMALL], there)
        if faults := verify(there, only=SMALL):
            raise _damaged(source.url, faults)
        return there

    def restore(self, run: Path) -> Path | None:
        """Fetch the newest copy into a run folder that has no checkpoint; None where there is none, or no need.
        UserError as `newest_for`."""
        newest = self.newest_for(run)
        return None if newest is None else self._fetch(run / CHECKPOINTS / newest)

    def repair(self, folder: Path) -> str:
        """Put in the place of a damaged checkpoint the copy of this very one, if there is a whole one; what was done,
        in words, "" where nothing was."""
        try:
            if not self.has(folder):
                return ""
        except OSError:  # its manifest cannot be read: which checkpoint is it?
            return ""
        try:
            self._fetch(folder)
        except RunError:  # the copy is damaged too
            return ""
        except StorageError as error:
            if not error.missing:
                raise
            return ""
        return f"its copy in {self.store.url} has taken its place"

    def _fetch(self, final: Path) -> Path:
        """The copy of this name, whole, as this folder; RunError where it is damaged."""
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        source = Store(f"{self.store.url}/{final.name}")
        source.fetch([MANIFEST], temporary)
        names: list[str] = []
        if not (faults := verify(temporary, only=())):  # of the manifest itself
            names = list(read_manifest(temporary))
            for name in names:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            source.fetch(names, temporary)
            faults = verify(temporary)
        if faults:
            shutil.rmtree(temporary)
            raise _damaged(source.url, faults)
        for name in (*names, MANIFEST, "."):
            sync(temporary / name)
        give_name(temporary, final)
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


def _damaged(url: str, faults: list[str]) -> RunError:
    return RunError(f"the copy {url} is damaged ({'; '.join(faults[:3])}); delete it, or restore it")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _is_same(one: str, other: str) -> bool:
    """Whether two texts name one folder, which is there."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)
