"""Commands around images on the web: fetch."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

from megatron_lcl.cli.arguments import add_input, add_jobs, add_output, jobs_of, output_folder, single_input
from megatron_lcl.cli.output import say
from megatron_lcl.data.fetch.settings import STORES, Settings
from megatron_lcl.errors import UserError
from megatron_lcl.units import counted


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add("fetch", _fetch, "download images by their URLs into a store, which `preprocess --images` reads")
    add_input(
        sub, "PATH",
        "a file or folder with image URLs: MMC4, OBELICS, OmniCorpus, MINT-1T, LAION, DataComp (.parquet, .jsonl, "
        ".ndjson, .json), JSON lines of this package, or .txt with a URL a line",
        "--input",
    )  # fmt: skip
    add_output(sub, "the store: new, or one to go on with")
    sub.add_argument(
        "--url-column", metavar="NAME", help="column or key of the URLs (default: those of these data sets)"
    )
    add_jobs(sub, "processes; a host is one process's alone")
    default = Settings()
    sub.add_argument(
        "--store", choices=STORES, default=default.store,
        help="what holds the images: tar files, or parquet files with a row for each URL (%(default)s)",
    )  # fmt: skip
    for name, kind, metavar, help in (
        ("max_image_side", int, "PIXELS", "scale larger images down, and encode them again"),
        ("max_bytes", int, "BYTES", "longer responses are refused (%(default)s)"),
        ("max_pixels", int, "N", "images of more pixels are refused (%(default)s)"),
        ("shard_urls", int, "N", "URLs that a shard accounts for (%(default)s)"),
        ("timeout", float, "SECONDS", "of a request, to its last byte (%(default)s)"),
        ("retries", int, "N", "after a lost connection, a timeout, status 408, 429, 500, 502, 503, 504 (%(default)s)"),
        ("backoff", float, "SECONDS", "before the first retry, then doubled; Retry-After if longer (%(default)s)"),
        ("concurrency", int, "N", "requests at a time of a process (%(default)s)"),
        ("per_host", int, "N", "requests at a time of a host (%(default)s)"),
        ("delay", float, "SECONDS", "between two requests of a host; its Crawl-delay if longer (%(default)s)"),
        ("proxy", str, "URL", "http://[user:password@]host:port for all requests"),
        ("user_agent", str, "TEXT", "name/version (and where to complain); robots.txt may name it (%(default)s)"),
    ):
        flag = "--" + name.replace("_", "-")
        sub.add_argument(flag, type=kind, metavar=metavar, default=getattr(default, name), help=help)
    sub.add_argument(
        "--allow-private", action="store_true", help="also connect to loopback and private addresses, as of a mirror"
    )


def _fetch(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.fetch.plan import ABOUT, FOLDER
    from megatron_lcl.data.fetch.run import fetch, fetch_in_jobs
    from megatron_lcl.data.storage.store import url_of

    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    input = single_input(options)
    common = {"url_column": options.url_column, "workers": options.workers, "progress": True}
    engine, job = jobs_of(options)
    if job is not None and url_of(options.output):
        raise UserError(
            "--job fetches a part of a store, and what is uploaded is whole: give a folder that all jobs see"
        )
    with output_folder(options, f"{FOLDER}/{ABOUT}", resumes=True) as folder:
        if engine is None:
            found = fetch(input, folder, settings, job=job, **common)
        else:
            found = fetch_in_jobs(input, folder, engine, settings, **common)
    total = sum(found[status] for status in ("kept", "dead", "refused"))
    say(
        f"{options.output}: {counted(total, 'URL')}: {found['kept']:,} kept ({found['bytes']:,} bytes), "
        f"{found['dead']:,} dead, {found['refused']:,} refused"
    )
    for reason, count in found["reasons"].items():
        say(f"{count:>12,}  {reason}")
    for reason, count in found["dropped"].items():
        say(f"{count:>12,}  not in the store: {reason}")
    if total and not found["todo"]:
        say(
            "nothing was left to request; what is dead or refused is not tried again in the same store, with other "
            "settings neither: fetch a list of these URLs into a new --output"
        )
