"""The maps of docs/architecture.md and CONTRIBUTING.md: every file that they name is there, and the tests shown. What
the docstring of a package says that it imports is what its files import."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_lcl"
PACKAGES = sorted(".".join(file.parent.relative_to(PACKAGE).parts) for file in PACKAGE.glob("*/**/__init__.py"))
PLACES = (ROOT, ROOT / "megatron_lcl", ROOT / "docs")
FILE = re.compile(r"`((?:[\w.-]+/)+|(?:[\w.-]+/)*[\w-]+\.(?:py|md|sh|toml|yaml|html))`")


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_that_are_named_exist(page: str) -> None:
    missing = []
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        folder = ROOT
        for name in FILE.findall(line):
            found = next((place / name for place in (*PLACES, folder) if (place / name).exists()), None)
            if found is None and "/" not in name:  # a file of the folder that the line is about
                found = next(ROOT.glob(f"megatron_lcl/**/{name}"), None)
            if found is None:
                missing.append(name)
            else:
                folder = found.parent
    assert missing == []


def test_tests_that_are_selected_by_name_exist() -> None:
    shown = re.findall(r"pytest (tests/\S+) -k (\w+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert shown
    for folder, word in shown:
        files = "".join(file.read_text(encoding="utf-8") for file in (ROOT / folder).glob("test_*.py"))
        assert re.search(rf"def test_\w*{word}", files), (folder, word)


def test_the_table_names_packages_and_their_files() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 25
    for packages, contents, begin in rows:
        places = [PACKAGE / name for name in re.findall("`(.+?)`", packages)]
        assert [place for place in places if not (place.is_file() if place.suffix else place.is_dir())] == []
        for name in FILE.findall(contents + begin):
            assert any((place / name).exists() for place in places), (packages, name)


CLAUSE = re.compile(
    r"(?:(Of train it i|I|May i)mports? )(no other package|everything)?(?: but )?([\w., ]*?)[.;](?: |$)"
)
"""in the docstring of a package; modules beside the packages, such as errors.py, need not be said"""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_what_it_says(package: str) -> None:
    folder = PACKAGE / package.replace(".", "/")
    said = " ".join((ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or "").split())
    assert "egin with " in said
    (clause,) = CLAUSE.finditer(said)
    start, all_or_none, listed = clause.groups()
    names = re.split(", | and ", listed) if listed else []
    imported = set(imports_of(folder, package))
    if all_or_none == "everything":
        assert set(names) == above(package)
        assert not [name for name in imported if covered(name, names)]
        return
    if start.startswith("Of train"):
        names = [f"train.{name}" for name in names]
        imported = {name for name in imported if name.startswith("train.")}
    must_be_said = {name for name in imported if (PACKAGE / name.split(".")[0]).is_dir()}
    assert {name for name in must_be_said if not covered(name, names)} == set()
    assert [name for name in names if not any(covered(other, [name]) for other in imported)] == []


def imports_of(folder: Path, package: str) -> Iterator[str]:
    """What the files of a package import of others, `data.corpus.store.Corpus`, say; without files, those below."""
    files = list(folder.glob("*.py"))
    for file in files if len(files) > 1 else folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, file
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                root, _, inside = name.partition(".")
                if root == "megatron_lcl" and inside and not covered(inside, [package]):
                    yield inside


def covered(name: str, packages: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def above(package: str) -> set[str]:
    """The packages beside or above one, as pyproject.toml has them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    found: set[str] = set()
    for line in contracts[0]["layers"]:
        here = set(line.replace("megatron_lcl.", "").split(" | "))
        found |= here - {package}
        if package in here:
            return found
    raise AssertionError(package)
