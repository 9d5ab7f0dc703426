"""Documents in any known format → a corpus (`store.py`), and, where asked for, a second one of held-out documents.

The input is cut into tasks by its order and sizes alone (`cut.py`). Tasks write parts into `output/_unfinished`
(`preprocess_task.py`) in any order, by any number of processes or machines; one of n jobs does every n-th task. At the
end the parts get their shard numbers, and the manifest is written (`finish.py`). So the bytes never depend on who did
the work, a run that was killed resumes where it stopped, and running the same command several times at once, on any
machines, does no harm: see `data/corpus/scratch.py`.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from megatron_lcl.data.corpus import tokenizer as tokenizers
from megatron_lcl.data.corpus.corpus_manifest import MANIFEST, has_names, read_manifest
from megatron_lcl.data.corpus.document import CAPTIONED
from megatron_lcl.data.corpus.drops import LOG, Drops
from megatron_lcl.data.corpus.files import replace_bytes
from megatron_lcl.data.corpus.scratch import waiting_for_others
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.prepare import importers
from megatron_lcl.data.prepare.bars import Bars
from megatron_lcl.data.prepare.budget import Budget, Unusable
from megatron_lcl.data.prepare.chosen import FOLDER as CHOSEN
from megatron_lcl.data.prepare.chosen import Chosen, choose, kept
from megatron_lcl.data.prepare.cut import check_cut, cut, task_size
from megatron_lcl.data.prepare.finish import GROUPS_KEY, finish
from megatron_lcl.data.prepare.first_documents import FirstDocuments
from megatron_lcl.data.prepare.holdout import groups_hash
from megatron_lcl.data.prepare.importers import Importer, Unit
from megatron_lcl.data.prepare.importers.sources import images_signature
from megatron_lcl.data.prepare.preprocess_task import Part, TaskSettings, is_finished, parts_of, run_task
from megatron_lcl.data.prepare.unfinished import (
    WORK,
    clear_errors,
    clear_up,
    holds_work,
    is_finished_corpus,
    work_folder,
)
from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.data.storage.paths import path_of, reading
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists, is_dir, matching
from megatron_lcl.units import counted

TASK_BYTES = 32 << 20
"""a task is a run of units of at least so many bytes, of a large input of more (`cut.task_size`)"""
SHARD_BYTES = 4 << 30
SHARD_DOCUMENTS = 500_000
_WORK_VERSION = 4
"""version of the layout of unfinished work"""
_REPLACED = re.compile(r"document: invalid .* replaced")
_FEW_REPLACED = 3
"""notes of that kind that need no warning"""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a corpus holds and what was dropped on the way."""

    path: Path | str
    """of the folder, or where it was uploaded to"""
    counts: dict[str, int]
    """documents, pieces, tokens, placements, images, image_bytes"""
    drops: Drops
    vocab_size: int
    """0 while other jobs are not done"""
    reused: bool = False
    """the folder already held the finished corpus, and that of the held-out documents was there, too"""
    held_out: Summary | None = None
    held_out_fraction: float | None = None
    """of the documents, which was asked for"""

    def at(self, place: str, held_out: str | None) -> Summary:
        """The same, of corpora at these places."""
        rest = self.held_out
        if rest is not None and held_out is not None:
            rest = replace(rest, path=held_out)
        return replace(self, path=place, held_out=rest)

    def __str__(self) -> str:
        if not self.vocab_size:
            return f"{self.path}: this job is done, others are not yet"
        c = self.counts
        lines = [
            f"{self.path}: {counted(c['documents'], 'document')}, {counted(c['tokens'], 'token')}, "
            f"{counted(c['placements'], 'image')} ({c['images']:,} distinct in a shard, "
            f"{c['image_bytes'] / 1e6:,.1f} MB), {counted(self.vocab_size, 'token id')}"
        ]
        for row in self.drops.rows():
            example = f"  (e.g. {row['names'][0]})" if row["names"] else ""
            lines.append(f"  {row['what']}  {row['count']:,}  {row['reason']}{example}")
        replaced = sum(count for reason, count in self.drops.noted_counts.items() if _REPLACED.fullmatch(reason))
        if replaced > max(_FEW_REPLACED, c["documents"] / 100):
            lines.append(
                f"  warning: {replaced:,} times bytes were replaced by \ufffd, as they are not in the charset in which "
                "they were read. A page has to declare its own; format table is told it by --option encoding=NAME"
            )
        if self.held_out is not None:
            lines.append(f"held out: {self.held_out}{self._far_fewer()}")
        if self.reused:
            lines.append(
                "finished before, and not read again. Images in folders are not compared: if some were added or "
                "changed, give new folders, or remove these"
            )
        return "\n".join(lines)

    def _far_fewer(self) -> str:
        """What is to be said where less than half of what was asked for is held out; else nothing."""
        if self.held_out is None or not self.held_out.vocab_size or self.held_out_fraction is None:
            return ""
        held = self.held_out.counts["documents"]
        asked = round(self.held_out_fraction * (self.counts["documents"] + held))
        if 2 * held >= asked:
            return ""
        return (
            f"\n  {held:,} of about {asked:,} documents asked for: those of one page, book or image, or with "
            "near-duplicate images, stay together, and large groups are never held out"
        )


@reading()
def preprocess(
    format: str | Importer,
    input: str | Path | None,
    output: str | Path,
    *,
    images: str | Path | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    vocab_size: int = 4096,
    more_texts: Sequence[str] = (),
    held_out: str | Path | None = None,
    held_out_fraction: float = 0.13,
    seed: int = 0,
    max_bad_fraction: float = 0.2,
    max_image_side: int | None = None,
    limit: int | None = None,
    source: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    workers: int = 1,
    job: tuple[int, int] | None = None,
    task_bytes: int = TASK_BYTES,
    shard_bytes: int = SHARD_BYTES,
    shard_documents: int = SHARD_DOCUMENTS,
    progress: bool = False,
) -> Summary:
    """Write the corpus `output` from `input`; returns what it holds.

    format: a name, or an `Importer`, which has its own input and options: then `input` is None. With `workers` above 1
    a copy of it is pickled for each of them, so its class must be in a module, and documents that it holds are sent.
    input, images: also URLs of objects, `s3://bucket/folder` or `http(s)://host/file`, which are read where they lie.
    tokenizer: "clip", a SentencePiece model, or None to train one of `vocab_size` ids on the (training) documents, and
    on `more_texts`, of another corpus that is to have the same tokenizer.
    held_out: a second corpus of about `held_out_fraction` of the documents, none of whose images has a near-duplicate
    in the first (`holdout.py`). max_image_side: scale larger images down, pixels. limit: only so many documents, the
    first of the input. source: goes into the manifest as it is. options: the importer's own. job: (i, n) does every
    n-th task, the i-th of 0 … n-1; the first that comes chooses the tokenizer and the held-out documents for all, the
    one that finds all tasks done finishes the corpus, and a job that fails leaves the others' work alone. progress: say
    what is done, with bars, on stderr.

    Run again with the same input it resumes where it was killed, and a finished corpus is recognized. Raises
    UserError where the folder holds something else or the disk is full, and, leaving nothing but the list of what was
    bad (`drops.jsonl`), where the input is unusable or more than `max_bad_fraction` of it is bad, held-out documents
    included (if that shows only when these are written, the training corpus stays). After any other failure finished
    parts, what was chosen, and indexes of images stay.
    """
    output = Path(output)
    _check_numbers(max_bad_fraction, held_out_fraction, workers, max_image_side, limit, shard_bytes, shard_documents)
    bars = Bars(progress)
    importer, format = _importer_of(format, input, images, options, bars)
    bars.say(f"{input}: {importer.chosen}" if importer.chosen and input is not None else importer.chosen)
    _check_folders(output, held_out, input)
    given = tokenizers.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    recipe: dict[str, Any] = {
        "format": format,
        "input": _signature_of(importer),
        "images": None if images is None else images_signature(path_of(images)),
        "options": dict(options or {}),
        "tokenizer": given.fingerprint if given else {"train": vocab_size, **_texts_in_recipe(more_texts)},
        "max_image_side": max_image_side,
        "held_out": [held_out_fraction, seed] if held_out is not None else None,
        "layout": [task_bytes, shard_bytes, shard_documents],
    }
    if limit is not None:  # else as without the option
        recipe["limit"] = limit
    rules = _rules(importer, given, max_image_side is not None, held_out is not None)
    if rules > 1:  # else as older versions wrote it
        recipe["rules"] = rules
    sides = [(output, {**recipe, "side": "training"})]
    if held_out is not None:
        sides.append((Path(held_out), {**recipe, "side": "held out"}))
    finished = [folder for folder, side in sides if is_finished_corpus(folder, side, _WORK_VERSION)]
    unfinished = [(folder, side) for folder, side in sides if folder not in finished]
    for folder in finished:
        clear_up(folder)
    if not unfinished:
        training, *rest = (_summary(folder) for folder, _ in sides)
        return replace(_with(training, rest, held_out_fraction), reused=True)
    for folder, side in sides:
        if folder in finished and (_rules_differ(folder, side) or not has_names(read_manifest(folder), 0)):
            raise UserError(
                f"{folder} was made by another version's rules for {format}, and its other half is not finished; "
                "remove both, or give new folders"
            )

    *others, (last, last_side) = unfinished
    work = last / WORK  # what both corpora are written by is kept here, as it is needed until the last is finished
    try:
        importer.scan(bars.scan(importer, workers))
        if limit is not None:
            importer = FirstDocuments(importer, limit)
        units = list(importer.units())  # read more than once, and another package's may be a generator
        tasks = cut(units, task_size(sum(unit.size for unit in units), task_bytes, shard_bytes))
        as_before = [*map(len, tasks)] == [*map(len, cut(units, task_bytes))]

        def choice() -> Chosen:
            known = given or (tokenizers.load(finished[0]) if finished else None)
            hold_out = (held_out_fraction, seed) if held_out is not None else None
            return choose(importer, tasks, known, hold_out, vocab_size, more_texts, workers, bars)

        no_choice = Chosen(given) if given is not None and held_out is None else None
        useless = partial(_is_useless, work, job, no_choice is None)
        with work_folder(last, last_side, _WORK_VERSION, useless) as scratch:
            with waiting_for_others(work / "lock"):
                chosen = None
                if not is_finished_corpus(last, last_side, _WORK_VERSION):  # by others, since the first look
                    importer.prepare(work)
                    chosen = no_choice or kept(work, scratch, choice)
            if chosen is not None:
                for folder in finished:
                    _check_chosen(folder, chosen)
                works = tuple(folder / WORK for folder, _ in unfinished)
                settings = TaskSettings(
                    importer, chosen.tokenizer, work, works, max_image_side, shard_bytes, shard_documents, chosen.groups
                )

                def write(folder: Path, side: Mapping[str, Any], scratch: Path) -> None:
                    training = output if side["side"] == "held out" else None
                    its = replace(settings, folder=folder / WORK, training=training)
                    names = ([unit.name for unit in task] for task in tasks)
                    check_cut(folder / WORK, names, "part-*", as_before, works)
                    _write_corpus(
                        folder, side, its, tasks, max_bad_fraction, dict(source or {}), scratch, workers, job, bars
                    )

                for folder, side in others:
                    useless = partial(_is_useless, folder / WORK, job, False)
                    with work_folder(folder, side, _WORK_VERSION, useless) as its_scratch:
                        write(folder, side, its_scratch)
                write(last, last_side, scratch)
    except Unusable as error:
        raise _with_list(error, [folder for folder, _ in sides]) from None
    training, *rest = (_summary(folder) for folder, _ in sides)
    return _with(training, rest, held_out_fraction)


def _with_list(error: Unusable, folders: list[Path]) -> Unusable:
    """The error that also names a list of what was bad, which is written where the corpus would have been."""
    folder = next((folder for folder in folders if not exists(folder / MANIFEST)), None)
    if folder is None or not any(error.drops.rows()):
        return error
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(folder / LOG, error.drops.log())
    error.args = (f"{error.args[0]} (all reasons, with names: {folder / LOG})",)
    return error


def _with(training: Summary, rest: list[Summary], fraction: float) -> Summary:
    return replace(training, held_out=rest[0], held_out_fraction=fraction) if rest else training


# --- before the work ---------------------------------------------------------------------------------------------


def _check_numbers(
    max_bad_fraction: float,
    held_out_fraction: float,
    workers: int,
    max_image_side: int | None,
    limit: int | None,
    shard_bytes: int,
    shard_documents: int,
) -> None:
    Budget(max_bad_fraction)  # which checks it
    if not 0 < held_out_fraction < 1:
        raise UserError(f"--held-out-fraction {held_out_fraction}: give a number between 0 and 1")
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    if max_image_side is not None and max_image_side < 2:
        raise UserError(f"--max-image-side {max_image_side}: give at least 2 pixels")
    for flag, value in (("limit", limit), ("shard-bytes", shard_bytes), ("shard-documents", shard_documents)):
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: give at least 1")


def _importer_of(
    format: str | Importer,
    input: str | Path | None,
    images: str | Path | None,
    options: Mapping[str, Any] | None,
    bars: Bars,
) -> tuple[Importer, str]:
    """The importer of the input, and the name of its format."""
    if isinstance(format, Importer):
        if input is not None or images is not None or options:
            raise UserError("an Importer has its own input, images and options; give None for `input`, and no others")
        return format, f"{type(format).__module__}.{type(format).__qualname__}"
    if input is None:
        raise UserError(f"input = None, which is for an Importer; give the files of the format {format}")
    with bars.waiting(f"{input}: looking for the files of the format {format}"):
        return importers.create(format, input, images, options or {}), format


def _check_folders(output: Path, held_out: str | Path | None, input: str | Path | None) -> None:
    if held_out is not None and Path(held_out).resolve() == output.resolve():
        raise UserError(f"the held-out corpus cannot have the folder of the corpus itself, {output}")
    for folder in (output, *([Path(held_out)] if held_out is not None else [])):
        if input is not None and is_dir(Path(input)) and folder.resolve().is_relative_to(Path(input).resolve()):
            raise UserError(f"{folder} lies in the folder of the input, and would be part of it; give another folder")


def _signature_of(importer: Importer) -> Any:
    signature = importer.signature()
    try:
        json.dumps(signature)
    except TypeError:
        raise UserError(
            f"the `signature` of {importer} is {signature!r}, which the recipe in a manifest, being JSON, cannot hold; "
            "let it give a str"
        ) from None
    return signature


def _rules(importer: Importer, tokenizer: Tokenizer | None, scales_down: bool, holds_out: bool) -> int:
    """The version of the rules by which documents are made. tokenizer: None where one is trained."""
    # earlier releases scaled down TIFFs of float levels from 0 to 1 as black pictures, and compared images inexactly,
    # later ones as they lie in the file and those of 16 bits in two levels, and scaled down those of 16 bits without
    # their transparency
    rules = importer.rules + 2 * scales_down + 2 * holds_out
    if not (tokenizer and tokenizer.separates_texts):  # they put nothing between texts, not even white space in them
        rules += bool(importer.separator) + (type(importer).kind not in CAPTIONED)
    return rules


def _rules_differ(folder: Path, recipe: Mapping[str, Any]) -> bool:
    return read_manifest(folder).get("recipe", {}).get("rules") != recipe.get("rules")


def _check_chosen(folder: Path, chosen: Chosen) -> None:
    """UserError where a finished half was written by another choice."""
    manifest = read_manifest(folder)
    groups = manifest["recipe"][GROUPS_KEY]
    if (manifest["tokenizer"]["fingerprint"], groups) != (chosen.tokenizer.fingerprint, groups_hash(chosen.groups)):
        raise UserError(
            f"{folder} was written with another tokenizer or other held-out documents than its other half is to be, as "
            "another release or another processor may choose them; remove both, or give new folders"
        )


def _texts_in_recipe(texts: Sequence[str]) -> dict[str, str]:
    """Their hash; nothing where there are none, as older versions wrote it."""
    return {"more_texts": xxhash.xxh3_128_hexdigest("\0".join(texts).encode())} if texts else {}


# --- the work ----------------------------------------------------------------------------------------------------


def _is_useless(work: Path, job: tuple[int, int] | None, chooses: bool, error: BaseException) -> bool:
    """Whether the work of a failed run can go. error: why it failed. Of a run that is no job: where the input is
    unusable, or nothing that took long is there, such as an index of images. Of any: where no part is finished and
    nothing chosen, and choosing failed for a UserError, which may ask for other options. chooses: it had to choose."""
    if job is None and isinstance(error, Unusable):
        return True
    if matching(work, "part-*") or exists(work / CHOSEN):
        return False
    if chooses and isinstance(error, UserError):
        return True
    return job is None and not holds_work(work)


def _write_corpus(
    folder: Path,
    recipe: Mapping[str, Any],
    settings: TaskSettings,
    tasks: list[list[Unit]],
    max_bad_fraction: float,
    source: dict[str, Any],
    scratch: Path,
    workers: int,
    job: tuple[int, int] | None,
    bars: Bars,
) -> None:
    """Do the tasks of a job, and finish the corpus if all others are done."""
    work = settings.folder
    if is_finished_corpus(folder, recipe, _WORK_VERSION):  # by others
        return
    index, num_jobs = job or (0, 1)
    mine = [k for k in range(len(tasks)) if k % num_jobs == index]
    budget = Budget(max_bad_fraction, settings.importer.place)
    with closing(in_order(run_task, settings, [(k, tasks[k]) for k in mine], workers)) as done:
        for number, drops in zip(mine, bars.over(done, folder.name, "task", [1] * len(mine)), strict=True):
            budget.add(drops, [part.seen for part in parts_of(work, number)])
    with waiting_for_others(work / "lock"):
        if not exists(folder / MANIFEST) and (parts := _all_parts(work, len(tasks))) is not None:
            finish(folder, recipe, settings, parts, max_bad_fraction, source, scratch, workers)


def _all_parts(work: Path, num_tasks: int) -> list[Part] | None:
    """The parts of all tasks, in order; None where one is not finished.

    Of the jobs all but one find this out, so they read few records, which have all drops of their parts.
    """
    names = {path.name for path in matching(work, "part-*")}
    if not names.issuperset(Part(task, 0, True, 0).name for task in range(num_tasks)):
        return None
    found: list[list[Part]] = []
    for task in reversed(range(num_tasks)):  # mostly the last ones are finished last
        found.append(parts_of(work, task))
        if not is_finished(found[-1]):
            return None
    return list(itertools.chain.from_iterable(reversed(found)))


def _summary(folder: Path) -> Summary:
    if not exists(folder / MANIFEST):  # other jobs are not done yet
        return Summary(
            folder, dict.fromkeys(("documents", "tokens", "placements", "images", "image_bytes"), 0), Drops(), 0
        )
    manifest = read_manifest(folder)
    return Summary(folder, manifest["counts"], Drops.from_dict(manifest["drops"]), manifest["tokenizer"]["vocab_size"])
