"""How a chat speaks of itself: dim lines and complaints on standard error, and words about a conversation."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from ..runtime.chat import Transcript
from .chat_markdown import CONTROL
from .terminal import err

LONG_WORD = 40


def say(text: str) -> None:
    """Say something about the chat, dim and wrapped at words."""
    sys.stdout.flush()
    err.print(CONTROL.sub("", text), style="dim", markup=False)


def say_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Say a list of names and what they stand for, in two columns."""
    sys.stdout.flush()
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(Text(CONTROL.sub("", name)), Text(CONTROL.sub("", value)))
    err.print(table, style="dim")


def complain(text: str) -> None:
    sys.stdout.flush()
    words = CONTROL.sub("", text).split()
    is_long = any(len(word) > LONG_WORD for word in words)  # a path, which stays whole for copying
    err.print(" ".join(words), style="red", markup=False, soft_wrap=is_long)


def first_question(transcript: Transcript) -> str:
    """Return the beginning of the first question, without the documents before it."""
    first = next((message for message in transcript.messages if message.role == "user"), None)
    return shorten(" ".join(first.content[first.question_at :].split()), 40) if first else "no question yet"


def counted_turns(n: int) -> str:
    return "oldest question and its answer" if n == 1 else f"{n} oldest questions and their answers"


def shorten(text: str, length: int = 76) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
