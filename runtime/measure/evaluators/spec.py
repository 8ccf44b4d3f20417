"""The specification of an evaluator, as data: the model's file, the passages, and how to read them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from ....container import model_digest
from ....factors import Band
from ..passages import Passage, digest

WINDOW = 1024

VERSION = 4  # increase it when the same band would give another loss than before

Kind = Literal["llama", "torch"]


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that an evaluator is created from.

    Attributes:
        base: the band in which screening reads the tokens before the window.
        kind: which evaluator.
        window: tokens at a passage's end that screening reads; 0 = no screening.
        kv: cache type for llama.cpp.
        threads: CPU threads; None = the machine's cores.
    """

    model: str
    passages: tuple[Passage, ...]
    base: Band
    kind: Kind = "llama"
    window: int = WINDOW
    kv: str = "f16"
    threads: int | None = None

    @property
    def key(self) -> str:
        """A digest of all that a loss depends on besides the band; threads are not part of it."""
        base = self.base.model_dump_json(exclude={"found", "plain"})
        kv = self.kv if self.kind == "llama" else None
        parts = (VERSION, model_digest(self.model), digest(self.passages), base, self.kind, self.window, kv)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def is_base(self, band: Band) -> bool:
        """Whether `band` reads a text exactly as the base band does."""
        facts = ("near_tokens", "rescale_factors", "start_tokens", "attention_factor")
        return all(getattr(band, name) == getattr(self.base, name) for name in facts)

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each passage: all are equal."""
        return (1.0,) * len(self.passages)
