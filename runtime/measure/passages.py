"""What schedules are scored on: passages of real text, and the tokens in them whose prediction counts.

A `Passage` is as long as the context that it is for, and has the positions that are scored and their weights. The
objective says what is scored: `tail`, the tokens past the original context; `all`; `needle`, the digits of a pass key
hidden in the text and asked for at its end, whose prediction depends on text far back (after LongRoPE2, arXiv
2502.20082, section 3.2); or a weighted mix of them: ``tail+0.5*needle``.
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
"""Where keys are hidden, as a share of the text; one depth per passage, in turn."""


@dataclass(frozen=True)
class Text:
    """A text to cut passages from, and its name in messages."""

    name: str
    text: str


@dataclass(frozen=True)
class ObjectivePart:
    """One part of an objective in a passage: its share of the whole, and its weights of the passage's targets.

    The weights add up to 1; the passage's own weights are the sum of its parts', each times its share.
    """

    kind: str
    share: float
    weights: tuple[float, ...]

    def within(self, first: int) -> ObjectivePart:
        """The same part for the targets from the `first` on; all weights are 0 if it has none there."""
        kept = self.weights[first:]
        total = math.fsum(kept) or 1.0
        return ObjectivePart(self.kind, self.share, tuple(weight / total for weight in kept))


@dataclass(frozen=True)
class Passage:
    """A piece of text, and what is scored in it.

    `targets` are rising positions in `tokens`, at least 1; `weights`, one for each, add up to 1. `parts` says what the
    weights are the sum of.
    """

    name: str
    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    weights: tuple[float, ...]
    parts: tuple[ObjectivePart, ...] = ()

    def last(self, window: int) -> Passage:
        """The same text, scored only in its last `window` tokens except their first; each part keeps its share.

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
    """Parse ``tail``, ``tail+0.5*needle``, … into weights by name, which add up to 1.

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
    """Cut `count` passages of `context` tokens from the texts (see `cut`), and set what is scored in them.

    Args:
        llm: only its vocabulary is used (`vocab_only` is enough).
        original_context: `tail` scores tokens from this position on.
        seed: for the keys.

    Raises:
        UserError: texts too short (with how much is missing), or an objective that cannot be scored in that context.
    """
    parts = parse_objective(objective)
    if "tail" in parts and context <= original_context:
        raise UserError(
            f"objective tail: a context of {context:,} tokens has none past the original {original_context:,}"
        )
    rng = random.Random(seed)
    passages: list[Passage] = []
    n_bos = len(llm.tokenize(b"", add_bos=True))
    for name, tokens in cut(llm, texts, context - n_bos, count):
        key, depth = str(rng.randrange(10_000, 100_000)), DEPTHS[len(passages) % len(DEPTHS)]
        passages.append(_passage(llm, name, tokens, parts, original_context, key, depth))
    return tuple(passages)


def digest(passages: Sequence[Passage]) -> str:
    """A digest of texts, targets and weights: equal if and only if all of them are."""
    return hashlib.sha256(repr([(p.tokens, p.targets, p.weights) for p in passages]).encode()).hexdigest()[:16]


def split_texts(texts: Sequence[Text], seed: int = 0) -> tuple[list[Text], list[Text]]:
    """Split into texts to search on and held-out texts to judge by: a third, but at least one.

    A single text is cut in two at a paragraph break near its middle.
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
    """Yield `count` pieces of `length` tokens with their names, spread evenly over each text.

    Each text gives the same number, or as many as it holds if that is fewer.

    Raises:
        UserError: the texts are too short; says how much is missing.
    """
    tokenised = [llm.tokenize(text.text.encode(), add_bos=False) for text in texts]
    for text, tokens, share in zip(texts, tokenised, _shares(texts, tokenised, length, count), strict=True):
        gap = (len(tokens) - length * share) // max(share, 1)
        for j in range(share):
            name = text.name if share == 1 else f"{text.name} ({j + 1} of {share})"
            yield name, tokens[j * (length + gap) : j * (length + gap) + length]


def _shares(texts: Sequence[Text], tokenised: Sequence[list[int]], length: int, count: int) -> list[int]:
    """How many of `count` passages each text gives."""
    room = [len(tokens) // length for tokens in tokenised]
    if sum(room) < count:
        longest = max(range(len(texts)), key=lambda i: len(tokenised[i]))
        name = texts[longest].name if len(texts) == 1 else f"{len(texts)} texts, the longest {texts[longest].name}"
        missing = length * (count - sum(room)) - max(len(tokens) % length for tokens in tokenised)
        wanted = "1 passage" if count == 1 else f"{count} passages"
        raise UserError(f"{name}: {len(tokenised[longest]):,} tokens, {missing:,} too few for {wanted} of {length:,}")
    shares = [0] * len(texts)
    for _ in range(count):
        shares[min((i for i in range(len(texts)) if shares[i] < room[i]), key=lambda i: shares[i])] += 1
    return shares


def _passage(
    llm: Llama,
    name: str,
    text: list[int],
    parts: dict[str, float],
    original_context: int,
    key: str,
    depth: float,
) -> Passage:
    bos = llm.tokenize(b"", add_bos=True)
    scored: dict[str, Sequence[int]] = {}
    tokens = [*bos, *text]
    end = len(tokens)
    if "needle" in parts:
        planted = plant_key(llm, text, key, depth)
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
