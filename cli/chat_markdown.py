"""An answer at the terminal while it is generated: Markdown, wrapped at words; or plain text for a pipe.

Finished blocks (paragraphs, lists, code) are printed once and stay. The one that is being generated is shown again with
every piece of text, as its last lines if it is taller than the screen.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.segment import Segment, Segments

from .markdown_fence import FENCE

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, with which an answer could take over the terminal."""

REDRAW_S = 0.08


class ShownAnswer:
    """Shows an answer while the block runs.

    Args:
        file: where to.
        markdown: render it; only if `file` is a terminal that can move its cursor.
    """

    def __init__(self, file: Any, *, markdown: bool = True) -> None:
        self._file = file
        self._console = Console(file=file, highlight=False, soft_wrap=False)
        self._renders = markdown and self._console.is_terminal and not self._console.is_dumb_terminal
        self._rest = ""
        self._printed = False
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> ShownAnswer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def write(self, text: str) -> None:
        """Show more of the answer."""
        text = CONTROL.sub("", text)
        if not self._renders:
            self._file.write(text)
            self._file.flush()
            self._printed = self._printed or bool(text)
            return
        blocks, self._rest = split_blocks(self._rest + text)
        if blocks:
            self._stop_live()
            for block in blocks:
                self._print(block)
        self._draw()

    def close(self) -> None:
        """Show what is left, and end the line."""
        self._stop_live()
        if self._renders:
            if self._rest.strip():
                self._print(self._rest)
            self._rest = ""
        elif self._printed:
            self._file.write("\n")
        self._file.flush()
        self._printed = False

    def _print(self, block: str) -> None:
        self._console.print(Segments([*_joined(self._lines(block)), Segment.line()]))
        self._printed = True

    def _lines(self, block: str) -> list[list[Segment]]:
        """Return a block's lines, with one blank line before all but the first block."""
        from .markdown_blocks import MarkdownBlock

        lines = self._console.render_lines(MarkdownBlock(block), self._console.options, pad=False)
        while lines and not _text(lines[0]):
            del lines[0]
        while lines and not _text(lines[-1]):
            del lines[-1]
        return [[], *lines] if self._printed else lines

    def _draw(self) -> None:
        """Show the unfinished block again, unless it was shown just now."""
        now = time.monotonic()
        if not self._rest.strip() or now - self._drawn < REDRAW_S:
            return
        self._drawn = now
        shown = self._lines(self._rest)[-max(self._console.height - 2, 1) :]
        if not any(map(_text, shown)):
            return  # the first sign of a heading, say
        if self._live is None:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
            )
            self._live.start()
        self._live.update(Segments(_joined(shown)), refresh=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()


def _text(line: list[Segment]) -> str:
    return "".join(segment.text for segment in line).strip()


def _joined(lines: list[list[Segment]]) -> list[Segment]:
    return [segment for line in lines for segment in (*line, Segment.line())][:-1]


def split_blocks(text: str) -> tuple[list[str], str]:
    """Split Markdown at the blank lines where a block certainly ends; return those blocks, and the rest.

    A block has ended when the next one starts at the left edge; an indented line may belong to a list above it.
    """
    blocks, start, place, fence, blank = [], 0, 0, "", False
    for line in text.splitlines(keepends=True):
        marks = FENCE.match(line)
        if fence:
            if marks and marks[1].startswith(fence) and not marks[2].strip():
                fence = ""
        elif not line.strip():
            blank = True
        else:
            if blank and not line[0].isspace() and text[start:place].strip():
                blocks.append(text[start:place].strip("\n"))
                start = place
            blank = False
            if marks:
                fence = marks[1]
        place += len(line)
    return blocks, text[start:]
