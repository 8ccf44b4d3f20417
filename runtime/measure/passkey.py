"""A pass key hidden in a long text: the text, and what one model makes of it under one schedule.

The sentence that holds the key is said twice in the middle and asked for by its own beginning at the end, which small
models can follow where they would not understand a question.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...factors import Schedule
from ..chat.answer import piece
from ..chat.template import ChatTemplate, Message

if TYPE_CHECKING:
    from ..llama import Llama

OPENING = "The secret pass key of the vault is"


@dataclass(frozen=True)
class HiddenKey:
    """A text with a key in it: a string, and token ids of it, of the question, and of the right answer.

    `text` begins with what the model wants before any text.
    """

    key: str
    body: str
    text: tuple[int, ...]
    question: tuple[int, ...]
    digits: tuple[int, ...]

    @property
    def tokens(self) -> list[int]:
        return [*self.text, *self.question, *self.digits]


@dataclass(frozen=True)
class KeyReading:
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


def hide_key(llm: Llama, text: str, n_tokens: int, key: str) -> HiddenKey:
    """Cut `text` to about `n_tokens` tokens, as a user's message, and hide `key` in its middle.

    Raises:
        UserError: the text is too short.
    """
    template = ChatTemplate(llm)
    words = llm.tokenize(text.encode(), add_bos=False)
    if len(words) < n_tokens:
        raise UserError(f"the text has {len(words):,} tokens, expected at least {n_tokens:,}")
    hidden = f"\n\n{OPENING} {key}. Remember it. {OPENING} {key}.\n\n"
    half = (n_tokens - len(llm.tokenize(hidden.encode(), add_bos=False))) // 2
    parts = (_text(llm, words[at : at + half]) for at in (0, half))
    body = hidden.join(parts)
    begun = template.opening([Message("user", body)])
    asked = template.tokens([Message("user", f"{body}\n\n{OPENING}")])
    answered = template.tokens([Message("user", f"{body}\n\n{OPENING} {key}.")])
    first, last = _answer(llm, asked, answered, key)
    text_end = llm.longest_token_prefix(begun, answered)
    return HiddenKey(
        key, body, tuple(answered[:text_end]), tuple(answered[text_end:first]), tuple(answered[first:last])
    )


def plant_key(llm: Llama, words: Sequence[int], key: str, depth: float) -> HiddenKey:
    """Hide `key` in a plain text of tokens, without a chat's template, `depth` (0 to 1) of the way through it.

    Text, question and digits take as many tokens as `words` in all, beside what the model wants before any text; the
    text's end gives way to them.

    Raises:
        UserError: the text is too short.
    """

    def tokens(text: str) -> list[int]:
        return list(llm.tokenize(text.encode(), add_bos=False))

    hidden = tokens(f"\n\n{OPENING} {key}. Remember it. {OPENING} {key}.\n\n")
    answered = tokens(f"\n\n{OPENING} {key}.")
    first, last = _answer(llm, tokens(f"\n\n{OPENING}"), answered, key)
    room = len(words) - len(hidden) - last
    if room < 1:
        raise UserError(f"the text has {len(words):,} tokens, expected more than {len(hidden) + last:,}")
    at = round(depth * room)
    text = (*words[:at], *hidden, *words[at:room])
    begin = llm.tokenize(b"", add_bos=True)
    return HiddenKey(key, _text(llm, text), (*begin, *text), tuple(answered[:first]), tuple(answered[first:last]))


def _answer(llm: Llama, asked: list[int], answered: list[int], key: str) -> tuple[int, int]:
    """Where the key's digits are in `answered`, which begins as `asked` does."""
    first = llm.longest_token_prefix(asked, answered)
    while not _text(llm, answered[first : first + 1]).strip():  # a space that is a token of its own is not the answer
        first += 1
    last = first + 1
    while not _text(llm, answered[first:last]).strip().startswith(key):
        last += 1
    return first, last


def _text(llm: Llama, tokens: Sequence[int]) -> str:
    return b"".join(piece(llm, token) for token in tokens).decode(errors="ignore")


def read(llm: Llama, hidden: HiddenKey, schedule: Schedule, start: int) -> KeyReading:
    """Have `llm` read the text under `schedule`, keep the losses from `start` on, and ask it for the key.

    Tokens that the cache holds already are not read again: their keys are turned to the schedule's band.
    """
    began = time.perf_counter()
    llm.rewind(llm.longest_token_prefix(llm.tokens[:start].tolist(), hidden.tokens))
    llm.set_schedule(schedule)
    losses = llm.token_losses(hidden.tokens, start)
    band = llm.band
    asked = [*hidden.text, *hidden.question]
    most = min(len(hidden.digits) + 2, llm.n_ctx() - len(asked))
    said: list[int] = []
    for token in llm.generate(asked, temp=0.0, repeat_penalty=1.0, top_k=1):
        said.append(token)
        if len(said) >= most or token == llm.token_eos():
            break
    return KeyReading(
        start=start,
        losses=losses,
        n_digits=len(hidden.digits),
        said=_text(llm, said).strip(),
        seconds=time.perf_counter() - began,
        band_context=band.context,
    )
