"""Protects the documentation as a site: it builds, links and anchors lead somewhere, what is generated is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import subprocess
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import docutils_namespace

from megatron_lcl import config as configs
from megatron_lcl.cli import main
from megatron_lcl.config.phases import phases_of
from megatron_lcl.convert import hf, timm

DOCS = Path(__file__).parents[1] / "docs"


def build(source: Path, output: Path) -> Path:
    """The site; SphinxError where there is a warning."""
    with docutils_namespace():
        app = Sphinx(source, source, output, output / ".doctrees", "html", status=None, warningiserror=True)
        app.build()
        assert app.statuscode == 0
    return output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DOCS, tmp_path_factory.mktemp("site"))


def test_every_page_is_in_it(site: Path) -> None:
    index = (site / "index.html").read_text()
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix("").as_posix()
        assert f'href="{name}.html"' in index or name == "index", name


def test_every_field_and_command_is_in_it(site: Path) -> None:
    config, commands = ((site / f"{name}.html").read_text() for name in ("config", "commands"))
    fields: dict[str, list[str]] = {}
    for name, *_ in configs.describe():
        section, _, field = name.rpartition(".")
        fields.setdefault(section.replace(".", "-") or "at-the-top", []).append(field)
    tables = dict(re.findall(r'<section id="([^"]+)">(.*?)(?=<section|</section>)', config, re.S))
    rows = {
        section: re.findall(r"<tr[^>]*><td><p><code[^>]*><span[^>]*>([^<]+)<", of) for section, of in tables.items()
    }
    assert "corpora[].weight" in rows["data"]
    assert {section: [field for field in rows[section] if "[" not in field] for section in fields} == fields
    for command in ("preprocess", "train", "evaluate", "export", "selftest"):
        assert f"usage: megatron-lcl {command} " in commands


@pytest.mark.parametrize("page", sorted(DOCS.glob("sources/*.md")), ids=lambda page: page.stem)
def test_commands_of_a_data_set_are_ours(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each command, format and option is known: what fails is the first look at the data, which are not there."""
    monkeypatch.setattr("megatron_lcl.data.prepare.bars._LONG", 60.0)  # a full garbage collection takes half a second
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line)[1:] for line in re.findall(r"^ {4}(megatron-lcl .*)$", page.read_text("utf-8"), re.M)]
    assert {"preprocess", "verify", "inspect"} <= {name for name, *_ in commands}
    for name, *words in commands:
        assert main([name, *words]) > 0
        (line,) = "".join(capsys.readouterr()).splitlines()
        data = words[words.index("--input") + 1] if "--input" in words else words[0]
        assert re.search(rf"(^| ){data} (does not exist|is not a corpus)", line), line


def test_corpora_are_made_with_the_tokenizer_of_the_configs() -> None:
    """Else one is trained, whose corpus no shipped config takes: CLIP's, or one that is trained, on a page that gives
    `train` the size of the vocabulary. Lines with … are about something else."""
    commands = [
        (page, line)
        for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
        for line in re.findall(r"megatron-lcl preprocess (--format .* --output .*)", page.read_text("utf-8"))
        if "…" not in line
    ]
    assert len(commands) > 15
    for page, line in commands:
        words = shlex.split(line)
        corpus = words[words.index("--output") + 1]
        sized = rf"megatron-lcl train .* --data\.corpora {corpus} --model\.language\.vocab_size \$N "
        tokenizer = words[words.index("--tokenizer") + 1] if "--tokenizer" in words else None
        assert tokenizer == "clip" or (tokenizer is None and re.search(sized, page.read_text("utf-8"))), (page, line)
        if re.match(r"--format (mmc4|obelics|omnicorpus|table) ", line):
            assert "--images " in line or "--option join=none " in line, (page, line)
        if re.search(r" --images images/(mmc4|obelics|omnicorpus|datacomp) ", line):  # whole lists of URLs, many dead
            assert "--max-bad-fraction 0.5" in line, line
            assert "--held-out" not in words, f"it is for up to 200,000 images: {line}"
    for file in DOCS.parent.glob("configs/*.yaml"):
        assert configs.load(file).model.language.vocab_size == 49411


def test_what_pages_offer_in_python_is_in_the_list_of_what_is_stable() -> None:
    listed = set(re.findall(r"auto(?:function|class|data|exception):: (\S+)", (DOCS / "api.md").read_text("utf-8")))
    offered: set[str] = set()
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]:
        text = page.read_text("utf-8")
        groups = re.findall(r"^ *from (megatron_lcl[.\w]*) import (.+)$", text, re.M)
        groups += re.findall(r"`(megatron_lcl[.\w]+)\.\{(.+?)\}`", text)
        offered |= {f"{module}.{name}" for module, names in groups for name in names.split(", ")}
        offered.update(re.findall(r"\b(megatron_lcl(?:\.\w+)+)\(", text))
    assert {"megatron_lcl.load_model", "megatron_lcl.convert.export.export", "megatron_lcl.evaluate.run.evaluate",
            "megatron_lcl.curate.run.curate"} <= offered  # fmt: skip
    assert offered <= listed, offered - listed


def test_an_export_is_saved_again_for_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "conversion.md").read_text("utf-8")
    (lines,) = re.findall(r"^((?: {4}.*\n)* {4}torch\.save\(.*\n)", page, re.M)
    tensor = torch.arange(6.0)
    (tmp_path / "DIR").mkdir()
    save_file({"a": tensor}, tmp_path / "DIR" / "lcl.safetensors")
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent(lines), {})
    assert torch.equal(torch.load("DIR/lcl.pt")["a"], tensor)


def test_exports_are_loaded_as_their_cards_say() -> None:
    """Whose examples run in the tests of the exports; ViT-L/16 is what the page takes for timm's."""
    page = (DOCS / "conversion.md").read_text("utf-8")
    large = configs.load(DOCS.parent / "configs/lcl_vitl14_interleaved.yaml").model.vision
    name, arguments = timm.architecture(dataclasses.replace(large, patch_size=16))
    assert (name, arguments) == ("vit_large_patch14_clip_224", {"patch_size": 16})
    for example in (hf.USAGE.example, timm.USAGE.example.replace("ARGUMENTS", f'"{name}", patch_size=16')):
        assert textwrap.indent(example, "    ", lambda line: bool(line.strip())) in page


def test_the_first_run_says_how_its_commands_are_found() -> None:
    """Before the first of them: the script leaves them in an environment of its own."""
    page = (DOCS / "first-run.md").read_text("utf-8")
    assert page.index("\n    . .venv/bin/activate\n") < page.index("`megatron-lcl ")


def test_open_clip_is_as_new_as_an_export_wants() -> None:
    (wanted,) = re.findall(r"open-clip-torch ≥ ([\d.]+)", (DOCS / "conversion.md").read_text("utf-8"))
    extras = tomllib.loads((DOCS.parent / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    floors = {extra: [r for r in needs if r.startswith("open-clip-torch")] for extra, needs in extras.items()}
    assert {extra: needs for extra, needs in floors.items() if needs} == {
        "clip": [f"open-clip-torch>={wanted}"],
        "dev": [f"open-clip-torch>={wanted}"],
    }


@pytest.mark.parametrize("link", ["[x](page.md#nowhere)", "[x](nowhere.md)"])
def test_a_link_that_leads_nowhere_is_an_error(link: str, tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    for file in ("conf.py", "generated.py"):
        shutil.copy(DOCS / file, source)
    shutil.copytree(DOCS / "_static", source / "_static")
    (source / "page.md").write_text("---\norphan: true\n---\n# Page\n")
    (source / "index.md").write_text(f"# Index\n\n{link}\n")
    with pytest.raises((SphinxError, AssertionError)):
        build(source, tmp_path / "site")
    (source / "index.md").write_text("# Index\n\n[x](page.md#page)\n")
    build(source, tmp_path / "site2")


@pytest.mark.skipif(not shutil.which("perl"), reason="perl is not installed")
def test_captions_are_moved_before_their_figures(tmp_path: Path) -> None:
    """By the command of docs/sources/pdf.md, in files as converters write them."""
    page = (DOCS / "sources/pdf.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`(perl .*?)`", page)
    (tmp_path / "papers").mkdir()
    before = "![](a.png)\n\nFigure 1. A long\ncaption.\n\nFigure 3 shows it.\n\n![x](b.png)\n\nFig. 2: B\n"
    (tmp_path / "papers/one.md").write_text(before)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=30)
    after = "Figure 1. A long\ncaption.\n\n![](a.png)\n\nFigure 3 shows it.\n\nFig. 2: B\n\n![x](b.png)\n"
    assert (tmp_path / "papers/one.md").read_text() == after
    assert (tmp_path / "papers/one.md.bak").read_text() == before


def test_the_quickstarts_config_takes_another_number_of_steps() -> None:
    """With the options that docs/first-run.md gives: its cooldown is a number of steps."""
    page = (DOCS / "first-run.md").read_text(encoding="utf-8")
    (options,) = re.findall(r"`(--train\.steps \d+ --schedule\.cooldown \d+)`", page)
    words = options.split()
    assert int(words[1]) == 4 * int(words[3])
    overrides = {words[0][2:]: words[1], words[2][2:]: words[3]}
    config = configs.load(DOCS.parent / "megatron_lcl/quickstart/blend.yaml", overrides)
    assert phases_of(config)[-1].stop == int(words[1])
