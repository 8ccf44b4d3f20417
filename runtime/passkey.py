"""A pass key hidden in a long text: the text, and what one model makes of it under one schedule.

The sentence that holds the key is said twice in the middle and asked for by its own beginning at the end, which small
models can follow where they would not understand a question.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..factors import Schedule

if TYPE_CHECKING:
    from .llama import Llama

OPENING = "The secret pass key of the vault is"


@dataclass(frozen=True)
class HiddenKey:
    """Token ids of a text with a key in its middle: `text`, then `question`, whose right answer is `digits`."""

    key: str
    text: tuple[int, ...]
    question: tuple[int, ...]
    digits: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        return [*self.text, *self.question, *self.digits]


@dataclass(frozen=True)
class Reading:
    """What a model made of the text: losses in nats by position, and what it said for the key."""

    start: int
    losses: npt.NDArray[np.float64]
    """Of the tokens from position `start` on, the digits last; shape ``(n - start,)``."""
    n_digits: int
    said: str
    seconds: float
    band_context: int

    @property
    def perplexity(self) -> float:
        """Over the text from `start` on, the key's digits left out."""
        return math.exp(float(self.losses[: -self.n_digits].mean()))

    @property
    def key_loss(self) -> float:
        """Mean loss (nats) on the key's digits."""
        return float(self.losses[-self.n_digits :].mean())


def hide_key(llm: Llama, text: str, n_tokens: int, key: str, head: str = "") -> HiddenKey:
    """Cut `text` to `n_tokens` tokens and hide `key` in its middle; `head` goes before it.

    Raises:
        UserError: the text is too short.
    """
    words = llm.tokenize(text.encode(), add_bos=False)
    if len(words) < n_tokens:
        raise UserError(f"the text has {len(words):,} tokens, expected at least {n_tokens:,}")
    sentence = f"\n\n{OPENING} {key}. Remember it. {OPENING} {key}.\n\n"
    hidden = llm.tokenize(sentence.encode(), add_bos=False)
    opening = llm.tokenize(head.encode(), add_bos=True, special=True)
    half = (n_tokens - len(hidden) - len(opening)) // 2
    body = [*opening, *words[:half], *hidden, *words[half : 2 * half]]
    asked = llm.tokenize(f"\n\n{OPENING}".encode(), add_bos=False)
    answered = llm.tokenize(f"\n\n{OPENING} {key}.".encode(), add_bos=False)
    # the answer's tokens are those that the key adds to the question, whatever they share of a space
    same = llm.longest_token_prefix(asked, answered)
    digits = llm.tokenize(key.encode(), add_bos=False)
    first = next((i for i in range(same, len(answered)) if answered[i : i + len(digits)] == digits), same)
    return HiddenKey(key, tuple(body), tuple(answered[:first]), tuple(answered[first : first + len(digits)]))


def read(llm: Llama, hidden: HiddenKey, schedule: Schedule, start: int) -> Reading:
    """Have `llm` read the text under `schedule`, keep the losses from `start` on, and ask it for the key.

    Tokens that the cache holds already are not read again: their keys are turned to the schedule's band.
    """
    began = time.perf_counter()
    llm.n_tokens = llm.longest_token_prefix(llm._input_ids[:start].tolist(), hidden.tokens)
    llm.set_schedule(schedule)
    losses = llm.token_losses(hidden.tokens, start)
    band = llm.band
    said = []
    for token in llm.generate([*hidden.text, *hidden.question], temp=0.0, repeat_penalty=1.0, top_k=1):
        said.append(token)
        if len(said) >= len(hidden.digits) + 2 or token == llm.token_eos():
            break
    return Reading(
        start=start,
        losses=losses,
        n_digits=len(hidden.digits),
        said=llm.detokenize(said).decode(errors="replace").strip(),
        seconds=time.perf_counter() - began,
        band_context=band.context,
    )
