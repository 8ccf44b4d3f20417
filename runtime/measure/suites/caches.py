"""What a quantised KV cache costs: how far the model's predictions are from those with an f16 cache, on one text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from ....errors import UserError
from ....factors import Band
from ...losses import Logits, Losses
from .asking import band_key
from .journal import Journal

if TYPE_CHECKING:
    from ...llama import Llama

VERSION = 1
"""Increase it when the same text would give other numbers than before."""

EXACT = "f16"

SCORED = 512
"""How many tokens at the text's end are predicted, if it is twice as long; otherwise its second half is."""

CHUNK = 64  # rows whose probabilities are computed at a time


@dataclass(frozen=True)
class CacheLoss:
    """The Kullback–Leibler divergence (nats per token) of predictions over a cache type from those over f16.

    Attributes:
        mean, p99: its mean, and its 99th percentile.
        same: the share of tokens for which both expect the same token most.
    """

    kv_type: str
    mean: float
    p99: float
    same: float


def cache_losses(
    load: Callable[[str], Llama],
    tokens: Sequence[int],
    band: Band,
    kv_types: Sequence[str],
    journal: Journal,
    model: str,
    advance: Callable[[int, int], None],
) -> list[CacheLoss]:
    """Measure cache types on a text, read in `band`.

    Args:
        load: loads the model with a cache type, to read in that band.
        model: a digest of the model.

    Raises:
        UserError: as `load`.
    """
    keys = {
        kv: hashlib.sha256(repr((VERSION, SCORED, model, band_key(band), tuple(tokens), kv)).encode()).hexdigest()[:24]
        for kv in kv_types
    }
    expected: Logits | None = None
    found = []
    for i, kv in enumerate(kv_types):
        known = journal.find(keys[kv])
        if known is None:
            expected = _logits(load, EXACT, tokens) if expected is None else expected
            asked = {"cache": kv, "tokens": len(tokens)}
            known = journal.add(keys[kv], asked, asdict(_compared(kv, expected, _logits(load, kv, tokens))))
        try:
            found.append(CacheLoss(kv, float(known["mean"]), float(known["p99"]), float(known["same"])))
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{journal.path}: {keys[kv]}: is not a comparison of cache types") from None
        advance(i + 1, len(kv_types))
    return found


def _logits(load: Callable[[str], Llama], kv: str, tokens: Sequence[int]) -> Logits:
    with closing(load(kv)) as llm:
        return llm.token_logits(tokens, len(tokens) - min(SCORED, len(tokens) // 2))


def _compared(kv: str, expected: Logits, found: Logits) -> CacheLoss:
    losses = divergence(expected, found)
    same = float((expected.argmax(axis=1) == found.argmax(axis=1)).mean())
    return CacheLoss(kv, float(losses.mean()), float(np.percentile(losses, 99)), same)


def divergence(expected: Logits, found: Logits) -> Losses:
    """The Kullback–Leibler divergence of each row of `found` from that of `expected`, in nats, shape ``(rows,)``."""
    parts = [_rows(expected[at : at + CHUNK], found[at : at + CHUNK]) for at in range(0, len(expected), CHUNK)]
    return np.concatenate(parts)


def _rows(expected: Logits, found: Logits) -> Losses:
    ours, theirs = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return np.asarray((np.exp(ours) * (ours - theirs)).sum(axis=1))


def _log_softmax(logits: Losses) -> Losses:
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
