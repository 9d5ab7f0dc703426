"""An export's folder: complete or not there, and never on top of something else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_lcl.convert.manifest import MANIFEST
from megatron_lcl.data.corpus.files import hash_file
from megatron_lcl.data.corpus.scratch import whole_folder
from megatron_lcl.filesystem import below, is_dir

CERTIFICATE = "certificate.json"
IMPORT = "import"
"""kind of folder that `import` writes"""
HAS_RUN = "run"
"""fact of an import's record: whether its config is that of the run that trained the weights; else only the sizes of
the model were known, as to earlier versions, which have not written it"""
EXPORTS = ("hf", "timm", "open_clip")
"""kinds of folders that `export` writes"""
_IMPORTED = "import.json"
RECORDS = (MANIFEST, CERTIFICATE, _IMPORTED)
"""of a checkpoint, an export, an import: the file that lists a folder's files"""
_BY_KIND = {IMPORT: (_IMPORTED, MANIFEST)}
"""names of the file that lists a folder's files, by kind; the first is written, the others earlier versions wrote"""


@contextlib.contextmanager
def new_folder(output: Path, kind: str) -> Iterator[Path]:
    """`whole_folder` for an export of a kind.

    An existing `output` must be empty, or an earlier export of the same kind that nothing was changed in since (as
    its record lists it); such an export is replaced. Raises UserError before any work otherwise.
    """
    with whole_folder(output, lambda place: why_foreign(place, kind)) as folder:
        yield folder


def write_record(folder: Path, kind: str, facts: dict[str, Any]) -> None:
    """The folder's record: the facts, and every file of the folder with its XXH3 (128 bits)."""
    files = {name: hash_file(folder / name) for name in _files(folder)}
    content = {"format": kind, **facts, "files": files}
    (folder / _records(kind)[0]).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_record(folder: Path, kind: str) -> tuple[str, dict[str, Any]] | None:
    """A folder's record, as (name of its file, content); None where the folder is not of this kind."""
    for name in _records(kind):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and content.get("format") == kind and isinstance(content.get("files"), dict):
            return name, content
    return None


def _records(kind: str) -> tuple[str, ...]:
    return _BY_KIND.get(kind, (CERTIFICATE,))


def why_foreign(output: Path, kind: str) -> str:
    """Why writing an export of this kind to `output`, which is not empty, would destroy something; "" where not."""
    if not is_dir(output):
        return "exists and is not a folder; give another --output"
    unchanged, names = False, _files(output)
    if record := read_record(output, kind):
        name, content = record
        unchanged = set(names) == {*content["files"], name} and all(
            hash_file(output / file) == digest for file, digest in content["files"].items()
        )
    what = kind if kind == IMPORT else f"{kind} export"
    return "" if unchanged else f"holds something else than an unchanged {what}; give another --output or remove it"


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in below(folder) if not is_dir(path))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON file as these libraries write theirs."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
