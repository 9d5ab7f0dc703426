"""Questions about files: what Python 3.11's `Path` answered, and errors that later versions take for an answer."""

from __future__ import annotations

import ast
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megatron_lcl
from megatron_lcl.filesystem import below, exists, is_dir, is_file, matching
from megatron_lcl.run_folder import CHECKPOINTS
from megatron_lcl.train.checkpoint.folder import choose


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files, folders and links of all kinds."""
    for name in ("a.txt", "b.txt", ".hidden.txt", "[c].txt", "one/a.txt", "one/two/a.txt", "empty/b.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for link, target in {"file": "a.txt", "folder": "one", "nowhere": "gone", "circle": "circle"}.items():
        (tmp_path / f"to-{link}").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


def test_without_errors_they_answer_as_pathlib_does(tree: Path) -> None:
    for path in (*tree.rglob("*"), tree, tree / "gone", tree / "a.txt" / "inside", tree / "zero\0byte"):
        assert exists(path) == path.exists(), path
        assert is_file(path) == path.is_file(), path
        assert is_dir(path) == path.is_dir(), path
    for pattern in ("*", "*.txt", "a*", "[ab].txt", "nothing-*"):
        assert matching(tree, pattern) == sorted(tree.glob(pattern)), pattern
        assert sorted(below(tree, pattern)) == sorted(tree.rglob(pattern)), pattern
    for nothing in (tree / "gone", tree / "a.txt", tree / "to-circle", tree / "zero\0byte"):
        assert matching(nothing, "*") == [*below(nothing)] == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_is_no_answer(tree: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Of the folder itself, or of one inside."""
    (tree / CHECKPOINTS).mkdir()
    (tree / CHECKPOINTS / "step-00000001").mkdir()

    def failing_at(place: Path, ask: Callable[..., Any]) -> Callable[..., Any]:
        def fail(path: Any = ".", *arguments: Any, **options: Any) -> Any:
            if path == place or path == os.fspath(place):
                raise OSError(number, os.strerror(number), os.fspath(place))
            return ask(path, *arguments, **options)

        return fail

    for place in (tree / CHECKPOINTS, tree / "one" / "two"):
        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", failing_at(place, os.stat))
            for ask in (exists, is_file, is_dir):
                with pytest.raises(OSError, match=str(place)):
                    ask(place)
        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", failing_at(place, os.scandir))
            with pytest.raises(OSError, match=str(place)):
                matching(place, "*")
            with pytest.raises(OSError, match=str(place)):
                list(below(tree))
    for question in ("stat", "scandir"):
        with monkeypatch.context() as patched:
            patched.setattr(os, question, failing_at(tree / CHECKPOINTS, getattr(os, question)))
            with pytest.raises(OSError, match=CHECKPOINTS):  # and no run that begins anew
                choose(tree, "auto")


def _is_of_another(call: ast.Call) -> bool:
    """`os.path.exists(path)`, `store.exists(name)`"""
    return isinstance(call.func, ast.Attribute) and call.func.attr == "exists" and bool(call.args)


def test_no_other_module_asks_pathlib() -> None:
    asked = {"exists", "is_file", "is_dir", "glob", "rglob"}
    package = Path(megatron_lcl.__file__).parent
    for path in sorted(package.rglob("*.py")):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        found = {call.func.attr for call in calls if isinstance(call.func, ast.Attribute) and not _is_of_another(call)}
        ours = {"data/storage/paths.py": {"is_file", "is_dir"}, "filesystem.py": {"is_dir"}}  # an object's, an entry's
        assert found & asked == ours.get(path.relative_to(package).as_posix(), set()), path
