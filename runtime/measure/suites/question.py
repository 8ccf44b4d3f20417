"""Questions about a long text: prompts of an exact number of tokens, with what is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ....errors import UserError
from .pen import Pen

SPARE_TOKENS = 16
"""Room that an answer has beyond the tokens of the right one."""


@dataclass(frozen=True)
class Question:
    """One question about one long text, its haystack.

    Attributes:
        length: tokens that the prompt and the longest answer to it take together, at most.
        haystack: the haystack's number, in the same task and length.
        depth: where in the haystack (0 to 1) the answer stands; None where it stands in many places.
        prompt: all tokens up to the answer, whose opening is the prompt's end.
        cuts: rising positions in the prompt at which reading pauses, so that questions that share what is before a cut
            find it in the cache, read in the same batches.
        answer: the tokens of the right answer; its loss is that of these.
        references: texts that the answer should have: each counts the same, or with `any_of` one is enough.
    """

    task: str
    length: int
    haystack: int
    depth: float | None
    prompt: tuple[int, ...]
    cuts: tuple[int, ...]
    answer: tuple[int, ...]
    references: tuple[str, ...]
    any_of: bool = False

    @property
    def max_tokens(self) -> int:
        """The most tokens of an answer."""
        return len(self.answer) + SPARE_TOKENS


@dataclass(frozen=True)
class Ask:
    """A question in words: what is asked, how the answer begins, and how it goes on if it is right.

    `needle` is the number of the needle in the haystack that says so; None = no single one does.
    """

    question: str
    opening: str
    answer: str
    references: tuple[str, ...]
    needle: int | None = None
    any_of: bool = False


@dataclass(frozen=True)
class Body:
    """A haystack's tokens, and where its needles start."""

    tokens: list[int]
    starts: list[int]


@dataclass(frozen=True)
class Place:
    """Which haystack: its task, its length in tokens, and its number."""

    task: str
    length: int
    haystack: int

    def too_short(self, missing: int) -> UserError:
        """The error of a length that lacks `missing` tokens."""
        return UserError(
            f"{self.task}: {self.length:,} tokens are too few, expected at least {self.length + missing:,}"
        )


def about_one_body(
    pen: Pen, place: Place, lead: str, asks: Sequence[Ask], body_of: Callable[[int], Body]
) -> list[Question]:
    """Questions that share a haystack, which is in the cache when the second is asked.

    Args:
        lead: what is said before the haystack.
        body_of: makes the haystack of exactly so many tokens.

    Raises:
        UserError: the length is too short.
    """
    start = [*pen.head, *pen.tokens(lead + "\n\n")]
    endings = [ending(pen, ask) for ask in asks]
    room = place.length - len(start) - max(len(end) + len(answer) + SPARE_TOKENS for end, answer in endings)
    body = body_of(room)
    if len(body.tokens) != room:
        raise RuntimeError(f"{place.task}: a haystack of {len(body.tokens)} tokens, expected {room}")
    return [
        Question(
            place.task,
            place.length,
            place.haystack,
            None if ask.needle is None else body.starts[ask.needle] / room,
            (*start, *body.tokens, *end),
            (len(start) + room,),
            tuple(answer),
            ask.references,
            ask.any_of,
        )
        for ask, (end, answer) in zip(asks, endings, strict=True)
    ]


def ending(pen: Pen, ask: Ask) -> tuple[list[int], list[int]]:
    """The tokens from the haystack's end to the answer's opening, and those of the answer."""
    opening, answer = pen.answer(ask.opening, ask.answer)
    return [*pen.tokens("\n\n" + ask.question), *pen.tail, *opening], answer
