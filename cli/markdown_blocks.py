"""Blocks of Markdown as rich renders them for a chat: headings at the left edge, code without a margin.

Its parser and highlighter take long to import: this module is imported only where Markdown is rendered.
"""

from __future__ import annotations

from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax

from .markdown_fence import FENCE

PARSER = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")
"""Without HTML, which rich would leave out of what it shows."""


class _Heading(Heading):
    """A heading at the left edge, in bold, without a box."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        self.text.stylize("bold")
        yield self.text


class _Code(CodeBlock):
    """Code on the terminal's own background, so that it can be copied without a margin of spaces on its right."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme="ansi_dark", background_color="default", word_wrap=True)


class MarkdownBlock(Markdown):
    elements: ClassVar[dict[str, Any]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
    }

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.markup, self.parsed = text, PARSER.parse(_with_line_breaks(text))


def _with_line_breaks(text: str) -> str:
    """Keep the line breaks inside paragraphs, which Markdown would join: models write poems and addresses so."""
    lines, fence = [], ""
    for line in text.split("\n"):
        marks = FENCE.match(line)
        if fence:
            if marks and marks[1].startswith(fence) and not marks[2].strip():
                fence = ""
        elif marks:
            fence = marks[1]
        elif line.strip():
            line = line.rstrip() + "  "
        lines.append(line)
    return "\n".join(lines)
