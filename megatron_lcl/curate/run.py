"""`curate`: a corpus, and what of it is removed, into another corpus.

The result depends on the corpus and the settings alone: a run that was killed goes on where it stopped, the same
command again recognizes the finished corpus, and any number of processes do the tasks.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_lcl.curate.documents import Range, range_size, ranges
from megatron_lcl.curate.duplicates.settings import EVALUATION_RULES
from megatron_lcl.curate.joins import REMOVED as JOINED
from megatron_lcl.curate.joins import Join, Places
from megatron_lcl.curate.languages import context_of, libraries
from megatron_lcl.curate.models import resolve as models
from megatron_lcl.curate.passes import (
    REMOVED,
    REMOVED_FILE,
    SAMPLES,
    Counted,
    Work,
    decide,
    judge,
    names_found,
    once,
    recorded,
    threshold_text,
    thresholds_of,
)
from megatron_lcl.curate.result import Curated, Removed, Unmatched
from megatron_lcl.curate.settings import PERPLEXITY, WORD_COUNTS, Settings, as_recipe, rules_of
from megatron_lcl.curate.write import groups, shards_folder, write
from megatron_lcl.data.corpus.corpus_manifest import KIND, MANIFEST, PARENTS, as_parent, names_of, read_manifest
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.files import hash_file, sync
from megatron_lcl.data.corpus.indexed import FileInfo, write_file
from megatron_lcl.data.corpus.scratch import scratch_folder, temporary_folder, waiting_for_others
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.corpus.tables import read_table
from megatron_lcl.data.engines import Engine, run_jobs
from megatron_lcl.data.prepare.cut import check_cut
from megatron_lcl.data.prepare.finish import assemble
from megatron_lcl.data.prepare.preprocess import TASK_BYTES
from megatron_lcl.data.prepare.preprocess_task import Part
from megatron_lcl.data.prepare.unfinished import (
    WORK,
    clear_errors,
    clear_up,
    holds_work,
    is_finished_corpus,
    work_folder,
)
from megatron_lcl.data.prepare.workers import in_order
from megatron_lcl.data.storage.store import url_of
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import exists
from megatron_lcl.machine import num_cores
from megatron_lcl.units import counted

SAMPLES_FILE = "removed-samples.jsonl"
"""of the corpus: a few removals of each rule, with what was removed"""
CURATED = "curated"
"""key of the manifest: what the corpus had before, what each rule removed, which lines of a list matched nothing"""
_LINES = 5
"""of a list that are named"""
_ROWS = 1 << 15
_RULES = 4
"""version of what is written for the same corpus and thresholds (`_rules_version`)"""
_WORK_VERSION = 3
"""version of the layout of unfinished work"""
logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


class _NothingLeft(UserError):
    """Nothing of the work is of use."""


def curate(
    corpus: str | Path,
    output: str | Path | None,
    settings: Settings | None = None,
    *,
    joins: Sequence[Join] = (),
    workers: int = 1,
    job: tuple[int, int] | None = None,
    task_bytes: int = TASK_BYTES,
    samples: int = SAMPLES,
    progress: bool = False,
) -> Curated:
    """Write what the rules leave of `corpus` into the folder `output`; None: only say what they would remove.

    joins: rules over the whole corpus besides those of the settings. Ids of texts, bytes of images, similarities, names
    and kinds stay as they are. Beside the corpus's usual files, and as them in its manifest: `removed.parquet`, every
    removal, and samples of them. job: (i, n) is one of n that share the work: the i-th of 0 … n-1 begins at its part of
    the corpus, and then does what the others have not done yet, as it has to be done before the work goes on. samples:
    of each rule; 0: the result neither shows nor names anything that was removed, on the way to the source neither.
    The same call again goes on with an unfinished run and recognizes a finished corpus.
    Raises UserError, leaving nothing, where `output` holds something else, a list, model or package is missing, a
    model does not fit its rules, or every document would go.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: give at least 1")
    if samples < 0:
        raise UserError(f"--samples {samples}: give 0 or more")
    settings = _resolved(settings)
    source = open_corpus(corpus)
    _check_names(source, settings)
    joins = (*_joins_of(settings), *joins)
    _check(settings, keep=workers == 1)
    encoder = models.check(settings.models, keep=workers == 1)
    if output is None:
        remedy = "a dry run works in the folder for temporary files: set TMPDIR to one with more"
        with ExitStack() as made:
            with clear_errors(Path(tempfile.gettempdir()), remedy):
                folder = made.enter_context(temporary_folder("megatron-lcl-curate-"))
            with clear_errors(folder, remedy):
                work = Work(source, settings, joins, folder, samples)
                tasks, counted = _decide(work, task_bytes, workers, None, progress)
                return _curated(None, work, counted, tasks, workers)
    output = Path(output)
    inside, outside = output.resolve(), source.path.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise UserError(f"{output} is, lies in, or holds the corpus that is curated; give another folder")
    recipe: dict[str, Any] = {
        "curated": source.fingerprint,
        "names": names_of(source.manifest),
        "thresholds": {**as_recipe(settings), **encoder, **{join.rule: join.threshold for join in joins}},
        "libraries": _libraries(settings),
        "layout": [task_bytes],
        "rules": _rules_version(settings),
        # as in earlier releases where nobody asks for another number; a corpus that has more to tell is another one
        **({} if samples == SAMPLES else {"samples": samples}),
    }
    if is_finished_corpus(output, recipe, _WORK_VERSION, ["names"]):
        clear_up(output)
        return read_curated(output, reused=True)
    source.check_sizes()
    work = Work(source, settings, joins, output / WORK, samples)

    def is_useless(error: BaseException) -> bool:
        return isinstance(error, _NothingLeft) or not holds_work(work.folder)

    with work_folder(output, recipe, _WORK_VERSION, is_useless) as scratch:
        if not is_finished_corpus(output, recipe, _WORK_VERSION, ["names"]):  # by others, since the first look
            tasks, counted = _decide(work, task_bytes, workers, job, progress)
            parts = list(_each(write, "shards", work, groups(work, tasks), workers, job, progress))
            with waiting_for_others(work.folder / "lock"):
                if not exists(output / MANIFEST):
                    _finish(output, work, recipe, tasks, parts, counted, scratch, workers)
    return read_curated(output)


def curate_in_jobs(
    corpus: str | Path,
    output: str | Path,
    engine: Engine,
    settings: Settings | None = None,
    *,
    workers: int = 1,
    progress: bool = False,
    **options: Any,
) -> Curated:
    """`curate` in `engine.jobs` jobs on folders that all machines see; waits, and returns the same.

    workers: processes, and so CPUs, of a job. options: those of `curate`. UserError as of `curate` and `run_jobs`,
    before any job begins where a list, model or package is to blame.
    """
    output = Path(output).resolve()
    settings = _resolved(settings)
    if not exists(output / MANIFEST):
        _joins_of(settings)
        _check(settings, keep=False)
        models.check(settings.models, keep=False)
    arguments = {**options, "corpus": corpus, "output": output, "settings": settings, "workers": workers}
    reads = [] if url_of(corpus) else [Path(corpus)]
    run_jobs(curate, arguments, engine, output=output, reads=reads, cpus=workers, progress=progress)
    return curate(**arguments)  # finished: only reads what was removed


def read_curated(folder: str | Path, reused: bool = False) -> Curated:
    """What was removed on the way to a corpus. UserError where it is none that was curated."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    if CURATED not in manifest:
        raise UserError(f"{folder} was not curated, so nothing is known of what was removed; `inspect` shows a corpus")
    try:
        # bytes: a sample may hold U+0085 or U+2028, which end lines of a text
        lines = (folder / SAMPLES_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        lines = []  # a page can do without
    said = manifest[CURATED]
    rules, unmatched = [Removed(**r) for r in said["rules"]], said.get("unmatched")
    return Curated(
        folder, said["before"], rules, list(map(json.loads, lines)), unmatched and Unmatched(**unmatched), reused
    )


def _resolved(settings: Settings | None) -> Settings:
    settings = settings or Settings()
    return replace(settings, models=models.resolved(settings.models))


def _joins_of(settings: Settings) -> tuple[Join, ...]:
    joins: list[Join] = []
    rules = settings.duplicates
    duplicates = [each for each in (rules.images, rules.documents) if each.action is not None]
    if settings.image.max_places is not None:
        joins.append(Places(settings.image.max_places))
    if settings.evaluation.sets or duplicates:
        from megatron_lcl.curate.duplicates.rules import Duplicates, EvaluationSets  # imports numba and SciPy, too

        if settings.evaluation.sets:
            joins.append(EvaluationSets(settings.evaluation))
        joins += [Duplicates(each, rules.against) for each in duplicates]
    if settings.models.encoder is not None:
        from megatron_lcl.curate.models.rules import joins_of

        joins += joins_of(settings.models, rules.against)
    return tuple(joins)


def _check(settings: Settings, *, keep: bool) -> None:
    """UserError where a list, a model or a package is missing that a rule needs. keep: this process needs them soon."""
    context_of.cache_clear()  # a file may have changed since this process read it
    context = context_of(settings)
    for rule in (*rules_of(settings, "text"), *rules_of(settings, "document")):
        match rule.field:
            case "min_stop_words" | "max_flagged_words":
                getattr(context, rule.field[4:])
            case "excluded_names":
                _ = context.excluded_names
            case "min_language":
                context.language("a")
            case "min_perplexity" | "max_perplexity":
                context.perplexities(["a"])
    if not keep:
        context_of.cache_clear()


def _check_names(corpus: Corpus, settings: Settings) -> None:
    """UserError where names are excluded and a shard has none."""
    if settings.document.excluded_names is None:
        return
    for shard in corpus.shards:
        # all empty: curated from a corpus of an earlier release
        if shard.names is None or not any(shard.names.between(0, shard.num_documents)):
            raise UserError(
                f"document.excluded_names: {corpus.where} does not know where the documents of shard {shard.number} "
                "came from, as those of earlier releases, so that none would be found; `preprocess` its source again"
            )


def _rules_version(settings: Settings) -> int:
    """That of evaluation sets where there are some. One more where words are counted or compared: in earlier releases
    what stands between spaces was one word in any script, and images of pairs did not count. Another where they are
    compared: marks ended words, and were none of them. Another where images are decoded: the transparent color of some
    PNGs stayed, and some gray TIFFs were negatives."""
    documents = settings.duplicates.documents
    compared = documents.action is not None and documents.threshold is not None
    counts = any(rule.field in WORD_COUNTS for section in ("text", "document") for rule in rules_of(settings, section))
    decoded = settings.duplicates.images.action is not None or bool(settings.evaluation.sets) or settings.models.asks
    return (EVALUATION_RULES if settings.evaluation.sets else _RULES) + (compared or counts) + compared + decoded


def _libraries(settings: Settings) -> dict[str, str]:
    rules = {rule.field for section in ("text", "document") for rule in rules_of(settings, section)}
    return libraries(rules, settings.language, settings.lists)


# --- the work ----------------------------------------------------------------------------------------------------


def _decide(
    work: Work, task_bytes: int, workers: int, job: tuple[int, int] | None, progress: bool
) -> tuple[list[Range], Counted]:
    """Both passes, with the joins between them; the ranges, and what was removed."""
    tasks = ranges(work.corpus, task_bytes)
    names = ([f"{task.shard}: {task.first}-{task.last}"] for task in tasks)
    check_cut(work.folder, names, "judged-*", range_size(work.corpus, task_bytes) == task_bytes, [work.folder])
    _tell_idle_cores(work.settings, workers, len(tasks))
    with waiting_for_others(work.folder / "lock"):
        for number, join in enumerate(work.joins):
            with once(work, work.prepared(number)) as folder:
                if folder is not None:
                    join.prepare(folder, workers)
    deque(_each(judge, "texts and images", work, tasks, workers, job, progress), 0)
    with waiting_for_others(work.folder / "lock"):
        for number, join in enumerate(work.joins):
            if not exists(work.joined(number)):
                _join(work, number, join, len(tasks), workers)
    counted = Counted()
    for of_task in _each(decide, "documents", work, tasks, workers, job, progress):
        counted.merge(of_task, work.samples)
    return tasks, counted


def _tell_idle_cores(settings: Settings, workers: int, num_tasks: int) -> None:
    """Models compute in one thread of a process, so that a machine works as far as there are processes with a task."""
    fields = {rule.field for section in ("text", "document") for rule in rules_of(settings, section)}
    used, cores = min(workers, num_tasks), num_cores()
    if (settings.models.asks or fields & {*PERPLEXITY}) and used < cores:
        remedy = f"; --workers {min(cores, num_tasks)} uses more" if used < min(cores, num_tasks) else ""
        logger.warning(
            "models compute on %d of %d cores, in one thread of each process: --workers %d, %s of documents%s",
            *(used, cores, workers, counted(num_tasks, "task"), remedy),
        )


def _each(
    function: Callable[[Work, T], R],
    title: str,
    work: Work,
    tasks: Sequence[T],
    workers: int,
    job: tuple[int, int] | None,
    progress: bool,
) -> Iterator[R]:
    """Of every task what the function returns, those that a job begins with first."""
    index, num_jobs = job or (0, 1)
    start = index * len(tasks) // num_jobs
    mine_first = [*tasks[start:], *tasks[:start]]
    with closing(in_order(function, work, mine_first, workers, ahead=4 * workers)) as results:
        yield from tqdm(results, title, len(tasks), unit="task", disable=not progress)


def _join(work: Work, number: int, join: Join, num_tasks: int, workers: int) -> None:
    facts = [work.facts(task, number) for task in range(num_tasks)]
    with scratch_folder(work.folder) as folder:
        scratch, target = folder / "free", folder / REMOVED_FILE
        scratch.mkdir()
        _write_tables(target, JOINED, join.decide(facts, work.prepared(number), scratch, workers))
        os.replace(target, work.joined(number))


def _write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """A Parquet file of many tables, in row groups of about _ROWS, so that a reader of a few rows opens few."""
    waiting: list[pa.Table] = []
    num_rows = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def write() -> None:
            if waiting:
                writer.write_table(pa.concat_tables(waiting).unify_dictionaries())
                waiting.clear()

        for table in tables:
            waiting.append(table)
            num_rows += len(table)
            if num_rows >= _ROWS:
                write()
                num_rows = 0
        write()
    sync(path)


def _finish(
    output: Path,
    work: Work,
    recipe: dict[str, Any],
    tasks: Sequence[Range],
    written: list[Part],
    counted: Counted,
    scratch: Path,
    workers: int,
) -> None:
    parts = [recorded(work.folder, task.number) for task in tasks]
    written = sorted(written, key=lambda part: part.task)
    curated = _curated(output, work, counted, tasks, workers)
    shards = [shard for part in written for shard in part.shards]
    if not shards:
        raise _nothing_left(curated)
    drops = work.corpus.drops
    for part in parts:
        drops.add(Drops.from_dict(part.drops))
    if not work.samples:
        drops.names.clear()
        drops.samples.clear()
    samples = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in curated.samples)
    more = {
        REMOVED_FILE: _write_removed(work, parts, scratch),
        SAMPLES_FILE: write_file(scratch / SAMPLES_FILE, samples.encode()),
    }
    manifest = {
        "source": work.corpus.manifest["source"],
        "shards": [{**shard["counts"], KIND: shard["kind"]} for shard in shards],
        "recipe": recipe,
        PARENTS: [as_parent(work.corpus.manifest)],
        CURATED: {
            "before": curated.before,
            "rules": [vars(removed) for removed in curated.rules],
            **({"unmatched": vars(curated.unmatched)} if curated.unmatched else {}),
        },
    }
    assemble(output, shards_folder(work), written, work.corpus.tokenizer, drops, scratch, workers, manifest, more)


def _curated(path: Path | None, work: Work, counted: Counted, tasks: Sequence[Range], workers: int) -> Curated:
    thresholds = thresholds_of(work.settings, work.joins)
    counts = work.corpus.manifest["counts"]
    before = {
        "texts": counts["pieces"] - counts["placements"],
        "images": counts["placements"],
        "documents": counts["documents"],
    }
    rules = [
        Removed(rule, threshold_text(threshold), *counted.removed.get(rule, (0, 0, 0)))
        for rule, threshold in thresholds.items()
    ]
    samples = [sample for rule in thresholds for _, sample in counted.samples.get(rule, ())]
    unmatched = _unmatched(work, tasks, workers, named=path is None or work.samples > 0)
    return Curated(path, before, rules, samples, unmatched)


def _unmatched(work: Work, tasks: Sequence[Range], workers: int, *, named: bool) -> Unmatched | None:
    """By the names of the source alone, so that it does not depend on who did which task, nor when."""
    if work.settings.document.excluded_names is None:
        return None
    listed = context_of(work.settings).excluded_names
    left = listed.without(set().union(*_each(names_found, "names", work, tasks, workers, None, False)))
    return Unmatched(len(listed.lines), len(left), left[: _LINES * named])


def _nothing_left(curated: Curated) -> _NothingLeft:
    most = max(curated.rules, key=lambda r: (r.texts + r.images, -r.documents))
    items, all_items = most.texts + most.images, curated.before["texts"] + curated.before["images"]
    rule = f"{most.rule} = {most.threshold}" if most.threshold else most.rule
    return _NothingLeft(
        f"none of {curated.before['documents']:,} documents is left; {rule} removed most, "
        f"{items:,} of {all_items:,} texts and images; choose another threshold"
    )


def _write_removed(work: Work, parts: Sequence[Part], scratch: Path) -> FileInfo:
    """The removals of all tasks as one file."""
    path = scratch / REMOVED_FILE
    _write_tables(path, REMOVED, (read_table(work.folder / part.name / REMOVED_FILE) for part in parts))
    return {"size": path.stat().st_size, "xxh3": hash_file(path)}
