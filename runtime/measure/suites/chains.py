"""RULER's variable tracking (arXiv 2404.06654, section 3): which names hold a value, set to one another in a chain."""

from __future__ import annotations

import random
from itertools import pairwise

from .haystacks import Essays, hide, noise
from .pen import Pen
from .question import Ask, Body, Place, Question, about_one_body
from .words import coded_words, numbers

LEAD = "The text below also sets variables, to a number or to what another variable holds. Keep track of them."

HOPS = 4
"""How many variables are set to another one, in each chain."""


def variable_tracking(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """`count` chains in the same sentences again and again; all names of one are asked for."""
    names = [name.upper() for name in coded_words(rng, count * (HOPS + 1), length=5)]
    chains = [names[i::count] for i in range(count)]
    values = numbers(rng, count, digits=5)
    needles: list[tuple[float, list[int]]] = []
    for chain, value in zip(chains, values, strict=True):
        settings = [f"SET {chain[0]} = {value}."]
        settings += [f"SET {name} = {before}." for before, name in pairwise(chain)]
        where = sorted(rng.random() for _ in settings)
        needles += zip(where, map(pen.after, settings), strict=True)
    needles.sort(key=lambda needle: needle[0])

    def body_of(room: int) -> Body:
        return hide(place, noise(pen, room), needles, room)

    asks = [
        Ask(
            f"Which {HOPS + 1} variables hold the number {value} in the end?",
            f"The {HOPS + 1} variables that hold {value} are",
            ", ".join(chain),
            tuple(chain),
        )
        for chain, value in zip(chains, values, strict=True)
    ]
    return about_one_body(pen, place, LEAD, asks, body_of)
