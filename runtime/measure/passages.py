"""What a schedule is judged by: stretches of real text, and the tokens in them whose prediction counts.

A `Passage` is one stretch of a text, as long as the context it is for, with the positions that are scored and how much
each counts. What counts is an objective: `tail`, the tokens past the original context; `all`; `needle`, the digits of a
pass key hidden in the text and asked for at its end, whose prediction needs what stands far back (after LongRoPE2,
arXiv 2502.20082, section 3.2); or several of them, weighted: ``tail+0.5*needle``.
"""

from __future__ import annotations

import hashlib
import math
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UserError
from .passkey import plant_key

if TYPE_CHECKING:
    from ..llama import Llama

OBJECTIVES = ("tail", "all", "needle")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where keys are hidden, as a share of the text before them; one a passage, in turn."""


@dataclass(frozen=True)
class Text:
    """A text to cut passages from, and its name for messages."""

    name: str
    text: str


@dataclass(frozen=True)
class ObjectivePart:
    """One of the things that count in a passage: its share of the whole, and weights of the passage's targets.

    The weights add up to 1; the passage's own are the parts' weights, each times its share, added.
    """

    kind: str
    share: float
    weights: tuple[float, ...]

    def within(self, first: int) -> ObjectivePart:
        """The same for the targets from the `first` on; all 0 if nothing of it is there."""
        kept = self.weights[first:]
        total = math.fsum(kept) or 1.0
        return ObjectivePart(self.kind, self.share, tuple(weight / total for weight in kept))


@dataclass(frozen=True)
class Passage:
    """One stretch of text and what is scored in it.

    `targets` are rising positions in `tokens`, at least 1; `weights`, one each, add up to 1. `parts` says what they are
    made up of.
    """

    name: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    weights: tuple[float, ...]
    parts: tuple[ObjectivePart, ...] = ()

    def last(self, window: int) -> Passage:
        """The same text, scored within its last `window` tokens but the first; each part keeps its share.

        Raises:
            UserError: nothing is scored there.
        """
        first = bisect_right(self.targets, len(self.tokens) - window)
        parts = [part.within(first) for part in self.parts or (ObjectivePart("all", 1.0, self.weights),)]
        parts = [part for part in parts if any(part.weights)]
        if not parts:
            raise UserError(f"{self.name}: nothing to predict in its last {window} tokens")
        shares = np.array([part.share for part in parts])
        weights = shares / shares.sum() @ [part.weights for part in parts]
        return Passage(self.name, self.tokens, self.targets[first:], tuple(weights.tolist()), tuple(parts))


def parse_objective(name: str) -> dict[str, float]:
    """Weights by the name of what counts, adding up to 1, from ``tail``, ``tail+0.5*needle``, …

    Raises:
        UserError: it is not of that form.
    """
    weights: dict[str, float] = {}
    for part in name.split("+"):
        factor, _, kind = part.strip().rpartition("*")
        try:
            weight = float(factor) if factor else 1.0
        except ValueError:
            weight = math.nan
        if kind.strip() not in OBJECTIVES or not 0 < weight < math.inf or kind.strip() in weights:
            raise UserError(f"objective: {name!r}, expected {', '.join(OBJECTIVES)}, or a mix like tail+0.5*needle")
        weights[kind.strip()] = weight
    total = sum(weights.values())
    return {kind: weight / total for kind, weight in weights.items()}


def make_passages(
    llm: Llama, texts: Sequence[Text], context: int, count: int, objective: str, original_context: int, seed: int = 0
) -> tuple[Passage, ...]:
    """Cut `count` stretches of `context` tokens from the texts (see `cut`), and say what is scored in them.

    Args:
        llm: its vocabulary is used, nothing else (`vocab_only` will do).
        original_context: `tail` scores tokens from this position on.
        seed: draws the keys.

    Raises:
        UserError: texts too short (says how much is missing), or an objective that cannot be scored in that context.
    """
    parts = parse_objective(objective)
    if "tail" in parts and context <= original_context:
        raise UserError(
            f"objective tail: a context of {context:,} tokens has none past the original {original_context:,}"
        )
    rng = random.Random(seed)
    passages: list[Passage] = []
    begin = llm.tokenize(b"", add_bos=True)
    for name, words in cut(llm, texts, context - len(begin), count):
        key, depth = str(rng.randrange(10_000, 100_000)), DEPTHS[len(passages) % len(DEPTHS)]
        passages.append(_passage(llm, name, words, parts, original_context, key, depth))
    return tuple(passages)


def digest(passages: Sequence[Passage]) -> str:
    """A short name for texts and targets: equal if and only if all of them are."""
    return hashlib.sha256(repr([(p.tokens, p.targets, p.weights) for p in passages]).encode()).hexdigest()[:16]


def split_texts(texts: Sequence[Text], seed: int = 0) -> tuple[list[Text], list[Text]]:
    """Texts to search on and texts to judge by that the search never sees: a third, at least one.

    A single text is cut in two at a paragraph near its middle.
    """
    if len(texts) == 1:
        text = texts[0].text
        cut = text.rfind("\n\n", 0, len(text) // 2)
        cut = cut if cut > len(text) // 4 else len(text) // 2
        name = texts[0].name
        return [Text(f"{name}, first half", text[:cut])], [Text(f"{name}, second half", text[cut:])]
    order = list(texts)
    random.Random(seed).shuffle(order)
    held = max(1, len(order) // 3)
    return order[held:], order[:held]


def cut(llm: Llama, texts: Sequence[Text], length: int, count: int) -> Iterator[tuple[str, list[int]]]:
    """`count` stretches of `length` tokens with their names, spread evenly over each text.

    Texts give as many each, as far as they hold so many: the shorter ones give what they have.

    Raises:
        UserError: they do not hold so many; says how much is missing.
    """
    tokenised = [llm.tokenize(text.text.encode(), add_bos=False) for text in texts]
    for text, words, share in zip(texts, tokenised, _shares(texts, tokenised, length, count), strict=True):
        gap = (len(words) - length * share) // max(share, 1)
        for j in range(share):
            name = text.name if share == 1 else f"{text.name} ({j + 1} of {share})"
            yield name, words[j * (length + gap) : j * (length + gap) + length]


def _shares(texts: Sequence[Text], tokenised: Sequence[list[int]], length: int, count: int) -> list[int]:
    """How many of `count` stretches each text gives."""
    room = [len(words) // length for words in tokenised]
    if sum(room) < count:
        at = max(range(len(texts)), key=lambda i: len(tokenised[i]))
        name = texts[at].name if len(texts) == 1 else f"{len(texts)} texts, the longest {texts[at].name}"
        missing = length * (count - sum(room)) - max(len(words) % length for words in tokenised)
        stretches = "1 stretch" if count == 1 else f"{count} stretches"
        raise UserError(f"{name}: {len(tokenised[at]):,} tokens, {missing:,} too few for {stretches} of {length:,}")
    shares = [0] * len(texts)
    for _ in range(count):
        shares[min((i for i in range(len(texts)) if shares[i] < room[i]), key=lambda i: shares[i])] += 1
    return shares


def _passage(
    llm: Llama,
    name: str,
    stretch: list[int],
    parts: dict[str, float],
    original_context: int,
    key: str,
    depth: float,
) -> Passage:
    begin = llm.tokenize(b"", add_bos=True)
    scored: dict[str, Sequence[int]] = {}
    tokens = [*begin, *stretch]
    end = len(tokens)
    if "needle" in parts:
        planted = plant_key(llm, stretch, key, depth)
        tokens = planted.tokens
        end = len(planted.text)
        scored["needle"] = range(len(tokens) - len(planted.digits), len(tokens))
    scored["all"] = range(1, end)
    scored["tail"] = range(original_context, end)
    weights, of_parts = np.zeros(len(tokens)), np.zeros((len(parts), len(tokens)))
    for (kind, share), of_part in zip(parts.items(), of_parts, strict=True):
        if not scored[kind]:
            raise UserError(f"{name}: {len(tokens):,} tokens leave nothing to score as {kind}")
        of_part[list(scored[kind])] = 1 / len(scored[kind])
        weights[list(scored[kind])] += share / len(scored[kind])
    targets = np.flatnonzero(weights)
    return Passage(
        name,
        tuple(tokens),
        tuple(targets.tolist()),
        tuple(weights[targets].tolist()),
        tuple(
            ObjectivePart(kind, share, tuple(of_part[targets].tolist()))
            for (kind, share), of_part in zip(parts.items(), of_parts, strict=True)
        ),
    )
