"""Commands around trained encoders: evaluate, import, export."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_lcl.cli.arguments import MODEL, add_input, inputs, single_input
from megatron_lcl.errors import UserError


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers of these commands."""
    sub = add("evaluate", _evaluate, "measure an encoder: on held-out documents, or by the usual tasks on any data")
    models = f"{MODEL}; with --data also hf:DIR, timm:NAME, open_clip:NAME; several are compared"
    add_input(sub, "MODEL", models, "--checkpoint", "--model")
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
    sub.add_argument("--skip-bad-images", action="store_true", help="skip and count images that do not decode")
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
    add_input(sub, "MODEL", f"{MODEL} (.pt, .pth, .bin, .safetensors)", "--input")
    sub.add_argument("--format", default="open_clip", choices=["open_clip"], help="of a file (%(default)s)")
    sub.add_argument("--model-config", metavar="FILE.json", help="one of the reference's model_configs")
    sub.add_argument("--output", required=True, metavar="DIR")

    sub = add("export", _export, "a checkpoint into another library's format")
    add_input(sub, "MODEL", MODEL, "--checkpoint")
    sub.add_argument("--format", required=True, choices=["hf", "timm", "open_clip"])
    sub.add_argument("--output", required=True, metavar="DIR")
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


def _evaluate(options: argparse.Namespace, _rest: list[str]) -> None:
    models = inputs(options)
    if options.corpus:
        from megatron_lcl.evaluate.encoders.load import is_ours
        from megatron_lcl.evaluate.heldout import evaluate_checkpoint

        if options.tasks:
            raise UserError("--task goes with --data; --corpus measures what LCL trains, always the same")
        for model in models:
            if not is_ours(model):
                raise UserError(
                    f"--corpus measures what LCL trains, and {model} is no LCL model; give --data and --task"
                )
        if options.output and len(models) > 1:
            raise UserError("the results of one model fill --output; give one MODEL at a time, or no --output")
        for model in models:
            print(
                evaluate_checkpoint(Path(model), Path(options.corpus), Path(options.output) if options.output else None)
            )
        return
    import torch

    from megatron_lcl.evaluate.captioning import Decoding
    from megatron_lcl.evaluate.results import table
    from megatron_lcl.evaluate.run import evaluate

    results = evaluate(
        models,
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

    checkpoint = single_input(options)
    import_checkpoint(options.format, checkpoint, options.output, options.model_config)
    print(f"{options.output}: the weights of {checkpoint}")


def _export(options: argparse.Namespace, _rest: list[str]) -> None:
    from megatron_lcl.convert.card import card_of
    from megatron_lcl.convert.certificate import summary
    from megatron_lcl.convert.export import export

    checkpoint, metrics = single_input(options), []
    if options.results:
        from megatron_lcl.evaluate.encoders.load import load_encoder
        from megatron_lcl.evaluate.results import read_measured

        fingerprint = load_encoder(checkpoint).fingerprint
        metrics = [measured for file in options.results for measured in read_measured(file, fingerprint)]
    card = card_of(Path(checkpoint)).replaced(options.name, options.license, options.datasets, metrics)
    facts = export(checkpoint, options.format, options.output, options.dtype, options.image_size, card)
    print(f"{options.output}: {summary(facts)}")
