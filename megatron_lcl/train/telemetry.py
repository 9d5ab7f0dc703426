"""What a run says about itself: a progress bar or, in a log, a line every so often; metrics.jsonl, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError, describe_os_error
from megatron_lcl.objectives import contrast, generation, regression
from megatron_lcl.train.step import StepResult

METRICS = "metrics.jsonl"


@dataclass
class Rates:
    """Throughput since the last line of metrics."""

    seconds: float = 0.0
    data_seconds: float = 0.0
    images: int = 0
    tokens: int = 0
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)

    def add(self, result: StepResult, seconds: float, data_seconds: float) -> None:
        self.seconds += seconds
        self.data_seconds += data_seconds
        self.images += result.num_images
        self.tokens += result.num_tokens
        self.steps += 1

    def values(self) -> dict[str, float]:
        """Images and tokens a second over all processes, seconds a step, share of it spent waiting for data."""
        seconds = max(self.seconds, 1e-9)
        return {
            "images_per_second": self.images / seconds,
            "tokens_per_second": self.tokens / seconds,
            "step_seconds": seconds / max(self.steps, 1),
            "data_wait": self.data_seconds / seconds,
        }


class Telemetry:
    """Logs on the first process; on the others every call does nothing.

    A terminal gets a progress bar, unless `train.progress` is false. What is no terminal, or has no bar, gets a line
    every `train.log_every` steps.
    """

    def __init__(self, run: Path, config: Config, is_first: bool, first_step: int) -> None:
        self.every = config.train.log_every
        self.total = config.train.steps
        self._run = run
        self._progress = config.train.progress
        objective = objectives.create(config)
        self._contrasts = objective.sequences.contrast
        no_losses = {*contrast.METRICS[1:], *contrast.SIGMOID_METRICS[1:]}
        self._losses = [name for name in objective.metrics if name not in no_losses]
        self.num_without_pairs = 0
        """steps that had nothing to contrast, since this process started"""
        self._num_bad = 0
        """images that did not decode, since this process started"""
        self._file: Any = None
        if is_first:
            self._open(first_step)

    def _open(self, step: int) -> None:
        self._run.mkdir(parents=True, exist_ok=True)
        keep_lines_before(self._run / METRICS, step)
        self.rates = Rates()
        self._fault = ""
        self._file = (self._run / METRICS).open("a", encoding="utf-8")
        self._board = self._open_board(step + 1)
        # a new bar: its time left is that of the steps to come, at the rate of those made since
        disable = None if self._progress else True  # None: where stderr is no terminal
        self._bar = tqdm(initial=step, total=self.total, unit="step", disable=disable, dynamic_ncols=True)
        self._first_done: tuple[int, float] | None = None
        """the first step that this process has made since, and when; it may have taken long"""

    def _open_board(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._run / "tensorboard"), purge_step=step)

    def _close(self) -> None:
        self._bar.close()
        for file in (self._file, self._board):
            if file is not None:
                self._attempt(file.close)

    def rewind(self, step: int) -> None:
        """Step number `step` is the last one done: lines about later ones are removed."""
        if self._file is not None:
            self._close()
            self._open(step)

    def step(
        self, step: int, result: StepResult, lr: float, seconds: float, data_seconds: float, skipped: str | None = None
    ) -> None:
        """After step number `step` (counted from 1). skipped: why, if it was; it has no loss then."""
        if self._file is None:
            return
        self.rates.add(result, seconds, data_seconds)
        self._bar.update()
        self._first_done = self._first_done or (step, time.monotonic())
        if self._contrasts and not result.num_pairs:
            self.num_without_pairs += 1
            if self.num_without_pairs == 1:
                self.say(
                    f"step {step} has no pair: no image is compared with a text in it; metrics.jsonl counts such steps"
                )
        if skipped is not None:
            self.say(f"step {step} skipped: {skipped}")
            self.write({"step": step, "skipped": skipped, "lr": lr})
            return
        if step % self.every and step != self.total:
            return
        rates, numbers = self.rates.values(), self._measured(result)
        self.write({"step": step, **numbers, "steps_without_pairs": self.num_without_pairs, "lr": lr, **rates})
        self._bar.set_postfix_str(", ".join(_shown(numbers, rates)))
        if self._bar.disable or not sys.stdout.isatty():
            self.say(self._line(step, numbers, lr, rates))
        self.rates = Rates()

    def _measured(self, result: StepResult) -> dict[str, float | None]:
        """The step's numbers; None for a mean over pairs, or targets, of which the step has none."""
        numbers: dict[str, float | None] = {**result.numbers()}
        pairs = result.num_pairs if self._contrasts else 0
        if pairs and "image_accuracy" in numbers:
            numbers["chance_accuracy"] = 1 / pairs
        of_pairs = (*contrast.METRICS, *regression.METRICS)
        for names, count in ((of_pairs, pairs), (generation.METRICS, result.num_targets)):
            if not count:
                numbers |= {name: None for name in names if name in numbers}
        return numbers

    def _line(self, step: int, numbers: Mapping[str, float | None], lr: float, rates: Mapping[str, float]) -> str:
        """A step in one line of a log."""
        measured = {name: value for name, value in numbers.items() if value is not None}
        losses = ", ".join(f"{name} {measured[name]:.4f}" for name in self._losses if name in measured)
        parts = [f"step {step}/{self.total}", f"loss {measured['loss']:.4f}" + (f" ({losses})" if losses else "")]
        accuracies = [f"{measured[name]:.1%}" for name in ("image_accuracy", "text_accuracy") if name in measured]
        if accuracies:
            parts.append(f"accuracy {' / '.join(accuracies)} (chance {measured['chance_accuracy']:.1%})")
        parts += [
            f"lr {lr:.2e}",
            f"{rates['images_per_second']:.0f} images/s, {rates['tokens_per_second']:.0f} tokens/s",
        ]
        assert self._first_done is not None
        made, since = step - self._first_done[0], time.monotonic() - self._first_done[1]
        per_step = since / made if made else rates["step_seconds"]
        return "  ".join([*parts, f"{tqdm.format_interval((self.total - step) * per_step)} left"])

    def write(self, values: dict[str, Any]) -> None:
        """One line of metrics, and its numbers to TensorBoard.

        Where the disk is full, that is said once, and training goes on. Lines wait for space, as many as fit into the
        file's buffer; TensorBoard has a gap.
        """
        if self._file is None:
            return
        line = json.dumps({**values, "time": time.time()}) + "\n"
        written = self._attempt(lambda: self._file.write(line)) and self._attempt(self._file.flush)
        if written and not self._attempt(lambda: self._draw(values)):
            self._board = None  # its thread has ended; the next line opens another
            written = False
        if written:
            self._fault = ""

    def bad_images(self, step: int, reasons: list[str]) -> None:
        """Images of a step that did not decode: all to the metrics; the first, the tenth, … also to the console."""
        self.write({"step": step, "bad_images": reasons})
        before, self._num_bad = self._num_bad, self._num_bad + len(reasons)
        if len(str(before)) < len(str(self._num_bad)) or not before:
            self.say(f"step {step}: an image is skipped, {reasons[0]} ({self._num_bad:,} so far, see {METRICS})")

    def _draw(self, values: dict[str, Any]) -> None:
        self._board = self._board or self._open_board(values["step"])
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, values["step"])

    def _attempt(self, action: Callable[[], Any]) -> bool:
        try:
            action()
        except OSError as error:
            if not self._fault:
                self.say(f"metrics cannot be written: {describe_os_error(error, self._run)}")
            self._fault = str(error)
            return False
        return True

    def say(self, message: str) -> None:
        """A line for the person who watches, above the progress bar; in a log at once."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # nobody reads any more, or the log's disk is full: no reason to end
                tqdm.write(message)
                sys.stdout.flush()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            if self.num_without_pairs > 1:
                self.say(f"{self.num_without_pairs} steps had no pair: no image was compared with a text in them")
            self._close()


def _shown(numbers: Mapping[str, float | None], rates: Mapping[str, float]) -> Iterator[str]:
    """What stands beside the progress bar."""
    yield f"loss {numbers['loss']:.3f}"
    accuracy, chance = numbers.get("image_accuracy"), numbers.get("chance_accuracy")
    if accuracy is not None and chance is not None:
        yield f"accuracy {accuracy:.1%} (chance {chance:.1%})"
    yield f"{rates['images_per_second']:.0f} images/s"
    yield f"{rates['tokens_per_second']:.0f} tokens/s"


def keep_lines_before(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a resumed run will write again, and a line cut off in writing."""
    if not path.exists():
        return
    kept, lines = [], path.read_text(encoding="utf-8").splitlines(keepends=True)
    for line in lines:
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError):
            continue
    if kept != lines:
        replace_text(path, "".join(kept))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. UserError where one is damaged; one cut off in writing may end the file."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\n"):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is damaged: {error}") from None
    return found
