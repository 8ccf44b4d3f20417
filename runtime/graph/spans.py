"""How cached keys came to their band: which one each part of a sequence was read in, and its rotations since.

Both leave traces. Quantised keys lose a little with each rotation, and keys that were read in a long band depend on its
λ, whatever they are rotated to. So keys are read again that were rotated too often, and those that were read in a
longer band than the one that a sequence goes back to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...factors import Band

MOST_ROTATIONS = {"q8_0": 32, "q5_1": 8, "q5_0": 8, "q4_1": 4, "q4_0": 8, "iq4_nl": 4}
"""Rotations after which keys of a type are read again; there are two in a move to another band and back.

Each one quantises the keys again. The bounds are the powers of two up to which a token's loss is moved at most 1.3
times as far as by the first move and back. Measured on SmolLM2: three novels, 400 tokens moved from λ 1 to YaRN ×4 and
back, 100 scored. The columns are the mean distance of a token's loss from that without a move, and the change of the
mean loss, both in nats:

    moves    1              4              16             64
    f16      0.058  0.00    0.062 +0.01    0.059 +0.01    0.058  0.00
    q8_0     0.011  0.00    0.012  0.00    0.014  0.00    0.025  0.00
    q5_1     0.082  0.00    0.107  0.00    0.163  0.00    0.989 +0.71
    q5_0     0.074 -0.01    0.092  0.00    0.130 +0.01    0.723 +0.42
    q4_1     0.156 -0.01    0.218  0.00    0.699 +0.31    4.44  +4.31
    q4_0     0.162 +0.03    0.198 +0.03    0.368 +0.08    3.66  +3.47

f16 has no bound, as its keys do not drift: any change of the last bit moves losses by 0.05 where llama.cpp rounds
activations to 8 bits; with `fast_prefill`, which does not, one move as well as four moves them by 0.0004.
"""


@dataclass(frozen=True)
class Span:
    """A part of the cached sequence, up to the next one's start."""

    start: int
    band: Band
    """The band that it was read in."""
    rotations: int = 0


def add_span(spans: tuple[Span, ...], start: int, band: Band) -> tuple[Span, ...]:
    """Return `spans` with the tokens from position `start` on just read in `band`."""
    spans = tuple(span for span in spans if span.start < start)
    same = bool(spans) and spans[-1].band is band and not spans[-1].rotations
    return spans if same else (*spans, Span(start, band))


def rotated(spans: tuple[Span, ...], times: int) -> tuple[Span, ...]:
    """Return `spans` after `times` rotations of all their keys."""
    return tuple(replace(span, rotations=span.rotations + times) for span in spans) if times else spans


def rotatable(spans: Sequence[Span], n_tokens: int, type_k: str) -> int:
    """Return how many of the first `n_tokens` keys, of cache type `type_k`, may be rotated once more."""
    most = MOST_ROTATIONS.get(type_k)
    return min([n_tokens, *(span.start for span in spans if most is not None and span.rotations >= most)])


def read_before(spans: Sequence[Span], n_tokens: int, bands: Sequence[Band]) -> int:
    """Return how many of the first `n_tokens` tokens come before those that were read in one of `bands`."""
    return min([n_tokens, *(span.start for span in spans if span.band in bands)])
