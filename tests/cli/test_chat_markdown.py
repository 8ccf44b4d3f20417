"""Answers at a terminal: Markdown that is rendered while it is generated, and wrapped at words."""

import io
import re

import pytest
from ropewalk.cli import chat_markdown
from ropewalk.cli.chat_markdown import ShownAnswer, split_blocks

ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)")

ANSWER = """# Colours

Some **bold** text, a `word` of code, <b>tags</b>, vector<int> and \x1b[31mred\x07 that goes on for quite a while.

Roses are red,
violets are blue.

1. first
2. second

   more of it

```python
def f(x):

    return x
```

| a | b |
|---|---|
| 1 | 2 |
"""


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name, value in {"TERM": "xterm", "COLUMNS": "50", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(chat_markdown, "REDRAW_S", 0)
    return Screen()


def show(file, text, step=3, **options):
    with ShownAnswer(file, **options) as shown:
        for i in range(0, len(text), step):
            shown.write(text[i : i + step])
    return file.getvalue()


def final_lines(raw):
    """What stays on the screen: the transient drawings are erased line by line."""
    lines = [""]
    for part in re.split(r"(\n|\x1b\[1A|\x1b\[2K)", raw.replace("\r", "")):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[1A":
            lines.pop()
        elif part == "\x1b[2K":
            lines[-1] = ""
        else:
            lines[-1] += ESCAPES.sub("", part)
    return [line.rstrip() for line in lines]


def test_markdown_is_rendered_and_wrapped_at_words(terminal):
    raw = show(terminal, ANSWER)
    lines = final_lines(raw)
    assert max(map(len, lines)) <= 50
    text = "\n".join(lines)
    assert "Colours" in lines and "**" not in text and "`" not in text and "#" not in text
    assert "<b>tags</b>" in " ".join(lines) and "vector<int>" in text
    assert "\x1b[31m" not in raw and "\x07" not in raw
    assert text.index("Roses are red,\nviolets are blue.")
    assert " 2 second" in lines and "   more of it" in lines
    assert "def f(x):\n\n    return x" in text
    assert "\n\n\n" not in text and text.endswith("\n")


@pytest.mark.parametrize("step", [1, 7, 10_000])
def test_what_stays_does_not_depend_on_the_pieces(terminal, step):
    assert final_lines(show(terminal, ANSWER, step)) == final_lines(show(Screen(), ANSWER, 3))


def test_a_block_taller_than_the_screen_is_whole_in_the_end(terminal):
    text = "```\n" + "\n".join(f"line {i}" for i in range(40)) + "\n```\n"
    assert [line for line in final_lines(show(terminal, text)) if line] == [f"line {i}" for i in range(40)]


@pytest.mark.parametrize("options", [{"markdown": False}, {}])
def test_plain_output_is_the_text_without_control_characters(options, monkeypatch):
    file = Screen() if options else io.StringIO()
    assert show(file, ANSWER, **options) == ANSWER.replace("\x1b", "").replace("\x07", "") + "\n"


def test_a_dumb_terminal_gets_plain_text(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert show(terminal, "some *text*") == "some *text*\n"


def test_nothing_is_shown_of_an_empty_answer(terminal):
    assert show(terminal, "") == "" and show(io.StringIO(), "") == ""


def test_blocks_end_where_nothing_can_follow():
    assert split_blocks("a\n\nb") == (["a"], "b")
    assert split_blocks("a\n\n") == ([], "a\n\n")
    assert split_blocks("- a\n\n  b\n\nc\n") == (["- a\n\n  b"], "c\n")
    assert split_blocks("```\na\n\nb\n```\n\nc") == (["```\na\n\nb\n```"], "c")
    assert split_blocks("````\n```\n\nb\n") == ([], "````\n```\n\nb\n")
    assert split_blocks("") == ([], "")
