"""One self-contained page about a run: names of pictures, curves, what happened, retrieval, the first batch, drops."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_lcl import config as configs
from megatron_lcl import fields, objectives
from megatron_lcl.config import Config
from megatron_lcl.config.phases import phase_at
from megatron_lcl.convert.card import TRAINING
from megatron_lcl.convert.find import checkpoints_in, find_checkpoint
from megatron_lcl.data.corpus.corpus_manifest import source_text
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import Corpus, open_corpus
from megatron_lcl.data.loading.blend import corpora_read
from megatron_lcl.data.loading.ledger import Ledger
from megatron_lcl.data.pages.replay import render_first_packs
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.rules import NOT_COMPARABLE, called
from megatron_lcl.filesystem import below, is_dir, is_file
from megatron_lcl.report import charts
from megatron_lcl.report.charts import short
from megatron_lcl.report.curves import groups
from megatron_lcl.report.events import NAMES, newest, numbers
from megatron_lcl.report.files import read_json
from megatron_lcl.report.planned import Asked
from megatron_lcl.report.retrieval import with_images
from megatron_lcl.report.series import Metrics
from megatron_lcl.run_folder import CONFIG, EXAMPLES, GALLERY, HELDOUT, LABELED, PLAN, PROFILE
from megatron_lcl.train.checkpoint.folder import last_progress, ledger_of
from megatron_lcl.train.telemetry.lines import results_inside
from megatron_lcl.units import in_bytes, plain

REPORT = "report.html"
"""the page in a run folder, and its template here"""
MAX_PACKS = 16
"""of the first batch that are shown"""
MAX_PROFILES = 60
"""files that are linked"""
MAX_SHORT = 12
"""characters of a setting's value that is not broken, as of any number"""
Tile = tuple[str, str, str]
"""a number, what it is, more of it"""


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the page about a run folder; returns its path. UserError where `run` is not a run folder."""
    output = output or run / REPORT
    replace_text(output, RunPage(run).render(output.parent))
    return output


class RunPage:
    """The page about a run folder, which may still be growing."""

    def __init__(self, run: Path) -> None:
        """UserError where `run` is not a run folder."""
        if not is_file(run / CONFIG):
            raise UserError(f"{run} is not a run folder: it has no {CONFIG}")
        self.run = run
        self.config = configs.load(run / CONFIG)
        self.metrics = Metrics.of(run)
        self._planned: tuple[Asked | None, Mapping[str, Any]] = None, {}

    def changed(self) -> bool:
        """Whether the run has written anything since the last call, which is taken in."""
        return self.metrics.read()

    def render(self, folder: Path | None = None, live: bool = False) -> str:
        """The page. folder: where it lies, from which links start; None: nothing is linked. live: for a page that is
        served, and follows what changes. UserError where a file of results lacks what the page shows of it."""
        try:
            return self._render(folder, live)
        except jinja2.UndefinedError as error:
            files = [file for file in (self.run / GALLERY, self.run / EXAMPLES) if is_file(file)]
            named = " or ".join(map(str, [*files, *results_inside(self.run)]))
            raise UserError(
                f"{named or self.run} lacks what the report shows of it ({error}), as a file of another version may; "
                "`megatron-lcl evaluate` writes it anew"
            ) from error

    def _render(self, folder: Path | None, live: bool) -> str:
        run, metrics = self.run, self.metrics
        config = self.config = configs.load(run / CONFIG)  # which a run that goes on may have written anew
        root = Path(__file__).resolve().parents[2]
        evaluation, events = read_json(run / HELDOUT), metrics.events
        speed = metrics.last if _has(metrics.last, "images_per_second", "tokens_per_second", "data_wait") else None
        profile, planned = list(_profile(run, folder)), read_json(run / PLAN, "plan --json") or self._plan()
        examples, is_other = with_images(read_json(run / EXAMPLES), evaluation, config.data.cache)
        has = {
            "names": (gallery := read_json(run / GALLERY)),
            "heldout": evaluation,
            "labeled": (labeled := read_json(run / LABELED)),
            "curves": (drawn := groups(metrics.series, metrics.last_step, events)),
            "plan": (beside_plan := list(_beside_plan(planned, metrics))),
            "slowest": (slowest := list(metrics.slowest.rows())),
            "events": events,
            "retrieval": examples,
            "profile": profile,
        }
        return template(REPORT).render(
            live=live,
            area=AREA,
            trained_by=_trained_by(config),
            sections=[(name, title) for name, title in SECTIONS.items() if has.get(name, True)],
            metrics=metrics,
            tiles=list(_tiles(metrics)),
            time=_clock,
            config=config,
            config_yaml=configs.to_yaml(config),
            changed=list(changed_settings(config)),
            gallery=gallery,
            others=_others(run),
            speed=speed,
            groups=drawn,
            planned=planned,
            beside_plan=beside_plan,
            slowest=slowest,
            events=newest(events),
            num_events=sum(of_kind.number for of_kind in events.values()),
            numbers_of_events=numbers(events),
            marks=set(events),
            event_names=NAMES,
            evaluation=evaluation,
            rules=called(rules) if len(rules := metrics.rules_with(evaluation)) > 1 else "",
            not_comparable=NOT_COMPARABLE,
            heldout_tiles=list(_heldout_tiles(evaluation or {})),
            labeled=labeled,
            labeled_tiles=list(_labeled_tiles((labeled or {}).get("values") or {})),
            examples=examples,
            is_other_corpus=is_other,
            batch=self._batch,
            max_packs=MAX_PACKS,
            first_batch=self.first_batch,
            corpora=self._corpora,
            profile=profile,
            checkpoint=find_checkpoint(run).name if metrics.last and checkpoints_in(run) else None,
            run=run,
            checkout=_quoted(root) if is_dir(root / "launch") else None,
            environment=_quoted(Path(sys.prefix)) if sys.prefix != sys.base_prefix else None,
        )

    def _plan(self) -> Mapping[str, Any]:
        """What `plan` says of the run's own layout; empty where it does not know the device."""
        asked = Asked.of(self.config, self.metrics)
        if asked != self._planned[0]:
            self._planned = asked, asked.numbers() if asked else {}
        return self._planned[1]

    @functools.cached_property
    def _ledger(self) -> Ledger | None:
        """What the packs so far depend on; None where there is no checkpoint yet."""
        return ledger_of(last_progress(self.run))

    @property
    def first_batch(self) -> int:
        """Packs of step 0, which a config that has changed since may say otherwise."""
        if self._ledger is None:
            return phase_at(self.config, 0).config.train.global_batch
        return self._ledger.reading_at(0, self.config)[0].global_batch

    @functools.cached_property
    def _batch(self) -> Markup | None:
        """The first packs; None where the corpora that they were of, or the package of the objective, are not here."""
        packs = min(self.first_batch, MAX_PACKS)
        try:
            sequences = objectives.create(self.config).sequences
            return Markup(render_first_packs(self.config, sequences, packs, self._ledger))
        except (UserError, OSError):
            return None

    @functools.cached_property
    def _corpora(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        read = corpora_read(self._ledger.entries) if self._ledger else []
        known = set[str]()
        """fingerprints, and paths where nothing is now"""
        for corpus in self.config.data.corpora:
            try:
                opened = open_corpus(corpus.path, self.config.data.cache)
                is_new = bool(read) and opened.fingerprint not in {each.fingerprint for each in read}
                found.append({**_corpus(opened), "is_new": is_new})
                known.add(opened.fingerprint)
            except (UserError, OSError):
                found.append({"path": corpus.path})
                known.add(corpus.path)
        gone = (each.paths[0] for each in read if not known & {each.fingerprint, each.paths[0]})
        return found + [{"path": path, "is_removed": True} for path in gone]


SECTIONS = {
    "names": "Pictures and names",
    "heldout": "Held-out documents",
    "labeled": "Labeled images",
    "curves": "Curves",
    "plan": "Plan",
    "slowest": "Slowest processes",
    "events": "What happened",
    "retrieval": "Retrieval",
    "batch": "First batch",
    "documents": "Documents",
    "settings": "Settings",
    "profile": "Profiles",
    "going-on": "Going on",
}
"""of the page, by id: what the links at its head say"""
AREA = {name.lower(): getattr(charts, name) for name in ("WIDTH", "HEIGHT", "LEFT", "RIGHT", "TOP", "BOTTOM")}


def template(name: str) -> jinja2.Template:
    """A template of this package."""
    environment = jinja2.Environment(loader=jinja2.PackageLoader("megatron_lcl.report", "."), autoescape=True)
    environment.filters["plain"] = plain
    environment.tests["short"] = lambda text: len(text) <= MAX_SHORT
    return environment.get_template(name)


def _beside_plan(planned: Mapping[str, Any], metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    """What it is, as planned, as last measured, and the second of the first."""
    for name, title, factor, unit in (
        ("step_seconds", "a step", 1, " s"),
        ("images_per_second", "images a second", 1, ""),
        ("tokens_per_second", "tokens a second", 1, ""),
        ("flops_per_second", "TFLOP a second", 1e-12, ""),
        ("mfu", "MFU", 100, " %"),
        ("memory_peak_bytes", "peak memory of a process", 2**-30, " GiB"),
    ):
        series = metrics.series.get(name)
        plan, last = planned.get(name), series.last if series is not None else None
        if plan is None or last is None:
            continue
        least = "at least " if name == "memory_peak_bytes" and planned.get("memory_is_bound") else ""
        yield title, f"{least}{plain(factor * plan)}{unit}", f"{plain(factor * last)}{unit}", f"{last / plan:.2f}"


def _trained_by(config: Config) -> str:
    """By what a run trains, without the papers that a model card names."""
    return re.sub(r" \([^)]*\)", "", TRAINING.get(config.objective.name, f"the objective {config.objective.name}"))


def _has(numbers: Mapping[str, Any], *names: str) -> bool:
    """Whether these are numbers, which another version may not have written, or as null."""
    return all(isinstance(numbers.get(name), int | float) for name in names)


def _tiles(metrics: Metrics) -> Iterator[Tile]:
    """What the page begins with."""
    line = metrics.last
    if _has(line, "loss"):
        more = f"generation {plain(line['generation'])}" if _has(line, "generation") else ""
        yield plain(line["loss"]), "loss of the last step", more
    if _has(line, "image_accuracy", "chance_accuracy"):
        yield (
            f"{100 * line['image_accuracy']:.1f} %",
            "accuracy of the contrast",
            f"chance {plain(100 * line['chance_accuracy'], 2)} %",
        )
    if _has(line, "images_per_second", "tokens_per_second"):
        more = f"{short(line['tokens_per_second'])} tokens a second"
        yield short(line["images_per_second"]), "images a second", more
    for name, title, factor, unit in (("mfu", "MFU", 100, " %"), ("memory_peak_bytes", "peak memory", 2**-30, " GiB")):
        series = metrics.series.get(name)
        if series is not None and series.last is not None:
            yield f"{plain(factor * series.last, 3)}{unit}", title, ""
    if metrics.seconds:
        yield _duration(metrics.seconds), "of training", f"since {_clock(metrics.first_time or 0)}"


def _heldout_tiles(found: Mapping[str, Any]) -> Iterator[Tile]:
    """Of an evaluation on held-out documents."""
    if found.get("pairs"):
        yield from _share(found, "image_to_context_recall_at_10", "image → context recall@10", "chance_at_10")
        yield from _share(found, "image_to_context_recall_at_1", "recall@1", "chance_at_1")
        if _has(found, "median_rank"):
            of = (
                f"{found['distinct_contexts']} contexts"
                if found.get("distinct_contexts")
                else f"{found['pairs']} pairs"
            )
            yield f"{found['median_rank']:.0f}", "median rank", f"of {of}"
    for rivals, what in (("contexts_with_rivals", "contexts"), ("pairs_with_rivals", "pairs")):  # of earlier versions
        if not found.get(rivals):
            continue
        name, title = "image_in_document_recall_at_1", "the image among its document's"
        yield from _share(found, name, title, "chance_in_document", f"{found[rivals]} {what}")
    if found.get("targets") and _has(found, "bits_per_token"):
        yield f"{found['bits_per_token']:.2f}", "bits a token, generation", f"{found['targets']} targets"


def _others(run: Path) -> list[dict[str, Any]]:
    """Zero-shot results of evaluations in folders of the run folder, each with `folder`, its name."""
    return [
        {**result, "folder": file.parent.name}
        for file in results_inside(run)
        for result in read_json(file)
        if result.get("task") == "zero-shot classification"
    ]


def _labeled_tiles(found: Mapping[str, Any]) -> Iterator[Tile]:
    """Of an evaluation on labeled images."""
    for name, title, chance in (
        ("knn_accuracy", "k-NN accuracy", "chance"),
        ("zero_shot_accuracy", "zero-shot accuracy", "chance"),
        ("zero_shot_accuracy_top_5", "zero-shot, top 5", "chance_top_5"),
        ("zero_shot_mean_per_class_recall", "zero-shot, mean of the classes", "chance"),
    ):
        yield from _share(found, name, title, chance)


def _share(found: Mapping[str, Any], name: str, title: str, chance: str, *more: str) -> Iterator[Tile]:
    """A share beside what chance has; nothing where it was not measured."""
    if _has(found, name):
        if _has(found, chance) and found[chance]:
            more = f"chance {plain(100 * found[chance], 2)} %: {found[name] / found[chance]:.1f} times", *more
        yield f"{100 * found[name]:.1f} %", title, "; ".join(more)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if minutes else f"{seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours / 24:.1f} days"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


def settings_of(config: Config) -> dict[str, Any]:
    """A config by dotted name, for comparisons: what means the same is the same, whatever version wrote it."""
    weights = {f"objective.{name}": value for name, value in objectives.own_weights(config).items()}
    return fields.flat(configs.to_dict(configs.resolved(config))) | weights


def changed_settings(config: Config) -> Iterator[tuple[str, str, str]]:
    """(name, value, default) of the settings that are not the defaults."""
    own, default = map(settings_of, (config, Config()))
    for name, value in own.items():
        if value != default.get(name):
            yield name, text_of(value), text_of(default.get(name))


def text_of(value: Any) -> str:
    """A setting's value as it is read."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(text_of, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {text_of(part)}" for key, part in value.items()) or "none"
    return fields.plain_text(value)


def _profile(run: Path, folder: Path | None) -> Iterator[tuple[str, str | None, str]]:
    """Name, link, and size of the files of a profiler."""
    files = sorted(path for path in below(run / PROFILE) if is_file(path)) if is_dir(run / PROFILE) else []
    for path in files[:MAX_PROFILES]:
        href = None if folder is None else link(path, folder)
        yield str(path.relative_to(run)), href, in_bytes(path.stat().st_size)


def link(path: Path, folder: Path) -> str:
    """To a file, from a page that lies in a folder."""
    return urllib.parse.quote(os.path.relpath(path, folder))


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _corpus(corpus: Corpus) -> dict[str, Any]:
    return {
        "path": corpus.where,
        "source": source_text(corpus.manifest),
        "counts": corpus.manifest["counts"],
        "tokenizer": corpus.manifest["tokenizer"],
        "drops": list(Drops.from_dict(corpus.manifest["drops"]).rows()),
    }
