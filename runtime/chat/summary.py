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
from typing import TYPE_CHECKING

from ...errors import UserError
from ...factors import Band
from ..prompt_cache import PromptCache
from .answer import Answer, Sampling
from .template import ChatTemplate, Message, count_tokens

if TYPE_CHECKING:
    from ..llama import Llama

PROMPT = "Summarise the text above in a few sentences."
MAX_TOKENS = 256
MIN_ROOM = 96  # tokens; with fewer, a text and its summary cannot both fit
ANY_DAY = date(2025, 1, 1)  # for templates that name the date: the summary is the same on any day
SPARE = 32  # tokens for the joins between texts that were counted separately

BORDERS = (r"\n[^\S\n]*\n\s*", r"\n", r"(?<=[.!?…])\s+|(?<=[。！？])")
"""Where a text may be cut, best first: paragraphs, lines, sentences. The last resort is to halve it, between words."""

Count = Callable[[str], int]


class EmptySummary(UserError):
    """The model generated no text."""


@dataclass(frozen=True)
class SummarySettings:
    """What a summary depends on besides the text and the model. `seed` matters only above temperature 0."""

    prompt: str = PROMPT
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Summary:
    """A text's summary: its `n_tokens` were read in `parts`, and `band` is the longest band used."""

    text: str
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
            EmptySummary: the model ended its answer at once.
        """
        capacity = self._room - self._part_budget
        parts = split(text, capacity, lambda piece: count_tokens(self._llm, piece))
        sizes = [count_tokens(self._llm, part) for part in parts]
        totals = _Totals()
        last = len(parts) == 1
        texts = []
        for i, part in enumerate(parts):
            report = _reporter(on_progress, sum(sizes[:i]), sum(sizes))
            texts.append(self._answer(part, last, totals, report))
        while not last:
            texts = [text for text in texts if text]  # the summary of a part may be empty
            groups = self._groups(texts, capacity)
            last = len(groups) <= 1
            texts = [self._answer(group, last, totals, None, is_document=False) for group in groups] or [""]
        if not texts[0]:
            raise EmptySummary("the model wrote no summary")
        return Summary(
            text=texts[0],
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
        return _whole_sentences(answer.text.strip()) if answer.ending == "length" else answer.text.strip()

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
            if groups and (len(groups[-1]) < 2 or count_tokens(self._llm, joined) <= capacity):
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

    def add(self, answer: Answer, band_index: int) -> None:
        self.band_index = max(self.band_index, band_index)
        self.read_tokens += answer.read_tokens
        self.written_tokens += answer.written_tokens
        self.read_s += answer.read_s
        self.write_s += answer.write_s


def _reporter(
    on_progress: Callable[[int, int], None] | None, before: int, total: int
) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, _: on_progress(min(before + done, total), total)


def _whole_sentences(text: str) -> str:
    """Drop a last sentence that was cut off, unless it is most of the text."""
    ends = [match.end() for match in re.finditer(r"[.!?…。！？][\"'”’)]*(?=\s|$)", text)]
    return text[: ends[-1]] if ends and ends[-1] > len(text) // 2 else text


def split(text: str, capacity: int, count: Count) -> list[str]:
    """Cut `text` into parts of at most `capacity` tokens and similar size; joined, they are the text."""
    if count(text) <= capacity:
        return [text]
    atoms = _atoms(text, capacity, count, BORDERS)
    total = sum(size for _, size in atoms)
    target = total / math.ceil(total / capacity)
    parts: list[list[str]] = [[]]
    size, done = 0, 0
    for atom, n_tokens in atoms:
        if parts[-1] and (size + n_tokens > capacity or done + n_tokens / 2 > target * len(parts)):
            parts.append([])
            size = 0
        parts[-1].append(atom)
        size += n_tokens
        done += n_tokens
    return ["".join(part) for part in parts]


def _atoms(text: str, capacity: int, count: Count, borders: Sequence[str]) -> list[tuple[str, int]]:
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
