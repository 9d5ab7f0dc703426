"""Which Ray is taken where none is named. With a stand-in for Ray, which only says where it would connect."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_lcl.data.engines import ray as engine
from megatron_lcl.errors import UserError


def test_a_cluster_that_another_user_notes_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Anybody may make /tmp/ray first; jobs and their passwords would go to an address of theirs."""
    asked: list[str] = []
    ray = SimpleNamespace(
        init=lambda address, **_: asked.append(address), exceptions=SimpleNamespace(RayError=RuntimeError)
    )

    def connected(**given: Any) -> str:
        engine._connect(ray, engine.RaySettings(**given), 1, str(tmp_path))
        return asked.pop()

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    note = tmp_path / "ray" / "ray_current_cluster"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        note.write_text(f"{address}\n")
        assert connected() == connected(address="auto") == address
        os.rename(note, tmp_path / "own")
        note.symlink_to(tmp_path / "own")
        assert connected() == "local", "who makes a link there chooses which file of this user is read"
        os.replace(tmp_path / "own", note)
        if os.geteuid():
            monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        else:  # root's own would do for everybody
            os.chown(note, 1, -1)
        with caplog.at_level(logging.WARNING):
            assert connected() == "local"
        assert f"{note} is user {note.stat().st_uid}'s, and not followed" in caplog.text
        with pytest.raises(UserError, match="no Ray runs on this machine"):
            connected(address="auto")
        assert connected(address=address) == address
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert connected() == address
