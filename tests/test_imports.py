"""Who imports which other package; the order of our own is import-linter's to check (pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "megatron_lcl"


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at the top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_data_never_imports_torch_distributed() -> None:
    files = list((PACKAGE / "data").rglob("*.py"))
    assert len(files) > 10
    for file in files:
        assert not any(name.startswith("torch.distributed") for name in imported(file)), file


def test_only_train_imports_deepspeed() -> None:
    users = {
        file.relative_to(PACKAGE).parts[0]
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "deepspeed" for name in imported(file))
    }
    assert users == {"train"}
