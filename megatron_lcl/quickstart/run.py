"""From real documents to a pre-trained vision encoder in Hugging Face format, on this machine, in minutes.

OUTPUT/source/        the GIMP manual, where no folder of HTML is given
OUTPUT/corpus/        training documents            OUTPUT/heldout/    documents that training never sees
OUTPUT/config.yaml    the run's config              OUTPUT/run/        checkpoints, metrics, evaluation
OUTPUT/hf/            the encoder                   OUTPUT/report.html
"""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path

from megatron_lcl import config as configs
from megatron_lcl.config import Config
from megatron_lcl.convert.certificate import summary
from megatron_lcl.convert.export import export
from megatron_lcl.convert.find import find_checkpoint
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.demo.manual import VOCAB_SIZE, fetch_manual
from megatron_lcl.evaluate.heldout import evaluate_checkpoint
from megatron_lcl.parallel.cores import num_cores
from megatron_lcl.report.page import REPORT, write_report
from megatron_lcl.run_folder import CONFIG
from megatron_lcl.train.checks import check
from megatron_lcl.train.launch import default_processes, start_local

SOURCE, CORPUS, HELD_OUT, CACHE, RUN, ENCODER = "source", "corpus", "heldout", "cache", "run", "hf"
"""folders of the output"""


def quickstart(output: Path, html: Path | None = None, steps: int | None = None) -> int:
    """All six steps; each picks up what an earlier call finished. ValueError with one line where something is amiss.

    Returns the exit code: 0, or that of the training, which has said what it is.
    """
    started = time.monotonic()

    def say(number: int, title: str) -> None:
        print(f"\n[{number}/6] {title}  ({time.monotonic() - started:.0f} s so far)", flush=True)

    source: dict[str, str] = {}
    if html is None:
        say(1, "real documents: the GIMP manual")
        manual = fetch_manual(output / SOURCE)
        html, source = manual.html, manual.source
    else:
        say(1, f"real documents: {html}")
    say(2, "preprocess: documents → corpus")
    print(
        preprocess(
            "html",
            html,
            output / CORPUS,
            vocab_size=VOCAB_SIZE,
            held_out=output / HELD_OUT,
            source=source,
            workers=min(2, num_cores()),
            progress=True,
        )
    )
    config = quickstart_config(output, steps)
    say(3, "train")
    if code := _train(config, output / CONFIG):
        return code
    say(4, "evaluate on held-out documents")
    run, encoder, page = output / RUN, output / ENCODER, output / REPORT
    checkpoint = find_checkpoint(run)
    print(evaluate_checkpoint(checkpoint, output / HELD_OUT, run))
    say(5, "export to Hugging Face")
    certificate = export(checkpoint, "hf", encoder)
    print(f"{encoder}: {summary(certificate)}")
    say(6, "report")
    print(write_report(run, page))
    print(f"\nDone in {time.monotonic() - started:.0f} s. Open {page}; the encoder is {encoder}.")
    return 0


def quickstart_config(output: Path, steps: int | None) -> Config:
    """The packaged config for the corpus in `output`, also written to `output`/config.yaml."""
    packaged = importlib.resources.files("megatron_lcl.quickstart") / "quickstart.yaml"
    corpus = output / CORPUS
    overrides = {
        "data.corpora": str(corpus),
        "data.cache": str(output / CACHE),
        "train.output": str(output / RUN),
        "model.language.vocab_size": str(open_corpus(corpus).tokenizer.vocab_size),
    }
    if steps is not None:
        overrides["train.steps"] = str(steps)
    with importlib.resources.as_file(packaged) as file:
        config = configs.load(file, overrides)
    replace_text(output / CONFIG, configs.to_yaml(config))
    return config


def _train(config: Config, file: Path) -> int:
    processes = default_processes(config.train.global_batch)
    check(config, processes)
    return start_local(["train", "--config", str(file)], processes)
