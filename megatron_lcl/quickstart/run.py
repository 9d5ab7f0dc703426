"""From real documents to a pre-trained vision encoder in Hugging Face format, on this machine, in minutes.

OUTPUT/source/        the GIMP manual, where no folder of HTML is given
OUTPUT/emoji/         the data set of `megatron-lcl demo emoji`, in the manual's tokenizer
OUTPUT/corpus/        training documents            OUTPUT/heldout/    documents that training never sees
OUTPUT/config.yaml    the run's config              OUTPUT/run/        checkpoints, metrics, evaluation
OUTPUT/hf/            the encoder                   OUTPUT/report.html
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_lcl.convert.certificate import summary
from megatron_lcl.convert.export import export
from megatron_lcl.convert.find import find_checkpoint
from megatron_lcl.data.corpus.corpus_manifest import MANIFEST
from megatron_lcl.data.corpus.store import open_corpus
from megatron_lcl.data.corpus.tokenizer import Tokenizer
from megatron_lcl.data.prepare import importers
from megatron_lcl.data.prepare.preprocess import preprocess
from megatron_lcl.demo import emoji
from megatron_lcl.demo.manual import VOCAB_SIZE, fetch_manual
from megatron_lcl.demo.packages import fetch
from megatron_lcl.demo.run import check_is_own
from megatron_lcl.demo.train import CACHE, RUN, check_steps, name_pictures, packaged_config, train_on_this_machine
from megatron_lcl.demo.write import CORPORA, DOCUMENTS, TRAINING, is_written, training_texts, write
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.heldout import evaluate_checkpoint
from megatron_lcl.filesystem import exists
from megatron_lcl.machine import num_cores
from megatron_lcl.report.page import REPORT, write_report
from megatron_lcl.run_folder import CONFIG

SOURCE, EMOJI, CORPUS, HELD_OUT, ENCODER = "source", "emoji", "corpus", "heldout", "hf"
"""folders of the output"""
BLEND_VOCAB_SIZE = 3072
"""of the manual and the emoji together"""


def quickstart(output: Path, html: Path | None = None, steps: int | None = None, given: Path | None = None) -> int:
    """All six steps; each picks up what an earlier call finished. ValueError with one line where something is amiss.

    html: pages in place of the GIMP manual. given: an offline folder of the packages. Where the emoji's packages cannot
    be had, or drawn, the pages alone are trained on, which is said. Returns the exit code: 0, or that of the training,
    which has said what it is.
    """
    check_steps(steps)
    check_is_own(output, (EMOJI, CORPUS))
    started = time.monotonic()

    def say(number: int, title: str) -> None:
        print(f"\n[{number}/6] {title}  ({time.monotonic() - started:.0f} s so far)", flush=True)

    say(1, f"real documents: {html or 'the GIMP manual'}")
    pages = _Pages(output, html, given)
    say(2, "emoji by eight artists, and preprocess: documents → corpora")
    blend = _add_emoji(pages, given)
    if not blend:
        pages.write()
    corpora = {"manual": output / CORPUS}
    if blend:
        corpora |= {name: output / EMOJI / CORPORA / name for name in TRAINING}
    file = "blend.yaml" if blend else "manual.yaml"
    config = packaged_config("megatron_lcl.quickstart", file, corpora, output, steps)
    say(3, "train")
    if code := train_on_this_machine(config, output / CONFIG):
        return code
    say(4, "evaluate on held-out documents" + ", and on the images of an artist that training never saw" * blend)
    run, encoder, page = output / RUN, output / ENCODER, output / REPORT
    checkpoint = find_checkpoint(run)
    print(evaluate_checkpoint(checkpoint, output / HELD_OUT, run), flush=True)
    if blend:
        print(name_pictures(output / EMOJI, run, output / CACHE))
    say(5, "export to Hugging Face")
    certificate = export(checkpoint, "hf", encoder)
    print(f"{encoder}: {summary(certificate)}")
    say(6, "report")
    print(write_report(run, page))
    print(f"\nDone in {time.monotonic() - started:.0f} s. Open {page}; the encoder is {encoder}.")
    return 0


class _Pages:
    """The GIMP manual, or other pages, as corpora of the output."""

    def __init__(self, output: Path, html: Path | None, given: Path | None) -> None:
        self.output = output
        self._source: dict[str, str] = {}
        if html is None:
            manual = fetch_manual(output / SOURCE, given)
            html, self._source = manual.html, manual.source
        else:
            importers.create("html", html, None, {})  # says at once if there are none
        self._html = html

    def write(self, more_texts: Sequence[str] = ()) -> Tokenizer:
        """The corpora, whose tokenizer is also of other texts."""
        print(
            preprocess(
                "html",
                self._html,
                self.output / CORPUS,
                vocab_size=BLEND_VOCAB_SIZE if more_texts else VOCAB_SIZE,
                more_texts=more_texts,
                held_out=self.output / HELD_OUT,
                source=self._source,
                workers=min(2, num_cores()),
                progress=True,
            ),
            flush=True,
        )
        return open_corpus(self.output / CORPUS).tokenizer


def _add_emoji(pages: _Pages, given: Path | None) -> bool:
    """Write the emoji, and the pages, in one tokenizer. Whether they are there; if not nothing is written."""
    folder, workers = pages.output / EMOJI, min(2, num_cores())
    if exists(pages.output / CORPUS / MANIFEST) and not exists(folder / DOCUMENTS):
        print(
            f"{pages.output} was begun with the pages alone, and goes on with them; with the emoji: a new --output",
            flush=True,
        )
        return False
    try:
        packages = fetch(emoji.PACKAGES, folder / SOURCE, given)
        data = None if is_written(folder, packages) else emoji.data_set(packages, folder / SOURCE, workers)
    except UserError as error:
        if exists(folder / DOCUMENTS):
            raise
        print(f"without the emoji, on the pages alone: {error.said()}; and then give a new --output", flush=True)
        return False
    if data is None:
        pages.write(training_texts(folder))
    else:
        write(data, packages, folder, workers, pages.write)
    return True
