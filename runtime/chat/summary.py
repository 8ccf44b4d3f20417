"""Summaries of texts of any length: a text that fits the context is read whole, a longer one is split.

A text that is too long is cut at paragraph borders (then lines, sentences, words, characters), each part is
summarised, and the summaries are summarised together, in groups if there are too many. Every part is read with an empty
cache, so that a text's summary does not depend on what was done before it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from ...errors import UserError
from ...factors import Band
from ..prompt_cache import PromptCache
from .answer import Answer, Sampling
from .template import EXACT_CHARACTERS, ChatTemplate, Message, count_tokens

if TYPE_CHECKING:
    from ..llama import Llama

PROMPT = "Summarise the text above in a few sentences."
MAX_TOKENS = 256
MIN_ROOM = 96  # tokens; with fewer, a text and its summary cannot both fit
ANY_DAY = date(2025, 1, 1)  # for templates that name the date: the summary is the same on any day
SPARE = 32  # tokens for the joins between texts that were counted separately

BORDERS = (r"\n[^\S\n]*\n\s*", r"\n", r"(?<=[.!?…])\s+|(?<=[。！？])")
"""Where a text may be cut, best first: paragraphs, lines, sentences. The last resort is to halve it, between words."""

WORD = re.compile(r"[^\W_\u115f\u1160\u3164\uffa0]")  # a letter or digit that can be seen

SENTENCE_END = re.compile(r"[.!?…][\"'”’)\]*_]*(?=\s|$)|[。！？][」』”’]*")
NO_END = re.compile(
    r"(?:(?:^|\n)\W*\d+|\b[^\W\d_]|\b(?:Dr|Mr|Mrs|Ms|Prof|St|No|Fig|cf|vs|approx|e\.g|i\.e))\.$", re.IGNORECASE
)
"""A text up to a full stop that ends no sentence: the number of a list's item, an initial, an abbreviation."""

CUT_MARK = " …"
"""The end of a summary that was cut at the limit."""

Count = Callable[[str], int]

Atom = tuple[str, int]
"""A piece of a text, and its tokens."""


class EmptySummary(UserError):
    """The model generated no text."""


class NothingToSummarize(UserError):
    """A text without a letter or a digit, for which a model would invent a summary."""


def has_words(text: str) -> bool:
    """Whether a text has a letter or a digit, in any script."""
    return WORD.search(text) is not None


@dataclass(frozen=True)
class SummarySettings:
    """What a summary depends on besides the text and the model. `seed` matters only above temperature 0."""

    prompt: str = PROMPT
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Summary:
    """A text's summary: its `n_tokens` were read in `parts`, and `band` is the longest band used.

    `finish_reason` is "length" if the summary was cut off at the limit; then it ends with `CUT_MARK`.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    n_tokens: int
    parts: int
    band_index: int
    band: Band
    read_tokens: int
    written_tokens: int
    read_s: float
    write_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens read and generated per second."""
        return (self.read_tokens + self.written_tokens) / max(self.read_s + self.write_s, 1e-9)


class Summarizer:
    """Summarises texts with one model.

    Args:
        settings: what the model is asked, and how it answers.
        cache: keeps documents, so that another question about one does not read it again.

    Raises:
        UserError: the context is too small, or the model's chat template fails.
    """

    def __init__(self, llm: Llama, settings: SummarySettings | None = None, cache: PromptCache | None = None) -> None:
        self._llm, self._settings, self._cache = llm, settings or SummarySettings(), cache
        self._template = ChatTemplate(llm, ANY_DAY)
        self._room = llm.n_ctx() - len(self._prompt("")) - SPARE
        self._n_around = len(self._prompt("a")) - count_tokens(llm, "a")
        if self._room < MIN_ROOM:
            least = llm.n_ctx() - self._room + MIN_ROOM
            raise UserError(
                f"a context of {llm.n_ctx():,} tokens is too small to summarise in, expected at least {least:,}"
            )
        # Summaries of parts take a third at most, so that two of them always fit together and combining terminates.
        self._part_budget = min(self._settings.max_tokens, self._room // 3)

    def summarize(self, text: str, on_progress: Callable[[int, int], None] | None = None) -> Summary:
        """Summarise `text`; `on_progress` is called with (tokens of it that were read, its tokens).

        Raises:
            NothingToSummarize: the text has neither a letter nor a digit.
            EmptySummary: the model ended its answer at once.
        """
        if not has_words(text):
            raise NothingToSummarize("no text: neither a letter nor a digit")
        capacity = self._room - self._part_budget
        parts = [part for part in self._parts(text) if has_words(part)]
        sizes = [count_tokens(self._llm, part) for part in parts]
        totals = _Totals()
        last = len(parts) == 1
        texts = []
        for i, part in enumerate(parts):
            report = _reporter(on_progress, sum(sizes[:i]), sum(sizes))
            texts.append(self._answer(part, last, totals, report))
        while not last:
            texts = [text for text in texts if has_words(text)]  # the summary of a part may be empty
            groups = self._groups(texts, capacity)
            last = len(groups) <= 1
            texts = [self._answer(group, last, totals, None, is_document=False) for group in groups] or [""]
        if not texts[0]:
            raise EmptySummary("the model wrote no summary")
        is_cut = totals.ending != "stop"
        return Summary(
            text=texts[0] + CUT_MARK * is_cut,
            finish_reason="length" if is_cut else "stop",
            n_tokens=sizes[0] if len(parts) == 1 else count_tokens(self._llm, text),
            parts=len(parts),
            band_index=totals.band_index,
            band=self._llm.schedule.bands[totals.band_index],
            read_tokens=totals.read_tokens,
            written_tokens=totals.written_tokens,
            read_s=totals.read_s,
            write_s=totals.write_s,
        )

    def _answer(
        self,
        text: str,
        last: bool,
        totals: _Totals,
        report: Callable[[int, int], None] | None,
        *,
        is_document: bool = True,
    ) -> str:
        settings, llm = self._settings, self._llm
        budget = settings.max_tokens if last else self._part_budget
        sampling = Sampling(max_tokens=budget, temperature=settings.temperature, seed=settings.seed)
        llm.reset()
        prompt = self._prompt(text)
        before = llm.on_progress
        llm.on_progress = report or before
        try:
            if self._cache is not None and is_document:
                self._read_document(self._cache, text, prompt, totals)
                llm.on_progress = None  # what is left is the question
            answer = Answer(llm, prompt, sampling, self._template.stops)
            answer.write()
        finally:
            llm.on_progress = before
        totals.add(answer, llm.band_index)
        text = answer.text.strip() if answer.ending == "stop" else _whole_sentences(answer.text.strip())
        return text if last else self._clipped(text)

    def _parts(self, text: str) -> list[str]:
        capacity = self._room - self._part_budget
        return split(text, capacity, lambda piece: count_tokens(self._llm, piece), self._size)

    def _clipped(self, text: str) -> str:
        """The start of a part's summary, if it has more tokens when it is read than when it was generated."""
        count = lambda piece: count_tokens(self._llm, piece)  # noqa: E731
        return split(text, self._part_budget, count)[0]

    def _size(self, text: str) -> int:
        """The number of tokens by which `text` makes a prompt longer; of a very long one, those of its pieces."""
        if len(text) > EXACT_CHARACTERS:
            return count_tokens(self._llm, text)
        return len(self._prompt(text)) - self._n_around

    def _read_document(self, cache: PromptCache, text: str, prompt: list[int], totals: _Totals) -> None:
        """Read what is the same for any question on its own, so that it can be kept."""
        started = time.perf_counter()
        opening = self._template.opening([Message("user", text.lstrip())])
        shared = self._llm.longest_token_prefix(opening, prompt)
        totals.read_tokens += cache.read(prompt[:shared])
        totals.read_s += time.perf_counter() - started

    def _prompt(self, text: str) -> list[int]:
        return self._template.tokens([Message("user", f"{text}\n\n{self._settings.prompt}".strip())])

    def _groups(self, texts: Sequence[str], capacity: int) -> list[str]:
        """Join summaries in groups of at least two and as many as fit; one may be left over."""
        groups: list[list[str]] = []
        for text in texts:
            joined = "\n\n".join([*groups[-1], text]) if groups else text
            if groups and (len(groups[-1]) < 2 or self._size(joined) <= capacity):
                groups[-1].append(text)
            else:
                groups.append([text])
        return ["\n\n".join(group) for group in groups]


@dataclass
class _Totals:
    """Totals of one summary so far."""

    band_index: int = 0
    read_tokens: int = 0
    written_tokens: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    ending: str = ""  # of the last answer

    def add(self, answer: Answer, band_index: int) -> None:
        self.band_index = max(self.band_index, band_index)
        self.read_tokens += answer.read_tokens
        self.written_tokens += answer.written_tokens
        self.read_s += answer.read_s
        self.write_s += answer.write_s
        self.ending = answer.ending


def _reporter(
    on_progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, _: on_progress(min(before + done, total), total)


def _whole_sentences(text: str) -> str:
    """Drop a last sentence that was cut off, unless it is most of the text."""
    ends = [end.end() for end in SENTENCE_END.finditer(text) if not NO_END.search(text, 0, end.start() + 1)]
    return text[: ends[-1]] if ends and ends[-1] > len(text) // 2 else text


def split(text: str, capacity: int, count: Count, count_part: Count | None = None) -> list[str]:
    """Cut `text` into parts of at most `capacity` tokens and similar size; joined, they are the text.

    Pieces of it are counted by `count`. Joined, they may have more tokens than apart: the parts are counted again, by
    `count_part` if there is one.
    """
    count_part = count_part or count
    apart, joined = count(text), count_part(text)
    if max(apart, joined) <= capacity:
        return [text]
    atoms = _atoms(text, int(capacity * min(1, apart / max(joined, 1))), count, BORDERS)
    parts = _grouped(atoms, capacity)
    growth = max(count_part(_text(part)) / max(sum(size for _, size in part), 1) for part in parts)
    if growth > 1:
        parts = _grouped([(piece, math.ceil(size * growth)) for piece, size in atoms], capacity)
    return [piece for part in parts for piece in _fitting(part, capacity, count_part)]


def _grouped(atoms: list[Atom], capacity: int) -> list[list[Atom]]:
    """Put pieces together, in order, to parts of at most `capacity` tokens and similar size."""
    total = sum(size for _, size in atoms)
    target = total / math.ceil(total / capacity)
    parts: list[list[Atom]] = [[]]
    size, done = 0, 0
    for piece, n_tokens in atoms:
        if parts[-1] and (size + n_tokens > capacity or done + n_tokens / 2 > target * len(parts)):
            parts.append([])
            size = 0
        parts[-1].append((piece, n_tokens))
        size += n_tokens
        done += n_tokens
    return parts


def _fitting(part: list[Atom], capacity: int, count: Count) -> list[str]:
    """The text of a part; in halves, or halves of them, if it is too long."""
    text = _text(part)
    if len(text) < 2 or count(text) <= capacity:
        return [text]
    if len(part) > 1:
        middle = len(part) // 2
        halves = [part[:middle], part[middle:]]
    else:
        halves = [[(half, 0)] for half in _halves(text)]
    return [piece for half in halves for piece in _fitting(half, capacity, count)]


def _text(part: list[Atom]) -> str:
    return "".join(piece for piece, _ in part)


def _atoms(text: str, capacity: int, count: Count, borders: Sequence[str]) -> list[Atom]:
    """Cut `text` into pieces that each fit, with their sizes: paragraphs, and smaller pieces where one is too long."""
    n_tokens = count(text)
    if n_tokens <= capacity or len(text) < 2:
        return [(text, n_tokens)]
    pieces = _cut_at(text, borders[0]) if borders else _halves(text)
    return [atom for piece in pieces for atom in _atoms(piece, capacity, count, borders[1:])]


def _halves(text: str) -> list[str]:
    middle = len(text) // 2
    border = re.compile(r"\s+").search(text, middle)
    place = border.end() if border and border.end() < len(text) else middle
    return [text[:place], text[place:]]


def _cut_at(text: str, border: str) -> list[str]:
    """Cut after each match of `border`, which stays at the end of its piece."""
    places = [0, *(match.end() for match in re.finditer(border, text)), len(text)]
    return [text[a:b] for a, b in pairwise(places) if a < b]
