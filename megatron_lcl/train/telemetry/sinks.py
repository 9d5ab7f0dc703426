"""Where numbers go beside metrics.jsonl: TensorBoard, and the trackers that `train.trackers` names.

A tracker's package is imported where it is asked for. What it reads besides (where its server is, the project's name,
whether it is offline) it takes from its own environment variables, such as WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI. A run that goes on writes to the tracker's run that it has begun: `trackers.json` in the run folder
names it, and the folder, by which a copy of it is known that begins a tracker's run of its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse
from urllib.request import url2pathname

from megatron_lcl.config import Config, to_dict
from megatron_lcl.data.corpus.files import replace_text
from megatron_lcl.errors import UserError, without_secrets
from megatron_lcl.filesystem import exists, matching

logger = logging.getLogger(__name__)
FINISH_SECONDS = 50.0
"""for which W&B sends at the end what is not sent yet; less than `feed.END_SECONDS`"""
IDS = "trackers.json"
_FOLDER = "folder"
_IDS_LOCK = threading.Lock()
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
"""what to install for each tracker"""
_EVENTS = re.compile(r".*tfevents\.(\d+)")
"""how the name of an event file begins"""


class Sink(Protocol):
    """Takes the numbers of lines, in order of their steps; after a rewind steps come again."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def close(self, failed: bool) -> None:
        """No more come. failed: whether the run has; not where it ends as requested."""


class TensorBoard:
    """Event files in the run folder, each behind those that are there.

    TensorBoard reads them in the order of their names, and a file of a later start hides steps of those before it.
    torch's SummaryWriter numbers them by the clock, which may be behind that of an earlier start.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        """first_step: of those to come; later ones that are there already are hidden."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run / "tensorboard"
        folder.mkdir(exist_ok=True)
        there = (_EVENTS.match(path.name) for path in matching(folder, "*"))
        number = max([int(time.time()), *(int(name[1]) + 1 for name in there if name)])
        name = f"events.out.tfevents.{number:010}.{socket.gethostname()}.{os.getpid()}"
        self._records: Any = RecordWriter((folder / name).open("xb"))
        try:
            self._add(file_version="brain.Event:2")
            self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))
        except BaseException:
            with contextlib.suppress(OSError):  # the disk is full, which is raised already
                self.close()
            raise

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if numbers:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
            self._add(step=step, summary=Summary(value=values))

    def close(self) -> None:
        self._records.close()

    def _add(self, **values: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **values).SerializeToString())
        self._records.flush()


class WeightsAndBiases:
    """A run of Weights & Biases; offline its files are in RUN/wandb."""

    def __init__(self, run: Path, config: Config) -> None:
        import wandb

        # else it would ask on the terminal, from a thread, while the run goes on
        sends = wandb.setup().settings.mode not in ("offline", "dryrun", "disabled") and wandb.run is None
        if sends and not wandb.login(prompt=False, verify=False):  # `init` is who asks the server
            raise UserError("no API key: give one by `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline")

        def begin(known: str | None) -> tuple[Any, str]:
            found = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "megatron-lcl"),
                name=run.name,
                dir=str(run),
                id=known,
                resume="allow" if known else None,
                config=to_dict(config),
                # also bounds what W&B does as the process ends, which else waits for its server as long as that takes
                settings=wandb.Settings(finish_timeout=FINISH_SECONDS, finish_timeout_raises=True),
            )
            return found, found.id

        self._run = _with_id(run, "wandb", begin)
        # their own count of steps only goes up, ours goes back at a rewind
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of MLflow; without MLFLOW_TRACKING_URI its files are in RUN/mlruns."""

    def __init__(self, run: Path, config: Config) -> None:
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (run.absolute() / "mlruns").as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 asks whether it is meant
        self._client = MlflowClient(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "megatron-lcl")

        def begin(known: str | None) -> tuple[str, str]:
            if known is None:
                experiment = self._client.get_experiment_by_name(name)
                number = experiment.experiment_id if experiment else self._client.create_experiment(name)
                known = self._client.create_run(number, run_name=run.name).info.run_id
            return known, known

        self._run_id = _with_id(run, "mlflow", begin)
        self._client.update_run(self._run_id, "RUNNING")
        try:  # artifacts may lie elsewhere than metrics, where this machine may not write
            artifacts = urlparse(self._client.get_run(self._run_id).info.artifact_uri)
            place = Path(url2pathname(artifacts.path)).resolve()
            # files of a run folder that was moved since still name the place where it was, which would be made again
            is_moved = not os.environ.get("MLFLOW_TRACKING_URI") and not place.is_relative_to(run.resolve())
            if artifacts.scheme != "file" or not is_moved:
                self._client.log_text(self._run_id, json.dumps(to_dict(config), indent=1), "config.json")
        except Exception as error:  # noqa: BLE001 of whatever the store of artifacts needs
            said = without_secrets(" ".join(str(error).split()))
            logger.warning("mlflow has no config.json of this run: %s", said)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        # in its files a name is a path, and grad_norm cannot be a file and the folder of grad_norm/vision
        metrics = [Metric(name.replace("/", "."), value, now, step) for name, value in numbers.items()]
        self._client.log_batch(self._run_id, metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[[Path, Config], Sink]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def check_trackers(config: Config) -> None:
    """UserError naming the package of a tracker that is asked for and not installed."""
    for name in config.train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers names {name}, and its package is not installed; pip install {PACKAGES[name]}, or "
                f"leave {name} out"
            )


def _with_id(run: Path, name: str, begin: Callable[[str | None], tuple[Any, str]]) -> Any:
    """What `begin` gives for the tracker's run that is known of a run folder, or a new one, which then is known."""
    found, number = begin(_own(run).get(name))
    with _IDS_LOCK:  # read again: another tracker may have begun meanwhile, in its own thread
        replace_text(run / IDS, json.dumps({**_own(run), name: number, _FOLDER: str(run.resolve())}))
    return found


def _own(run: Path) -> dict[str, str]:
    """What is known of a run folder; nothing where that is of the folder that it is a copy of."""
    return {} if _is_copy(run) else _known(run)


def _is_copy(run: Path) -> bool:
    """Whether a run folder is the copy of another one that is still there and writes to the same trackers' runs."""
    known = _known(run)
    other = Path(known.pop(_FOLDER, run))
    try:
        theirs = {} if other.samefile(run) else _known(other)
    except OSError:  # not there, or not to be entered
        theirs = {}
    return any(theirs.get(name) == number for name, number in known.items())


def _known(run: Path) -> dict[str, str]:
    """What the file in a run folder says: by the tracker the number of its run, and where the folder was."""
    path = run / IDS
    return json.loads(path.read_text(encoding="utf-8")) if exists(path) else {}
