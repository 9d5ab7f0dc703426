"""The documentation as a site: `sphinx-build -W -n docs BUILD`; warnings (broken links and anchors too) are errors.

Pages are Markdown, readable without the site. Two are written from the code while they are read: a line
`<!-- generated: config -->` or `<!-- generated: commands -->` is replaced by what `generated.py` makes.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))

import generated

import megatron_lcl

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "megatron_lcl"
release = megatron_lcl.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_title = "megatron_lcl"
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = True
nitpick_ignore_regex = [("py:.*", ".*")]  # types of the standard library and of torch have no page here


def _generate(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Fill in what comes from the code."""
    source[0] = re.sub(
        r"^<!-- generated: (\w+) -->$", lambda m: getattr(generated, m[1])(), source[0], flags=re.MULTILINE
    )


def _preformatted(_app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text, with formulas and tables laid out by hand."""
    lines[:] = ["::", "", *(f"    {line}" for line in lines), ""] if any(lines) else []


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _generate)
    app.connect("autodoc-process-docstring", _preformatted)
