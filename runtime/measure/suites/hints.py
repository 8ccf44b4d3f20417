"""Needles that share no word with the question about them (after NoLiMa, arXiv 2502.05167), in words of our own.

What connects both is known to the model alone: the needle names a sight, the question a country.
"""

from __future__ import annotations

import random

from .haystacks import Essays, hide
from .needles import depths
from .pen import Pen
from .question import Ask, Body, Place, Question, about_one_body
from .words import listed

SIGHTS = {
    "France": "Eiffel Tower",
    "Italy": "Colosseum",
    "Egypt": "Great Pyramid",
    "India": "Taj Mahal",
    "Greece": "Parthenon",
    "Germany": "Brandenburg Gate",
    "Russia": "Kremlin",
    "Spain": "Sagrada Familia",
    "Peru": "ruins of Machu Picchu",
    "Japan": "snow on Mount Fuji",
    "Australia": "Sydney Opera House",
    "Jordan": "rock tombs of Petra",
    "Cambodia": "temples of Angkor Wat",
    "Turkey": "dome of Hagia Sophia",
    "Switzerland": "Matterhorn",
    "Denmark": "statue of the Little Mermaid",
    "Ireland": "Cliffs of Moher",
    "Canada": "CN Tower",
    "Brazil": "statue of Christ the Redeemer",
    "Chile": "stone heads of Easter Island",
}

NAMES = listed(
    """Adela Benno Carla Doris Emil Fiona Gerda Horst Irma Jonas Karin Leo Mira Nils Olga Paula Ruben Selma Tilda
Viktor"""
)

LEAD = "The text below comes from books, with a few sentences of another kind in between. Read it with care."

MOST = len(SIGHTS)
"""Most needles in one text."""


def without_shared_words(pen: Pen, essays: Essays, place: Place, rng: random.Random, count: int) -> list[Question]:
    """`count` people see sights of different countries; each question asks for the one in a country."""
    count = min(count, MOST)
    countries, names = rng.sample(sorted(SIGHTS), count), rng.sample(NAMES, count)
    needles = [
        (depth, pen.after(needle(name, country)))
        for depth, name, country in zip(depths(place, count), names, countries, strict=True)
    ]

    def body_of(room: int) -> Body:
        return hide(place, essays.sentences(rng, room), needles, room)

    asks = [
        Ask(question(country), opening(country), name, (name,), i)
        for i, (name, country) in enumerate(zip(names, countries, strict=True))
    ]
    return about_one_body(pen, place, LEAD, asks, body_of)


def needle(name: str, country: str) -> str:
    return f"From a window, {name} looks at the {SIGHTS[country]}."


def question(country: str) -> str:
    return f"Which person must be in {country}?"


def opening(country: str) -> str:
    return f"Whoever must be in {country} has this name:"
