"""Protects the help on formats: each is named with what it reads, each option with type, default and what it does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Annotated, Any

import pytest

from megatron_lcl import plugins
from megatron_lcl.cli import main
from megatron_lcl.data.prepare import importers
from megatron_lcl.data.prepare.importers import Importer, create, formats, importer_class, options_of, read_options
from megatron_lcl.data.prepare.importers.jsonl import JsonlImporter
from megatron_lcl.errors import UserError

DOCS = (Path(__file__).parents[3] / "docs/corpus-format.md").read_text("utf-8")


class PoemImporter(JsonlImporter):
    """Poems, a stanza a line."""

    reads = ""

    def __init__(
        self, input: Path, images: Path | None = None, max_lines: Annotated[int, "longer stanzas are cut"] = 14
    ) -> None:
        super().__init__(input, images)
        self.max_lines = max_lines


class OldImporter(JsonlImporter):
    """As importers were written before: what options do stands in a dictionary."""

    options = {"color": "of the ink", "depth": "of the plate"}  # noqa: RUF012

    def __init__(self, input: Path, images: Path | None = None, depth: float = 2.5, **others: Any) -> None:
        super().__init__(input, images)
        self.given = {"depth": depth, **others}


class HalfImporter(Importer):
    """Half of a poem a line."""

    def __init__(self, input: Path, images: Path | None = None) -> None:
        self.input = input

    def signature(self) -> str:
        return str(self.input)


class DialectImporter(JsonlImporter):
    """Poems in a dialect."""

    def __init__(self, input: Path, images: Path | None = None, *, dialect: str, meter: Any) -> None:
        super().__init__(input, images)


class LonelyImporter(JsonlImporter):
    """Poems, without images."""

    def __init__(self, input: Path) -> None:
        super().__init__(input)


@pytest.fixture
def other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {"poem": "PoemImporter", "old": "OldImporter", "broken": "Missing"}
    classes |= {"half": "HalfImporter", "function": "help_of"}
    classes |= {"dialect": "DialectImporter", "lonely": "LonelyImporter"}
    points = [EntryPoint(name, f"{__name__}:{cls}", importers.ENTRY_POINTS) for name, cls in classes.items()]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == importers.ENTRY_POINTS else [])


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["preprocess", *arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("other_packages")
def test_the_help_names_all_formats(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--help")
    assert "usage: megatron-lcl preprocess --format F --input PATH|URL --output DIR|URL" in text
    for name in set(formats()) - {"broken", "half", "function"}:
        importer = importer_class(name)
        reads = importer.reads or (inspect.getdoc(importer) or "").partition("\n")[0]
        assert reads
        assert f" {name} {' '.join(reads.split())}" in text
    assert " poem Poems, a stanza a line." in text
    assert f" broken ('broken' of megatron_lcl.importers (a package with {__name__}) cannot be loaded from" in text
    assert text.endswith("--format F --help lists the options of format F")


@pytest.mark.usefixtures("other_packages")
@pytest.mark.parametrize("help_first", [True, False])
def test_the_help_on_a_format(capsys: pytest.CaptureFixture[str], help_first: bool) -> None:
    for name in set(formats()) - {"broken", "half", "function"}:
        words = ["--help", "--format", name] if help_first else ["--format", name, "--help"]
        text = help_of(capsys, *words)
        parameters = list(inspect.signature(importer_class(name)).parameters.values())[2:]
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        assert ("it has no options" in text) == (not named)
        for parameter in named:
            if parameter.default is parameter.empty:
                assert re.search(rf" {parameter.name} \(\w+, needed\)", text)
                continue
            (found,) = re.findall(rf" {parameter.name} (\S.*?) \((\w+), default (.*?)\)", text)
            default = str(parameter.default)
            assert float(found[2]) == float(default) if re.fullmatch(r"[\d.]+", default) else (
                found[2] == (default.lower() if default in ("True", "False") else default or "empty")
            )  # fmt: skip
            assert found[1] == type(parameter.default).__name__
    assert "max_lines longer stanzas are cut (int, default 14)" in help_of(capsys, "--help", "--format", "poem")
    old = help_of(capsys, "--help", "--format", "old")
    assert "color of the ink (str, default empty)" in old
    assert "depth of the plate (float, default 2.5)" in old


@pytest.mark.usefixtures("other_packages")
def test_other_packages_importers_take_their_options(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"items": [{"text": "a"}]}')
    poem = create("poem", tmp_path, None, read_options("poem", {"max_lines": "3"}))
    assert isinstance(poem, PoemImporter)
    assert poem.max_lines == 3
    old = create("old", tmp_path, None, read_options("old", {"color": "01", "depth": "2"}))
    assert isinstance(old, OldImporter)
    assert old.given == {"color": "01", "depth": 2.0}
    for name, value in (("max_lines", "many"), ("width", "3")):
        with pytest.raises(UserError, match=rf"--option {name}={value}|has no option '{name}'"):
            create("poem", tmp_path, None, read_options("poem", {name: value}))
    for given, missing in ({}, "--option dialect=… --option meter=…"), ({"dialect": "Swabian"}, "--option meter=…"):
        with pytest.raises(UserError, match=re.escape(f"format dialect needs {missing} (`megatron-lcl preprocess")):
            create("dialect", tmp_path, None, given)
    assert isinstance(create("dialect", tmp_path, None, {"dialect": "Swabian", "meter": 4}), DialectImporter)
    with pytest.raises(UserError, match=r"--option dialect=3: give a str \("):
        create("dialect", tmp_path, None, {"dialect": 3, "meter": 4})


@pytest.mark.usefixtures("other_packages")
@pytest.mark.parametrize(
    ("format", "says"),
    [
        ("broken", f"AttributeError: module '{__name__}' has no attribute 'Missing'; mend that package"),
        ("half", "format 'half': the class HalfImporter does not define its documents, units"),
        ("function", "which is no class made of `Importer`"),
        (
            "lonely",
            "format lonely: LonelyImporter.__init__ takes (input: 'Path') -> 'None', and has to take",
        ),
    ],
)
def test_a_format_that_cannot_be_used_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, format: str, says: str
) -> None:
    places = ["--input", str(tmp_path), "--output", str(tmp_path / "corpus")]
    assert main(["preprocess", "--format", format, *places]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert says in said


def test_an_unknown_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preprocess", "--format", "latin", "--help"]) == 2
    assert f"there is no format 'latin'; there are {', '.join(formats())}\n" in capsys.readouterr().err


def test_without_help_the_places_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["preprocess", "--format", "jsonl"])
    assert "the following arguments are required: --input, --output" in capsys.readouterr().err


def test_every_option_says_what_it_does() -> None:
    for name in formats():
        for option in options_of(importer_class(name)):
            assert len(option.help) > 10, (name, option)
            assert option.type in (int, float, str, bool)
            assert type(option.default) is option.type


def test_the_documented_formats_are_those_there_are() -> None:
    table = dict(
        re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCS.partition("| `--format` | reads |")[2].partition("\n\n")[0], re.M)
    )
    assert table == {name: importer_class(name).reads for name in formats()}


def test_the_help_of_other_commands_imports_no_importer() -> None:
    program = (
        "import sys; from megatron_lcl.cli import main\n"
        "try: main(['verify', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if 'importers' in name], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"
