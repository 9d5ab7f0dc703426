"""What a run says about itself: a progress bar or, in a log, a line every so often; metrics.jsonl, the other sinks."""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from megatron_lcl import objectives
from megatron_lcl.config import Config
from megatron_lcl.errors import describe_os_error, without_secrets
from megatron_lcl.objectives import contrast, generation, regression
from megatron_lcl.run_folder import METRICS
from megatron_lcl.train.resilience.signals import Interrupted, Stopped
from megatron_lcl.train.result import StepResult
from megatron_lcl.train.telemetry.feed import Feed
from megatron_lcl.train.telemetry.lines import keep_lines_before, remove_results_after
from megatron_lcl.train.telemetry.sinks import TRACKERS, TensorBoard
from megatron_lcl.train.telemetry.stragglers import over_ranks
from megatron_lcl.units import in_bytes, in_units, plain

WAITING = 1 << 20
"""bytes of lines that wait where the disk is full"""
NOTABLE_WAIT = 0.01
"""share of the time for which processes waited for data, from which the console names it"""
RISEN = 1.01
"""times the last named peak of memory from which a log names it again"""


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
        self._peak = 0.0
        """bytes of memory that a line has named last"""
        self.num_without_pairs = 0
        """steps that had nothing to contrast, since this process started"""
        self._num_bad = 0
        """images that did not decode, since this process started"""
        self._num_skipped = 0
        """steps that were, since this process started"""
        self.last_step = first_step
        """the last one done"""
        self._file: Any = None
        self._trackers: list[Feed] = []
        if not is_first:
            return
        self._open(first_step)
        for name in config.train.trackers:
            with contextlib.suppress(Exception):  # the thread says it
                importlib.import_module(name)  # not in the thread: a process that is forked meanwhile would hang in it
            begin, failed = partial(TRACKERS[name], run, config), partial(self._left_alone, name)
            self._trackers.append(Feed(begin, failed))
            self._trackers[-1].start()

    def _open(self, step: int) -> None:
        self._run.mkdir(parents=True, exist_ok=True)
        self.last_step = step
        self._fault = ""
        self._file = (self._run / METRICS).open("a", buffering=WAITING, encoding="utf-8")
        self._attempt(lambda: keep_lines_before(self._run / METRICS, step))
        self._attempt(lambda: remove_results_after(self._run, step))
        self._board: TensorBoard | None = None
        self._attempt(lambda: self._open_board(step + 1), Exception)
        # a new bar: its time left is that of the steps to come, at the rate of those made since
        disable = None if self._progress else True  # None: where stderr is no terminal
        self._bar = tqdm(initial=step, total=self.total, unit="step", disable=disable, dynamic_ncols=True)
        self._first_done: tuple[int, float] | None = None
        """the first step that this process has made since, and when; it may have taken long"""

    def _close(self) -> None:
        self._bar.close()
        self._attempt(self._file.close)
        self._close_board()

    def _close_board(self) -> None:
        """Not left to the garbage collector: what does not fit on the disk would be a traceback from Python 3.13 on."""
        board, self._board = self._board, None
        if board is not None:
            self._attempt(board.close, Exception)

    def rewind(self, step: int) -> None:
        """Step number `step` is the last one done: lines about later ones are removed."""
        if self._file is not None:
            self._close()
            self._open(step)

    def is_logged(self, step: int) -> bool:
        """Whether a step's numbers are written; the same on every process."""
        return step % self.every == 0 or step == self.total

    def count(self, step: int, counts: Mapping[str, int]) -> None:
        """After step number `step` (counted from 1), whatever else is said of it. counts: of the global batch."""
        if self._file is None:
            return
        self.last_step = step
        self._bar.update()
        self._first_done = self._first_done or (step, time.monotonic())
        if self._contrasts and not counts["num_pairs"]:
            self.num_without_pairs += 1
            if self.num_without_pairs == 1:
                self.say(
                    f"step {step} has no pair: no image is compared with a text in it; metrics.jsonl counts such steps"
                )

    def skipped(self, step: int, reason: str, lr: float) -> None:
        """A step was skipped, and is counted; it has no loss."""
        self._num_skipped += 1
        if self._file is not None:
            self.say(f"step {step} skipped: {reason}")
            self.write({"step": step, "skipped": reason, "lr": lr})

    def step(self, step: int, result: StepResult, lr: float, more: Mapping[str, Any]) -> None:
        """The line of a step that is logged, and counted. more: what else there is to write of it (`meter`), its rates
        at least."""
        if self._file is None:
            return
        numbers = self._measured(result)
        events = {"steps_without_pairs": self.num_without_pairs, "skipped_steps": self._num_skipped}
        # what a term measures over the whole batch counts, not what is measured of the same on a sample of it
        others = {name: value for name, value in more.items() if name not in numbers}
        self.write({"step": step, **numbers, **events, "lr": lr, **others})
        self._bar.set_postfix_str(", ".join(_shown(numbers, others)))
        if self._bar.disable or not sys.stdout.isatty():
            self.say(self._line(step, numbers, lr, others))

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

    def _line(self, step: int, numbers: Mapping[str, float | None], lr: float, rates: Mapping[str, Any]) -> str:
        """A step in one line of a log, of no more than 160 characters up to step 99,999, but for MFU and the peak."""
        measured = {name: value for name, value in numbers.items() if value is not None}
        losses = ", ".join(f"{name} {measured[name]:#.4g}" for name in self._losses if name in measured)
        parts = [f"step {step}/{self.total}", f"loss {measured['loss']:#.4g}" + (f" ({losses})" if losses else "")]
        accuracies = [f"{100 * measured[n]:.1f}" for n in ("image_accuracy", "text_accuracy") if n in measured]
        if accuracies:
            parts.append(f"acc {'/'.join(accuracies)}% (chance {_percent(measured['chance_accuracy'])})")
        speed = [*_speed(rates), *([f"MFU {rates['mfu']:.1%}"] if "mfu" in rates else []), *_data_wait(rates)]
        peak = rates.get("memory_peak_bytes", 0.0)
        if peak > RISEN * self._peak:
            self._peak = peak
            speed.append(f"peak {in_bytes(peak)}")
        parts += [f"lr {lr:.2e}".replace("e-0", "e-"), ", ".join(speed)]
        assert self._first_done is not None
        made, since = step - self._first_done[0], time.monotonic() - self._first_done[1]
        per_step = since / made if made else rates["step_seconds"]
        return " ".join([*parts, f"{tqdm.format_interval((self.total - step) * per_step)} left"])

    def write(self, values: dict[str, Any]) -> None:
        """One line of metrics, and its numbers to TensorBoard and the trackers.

        Where the disk is full, that is said once, and training goes on. Lines wait for space, as many as fit into the
        file's buffer; TensorBoard has a gap. A tracker that fails, or falls behind, is left alone from then on.
        """
        if self._file is None:
            return
        line = json.dumps({**values, "time": time.time(), "clock": time.monotonic()}) + "\n"
        written = self._attempt(lambda: self._file.write(line)) and self._attempt(self._file.flush)
        if written and not self._attempt(lambda: self._draw(values), Exception):
            self._close_board()  # half of a record may end its file; the next line opens another
            written = False
        if written:
            self._fault = ""
        numbers = _numbers(values)
        for tracker in self._trackers if numbers else ():
            tracker.write(values["step"], numbers)

    def _left_alone(self, name: str, error: Exception) -> None:
        why = " ".join(str(error).split()) or type(error).__name__
        self.say(f"{name} gets no more metrics: {why}; metrics.jsonl has them all")

    def bad_images(self, step: int, number: int, reasons: list[str]) -> None:
        """Images that did not decode up to a step, since this was said last; the first, the tenth, … of all also to
        the console. reasons: of some, of one at least."""
        self.write({"step": step, "bad_images": reasons, "num_bad_images_since": number})
        before, self._num_bad = self._num_bad, self._num_bad + number
        if len(str(before)) < len(str(self._num_bad)) or not before:
            self.say(f"step {step}: an image is skipped, {reasons[0]} ({self._num_bad:,} so far, see {METRICS})")

    def _open_board(self, first_step: int) -> TensorBoard:
        self._board = self._board or TensorBoard(self._run, first_step)
        return self._board

    def _draw(self, values: dict[str, Any]) -> None:
        # a line may be of an earlier step, as that of a save: what was drawn since is not to be hidden
        self._open_board(self.last_step + 1).write(values["step"], _numbers(values))

    def _attempt(self, action: Callable[[], Any], errors: type[Exception] = OSError) -> bool:
        """Whether it was done. errors: of TensorBoard any, as its package may raise others."""
        try:
            action()
        except errors as error:
            if not self._fault:
                said = describe_os_error(error, self._run) if isinstance(error, OSError) else str(error)
                self.say(f"metrics cannot be written: {said}")
            self._fault = str(error)
            return False
        return True

    def say(self, message: str) -> None:
        """A line `without_secrets` for the person who watches, above the progress bar; in a log at once. Trackers may
        record the console."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # nobody reads any more, or the log's disk is full: no reason to end
                tqdm.write(without_secrets(message))
                sys.stdout.flush()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            if self.num_without_pairs > 1:
                self.say(f"{self.num_without_pairs} steps had no pair: no image was compared with a text in them")
            self._close()
            for tracker in self._trackers:
                tracker.close(failed=value is not None and not isinstance(value, Stopped | Interrupted))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What of a line can be drawn."""
    numbers = {name: v for name, v in values.items() if isinstance(v, int | float) and name != "step"}
    return numbers | over_ranks(values)


def _shown(numbers: Mapping[str, float | None], rates: Mapping[str, Any]) -> Iterator[str]:
    """What stands beside the progress bar."""
    yield f"loss {numbers['loss']:.3f}"
    accuracy, chance = numbers.get("image_accuracy"), numbers.get("chance_accuracy")
    if accuracy is not None and chance is not None:
        yield f"accuracy {accuracy:.1%} (chance {_percent(chance)})"
    yield from _speed(rates)
    yield from _data_wait(rates)
    if "memory_peak_bytes" in rates:
        yield in_bytes(rates["memory_peak_bytes"])


def _speed(rates: Mapping[str, Any]) -> Iterator[str]:
    for name, unit in (("images", "img/s"), ("tokens", "tok/s")):
        rate = rates[f"{name}_per_second"]
        yield f"{rate:.0f} {unit}" if rate < 9_999.5 else f"{in_units(rate, ('', 'k', 'M', 'G'))} {unit}"


def _percent(chance: float) -> str:
    """To two digits: of many pairs it is far below 1 %."""
    return f"{plain(100 * chance, 2)}%"


def _data_wait(rates: Mapping[str, Any]) -> Iterator[str]:
    if rates.get("data_wait", 0.0) > NOTABLE_WAIT:
        yield f"data wait {rates['data_wait']:.0%}"
