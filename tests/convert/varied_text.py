"""Lines of text of many kinds: English, source code, many scripts, emoji, numbers, runs of spaces."""

from __future__ import annotations

import random
import sysconfig
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

SCRIPTS = {
    "Latin": "Größe façade naïve Øre Ünïcödé straße Łódź İstanbul ŒUVRE piñata Ångström",
    "Greek": "Η γλώσσα είναι ένα σύστημα. Ποιος ΓΡΆΦΕΙ; άνθρωπος",
    "Cyrillic": "Привет, мир! Всё хорошо; ЭТО Предложение. Україна їжа Ёлка",
    "Chinese": "你好，世界！今天天气很好。他说：“我们走吧。”《红楼梦》",
    "Japanese": "日本語のテキスト、カタカナ。「はい」と言った。ｶﾅ",
    "Korean": "한국어 문장입니다. 안녕하세요, 여러분!",
    "Arabic": "مرحبا بالعالم، كيف الحال؟ هذا نص عربي.",
    "Hebrew": "שלום עולם, מה נשמע? זה משפט.",
    "Devanagari": "नमस्ते दुनिया। यह एक वाक्य है।",
    "Thai": "สวัสดีชาวโลก นี่คือประโยค",
    "Armenian": "Բարեւ աշխարհ, ինչպես ես",
    "Georgian": "გამარჯობა მსოფლიო",
    "Vietnamese": "Xin chào thế giới, đây là một câu tiếng Việt.",
}
EMOJI = (
    "😀",
    "😶\u200d🌫\ufe0f",
    "👩\u200d👩\u200d👧",
    "✅",
    "🦙",
    "🚀🚀",
    "👍🏽",
    "🇺🇳",
    "❤\ufe0f",
    "1\ufe0f\u20e3",
    "☺",
)
NUMBERS = (
    "0",
    "7",
    "42",
    "365",
    "1000",
    "31415",
    "1234567",
    "12,345.67",
    "-1e-9",
    "0xFF",
    "10%",
    "½",
    "²",
    "١٢٣",
    "४५६",
)
BLANKS = (" ", "  ", "   ", "\t", " \t", "    ", "\u00a0", "\u3000", "        ")
MARKS = (*"!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~—…", "...", "--", "==", "!=", "->", "::", "//", "'s", "n't", "“”")
ENGLISH = ("The", "quick", "fox's", "jumping", "it;", "DON'T", "we'll", "THEY'RE", "camelCase", "snake_case", "O'Neill")


@cache
def varied_lines(count: int) -> tuple[str, ...]:
    """`count` different lines, of each kind in turn; always the same lines with the same Python."""
    rng = random.Random(5)
    kinds = [_english(), _code(), _scripts(rng), _mixtures(rng)]
    lines: dict[str, None] = {}
    while len(lines) < count:
        for kind in kinds:
            lines.update(dict.fromkeys(islice(kind, 1)))
    return tuple(islice(lines, count))


def _english() -> Iterator[str]:
    from pydoc_data.topics import topics

    for text in topics.values():
        yield from text.split("\n")
        yield from (part[:300] for part in text.split("\n\n")[:20])  # several lines at once


def _code() -> Iterator[str]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    for name in ("textwrap.py", "argparse.py", "tarfile.py", "typing.py", "tokenize.py", "smtplib.py", "difflib.py"):
        text = (folder / name).read_text(encoding="utf-8")
        yield from text.split("\n")
        yield from (part[:300] for part in text.split("\n\n\n")[:30])


def _scripts(rng: random.Random) -> Iterator[str]:
    while True:
        words = rng.choice(list(SCRIPTS.values())).split()
        line = " ".join(rng.choices(words, k=rng.randint(1, 6)))
        yield rng.choice((line, line.upper(), line.title(), line.replace(" ", ""), line.replace(" ", "  ")))


def _mixtures(rng: random.Random) -> Iterator[str]:
    """Words of any script, numbers, marks and emoji, with any spaces between them."""
    words = [word for text in SCRIPTS.values() for word in text.split()]
    while True:
        parts = []
        for _ in range(rng.randint(1, 10)):
            parts.append(rng.choice(rng.choice((words, ENGLISH, EMOJI, NUMBERS, MARKS))))
            parts.append(rng.choice(("", " ", " ", " ", rng.choice(BLANKS), rng.choice(BLANKS) * 3)))
        line = "".join(parts)
        yield rng.choice((line, line, line + "\n", "\n" + line, line.replace(" ", "\r\n", 1), "  " + line))


def composed(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The lines in NFC: a letter and its accents are one code point where Unicode has one."""
    return tuple(unicodedata.normalize("NFC", line) for line in lines)
