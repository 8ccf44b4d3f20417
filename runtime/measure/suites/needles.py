"""RULER's eight tasks of needles in a haystack (arXiv 2404.06654, section 3), in words of our own.

A needle gives a key and its number (or identifier), and the question gives the key. What differs is the haystack (the
same sentences again and again, real texts, or other needles), how many keys there are, and how many are asked for.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from .haystacks import Essays, flat, hide, nearest, noise, padding
from .pen import Pen
from .question import SPARE_TOKENS, Ask, Body, Place, Question, about_one_body, ending
from .words import keys, numbers, uuids

Haystack = Literal["noise", "essay", "needles"]

LEAD = "The text below also gives the registry {values} of some things. Read it with care: I will ask for one of them."

SEVERAL = 4
"""How many keys or values RULER's tasks of several have."""


@dataclass(frozen=True)
class Needles:
    """What a task's needles look like, and what they are hidden in."""

    haystack: Haystack
    key: Callable[[random.Random, int], list[str]] = keys
    value: Callable[[random.Random, int], list[str]] = numbers

    @property
    def noun(self) -> str:
        return "number" if self.value is numbers else "mark"

    def sentence(self, key: str, value: str) -> str:
        return f"The registry {self.noun} of {key} is {value}."

    @property
    def lead(self) -> str:
        return LEAD.format(values=self.noun + "s")

    def ask(self, key: str, value: str, needle: int) -> Ask:
        return Ask(
            f"Which registry {self.noun} does the text give for {key}?",
            f"The registry {self.noun} of {key} is",
            value,
            (value,),
            needle,
        )


GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples are spread evenly over the numbers from 0 to 1, however many of them there are."""


def depths(place: Place, count: int) -> list[float]:
    """So many depths, spread evenly over the haystack; others in the next haystack."""
    return [(i + (0.5 + place.haystack * GOLDEN) % 1) / count for i in range(count)]


def single(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int, kind: Needles) -> list[Question]:
    """One needle in a haystack, at each of `count` depths in turn: a haystack of its own each, but the text is shared.

    The deepest comes first: the text before the next needle is then in the cache.
    """
    start = [*pen.head, *pen.tokens(kind.lead + "\n\n")]
    pairs = list(zip(kind.key(rng, count), kind.value(rng, count), strict=True))
    asks = [kind.ask(*pair, 0) for pair in pairs]
    needles = [pen.after(kind.sentence(*pair)) for pair in pairs]
    endings = [ending(pen, ask) for ask in asks]
    fills = [
        place.length - len(start) - len(needle) - len(end) - len(answer) - SPARE_TOKENS
        for needle, (end, answer) in zip(needles, endings, strict=True)
    ]
    if min(fills) < 1:
        raise place.too_short(1 - min(fills))
    sentences = noise(pen, max(fills)) if kind.haystack == "noise" else essays.sentences(rng, max(fills))
    text, _ = flat(sentences, max(fills))
    _, ends = flat(sentences, min(fills))
    places = [nearest(ends, depth * min(fills)) for depth in depths(place, count)]
    cuts = [len(start) + at for at in places]
    questions = []
    for i in reversed(range(count)):
        body = [*text[: places[i]], *needles[i], *text[places[i] : fills[i]]]
        end, answer = endings[i]
        questions.append(
            Question(
                place.task,
                place.length,
                place.haystack,
                places[i] / len(body),
                (*start, *body, *end),
                tuple(sorted(set(cuts[: i + 1]))),
                tuple(answer),
                asks[i].references,
            )
        )
    return questions


def among_needles(
    pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int, kind: Needles
) -> list[Question]:
    """Nothing but needles; `count` of them, spread over the haystack, are asked for."""
    one = pen.after(kind.sentence(kind.key(rng, 1)[0], kind.value(rng, 1)[0]))
    most = count + 2 * place.length // len(one)
    pairs = list(zip(kind.key(rng, most), kind.value(rng, most), strict=True))
    lines = [pen.after(kind.sentence(*pair)) for pair in pairs]
    ends = list(accumulate(map(len, lines)))
    # Which needles fit depends on how long the questions about them are; one less is safe, as they differ by little.
    longest = max(sum(map(len, ending(pen, kind.ask(*pair, 0)))) for pair in pairs[: 2 * count])
    room = place.length - len(pen.head) - len(pen.tokens(kind.lead + "\n\n")) - longest - SPARE_TOKENS
    there = bisect_right(ends, room - len(one))
    if there < count:
        raise place.too_short(ends[count - 1] + len(one) - room)
    asked = [int(depth * there) for depth in depths(place, count)]

    def body_of(room: int) -> Body:
        fit = bisect_right(ends, room)
        lead = padding(pen, room - ends[fit - 1])
        starts = [len(lead) + end - len(line) for end, line in zip(ends[:fit], lines, strict=False)]
        return Body([*lead, *(token for line in lines[:fit] for token in line)], starts)

    return about_one_body(pen, place, kind.lead, [kind.ask(*pairs[i], i) for i in asked], body_of)


def several_keys(
    pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int, kind: Needles
) -> list[Question]:
    """Four keys in a text; any of them is asked for, so up to four questions share a haystack."""
    pairs = list(zip(kind.key(rng, SEVERAL), kind.value(rng, SEVERAL), strict=True))
    needles = list(zip(_spread(rng, SEVERAL), (pen.after(kind.sentence(*pair)) for pair in pairs), strict=True))

    def body_of(room: int) -> Body:
        return hide(place, essays.sentences(rng, room), needles, room)

    asks = [kind.ask(*pairs[i], i) for i in rng.sample(range(SEVERAL), min(count, SEVERAL))]
    return about_one_body(pen, place, kind.lead, asks, body_of)


def several_values(
    pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int, kind: Needles
) -> list[Question]:
    """Four numbers for the same key, all of which are asked for; each of `count` keys has four."""
    names = kind.key(rng, count)
    values = kind.value(rng, SEVERAL * count)
    order = [i for i in range(count) for _ in range(SEVERAL)]
    rng.shuffle(order)
    lines, of_key = [], {i: iter(values[i * SEVERAL :]) for i in range(count)}
    said: dict[int, list[str]] = {i: [] for i in range(count)}
    for i in order:
        said[i].append(next(of_key[i]))
        lines.append(pen.after(kind.sentence(names[i], said[i][-1])))
    needles = list(zip(_spread(rng, len(lines)), lines, strict=True))

    def body_of(room: int) -> Body:
        return hide(place, essays.sentences(rng, room), needles, room)

    asks = [
        Ask(
            f"Which four registry {kind.noun}s does the text give for {names[i]}?",
            f"The four registry {kind.noun}s of {names[i]} are",
            ", ".join(said[i]),
            tuple(said[i]),
        )
        for i in range(count)
    ]
    return about_one_body(pen, place, kind.lead, asks, body_of)


def several_queries(
    pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int, kind: Needles
) -> list[Question]:
    """Four keys with a number each, all of which are asked for; `count` questions have four keys each."""
    pairs = list(zip(kind.key(rng, SEVERAL * count), kind.value(rng, SEVERAL * count), strict=True))
    needles = list(zip(_spread(rng, len(pairs)), (pen.after(kind.sentence(*pair)) for pair in pairs), strict=True))

    def body_of(room: int) -> Body:
        return hide(place, essays.sentences(rng, room), needles, room)

    asks = []
    for i in range(count):
        four = pairs[i::count]
        names = ", ".join(key for key, _ in four[:-1]) + f" and {four[-1][0]}"
        values = tuple(value for _, value in four)
        asks.append(
            Ask(
                f"Which registry {kind.noun}s does the text give for {names}?",
                f"The registry {kind.noun}s of {names} are, in this order,",
                ", ".join(values),
                values,
            )
        )
    return about_one_body(pen, place, kind.lead, asks, body_of)


def _spread(rng: random.Random, count: int) -> list[float]:
    """Rising depths, one at random in each of `count` equal parts."""
    return [(i + rng.random()) / count for i in range(count)]


NOISE_NUMBER, ESSAY_NUMBER = Needles("noise"), Needles("essay")
ESSAY_MARK = Needles("essay", value=uuids)
AMONG_NUMBERS, AMONG_MARKS = Needles("needles"), Needles("needles", key=uuids, value=uuids)
