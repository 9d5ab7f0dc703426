"""Markdown files with images, as notes and documentation have them: CommonMark with tables, and HTML in it.

A file becomes an HTML page, and then all is as of HTML pages: what is content, what repeats, which images stay.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt

from megatron_lcl.data.prepare.importers.charsets import text_of
from megatron_lcl.data.prepare.importers.html import HtmlImporter

_MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^(?:---|\.\.\.)[ \t]*$\n?", re.DOTALL | re.MULTILINE)
"""of site generators: YAML between lines of dashes"""


class MarkdownImporter(HtmlImporter):
    """A folder of Markdown files, or one; in the order of their names."""

    rules = 5
    reads = "folder of Markdown files (.md, .markdown); images beside the files (or in --images), or in data: URLs"
    suffixes = (".md", ".markdown")

    def page_text(self, name: str) -> tuple[str, list[str]]:
        text, noted = text_of(self.page_html(name))
        return _MARKDOWN.render(_FRONT_MATTER.sub("", text.replace("\r\n", "\n"), count=1)), noted
