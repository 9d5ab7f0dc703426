"""Commands around a corpus: demo, preprocess, verify, inspect, merge, retokenize, export-corpus, replay."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_lcl.cli.arguments import add_input, add_jobs, add_output, jobs_of, output_folder, pairs, single_input
from megatron_lcl.cli.output import say
from megatron_lcl.errors import UserError
from megatron_lcl.units import counted


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add("demo", _demo, "make a demo data set, documents and corpora, from public packages")
    sub.add_argument("name", choices=["emoji", "things", "manual"], metavar="emoji|things|manual")
    sub.add_argument("--output", required=True, metavar="DIR", help="where everything goes")
    sub.add_argument(
        "--from", dest="given", metavar="DIR",
        help="an offline folder of the packages, as `npm pack` and `apt-get download` leave them (default: fetch them)",
    )  # fmt: skip
    sub.add_argument("--html", metavar="DIR", help="manual: a folder of pages with images (default: the GIMP manual)")
    sub.add_argument(
        "--train",
        action="store_true",
        help="emoji, things: also train on it, name the held-out artist's images, and write a report",
    )
    sub.add_argument("--steps", type=int, help="with --train: optimizer steps (default: what its config says)")

    sub = add(
        "preprocess",
        _preprocess,
        "convert documents of a known format into a corpus",
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    needed = [
        sub.add_argument("--format", required=True, metavar="F", help="format of the input: one of those below"),
        sub.add_argument(
            "--input",
            required=True,
            metavar="PATH|URL",
            help="a file or folder of that format, also s3://bucket/folder",
        ),
        add_output(sub, "the corpus: a new or an empty folder", "input", "images", "held_out"),
    ]
    sub.add_argument(
        "-h", "--help", action=_HelpOnFormats, needed=needed, help="this, and with --format F the options of format F"
    )
    sub.add_argument("--images", metavar="DIR|URL", help="where the images are, for formats that keep them apart")
    sub.add_argument(
        "--tokenizer",
        metavar="clip|FILE|CORPUS",
        help="a SentencePiece .model, a tokenizer.json, or a corpus's (default: train one)",
    )
    sub.add_argument("--vocab-size", type=int, metavar="N", help="token ids, if a tokenizer is trained (4096)")
    sub.add_argument("--held-out", metavar="DIR|URL", help="hold whole documents out, into a corpus of their own")
    sub.add_argument("--held-out-fraction", type=float, metavar="X", help="share of documents to hold out (0.13)")
    sub.add_argument("--held-out-seed", type=int, metavar="N", help="seed that chooses these documents (0)")
    sub.add_argument(
        "--max-bad-fraction", type=float, default=0.2,
        help="stop if a larger share of images, texts or documents is bad (%(default)s)",
    )  # fmt: skip
    sub.add_argument("--max-image-side", type=int, metavar="PIXELS", help="scale larger images down")
    sub.add_argument("--limit", type=int, metavar="N", help="only the first N documents of the input, for a trial")
    sub.add_argument(
        "--shard-bytes", type=int, metavar="N", help="a shard ends after so many bytes of tokens and images (4 GiB)"
    )
    sub.add_argument("--shard-documents", type=int, metavar="N", help="… or after so many documents (500,000)")
    sub.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the format, see --format F --help; may be repeated",
    )
    add_jobs(sub, "processes; any number writes the same bytes")

    sub = add("verify", _verify, "check a corpus: checksums, offsets, token and image indices, every image decodes")
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("--quick", action="store_true", help="do not decode the images")

    sub = add("inspect", _inspect, "look at a corpus: numbers, one document, documents of a source, or a page")
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("what", nargs="*", default=[], metavar="stats | show N", help="default: stats")
    sub.add_argument("--json", action="store_true", help="stats as JSON")
    sub.add_argument("--html", metavar="FILE", help="write one self-contained page of sample documents")
    sub.add_argument(
        "--source", metavar="NAME", help="documents whose source (file, URL) has NAME in it; with --html, show these"
    )

    sub = add("merge", _merge, "join corpora of the same tokenizer")
    sub.add_argument("corpora", nargs="+", metavar="CORPUS")
    add_output(sub, "a new or an empty folder")
    sub.add_argument("--move", action="store_true", help="move the shards (default: link them)")

    sub = add("retokenize", _retokenize, "write a corpus with another tokenizer; its images are linked, not read")
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("--tokenizer", required=True, metavar="clip|FILE|CORPUS", help="as of `preprocess`")
    add_output(sub, "a new or an empty folder")

    sub = add(
        "export-corpus",
        _export_corpus,
        "convert a corpus back into JSON lines, WebDataset, or parquet for `datasets`",
    )
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("--format", default="jsonl", metavar="jsonl|webdataset|hf", help="(%(default)s)")
    add_output(sub, "a new or an empty folder")

    sub = add(
        "replay",
        _replay,
        "show the batch of a step as a page, on any machine; or list the steps that read a document",
    )
    add_input(sub, "RUN", "the run folder (train.output), one of its checkpoints, or a config file", "--config")
    sub.add_argument(
        "--step",
        type=int,
        help="counted from 0; with --source, the steps before it (default: those of the newest checkpoint, or all of "
        "the run where there is none)",
    )
    sub.add_argument(
        "--source",
        metavar="NAME",
        help="print which steps read documents whose source (file, URL) has NAME in it, and write no page",
    )
    sub.add_argument("--rank", type=int, help="only what this data-parallel process reads, with --world-size")
    sub.add_argument("--world-size", type=int, metavar="N", help="with --rank: data-parallel processes")
    sub.add_argument("--packs", metavar="A:B", help="only packs A to B, by the page's numbers (default: the first 16)")
    sub.add_argument("--output", metavar="FILE", help="default: replay-STEP.html")


class _HelpOnFormats(argparse.Action):
    """`--help` that first reads the whole command line, for the format that it names, then imports the importers."""

    def __init__(self, needed: list[argparse.Action], **options: Any) -> None:
        super().__init__(**{**options, "nargs": 0})
        self._needed = needed

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        for action in self._needed:
            action.required = False

        def show(options: argparse.Namespace, _rest: list[str]) -> None:
            for action in self._needed:
                action.required = True
            parser.epilog = _on_format(options.format) if options.format else _on_formats()
            parser.print_help()

        namespace.run = show


def _on_formats() -> str:
    from megatron_lcl.data.prepare.importers import formats, what_it_reads

    lines = ["formats:"]
    for name in formats():
        lines += _entry(name, what_it_reads(name))
    return "\n".join([*lines, "", "--format F --help lists the options of format F"])


def _on_format(format: str) -> str:
    from megatron_lcl.data.prepare.importers import importer_class, options_of, what_it_reads

    options = options_of(importer_class(format))
    lines = [f"format {format}:", *_entry("reads", what_it_reads(format)), ""]
    lines.append(f"options of format {format}, each as --option KEY=VALUE:" if options else "it has no options")
    for option in options:
        default = "needed" if option.is_needed else f"default {option.default_text}"
        lines += _entry(option.name, f"{option.help} ({option.type_name}, {default})")
    return "\n".join(lines)


def _entry(name: str, text: str) -> list[str]:
    """As argparse shows an argument."""
    indent = " " * 24
    lines = textwrap.wrap(text, 100, initial_indent=indent, subsequent_indent=indent) or [""]
    if len(name) > 20:
        return [f"  {name}", *lines]
    return [f"  {name:<22}{lines[0][24:]}", *lines[1:]]


def _demo(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.demo.run import demo

    if options.train and options.name == "manual":
        raise UserError("--train goes with emoji and things; `megatron-lcl quickstart` trains on the manual")
    if options.steps is not None and not options.train:
        raise UserError("--steps goes with --train")
    given, html = (None if path is None else Path(path) for path in (options.given, options.html))
    if not options.train:
        demo(options.name, Path(options.output), given, html)
        return 0
    from megatron_lcl.demo.train import check_steps, train_demo

    check_steps(options.steps)
    demo(options.name, Path(options.output), given, html)
    return train_demo(Path(options.output), options.steps)


def _preprocess(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
    from megatron_lcl.data.prepare.importers import read_options
    from megatron_lcl.data.prepare.jobs import preprocess_in_jobs
    from megatron_lcl.data.prepare.preprocess import preprocess
    from megatron_lcl.data.storage.store import url_of

    if options.tokenizer is not None and options.vocab_size is not None:
        raise UserError(
            f"--vocab-size {options.vocab_size} is of a tokenizer that is trained, and --tokenizer {options.tokenizer} "
            "has its own size; give one of the two"
        )
    if options.held_out is None:
        for name, value in (("fraction", options.held_out_fraction), ("seed", options.held_out_seed)):
            if value is not None:
                raise UserError(f"--held-out-{name} {value} goes with --held-out DIR, the folder of those documents")
    defaults = {
        "vocab_size": options.vocab_size,
        "held_out_fraction": options.held_out_fraction,
        "seed": options.held_out_seed,
        "shard_bytes": options.shard_bytes,
        "shard_documents": options.shard_documents,
    }
    arguments = {
        "images": options.images,
        "tokenizer": options.tokenizer,
        "max_bad_fraction": options.max_bad_fraction,
        "max_image_side": options.max_image_side,
        "limit": options.limit,
        "options": read_options(options.format, pairs(options.option)),
        "workers": options.workers,
        **{name: value for name, value in defaults.items() if value is not None},
    }
    engine, job = jobs_of(options)
    input = url_of(options.input)
    for place in filter(None, map(url_of, filter(None, (options.output, options.held_out)))):
        if input and f"{place}/".startswith(f"{input}/"):
            raise UserError(f"{place} lies in the folder of the input, and would be part of it; give another place")
    if options.held_out and (url := url_of(options.output)) and url == url_of(options.held_out):
        raise UserError(f"the held-out corpus cannot have the place of the corpus itself, {url}; give another one")
    with contextlib.ExitStack() as outputs:
        places = [outputs.enter_context(output_folder(options, MANIFEST, resumes=True))]
        if options.held_out is not None:
            places.append(outputs.enter_context(output_folder(options, MANIFEST, resumes=True, name="held_out")))
            arguments["held_out"] = places[1]
        if engine is None:
            found = preprocess(options.format, options.input, places[0], job=job, progress=True, **arguments)
        else:
            found = preprocess_in_jobs(options.format, options.input, places[0], engine, progress=True, **arguments)
    say(found.at(options.output, options.held_out))


def _verify(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.data.prepare.verify import verify

    faults = verify(options.corpus, options.quick)
    say("\n".join(faults) if faults else f"{options.corpus}: no fault found")
    return 1 if faults else 0


def _inspect(options: argparse.Namespace, _rest: list[str]) -> None:
    import json

    from megatron_lcl.data.corpus.store import open_corpus
    from megatron_lcl.data.pages import inspect

    if (options.html or options.json or options.source) and options.what not in ([], ["stats"]):
        raise UserError("--html, --json and --source are of the whole corpus; give them without `show N`")
    if options.json and options.source:
        raise UserError("--json prints numbers of the whole corpus; give it without --source")
    corpus = open_corpus(options.corpus)
    if options.html:
        say(inspect.write_page(corpus, options.html, source=options.source))
        return
    if options.source:
        say(inspect.found(corpus, options.source))
        return
    match options.what:
        case [] | ["stats"]:
            numbers = inspect.stats(corpus)
            say(json.dumps(numbers, indent=1) if options.json else inspect.table(numbers))
        case ["show", *numbers] if numbers and all(map(str.isdecimal, numbers)):
            say("\n\n".join([inspect.show(corpus, int(number)) for number in numbers]))
        case _:
            raise UserError(f"inspect takes `stats` or `show N`, not {' '.join(options.what)!r}")


def _merge(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
    from megatron_lcl.data.prepare.merge import merge
    from megatron_lcl.data.storage.store import url_of

    if options.move and url_of(options.output):
        raise UserError("--move removes corpora once they are joined, which is before the upload; leave it out")
    with output_folder(options, MANIFEST) as folder:
        counts = merge(options.corpora, folder, options.move)["counts"]
    say(f"{options.output}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))


def _retokenize(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
    from megatron_lcl.data.prepare.retokenize import retokenize

    with output_folder(options, MANIFEST) as folder:
        manifest = retokenize(options.corpus, folder, options.tokenizer, progress=True)
    counts, ids = manifest["counts"], counted(manifest["tokenizer"]["vocab_size"], "token id")
    say(f"{options.output}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')}, {ids}")


def _export_corpus(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.prepare.export_corpus import export_corpus

    with output_folder(options, None) as folder:
        found = export_corpus(options.corpus, folder, options.format, progress=True)
    say(dataclasses.replace(found, path=options.output))


def _replay(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl import objectives
    from megatron_lcl.data.corpus.files import replace_text
    from megatron_lcl.data.pages.replay import replay_html
    from megatron_lcl.train.checkpoint.folder import config_and_progress, ledger_of

    packs = None
    if options.packs is not None:
        found = re.fullmatch(r"(\d+):(\d+)", options.packs)
        packs = range(int(found[1]), int(found[2]) + 1) if found else range(0)
        if not packs:
            raise UserError(f"--packs {options.packs}: give the first and the last pack, as 512:527")
    if options.source is not None:
        return _print_reads(options)
    if options.step is None:
        raise UserError("give --step N for a page of its batch, or --source NAME for the steps that read a document")
    config, progress = config_and_progress(Path(single_input(options)))
    sequences, ledger = objectives.create(config).sequences, ledger_of(progress)
    page = replay_html(config, sequences, options.step, options.rank, options.world_size, ledger, packs=packs, say=say)
    file = Path(options.output or f"replay-{options.step}.html")
    replace_text(file, page)
    say(file)


def _print_reads(options: argparse.Namespace) -> None:
    from megatron_lcl import objectives
    from megatron_lcl.data.pages.reads import found_reads
    from megatron_lcl.train.checkpoint.folder import config_and_progress, ledger_of

    others = {"--rank": options.rank, "--world-size": options.world_size, "--packs": options.packs}
    others["--output"] = options.output
    for name in (name for name, value in others.items() if value is not None):
        raise UserError(f"{name} is of a page; give --source without it")
    if options.step is not None and options.step < 1:
        raise UserError(f"--step {options.step}: --source looks at the steps before it; give 1 or more")
    config, progress = config_and_progress(Path(single_input(options)))
    done = progress.step if progress else 0
    steps = min(options.step or done or config.train.steps, max(done, config.train.steps))
    say(found_reads(config, objectives.create(config).sequences, options.source, steps, done, ledger_of(progress)))
