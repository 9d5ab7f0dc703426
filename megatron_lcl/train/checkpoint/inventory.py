"""What `megatron-lcl checkpoint` does: list, verify and prune the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from megatron_lcl.config import load, replace
from megatron_lcl.convert.find import checkpoints_in, run_of
from megatron_lcl.convert.manifest import MANIFEST, Unread, read_manifest, verify
from megatron_lcl.errors import UserError
from megatron_lcl.run_folder import CHECKPOINTS, CONFIG
from megatron_lcl.train.checkpoint.folder import delete, half_deleted, read_progress, remove, step_of, superseded


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; or the one that the path is. UserError where it is neither."""
    found = checkpoints_in(path)
    if not found:
        raise UserError(f"{path} holds no checkpoint; name a run's folder (train.output), or one of its checkpoints")
    return found


def table(path: Path, quick: bool = False) -> str:
    """Step, time, size, layout and state of every checkpoint. `quick`: by the files' sizes, without reading them."""
    rows = [("step", "saved", "size", "layout", "state")]
    for folder in checkpoints_of(path):
        faults = verify(folder, quick)
        state = "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        rows.append((f"{step_of(folder):,}", *_facts(folder), state or ("complete" if quick else "verified")))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{step:>{widths[0]}}  {saved:<{widths[1]}}  {size:>{widths[2]}}  {layout:<{widths[3]}}  {state}"
        for step, saved, size, layout, state in rows
    )


def _facts(folder: Path) -> tuple[str, str, str]:
    try:
        size = sum(file["bytes"] for file in read_manifest(folder).values())
        saved = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return saved, f"{size / 1e6:,.1f} MB", str(read_progress(folder).layout)
    except (OSError, ValueError, TypeError, KeyError):
        return "?", "?", "?"


def faults(path: Path, quick: bool = False) -> Iterator[str]:
    """What is wrong with a run's checkpoints, one line a file."""
    for folder in checkpoints_of(path):
        for fault in verify(folder, quick):
            yield f"{folder.name}/{fault}"


def prune(
    run: Path, keep_last: int | None = None, keep_every: int | None = None, dry_run: bool = False
) -> Iterator[str]:
    """Delete a run's checkpoints but the newest `keep_last` that verify and those at multiples of `keep_every` steps.

    None: as the run's config says. Damaged ones go too, but not those of which a file cannot be read, and so does
    what deletions that were interrupted have left. Yields a line for each that cannot be read, and for each that is
    (or, with `dry_run`, would be) deleted. UserError, and nothing is deleted, where none verifies.
    """
    if step_of(run) >= 0:
        raise UserError(f"{run} is one checkpoint; prune takes the run's folder, {run_of(run)}")
    run = run_of(run)
    config = load(run / CONFIG)
    given = {"keep_last": keep_last, "keep_every": keep_every}
    keep = replace(config, **{f"checkpoint__{k}": v for k, v in given.items() if v is not None}).checkpoint
    found = {folder: verify(folder) for folder in checkpoints_of(run)}
    whole = [folder for folder, wrong in found.items() if not wrong]
    if not whole:
        raise UserError(f"no checkpoint of {run} verifies; nothing was deleted")
    old = set(superseded(whole, keep))
    deleted = "would delete" if dry_run else "deleted"
    for leftover in half_deleted(run / CHECKPOINTS):  # before others, which, where this fails, are left as well
        left = [] if dry_run else remove(leftover)
        yield f"{deleted} {leftover} (left by a deletion)"
        yield from (f"could not delete {fault}" for fault in left)
    for folder, wrong in found.items():
        if unread := next((fault for fault in wrong if isinstance(fault, Unread)), None):
            yield f"kept {folder}, which cannot be read ({unread})"
        elif wrong or folder in old:
            left = [] if dry_run else delete(folder)
            yield f"{deleted} {folder}" + (f" (damaged: {wrong[0]})" if wrong else "")
            yield from (f"could not delete {fault}" for fault in left)
