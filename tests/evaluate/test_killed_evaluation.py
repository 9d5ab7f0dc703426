"""An evaluation in several processes that is killed leaves no process, and no file for good."""

from __future__ import annotations

import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data.engines.running import marked, processes_marked
from processes import Ends
from tqdm import tqdm

from megatron_lcl.errors import UserError
from megatron_lcl.evaluate import workers
from megatron_lcl.evaluate.features import FeatureStore
from megatron_lcl.processes import NEVER_BEGAN

PROGRAM = """
import sys, time
from functools import partial
from pathlib import Path
import torch
from torch import nn
from megatron_lcl.evaluate.encoders.encoder import Encoder, Features
from megatron_lcl.evaluate.features import FeatureStore
from megatron_lcl.evaluate.image_set import FileBlob, ImageSet

class Slow(Encoder):
    def __init__(self, began, number):
        super().__init__("slow", nn.ParameterList([nn.Parameter(torch.zeros(1))]))
        self.began, self.number, self.source = began, number, partial(Slow, began)

    def prepare(self, image):  # this script's bytes, which are none
        return torch.zeros(1)

    _prepare = prepare

    def _encode(self, images):
        if self.number >= 0:
            self.began.with_name(f"began-{self.number}").touch()
            time.sleep(0.5)
        return Features(torch.zeros(len(images), 1000), torch.zeros(len(images), 0, 1))

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    data = ImageSet("x", (FileBlob(Path(__file__)),) * 1000)
    FeatureStore(folder / "cache", batch_size=1, processes=2).features(Slow(folder / "began", -1), data)
"""


def wait_for(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 180
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_evaluation_leaves_nothing(tmp_path: Path, signum: int) -> None:
    program, cache, mark = tmp_path / "program.py", tmp_path / "cache", uuid.uuid4().hex
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path)]
    with subprocess.Popen(command, env=marked(mark), stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: len(list(tmp_path.glob("began-*"))) == 2)
            assert len(processes_marked(mark)) > 2
            os.kill(process.pid, signum)
            assert process.wait(60) in {128 + signum, -signum}
        finally:
            process.kill()
    wait_for(lambda: not processes_marked(mark))  # after SIGKILL they see by themselves that they are alone
    if signum == signal.SIGKILL:
        assert sum(path.stat().st_size for path in cache.rglob("*.npy")) > 1000 * 1000 * 4
        FeatureStore(cache).check_room([], [])
    assert not list(cache.iterdir())


def folder_of_sockets(*_: Any) -> str:
    return multiprocessing.util.get_temp_dir()


@pytest.mark.timeout(200)
def test_loader_processes_of_a_process_have_the_sockets_folder_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a signal ends does not remove a folder of its own."""
    config = vars(multiprocessing.current_process())["_config"]
    monkeypatch.setitem(config, "tempdir", None)
    assert workers.in_processes([folder_of_sockets], tqdm(disable=True)) == [config["tempdir"]]


@pytest.mark.timeout(200)
def test_processes_that_never_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_start", Ends())
    job: Any = print
    with pytest.raises(UserError, match=re.escape(NEVER_BEGAN)):
        workers.in_processes([job, job], tqdm(disable=True))
