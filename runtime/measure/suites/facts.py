"""Facts hidden in books that must be put together (after BABILong, arXiv 2406.10149), in stories of our own."""

from __future__ import annotations

import random

from .haystacks import Essays, hide
from .pen import Pen
from .question import Ask, Body, Place, Question, about_one_body
from .words import listed

PEOPLE = listed("Agnes Boris Clara Dmitri Elsa Farid Greta Hamid Ingrid Jorge Keiko Lukas")
THINGS = listed("ladder violin teapot compass blanket hammer mirror basket telescope candle trumpet suitcase")
PLACES = listed(
    """attic bakery cellar chapel courtyard dairy forge gallery garage greenhouse hayloft kitchen laundry library
lighthouse nursery observatory orchard pantry stable studio theatre vineyard workshop"""
)

LEAD = (
    "The text below comes from books. In between, it also tells where some people go and what they carry; whoever picks"
    " up a thing keeps it. Read it with care: I will ask where a thing is."
)

MOST = len(PEOPLE)
"""Most stories in one text."""


def two_facts(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """Where a thing is: who has it, and where they went. `count` people have a thing each."""
    stories = _stories(rng, count)
    told = [[_taken(who, what), _gone(who, there)] for who, what, there, _ in stories]
    asks = [
        Ask(f"Where is the {what} in the end?", f"In the end, the {what} is in the", there, (there,))
        for _, what, there, _ in stories
    ]
    return _questions(pen, essays, place, rng, told, asks)


def three_facts(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """Where a thing was before: who has it, where they went, and where from. `count` people have a thing each."""
    stories = _stories(rng, count)
    told = [[_taken(who, what), _gone(who, first), _gone(who, then)] for who, what, then, first in stories]
    asks = [
        Ask(
            f"Where was the {what} before it came to the {then}?",
            f"Before it came to the {then}, the {what} was in the",
            first,
            (first,),
        )
        for _, what, then, first in stories
    ]
    return _questions(pen, essays, place, rng, told, asks)


def _stories(rng: random.Random, count: int) -> list[tuple[str, str, str, str]]:
    """Who, what, and two places, all of them different in each story."""
    count = min(count, MOST)
    places = rng.sample(PLACES, 2 * count)
    return list(zip(rng.sample(PEOPLE, count), rng.sample(THINGS, count), places[::2], places[1::2], strict=True))


def _taken(who: str, what: str) -> str:
    return f"{who} picked up the {what}."


def _gone(who: str, where: str) -> str:
    return f"{who} went to the {where}."


def _questions(
    pen: Pen, essays: Essays, place: Place, rng: random.Random, told: list[list[str]], asks: list[Ask]
) -> list[Question]:
    needles: list[tuple[float, list[int]]] = []
    for story in told:
        needles += zip(sorted(rng.random() for _ in story), map(pen.after, story), strict=True)
    needles.sort(key=lambda needle: needle[0])

    def body_of(room: int) -> Body:
        return hide(place, essays.sentences(rng, room), needles, room)

    return about_one_body(pen, place, LEAD, asks, body_of)
