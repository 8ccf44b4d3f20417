"""What an evaluator of the search is made from, as data: the model's file, the passages, and how to read them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

from ....container import model_digest
from ....factors import Band
from ..passages import Passage, digest

WINDOW = 1024

VERSION = 3  # raise it when the same band would be read to another loss than before

Kind = Literal["llama", "torch"]


@dataclass(frozen=True)
class EvaluatorSpec:
    """All that an evaluator is made from.

    Attributes:
        kind: what reads.
        base: the band in which screening reads what lies before the window.
        window: tokens at a passage's end that screening reads; 0 = nothing will be screened.
        kv: cache type of llama.cpp's evaluator.
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
        """A digest of all that a loss depends on beside the band; threads are not of it."""
        base = self.base.model_dump_json(exclude={"found"})
        kv = self.kv if self.kind == "llama" else None
        parts = (VERSION, model_digest(self.model), digest(self.passages), base, self.kind, self.window, kv)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def is_base(self, band: Band) -> bool:
        """Whether a text is read in `band` as it is in the base band."""
        facts = ("rescale_factors", "start_tokens", "attention_factor")
        return all(getattr(band, name) == getattr(self.base, name) for name in facts)

    @property
    def weights(self) -> tuple[float, ...]:
        """How much each passage counts: all the same."""
        return (1.0,) * len(self.passages)
