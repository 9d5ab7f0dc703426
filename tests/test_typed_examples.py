"""The examples of the docs in a program that mypy checks strictly: what is public says what it takes and gives."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STRICT = (  # what `mypy --strict` adds of a module's own; the rest as for the project, whose cache serves
    "# mypy: disallow-untyped-defs, disallow-incomplete-defs, disallow-untyped-calls, disallow-any-generics, "
    "disallow-subclassing-any, warn-return-any, strict-equality, no-implicit-reexport\n"
)
TYPES = {  # the pages leave them out
    "def __init__(self, albums):": "def __init__(self, albums: dict[str, list[Path]]) -> None:",
    "def signature(self):": "def signature(self) -> str:",
    "def units(self):": "def units(self) -> list[Unit]:",
    "def documents(self, unit, drops):": "def documents(self, unit: Unit, drops: Drops) -> Iterator[Document]:",
    "def __init__(self, step, weight):": "def __init__(self, step: StepInputs, weight: float) -> None:",
    "def surrogate(self, m, out):": "def surrogate(self, m: int, out: Outputs) -> torch.Tensor:",
    "def metrics(self):": "def metrics(self) -> dict[str, torch.Tensor]:",
    "def loss(self):": "def loss(self) -> torch.Tensor:",
}
IMPORTS = """\
from collections.abc import Iterator
from megatron_lcl.data.corpus.drops import Drops
from megatron_lcl.model.activations import Outputs
from megatron_lcl.objectives.base import StepInputs
"""
REST = """\
from megatron_lcl import open_corpus
from megatron_lcl.evaluate.captioning import caption, generate
from megatron_lcl.evaluate.image_set import FileBlob
from megatron_lcl.evaluate.settings import CaptioningSettings

corpus = open_corpus("corpora/albums")
reveal_type(corpus[0])
reveal_type(corpus[-2:])
reveal_type(caption(encoder, [FileBlob("cat.jpg"), FileBlob(Path("sea.jpg"))], CaptioningSettings()))
generate(model, images, CaptioningSettings(max_tokens=5), prompt=tokenizer.encode("A cat"))
"""


def examples(page: str) -> list[str]:
    return re.findall(r"^((?: {4}\S.*\n)(?:(?: {4}.*)?\n)*)", (ROOT / page).read_text("utf-8"), re.M)


@pytest.mark.timeout(300)
def test_the_examples_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mypy import api

    code = [text for page in ("docs/api.md", "docs/architecture.md") for text in examples(page) if "import " in text]
    text = "".join(map(textwrap.dedent, code))
    for untyped, typed in TYPES.items():
        assert untyped in text
        text = text.replace(untyped, typed)
    program = tmp_path / "program.py"
    program.write_text(STRICT + IMPORTS + text + REST)
    monkeypatch.setenv("MYPYPATH", str(ROOT))
    said, wrong, _ = api.run(
        ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"), str(program)]
    )
    assert not wrong, wrong
    assert "error:" not in said, said
    assert re.findall(r'Revealed type is "(.*)"', said.replace("builtins.", "")) == [
        "megatron_lcl.data.corpus.document.Document",
        "list[megatron_lcl.data.corpus.document.Document]",
        "list[str]",
    ], said
