"""What was removed, as one self-contained page: a table of the rules, and samples of each."""

from __future__ import annotations

from pathlib import Path

import jinja2

from megatron_lcl.curate.result import Curated
from megatron_lcl.data.corpus.files import replace_text

PAGE = "removed.html"
"""in the corpus's folder, where no other file is given"""


def write_page(curated: Curated, file: str | Path | None = None) -> Path:
    """Write the page; returns its file. None: `removed.html` in the corpus's folder."""
    if file is None:
        assert curated.path is not None
        file = curated.path / PAGE
    loaders = [jinja2.PackageLoader("megatron_lcl", folder) for folder in ("curate", "data/pages/templates")]
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    samples = {r.rule: [sample for sample in curated.samples if sample["rule"] == r.rule] for r in curated.rules}
    page = environment.get_template("removed.html").render(curated=curated, samples=samples)
    replace_text(Path(file), page)
    return Path(file)
