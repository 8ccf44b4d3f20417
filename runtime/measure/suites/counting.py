"""RULER's two tasks of counting (arXiv 2404.06654, section 3): the words that are most common in a list or a text."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache

from .haystacks import Essays, padding
from .pen import Pen
from .question import Ask, Body, Place, Question, about_one_body
from .words import coded_words, plain_words

COMMON, COMMON_TIMES, RARE_TIMES = 10, 30, 3
"""How many words are common, how often each of them is in the list, and each of the others."""

ALPHA = 2.0
"""The k-th most frequent word has a share of k to the power of -ALPHA (Zipf's law)."""

TOKENS_A_WORD_OF_VOCABULARY = 50

FREQUENT, FEWEST = 3, 90
"""How many frequent words are asked for, and the fewest words among which they stand out."""


def common_words(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """A numbered list, in which ten words are far more common than all others."""
    words = plain_words(rng, COMMON + place.length // RARE_TIMES // 3)
    common, rare = words[:COMMON], words[COMMON:]

    after = cache(pen.after)  # a word's tokens are needed again and again

    def listed(n: int) -> list[int]:
        items = [*common * COMMON_TIMES, *rare[:n] * RARE_TIMES]
        random.Random(n).shuffle(items)
        return [token for i, word in enumerate(items, 1) for part in (f"{i}.", word) for token in after(part)]

    ask = Ask(
        "Which ten words are the most common in the list above?",
        "The ten most common words in the list are",
        ", ".join(common),
        tuple(common),
    )
    lead = "Below is a numbered list in which some words are more common than others. Keep them in mind."
    return about_one_body(pen, place, lead, [ask], lambda room: _filled(pen, place, listed, 0, len(rare), room))


def frequent_words(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """Invented words, the k-th with a share of 1/k²; the first is an ellipsis, the next three are asked for."""
    words = ["...", *coded_words(rng, max(FREQUENT, place.length // TOKENS_A_WORD_OF_VOCABULARY))]
    norm = sum(k**-ALPHA for k in range(1, len(words) + 1))

    after = cache(pen.after)

    def written(n: int) -> list[int]:
        items = [word for k, word in enumerate(words, 1) for _ in range(round(n * k**-ALPHA / norm))]
        random.Random(n).shuffle(items)
        return [token for word in items for token in after(word)]

    asked = tuple(words[1 : 1 + FREQUENT])
    ask = Ask(
        "Apart from the dots, which three invented words are the most frequent in the text above?",
        "The three most frequent words are",
        ", ".join(asked),
        asked,
    )
    lead = "Below is a text of invented words. Mind how often each of them appears."
    return about_one_body(
        pen, place, lead, [ask], lambda room: _filled(pen, place, written, FEWEST, FEWEST + place.length, room)
    )


def _filled(pen: Pen, place: Place, make: Callable[[int], list[int]], least: int, most: int, room: int) -> Body:
    """The longest that `make` makes of a number of words and that fits, after as much noise as fills the room.

    Raises:
        UserError: what it makes of the `least` number does not fit.
    """
    tokens = make(least)
    if len(tokens) > room:
        raise place.too_short(len(tokens) - room)
    low, high = least, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        made = make(middle)
        if len(made) <= room:
            low, tokens = middle, made
        else:
            high = middle
    return Body([*padding(pen, room - len(tokens)), *tokens], [])
