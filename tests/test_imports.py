"""Who imports which other package, and no circle; the order of our own is import-linter's (pyproject.toml)."""

from __future__ import annotations

import ast
from pathlib import Path

import grimp

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


def circles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which imports, directly or not, all others of its group."""

    def reached(module: str) -> set[str]:
        seen, waiting = set[str](), [module]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in imports}
    groups = {
        frozenset(m for m in reach[module] if module in reach[m]) for module in imports if module in reach[module]
    }
    return sorted((set(group) for group in groups), key=min)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}}) == [{"b", "c"}, {"d"}]


def test_no_circle_between_files() -> None:
    """Imports inside functions count, those for types only do not."""
    graph = grimp.build_graph("megatron_lcl", cache_dir=None, exclude_type_checking_imports=True)
    assert len(graph.modules) > 100
    assert circles({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []
