"""From logits to losses."""

from __future__ import annotations

from typing import Any

import numpy as np

Logits = np.ndarray[Any, np.dtype[np.float32]]
Losses = np.ndarray[Any, np.dtype[np.float64]]

CHUNK_ROWS = 256  # logits per step, so that their exponentials stay in the processor's cache


def negative_log_likelihood(logits: Logits, tokens: np.ndarray[Any, Any]) -> Losses:
    """Return ``-log softmax(logits)[token]`` of each row, shape ``(rows,)``, in nats."""
    parts = [
        _row_losses(logits[at : at + CHUNK_ROWS], tokens[at : at + CHUNK_ROWS])
        for at in range(0, len(logits), CHUNK_ROWS)
    ]
    return np.concatenate(parts)


def _row_losses(logits: Logits, tokens: np.ndarray[Any, Any]) -> Losses:
    peak = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - peak, dtype=np.float32).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return np.asarray(np.log(total) + peak[:, 0] - chosen, dtype=np.float64)


class _Targets:
    """Which of the next tokens' logits predict a token that is asked about.

    Args:
        tokens: the whole text.
        targets: ascending positions in it, at least 1.
        start: the position at which reading starts.
    """

    def __init__(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], start: int) -> None:
        self._tokens, self._before, self._at = tokens, targets - 1, start

    def rows(self, n: int) -> np.ndarray[Any, Any]:
        """Return those rows of the next `n` tokens whose logits are needed."""
        low, high = np.searchsorted(self._before, (self._at, self._at + n))
        return np.asarray(self._before[low:high] - self._at)


class Scored(_Targets):
    """The tokens of a text to score, and their losses, collected batch by batch."""

    def __init__(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], start: int) -> None:
        super().__init__(tokens, targets, start)
        self._parts: list[Losses] = []

    def take(self, n: int, rows: np.ndarray[Any, Any], logits: Logits) -> None:
        """Score the next `n` tokens, just read; `logits` are those of `rows`, shape ``(len(rows), vocabulary)``."""
        if len(rows):
            self._parts.append(negative_log_likelihood(logits, self._tokens[self._at + rows + 1]))
        self._at += n

    def losses(self) -> Losses:
        """Return the losses of all targets, in nats, shape ``(len(targets),)``."""
        return np.concatenate(self._parts)


class Predicted(_Targets):
    """The logits by which tokens of a text are predicted, collected batch by batch."""

    def __init__(self, tokens: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], start: int) -> None:
        super().__init__(tokens, targets, start)
        self._parts: list[Logits] = []

    def take(self, n: int, rows: np.ndarray[Any, Any], logits: Logits) -> None:
        """Keep a copy of the logits of `rows` of the next `n` tokens, just read."""
        if len(rows):
            self._parts.append(logits.copy())
        self._at += n

    def logits(self) -> Logits:
        """Return the logits before all targets, shape ``(len(targets), vocabulary)``."""
        return np.concatenate(self._parts)
