"""From logits to losses."""

from __future__ import annotations

from typing import Any

import numpy as np


def negative_log_likelihood(
    logits: np.ndarray[Any, np.dtype[np.float32]], tokens: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``-log softmax(logits)[token]`` of each row, shape ``(rows,)``, in nats."""
    peak = logits.max(axis=1, keepdims=True)
    total = np.exp(logits - peak, dtype=np.float32).sum(axis=1, dtype=np.float64)
    chosen = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return np.asarray(np.log(total) + peak[:, 0] - chosen, dtype=np.float64)
