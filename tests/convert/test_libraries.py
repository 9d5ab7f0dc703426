"""Libraries that do not import, and settings of the process while one of them loads a model."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

from megatron_lcl.convert.libraries import only_weights, quietly, require
from megatron_lcl.errors import UserError
from megatron_lcl.evaluate.encoders.encoder import drawn_from
from megatron_lcl.evaluate.encoders.hub import Remote, by_cache_alone

constants: Any = pytest.importorskip("huggingface_hub.constants")


def test_a_library_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"^captioning needs sacrebleu: pip install 'megatron-lcl\[eval\]'$"):
        require("sacrebleu", "captioning")
    monkeypatch.syspath_prepend(tmp_path)
    for code, said in (
        (
            "raise ImportError('lxml>=5 is required,\\n but found lxml==4')",
            "ImportError: lxml>=5 is required, but found",
        ),
        ("import a_module_of_theirs", "ModuleNotFoundError: No module named 'a_module_of_theirs'"),
        ("raise RuntimeError('operator nms does not exist')", "RuntimeError: operator nms does not exist"),
    ):
        (tmp_path / "sacrebleu.py").write_text(code)
        monkeypatch.delitem(sys.modules, "sacrebleu", raising=False)
        with pytest.raises(UserError) as error:
            require("sacrebleu", "captioning")
        assert str(error.value).startswith(f"captioning needs sacrebleu, which is installed but does not load ({said}")
        assert str(error.value).endswith("; pip install 'megatron-lcl[eval]' installs what it needs")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        only_weights,
        quietly,
        lambda: drawn_from(1),
        lambda: by_cache_alone("hf:x", Remote("http://127.0.0.1:1", "give a path"), "out"),
    ],
)
def test_two_threads_leave_the_settings_of_the_process_as_they_were(
    changed: Callable[[], AbstractContextManager[None]],
) -> None:
    """The second begins before the first ends, and ends after it."""

    def settings() -> object:
        variables = {name: value for name, value in os.environ.items() if name.startswith("TORCH_")}
        return logging.root.manager.disable, variables, constants.HF_HUB_OFFLINE, torch.get_rng_state().tolist()

    before, inside, leave = settings(), Event(), Event()
    errors: list[BaseException] = []

    def other() -> None:
        try:
            with changed():
                inside.set()
                leave.wait(30)
        except BaseException as error:
            errors.append(error)
            raise

    thread = Thread(target=other)
    with changed():
        thread.start()
        inside.wait(0.3)
    leave.set()
    thread.join()
    assert inside.is_set()
    assert not errors
    assert settings() == before
