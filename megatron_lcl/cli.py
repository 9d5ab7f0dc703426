"""The `megatron-lcl` command: arguments to library calls, errors to one line.

Exit codes: 0 done, 1 a check failed or (with a traceback) a fault of the program, 2 bad input or a run that cannot
go on; of `train` also 71, a process or a machine was lost, and 75, stopped by a signal with all saved (130 for Ctrl-C):
start it again.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_lcl import config as configs
from megatron_lcl.errors import RunError, UserError

_MENDABLE = {
    errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOSPC,
    errno.ENOTDIR, errno.ENOTEMPTY, errno.EPERM, errno.EROFS, errno.ESTALE, errno.EIO,
}  # fmt: skip
"""what the system says of files and folders; other OSErrors are faults of the program"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be valid Unicode
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 2
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command != "train":
        parser.error(
            f"unknown argument {rest[0]!r} of `{options.command}`; see `megatron-lcl {options.command} --help`"
        )
    try:
        return options.run(options, rest) or 0
    except BrokenPipeError:
        return 0
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _MENDABLE:
            raise
        if not _said_elsewhere(error):
            print(f"megatron-lcl {options.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        _flush()


def _flush() -> None:
    """Write what is left; a reader that has gone (`| head`) is no error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _said_elsewhere(error: BaseException) -> bool:
    """Whether the run's first process says it."""
    return isinstance(error, RunError) and os.environ.get("RANK", "0") != "0"


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    return " ".join(str(error).split())


class _OneLineEach(argparse.RawDescriptionHelpFormatter):
    """Each command's help on the command's own line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=16, width=120)
        self._action_max_length = 14  # argparse forgets that commands are indented


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="megatron-lcl",
        description="Pre-training of vision encoders on interleaved image-text documents by Latent Compression\n"
        "Learning. `megatron-lcl COMMAND --help` says what a command takes.",
        epilog=__doc__.partition("\n\n")[2],
        formatter_class=_OneLineEach,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, run: Callable[..., int | None], help: str, **extra: object) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False, **extra)  # type: ignore[arg-type]
        sub.set_defaults(run=run)
        return sub

    sub = add(
        "quickstart",
        _quickstart,
        "from real documents to a pre-trained encoder in Hugging Face format, on this machine",
    )
    sub.add_argument("--html", metavar="DIR", help="a folder of HTML pages with images (default: the GIMP manual)")
    sub.add_argument("--output", metavar="DIR", default="runs/quickstart", help="where everything goes (%(default)s)")
    sub.add_argument("--steps", type=int, help="optimizer steps (default: what the quickstart config says)")

    sub = add("preprocess", _preprocess, "documents in any of the known formats into a corpus")
    sub.add_argument("--format", required=True, help="format of the input: html, jsonl, …")
    sub.add_argument("--input", required=True, metavar="PATH")
    sub.add_argument("--output", required=True, metavar="DIR", help="the corpus: a new or an empty folder")
    sub.add_argument("--images", metavar="DIR", help="where the images are, for formats that keep them apart")
    sub.add_argument("--tokenizer", metavar="clip|FILE.model", help="default: train SentencePiece on the documents")
    sub.add_argument("--vocab-size", type=int, default=4096, help="of a tokenizer trained here (%(default)s)")
    sub.add_argument("--held-out", metavar="DIR", help="hold whole documents out, into a corpus of their own")
    sub.add_argument("--held-out-fraction", type=float, default=0.13, help="share of documents (%(default)s)")
    sub.add_argument(
        "--max-bad-fraction", type=float, default=0.2, help="stop when more than this is bad (%(default)s)"
    )
    sub.add_argument("--max-image-side", type=int, metavar="PIXELS", help="scale larger images down")
    sub.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the format; may be repeated"
    )
    sub.add_argument("--workers", type=int, default=1, help="processes; any number writes the same bytes (%(default)s)")
    sub.add_argument("--shard", metavar="I/N", help="only the I-th of N shares (from 0); the last one done finishes")
    sub.add_argument("--executor", choices=["local", "slurm"], default="local", help="slurm: a job array of --shares")
    sub.add_argument("--shares", type=int, help="jobs of the array (8)")
    sub.add_argument("--slurm", action="append", default=[], metavar="KEY=VALUE", help="submitit's parameters")

    sub = add(
        "train", _train, "pre-train; --section.key VALUE overrides the config",
        formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_fields(),
    )  # fmt: skip
    sub.add_argument("--config", metavar="FILE", help="YAML; what it leaves out has the defaults below")
    sub.add_argument(
        "--processes",
        type=int,
        help="on this machine, where no launcher started them (default: one a GPU, or two on CPU)",
    )
    sub.add_argument("--print-config", action="store_true", help="print the whole config and stop")
    sub.add_argument("--dry-run", action="store_true", help="check everything, print what would be launched, and stop")
    sub.add_argument(
        "--nodes", type=int, default=1, help="with --dry-run: machines, each with --processes (%(default)s)"
    )
    sub.add_argument("--resume", metavar="auto|DIR", help="the same as --checkpoint.resume")

    sub = add("evaluate", _evaluate, "measure an encoder: on held-out documents, or by the usual tasks on any data")
    models = "a run or checkpoint; with --data also hf:DIR, timm:NAME, open_clip:NAME; may be repeated"
    sub.add_argument(
        "--checkpoint", "--model", dest="models", action="append", required=True, metavar="MODEL", help=models
    )
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", metavar="DIR", help="held-out corpus: retrieval on its contexts, generation loss")
    what.add_argument("--data", metavar="PATH", help="class folders, WebDataset, COCO-Karpathy JSON, or a corpus")
    tasks = "with --data: zero-shot, retrieval, knn, linear-probe, attentive-probe, captioning; may be repeated"
    sub.add_argument("--task", dest="tasks", action="append", metavar="TASK", help=tasks)
    sub.add_argument("--images", metavar="DIR", help="images of a COCO-Karpathy file")
    sub.add_argument("--class-names", metavar="FILE", help="one class name a line")
    sub.add_argument("--templates", metavar="FILE", help="one text template a line, {c} for the class")
    sub.add_argument("--tokenizer", metavar="clip|FILE", help="default: that of the model's corpus, or CLIP's")
    sub.add_argument("--split", help="of the data, measured on (default: test, or all of a folder without splits)")
    sub.add_argument("--train-split", default="train", help="of the data, k-NN and probes learn on it (%(default)s)")
    sub.add_argument("--skip-bad-images", action="store_true", help="leave out and count images that do not decode")
    sub.add_argument("--top-p", type=float, default=0.0, help="captions by nucleus sampling (default: greedy)")
    sub.add_argument("--seed", type=int, default=0, help="of intervals, probes and sampling (%(default)s)")
    sub.add_argument("--processes", type=int, default=1, help="share images among so many (%(default)s)")
    sub.add_argument("--batch-size", type=int, default=64, help="images of a forward pass (%(default)s)")
    sub.add_argument(
        "--device", dest="devices", action="append", metavar="DEVICE",
        help="cpu, cuda:1 …; repeated, the processes take turns (default: every GPU, or cpu)",
    )  # fmt: skip
    sub.add_argument("--output", metavar="DIR", help="also write the results there")

    sub = add("import", _import, "a checkpoint in the reference's format into ours")
    sub.add_argument("--format", required=True, choices=["open_clip"])
    sub.add_argument("--input", required=True, metavar="FILE")
    sub.add_argument("--model-config", metavar="FILE.json", help="one of the reference's model_configs")
    sub.add_argument("--output", required=True, metavar="DIR")

    sub = add("export", _export, "a checkpoint into another library's format")
    sub.add_argument("--checkpoint", required=True, metavar="DIR", help="a run, or one of its checkpoints")
    sub.add_argument("--format", required=True, choices=["hf", "timm", "open_clip"])
    sub.add_argument("--output", required=True, metavar="DIR")
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--image-size", type=int, help="interpolate the position embedding to this size")
    sub.add_argument("--name", help="of the model, for its card")
    sub.add_argument("--license", metavar="SPDX", help="of the weights, for the card: apache-2.0, cc-by-4.0, …")
    sub.add_argument(
        "--results", action="append", metavar="FILE", help="results.json of `evaluate`, for the card; may be repeated"
    )
    sub.add_argument(
        "--data",
        dest="datasets",
        action="append",
        metavar="TEXT",
        help="what the model was trained on, for the card; may be repeated (default: the corpora's manifests)",
    )

    sub = add("verify", _verify, "check a corpus: checksums, offsets, token and image indices, every image decodes")
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("--quick", action="store_true", help="do not decode the images")

    sub = add("inspect", _inspect, "look at a corpus: numbers, one document, or a page")
    sub.add_argument("corpus", metavar="CORPUS")
    sub.add_argument("what", nargs="*", metavar="stats | show N", help="default: stats")
    sub.add_argument("--json", action="store_true", help="stats as JSON")
    sub.add_argument("--html", metavar="FILE", help="write one self-contained page of sample documents")

    sub = add("merge", _merge, "join corpora of the same tokenizer")
    sub.add_argument("corpora", nargs="+", metavar="CORPUS")
    sub.add_argument("--output", required=True, metavar="DIR")
    sub.add_argument("--move", action="store_true", help="move the shards (default: link them)")

    sub = add(
        "replay",
        _replay,
        "the batch of a step as a page, on any machine",
    )
    sub.add_argument("--config", required=True, metavar="FILE", help="the run's config.yaml")
    sub.add_argument("--step", required=True, type=int, help="counted from 0")
    sub.add_argument("--rank", type=int, help="only what this data-parallel process reads")
    sub.add_argument("--world-size", type=int, default=1, help="data-parallel processes (%(default)s)")
    sub.add_argument("--output", metavar="FILE", help="default: replay-STEP.html")

    sub = add("checkpoint", _checkpoint, "list, verify or prune the checkpoints of a run")
    sub.add_argument("what", choices=["list", "verify", "prune"], help="verify: exit code 1 where a file is damaged")
    sub.add_argument("folder", metavar="RUN", help="the run folder (train.output); list, verify: or one checkpoint")
    sub.add_argument("--quick", action="store_true", help="list, verify: the files' sizes only, nothing is read")
    sub.add_argument("--keep-last", type=int, metavar="N", help="prune: newest kept (default: as the run's config)")
    sub.add_argument("--keep-every", type=int, metavar="N", help="prune: also those at multiples of N steps (likewise)")
    sub.add_argument("--dry-run", action="store_true", help="prune: only say what would be deleted")

    sub = add("report", _report, "one self-contained page about a run")
    sub.add_argument("--run", dest="folder", required=True, metavar="DIR", help="the run folder (train.output)")
    sub.add_argument("--output", metavar="FILE", help="default: report.html in the run folder")

    sub = add(
        "selftest",
        _selftest,
        "train a tiny model in every layout that the processes at hand allow, and compare with one process",
    )
    sub.add_argument("--timeout", type=float, default=120.0, help="seconds for one layout (%(default)s)")
    return parser


def _fields() -> str:
    lines = ["config fields (type, default):"]
    for name, kind, default, help in configs.describe():
        lines += [f"  --{name}  ({kind}, {default})", f"      {help}"]
    return "\n".join(lines)


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--a.b value`, `--a.b=value`, and `--a.b` alone for a field that is true or false."""
    switches = {name for name, kind, *_ in configs.describe() if kind == "bool"}
    overrides: dict[str, str] = {}
    items = deque(rest)
    while items:
        item = items.popleft()
        if not item.startswith("--"):
            raise UserError(f"unexpected argument {item!r}; overrides are --section.key value")
        key, equals, value = item[2:].partition("=")
        if not equals:
            alone = not items or items[0].startswith("--")
            if alone and key.replace("-", "_") not in switches:
                raise UserError(f"--{key} has no value")
            value = "true" if alone else items.popleft()
        overrides[key] = value
    return overrides


# --- commands ----------------------------------------------------------------------------------------------------


def _quickstart(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.quickstart.run import quickstart

    return quickstart(Path(options.output), Path(options.html) if options.html else None, options.steps)


def _preprocess(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.prepare.cluster import preprocess_on_slurm, read_parameters
    from megatron_lcl.data.prepare.importers import read_options
    from megatron_lcl.data.prepare.preprocess import parse_job, preprocess

    arguments = {
        "images": options.images,
        "tokenizer": options.tokenizer,
        "vocab_size": options.vocab_size,
        "held_out": options.held_out,
        "held_out_fraction": options.held_out_fraction,
        "max_bad_fraction": options.max_bad_fraction,
        "max_image_side": options.max_image_side,
        "options": read_options(options.format, _pairs(options.option)),
        "workers": options.workers,
    }
    places = (options.format, options.input, options.output)
    if options.executor == "slurm":
        if options.shard:
            raise UserError("--shard does one share here; --executor slurm does all --shares: give one of the two")
        shares = 8 if options.shares is None else options.shares
        print(preprocess_on_slurm(*places, jobs=shares, slurm=read_parameters(_pairs(options.slurm)), **arguments))
    else:
        if options.slurm or options.shares is not None:
            raise UserError("--shares and --slurm are for --executor slurm")
        job = parse_job(options.shard) if options.shard else None
        print(preprocess(*places, job=job, progress=True, **arguments))


def _pairs(items: Sequence[str]) -> dict[str, str]:
    """["key=value", …] as a dict."""
    for item in items:
        if "=" not in item:
            raise UserError(f"{item!r} is not KEY=VALUE")
    return {key: value for key, _, value in (item.partition("=") for item in items)}


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from megatron_lcl.train import launch

    rest = [*rest, "--checkpoint.resume", options.resume] if options.resume else rest
    config = configs.load(options.config, _overrides(rest))
    if options.print_config:
        print(configs.to_yaml(config), end="")
        return 0
    launch.adopt_slurm(os.environ)
    arguments = [*(["--config", options.config] if options.config else []), *rest]
    processes = options.processes or launch.default_processes(config.train.global_batch)
    if options.dry_run:
        from megatron_lcl.train.dryrun import dry_run

        print(dry_run(config, arguments, options.nodes, processes))
        return 0
    if options.nodes != 1:
        raise UserError("--nodes goes with --dry-run; processes on several machines are started by a launcher")
    from megatron_lcl.train.resilience.signals import Signals, Stopped

    if not launch.is_launched():
        from megatron_lcl.train.checks import check

        check(config, processes)
        if processes > 1:
            return launch.start_local(["train", *arguments], processes)
    with Signals() as signals:  # from here on: imports may take long where many processes make them
        from megatron_lcl.train.run import train

        try:
            train(config, signals)
        except Stopped as stop:
            if os.environ.get("RANK", "0") == "0":
                print(f"megatron-lcl train: {stop}", file=sys.stderr)
            return stop.code
    return 0


def _evaluate(options: argparse.Namespace, _rest: list[str]) -> None:
    if options.corpus:
        from megatron_lcl.evaluate.encoders.load import is_ours
        from megatron_lcl.evaluate.heldout import evaluate_checkpoint

        if options.tasks:
            raise UserError("--task goes with --data; --corpus measures what LCL trains, always the same")
        for model in options.models:
            if not is_ours(model):
                raise UserError(
                    f"--corpus measures what LCL trains, and {model} is no LCL model; give --data and --task"
                )
        if options.output and len(options.models) > 1:
            raise UserError("the results of one model fill --output; give one --model at a time, or no --output")
        for model in options.models:
            print(
                evaluate_checkpoint(Path(model), Path(options.corpus), Path(options.output) if options.output else None)
            )
        return
    import torch

    from megatron_lcl.evaluate.captioning import Decoding
    from megatron_lcl.evaluate.results import table
    from megatron_lcl.evaluate.run import evaluate

    results = evaluate(
        options.models,
        options.tasks or [],
        options.data,
        options.output,
        images=options.images,
        class_names=options.class_names,
        templates=options.templates,
        split=options.split,
        train_split=options.train_split,
        tokenizer=options.tokenizer,
        batch_size=options.batch_size,
        decoding=Decoding(top_p=options.top_p, seed=options.seed),
        seed=options.seed,
        skip_bad_images=options.skip_bad_images,
        processes=options.processes,
        devices=tuple(options.devices or ())
        or tuple(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        or ("cpu",),
    )
    print(table(results))


def _import(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.convert.export import import_checkpoint

    import_checkpoint(options.format, options.input, options.output, options.model_config)


def _export(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.convert.card import card_of
    from megatron_lcl.convert.certificate import summary
    from megatron_lcl.convert.export import export

    metrics = []
    if options.results:
        from megatron_lcl.evaluate.encoders.load import load_encoder
        from megatron_lcl.evaluate.results import read_measured

        fingerprint = load_encoder(options.checkpoint).fingerprint
        metrics = [measured for file in options.results for measured in read_measured(file, fingerprint)]
    card = card_of(Path(options.checkpoint)).replaced(options.name, options.license, options.datasets, metrics)
    facts = export(options.checkpoint, options.format, options.output, options.dtype, options.image_size, card)
    print(f"{options.output}: {summary(facts)}")


def _verify(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.data.prepare.verify import verify

    faults = verify(options.corpus, options.quick)
    print("\n".join(faults) if faults else f"{options.corpus}: no fault found")
    return 1 if faults else 0


def _inspect(options: argparse.Namespace, _rest: list[str]) -> None:
    import json

    from megatron_lcl.data.corpus.store import open_corpus
    from megatron_lcl.data.pages import inspect

    if (options.html or options.json) and options.what not in ([], ["stats"]):
        raise UserError("--html and --json are of the whole corpus; leave out `show N`")
    corpus = open_corpus(options.corpus)
    if options.html:
        print(inspect.write_page(corpus, options.html))
        return
    match options.what:
        case [] | ["stats"]:
            numbers = inspect.stats(corpus)
            print(json.dumps(numbers, indent=1) if options.json else inspect.table(numbers))
        case ["show", number] if number.isdecimal():
            print(inspect.show(corpus, int(number)))
        case _:
            raise UserError(f"inspect takes `stats` or `show N`, not {' '.join(options.what)!r}")


def _merge(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.data.prepare.merge import merge

    counts = merge(options.corpora, options.output, options.move)["counts"]
    print(f"{options.output}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))


def _replay(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl import objectives
    from megatron_lcl.data.corpus.files import replace_text
    from megatron_lcl.data.pages.replay import replay_html
    from megatron_lcl.train.checkpoint.folder import last_ledger

    config = configs.load(options.config)
    ledger = last_ledger(Path(config.train.output))
    page = replay_html(
        config, objectives.create(config).sequences, options.step, options.rank, options.world_size, ledger
    )
    file = Path(options.output or f"replay-{options.step}.html")
    replace_text(file, page)
    print(file)


def _checkpoint(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.train.checkpoint import inventory

    folder = Path(options.folder)
    if options.what == "list":
        print(inventory.table(folder, options.quick))
    elif options.what == "verify":
        faults = list(inventory.faults(folder, options.quick))
        print("\n".join(faults) if faults else f"{folder}: no fault found")
        return 1 if faults else 0
    else:
        lines = list(inventory.prune(folder, options.keep_last, options.keep_every, options.dry_run))
        print("\n".join(lines) if lines else "nothing to delete")
    return 0


def _report(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.report.page import write_report

    print(write_report(Path(options.folder), Path(options.output) if options.output else None))


def _selftest(options: argparse.Namespace, _rest: list[str]) -> int:
    from megatron_lcl.selftest.run import selftest
    from megatron_lcl.train import launch

    launch.adopt_slurm(os.environ)
    failed = [verdict for verdict in selftest(timeout=options.timeout) if verdict.faults]
    return 1 if failed else 0
