"""A pass key hidden in a long text: the text, and how well a model reads it under a schedule.

The sentence with the key is there twice, and its beginning stands at the end for the model to complete, which works
with small models that would not understand a question.
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
    """A text with a key in it, as a string and as tokens, with the tokens of the question and of the right answer.

    `text` starts with the tokens that the model expects before any text (BOS, or the chat template's).
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
    """A model's reading of the text: losses in nats by position, and its answer to the question for the key."""

    start: int
    losses: npt.NDArray[np.float64]
    """Losses of the tokens from position `start` on, the digits last; shape ``(n - start,)``."""
    n_digits: int
    answer: str
    seconds: float
    band_context: int

    @property
    def perplexity(self) -> float:
        """Perplexity of the text from `start` on, without the key's digits."""
        return math.exp(float(self.losses[: -self.n_digits].mean()))

    @property
    def key_loss(self) -> float:
        """Mean loss (nats) on the key's digits."""
        return float(self.losses[-self.n_digits :].mean())


def hide_key(llm: Llama, text: str, n_tokens: int, key: str) -> HiddenKey:
    """Cut `text` to about `n_tokens` tokens, as a user message, and hide `key` in its middle.

    Raises:
        UserError: the text is too short.
    """
    template = ChatTemplate(llm)
    tokens = llm.tokenize(text.encode(), add_bos=False)
    if len(tokens) < n_tokens:
        raise UserError(f"the text has {len(tokens):,} tokens, expected at least {n_tokens:,}")
    hidden = f"\n\n{OPENING} {key}. Remember it. {OPENING} {key}.\n\n"
    half = (n_tokens - len(llm.tokenize(hidden.encode(), add_bos=False))) // 2
    parts = (_text(llm, tokens[at : at + half]) for at in (0, half))
    body = hidden.join(parts)
    opening = template.opening([Message("user", body)])
    asked = template.tokens([Message("user", f"{body}\n\n{OPENING}")])
    answered = template.tokens([Message("user", f"{body}\n\n{OPENING} {key}.")])
    first, last = _answer(llm, asked, answered, key)
    text_end = llm.longest_token_prefix(opening, answered)
    return HiddenKey(
        key, body, tuple(answered[:text_end]), tuple(answered[text_end:first]), tuple(answered[first:last])
    )


def plant_key(llm: Llama, text_tokens: Sequence[int], key: str, depth: float) -> HiddenKey:
    """Hide `key` in a plain text, without a chat template, `depth` (0 to 1) of the way through it.

    Text, question and digits have as many tokens as `text_tokens` in total, besides those that the model expects before
    any text: the end of the text is cut to make room.

    Raises:
        UserError: the text is too short.
    """

    def tokens(text: str) -> list[int]:
        return list(llm.tokenize(text.encode(), add_bos=False))

    hidden = tokens(f"\n\n{OPENING} {key}. Remember it. {OPENING} {key}.\n\n")
    answered = tokens(f"\n\n{OPENING} {key}.")
    first, last = _answer(llm, tokens(f"\n\n{OPENING}"), answered, key)
    room = len(text_tokens) - len(hidden) - last
    if room < 1:
        raise UserError(f"the text has {len(text_tokens):,} tokens, expected more than {len(hidden) + last:,}")
    at = round(depth * room)
    text = (*text_tokens[:at], *hidden, *text_tokens[at:room])
    bos = llm.tokenize(b"", add_bos=True)
    return HiddenKey(key, _text(llm, text), (*bos, *text), tuple(answered[:first]), tuple(answered[first:last]))


def _answer(llm: Llama, asked: list[int], answered: list[int], key: str) -> tuple[int, int]:
    """Return where the key's digits start and end in `answered`, which starts like `asked`."""
    first = llm.longest_token_prefix(asked, answered)
    while not _text(llm, answered[first : first + 1]).strip():  # a separate token for the space is not the answer
        first += 1
    last = first + 1
    while not _text(llm, answered[first:last]).strip().startswith(key):
        last += 1
    return first, last


def _text(llm: Llama, tokens: Sequence[int]) -> str:
    return b"".join(piece(llm, token) for token in tokens).decode(errors="ignore")


def read_key(llm: Llama, hidden: HiddenKey, schedule: Schedule, start: int) -> KeyReading:
    """Have `llm` read the text under `schedule`, keep the losses from `start` on, and ask it for the key.

    Tokens that the cache holds already are not read again: their keys are rotated to the schedule's band.
    """
    started = time.perf_counter()
    llm.rewind(llm.longest_token_prefix(llm.tokens[:start].tolist(), hidden.tokens))
    llm.set_schedule(schedule)
    losses = llm.token_losses(hidden.tokens, start)
    band = llm.band
    asked = [*hidden.text, *hidden.question]
    max_tokens = min(len(hidden.digits) + 2, llm.n_ctx() - len(asked))
    answer: list[int] = []
    for token in llm.generate(asked, temp=0.0, repeat_penalty=1.0, top_k=1):
        answer.append(token)
        if len(answer) >= max_tokens or token == llm.token_eos():
            break
    return KeyReading(
        start=start,
        losses=losses,
        n_digits=len(hidden.digits),
        answer=_text(llm, answer).strip(),
        seconds=time.perf_counter() - started,
        band_context=band.context,
    )
