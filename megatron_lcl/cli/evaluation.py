"""Commands around trained encoders: evaluate, import, export."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_lcl.cli.arguments import MODEL, add_input, add_output, inputs, output_folder, single_input
from megatron_lcl.cli.output import say
from megatron_lcl.errors import UserError

_AVERAGE = "an average of the run's weights in their place: ema_0.999, tail_0.1 … (config section `average`)"


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add(
        "evaluate", _evaluate, "measure an encoder: on held-out documents, or by the usual tasks on any data",
        _add_settings,
        usage="megatron-lcl evaluate MODEL (--corpus DIR | --data PATH --task TASK [options]) [--output DIR]",
    )  # fmt: skip
    models = f"{MODEL}; with --data also hf:DIR, timm:NAME, open_clip:NAME; untrained: random:CONFIG, "
    models += "timm:NAME?pretrained=no, open_clip:NAME@none; several are compared"
    add_input(sub, "MODEL", models, "--checkpoint", "--model")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--corpus", metavar="DIR", help="held-out corpus: retrieval on its contexts, generation loss")
    images = "class folders, WebDataset, JSON of COCO-Karpathy or NoCaps, or a corpus"
    what.add_argument("--data", metavar="PATH", help=images)
    sub.add_argument("--output", metavar="DIR", help="also write the results there")
    sub.add_argument("--average", metavar="NAME", help=_AVERAGE)
    sub.add_argument("--processes", type=int, default=1, help="share images among so many (default: %(default)s)")
    sub.add_argument(
        "--device", dest="devices", action="append", metavar="DEVICE",
        help="cpu, cuda:1 …; repeated, the processes take turns (default: every GPU, or cpu)",
    )  # fmt: skip

    data = sub.add_argument_group("with --data")
    tasks = "zero-shot, retrieval, knn, linear-probe, attentive-probe, captioning; may be repeated"
    flags = [
        data.add_argument("--task", dest="tasks", action="append", metavar="TASK", help=tasks),
        data.add_argument("--images", metavar="DIR", help="images of a JSON file (default: its own folder)"),
        data.add_argument("--class-names", metavar="FILE", help="one class name a line"),
        data.add_argument("--templates", metavar="FILE", help="--zero-shot.prompts from a file, one a line"),
        data.add_argument("--tokenizer", metavar="clip|FILE", help="default: that of the model's corpus, or CLIP's"),
        data.add_argument("--split", help="measured on (default: test, or all of a folder without splits)"),
        data.add_argument("--train-split", help="k-NN and probes learn on it (default: train)"),
        data.add_argument(
            "--skip-bad-images", action="store_const", const=True, help="skip and count images that do not decode"
        ),
        data.add_argument("--top-p", metavar="P", help="the same as --captioning.top-p"),
        data.add_argument("--seed", type=int, help="of probes, sampling, and intervals of BLEU and CIDEr (default: 0)"),
        data.add_argument("--cache", metavar="DIR", help=f"folder of features (default: {_CACHE})"),
        data.add_argument("--batch-size", type=int, help="images of a forward pass (default: 64)"),
    ]  # fmt: skip
    sub.set_defaults(of_data={flag.dest: flag.option_strings[0] for flag in flags})

    sub = add("import", _import, "convert a checkpoint in the format of the published LCL models into ours")
    add_input(sub, "MODEL", f"{MODEL} (.pt, .pth, .bin, .safetensors)", "--input")
    sub.add_argument("--format", default="open_clip", choices=["open_clip"], help="of a file (%(default)s)")
    sub.add_argument("--model-config", metavar="FILE.json", help="one of the reference's model_configs")
    sub.add_argument("--output", required=True, metavar="DIR")

    sub = add("export", _export, "convert a checkpoint into another library's format")
    add_input(sub, "MODEL", MODEL, "--checkpoint")
    sub.add_argument("--format", required=True, choices=["hf", "timm", "open_clip"])
    add_output(sub, "a new folder, or an export of the same format, which is replaced")
    sub.add_argument("--average", metavar="NAME", help=_AVERAGE)
    sub.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    sub.add_argument("--image-size", type=int, help="interpolate the position embedding to this size")
    sub.add_argument("--name", help="of the model, for its card")
    sub.add_argument("--license", metavar="SPDX", help="of the weights, for the card: apache-2.0, cc-by-4.0, …")
    sub.add_argument(
        "--results",
        action="append",
        metavar="FILE[@ORG/NAME]",
        help="results.json of `evaluate`, for the card, and the data's identifier on the Hub; may be repeated",
    )
    sub.add_argument(
        "--data",
        dest="datasets",
        action="append",
        metavar="TEXT",
        help="what the model was trained on, for the card: words, or `ORG/NAME: words` for what is on the Hub; may be "
        "repeated (default: the corpora's manifests)",
    )


_CACHE = "megatron_lcl/features in the user's cache folder"


def _add_settings(sub: argparse.ArgumentParser) -> None:
    """The settings of `evaluate`'s tasks."""
    from megatron_lcl.evaluate.settings import describe

    options = sub.add_argument_group("of the tasks, each with its --task")
    for name, kind, default, help in describe():
        text = f"{help} ({kind}, default: {default or 'none'})".replace("%", "%%")
        options.add_argument(f"--{name}", dest=name, metavar="VALUE", help=text)
        sub.get_default("of_data")[name] = f"--{name}"


def _evaluate(options: argparse.Namespace, _rest: list[str]) -> None:
    models = [_averaged(model, options.average) for model in inputs(options)]
    if options.corpus:
        _evaluate_corpus(models, options)
        return
    from megatron_lcl.evaluate.results import table
    from megatron_lcl.evaluate.run import evaluate
    from megatron_lcl.evaluate.settings import describe, read_settings
    from megatron_lcl.evaluate.workers import default_devices

    tasks = options.tasks or []
    given = {name: getattr(options, name) for name, *_ in describe() if getattr(options, name) is not None}
    if options.top_p is not None:
        given.setdefault("captioning.top-p", options.top_p)
    if options.templates and "zero-shot" not in tasks:
        raise UserError("--templates goes with --task zero-shot")
    results = evaluate(
        models,
        tasks,
        options.data,
        options.output,
        images=options.images,
        class_names=options.class_names,
        templates=options.templates,
        split=options.split,
        train_split=options.train_split or "train",
        tokenizer=options.tokenizer,
        settings=read_settings(given, tasks),
        seed=options.seed or 0,
        cache=options.cache,
        batch_size=64 if options.batch_size is None else options.batch_size,
        processes=options.processes,
        devices=options.devices or default_devices(),
        skip_bad_images=bool(options.skip_bad_images),
    )
    say(table(results))


def _averaged(model: str, name: str | None) -> str:
    """The model, or the average of its weights that is asked for."""
    if name is None:
        return model
    from megatron_lcl.convert.find import find_average

    return str(find_average(Path(model), name))


def _evaluate_corpus(models: list[str], options: argparse.Namespace) -> None:
    from megatron_lcl.evaluate.encoders.spec import is_ours
    from megatron_lcl.evaluate.heldout import evaluate_checkpoint

    for name, flag in options.of_data.items():
        if getattr(options, name) is not None:
            raise UserError(f"{flag} goes with --data; --corpus measures what LCL trains, always in the same way")
    for model in models:
        if not is_ours(model):
            raise UserError(f"--corpus measures what LCL trains, and {model} is no LCL model; give --data and --task")
    if options.output and len(models) > 1:
        raise UserError("the results of one model fill --output; give one MODEL at a time, or no --output")
    output = Path(options.output) if options.output else None
    for model in models:
        say(evaluate_checkpoint(model, Path(options.corpus), output, options.processes, options.devices or ()))


def _import(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.convert.export import import_checkpoint

    checkpoint = single_input(options)
    import_checkpoint(options.format, checkpoint, options.output, options.model_config)
    say(f"{options.output}: the weights of {checkpoint}")


def _export(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.convert.card import card_of
    from megatron_lcl.convert.certificate import summary
    from megatron_lcl.convert.export import export
    from megatron_lcl.convert.find import find_checkpoint
    from megatron_lcl.convert.folder import CERTIFICATE

    # once: the run may save another while this works
    checkpoint = find_checkpoint(Path(_averaged(single_input(options), options.average)))
    metrics = []
    if options.results:
        from megatron_lcl.evaluate.encoders.load import load_encoder
        from megatron_lcl.evaluate.results import read_measured

        fingerprint = load_encoder(checkpoint).fingerprint
        metrics = [measured for file in options.results for measured in read_measured(file, fingerprint)]
    card = card_of(checkpoint).replaced(options.name, options.license, options.datasets, metrics)
    with output_folder(options, CERTIFICATE) as folder:
        facts = export(checkpoint, options.format, folder, options.dtype, options.image_size, card)
    say(f"{options.output}: {summary(facts)}")
