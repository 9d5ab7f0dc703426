"""Commands around what stays in a corpus: curate."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_lcl.cli.arguments import (
    add_input,
    add_jobs,
    add_output,
    jobs_of,
    output_folder,
    overrides_of,
    single_input,
)
from megatron_lcl.cli.output import say
from megatron_lcl.errors import UserError
from megatron_lcl.filesystem import is_dir


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add(
        "curate", _curate, "filter a corpus by rules into a new one; --section.key VALUE sets a rule",
        _add_rules, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_input(sub, "CORPUS", "a folder that `preprocess` or `curate` wrote", "--corpus")
    add_output(sub, "the new corpus: new, or one to go on with", required=False)
    rules = sub.add_mutually_exclusive_group()
    rules.add_argument("--preset", metavar="NAME", help="rules of a paper: datacomp, mint1t, mmc4, obelics")
    rules.add_argument("--config", metavar="FILE", help="YAML of rules; a field that it does not name is as below")
    add_jobs(
        sub,
        "processes, each with a task of documents at a time and its own copy of a model that rules ask, which computes "
        "in one thread; any number writes the same bytes",
    )
    sub.add_argument("--dry-run", action="store_true", help="only print what would be removed, without --output")
    sub.add_argument("--sample", metavar="FILE", help="also write an HTML page with samples of what was removed")
    sub.add_argument(
        "--samples",
        type=int,
        metavar="N",
        default=6,
        help="removals of each rule that are kept to be looked at, with text or a small image (%(default)s); 0: none, "
        "and no names of what was removed either",
    )


def _curate(options: argparse.Namespace, rest: list[str]) -> None:
    from megatron_lcl.curate.page import write_page
    from megatron_lcl.curate.run import curate, curate_in_jobs
    from megatron_lcl.curate.settings import read_settings
    from megatron_lcl.data.corpus.corpus_manifest import MANIFEST

    corpus = single_input(options)
    if options.dry_run == bool(options.output):
        raise UserError("give --output DIR, or --dry-run for a look at what would be removed")
    if options.sample:
        page = Path(options.sample)
        made = options.output and page.absolute().parent == Path(options.output).absolute()
        if is_dir(page) or not (made or is_dir(page.absolute().parent)):
            raise UserError(f"--sample {page}: give a file in a folder that is there")
    settings = read_settings(options.preset, options.config, overrides_of(rest, switches=()))
    engine, job = jobs_of(options)
    common = {"settings": settings, "workers": options.workers, "samples": options.samples, "progress": True}
    if options.dry_run:
        if engine is not None:
            raise UserError(f"--dry-run looks here; give it without --executor {engine.executor}")
        found = curate(corpus, None, job=job, **common)
    else:
        with output_folder(options, MANIFEST, resumes=True) as folder:
            if engine is None:
                found = curate(corpus, folder, job=job, **common)
            else:
                found = curate_in_jobs(corpus, folder, engine, **common)
    say(found)
    if options.sample:
        say(f"samples: {write_page(found, options.sample)}")


def _add_rules(sub: argparse.ArgumentParser) -> None:
    """The rules, for `--help`."""
    from megatron_lcl.curate.settings import describe

    lines = ["rules (type, default); null turns off what is null, [] or false by default:"]
    for name, kind, default, help in describe():
        lines += [f"  --{name}  ({kind}, {default})", f"      {help}"]
    sub.epilog = "\n".join(lines)
