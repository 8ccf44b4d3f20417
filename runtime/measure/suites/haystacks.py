"""What needles are hidden in: sentences of real texts, or the same few sentences again and again."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, cycle, islice

from ....errors import UserError
from ..passages import Text
from .pen import Pen
from .question import Body, Place

NOISE = (
    "The lake is still.",
    "The clouds drift by.",
    "The path is long.",
    "On it goes over the hill.",
    "And down again on the other side.",
)

SENTENCE_END = re.compile(r"(?<=[.!?])[\s]+|\n\s*\n")

Sentences = list[list[int]]
"""The tokens of each sentence."""


class Essays:
    """Sentences of texts, as a model's tokens; those of each are made when they are first needed."""

    def __init__(self, pen: Pen, texts: Sequence[Text]) -> None:
        self._pen = pen
        self._sentences = [sentence for text in texts for sentence in _sentences(text.text)]
        self._tokens: dict[int, list[int]] = {}

    def sentences(self, rng: random.Random, n_tokens: int) -> Sentences:
        """Consecutive sentences of at least `n_tokens` tokens in all, from a random one on; after the last, the first.

        Raises:
            UserError: all texts together have fewer.
        """
        total, first, found = 0, rng.randrange(max(1, len(self._sentences))), Sentences()
        for i in range(len(self._sentences)):
            if total >= n_tokens:
                return found
            found.append(self._of((first + i) % len(self._sentences)))
            total += len(found[-1])
        if total < n_tokens:
            raise UserError(f"the texts have {total:,} tokens, too few for a haystack of {n_tokens:,}")
        return found

    def _of(self, index: int) -> list[int]:
        if index not in self._tokens:
            self._tokens[index] = self._pen.after(self._sentences[index])
        return self._tokens[index]


def _sentences(text: str) -> Iterator[str]:
    for sentence in SENTENCE_END.split(text):
        if words := sentence.split():
            yield " ".join(words)


def noise(pen: Pen, n_tokens: int) -> Sentences:
    """`NOISE` again and again, at least `n_tokens` tokens."""
    once = [pen.after(sentence) for sentence in NOISE]
    return list(islice(cycle(once), len(once) * (1 + max(0, n_tokens) // sum(map(len, once)))))


def padding(pen: Pen, n_tokens: int) -> list[int]:
    """Exactly so many tokens of `NOISE`."""
    return [token for sentence in noise(pen, n_tokens) for token in sentence][:n_tokens]


def hide(place: Place, sentences: Sentences, needles: Sequence[tuple[float, list[int]]], room: int) -> Body:
    """Put needles between sentences, each as near as can be to its depth; exactly `room` tokens in all.

    The last sentence is cut off where the room ends.

    Args:
        needles: depths (0 to 1), rising, and tokens.

    Raises:
        UserError: the needles take all the room.
    """
    fill = room - sum(len(tokens) for _, tokens in needles)
    if fill < 1:
        raise place.too_short(1 - fill)
    text, ends = flat(sentences, fill)
    body, starts, done = [], [], 0
    for depth, tokens in needles:
        at = nearest(ends, depth * fill)
        body += text[done:at]
        starts.append(len(body))
        body += tokens
        done = at
    return Body([*body, *text[done:]], starts)


def flat(sentences: Sentences, n_tokens: int) -> tuple[list[int], list[int]]:
    """The first `n_tokens` tokens of sentences, and the positions between sentences there, both ends among them."""
    text = [token for sentence in sentences for token in sentence][:n_tokens]
    ends = [0, *(end for end in accumulate(map(len, sentences)) if end < n_tokens), n_tokens]
    return text, ends


def nearest(ends: Sequence[int], wanted: float) -> int:
    """That of the rising positions which is nearest to the wanted one."""
    i = bisect_left(ends, wanted)
    return min(ends[max(0, i - 1) : i + 1], key=lambda end: abs(end - wanted))
