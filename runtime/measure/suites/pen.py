"""Prompts as a model's tokens, put together piece by piece: their length is exact, and places in them are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....errors import UserError
from ...chat.answer import piece
from ...chat.template import ChatTemplate, Message

if TYPE_CHECKING:
    from ...llama import Llama


class Pen:
    """Writes prompts for one model: through its chat template, or as plain text for a model without one.

    Args:
        chat: whether to use the chat template; None = if there is one.

    Attributes:
        head, tail: the tokens before and after the user's message; the answer follows the tail.

    Raises:
        UserError: there is no chat template to use, or it fails.
    """

    def __init__(self, llm: Llama, chat: bool | None = None) -> None:
        self._llm = llm
        has_template = bool(llm.metadata.get("tokenizer.chat_template"))
        if chat and not has_template:
            raise UserError(f"{llm.model_path}: has no chat template, expected --no-chat")
        self.chat = has_template if chat is None else chat
        spaced, apart = self.tokens("one two"), [*self.tokens("one"), *self.tokens("two")]
        self._joint = "" if spaced == apart else " "  # some tokenisers put a space before every text by themselves
        self.head: list[int] = list(llm.tokenize(b"", add_bos=True))
        self.tail = self.tokens("\n")
        if self.chat:
            template = ChatTemplate(llm)
            first, second = (template.tokens([Message("user", text)]) for text in ("Q", "7"))
            self.head = first[: _same(first, second)]
            self.tail = first[len(first) - _same(first[::-1], second[::-1]) :]

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text that starts a line."""
        return list(self._llm.tokenize(text.encode(), add_bos=False))

    def after(self, text: str) -> list[int]:
        """The tokens of a text that follows another in the same line."""
        return self.tokens(self._joint + text)

    def text(self, tokens: list[int] | tuple[int, ...]) -> str:
        """What is written there; control tokens have no text."""
        return b"".join(piece(self._llm, token) for token in tokens).decode(errors="replace")

    def answer(self, opening: str, answer: str) -> tuple[list[int], list[int]]:
        """The tokens of an answer's opening, which the model gets, and of the rest, which it is to find."""
        whole, given = self.tokens(f"{opening} {answer}"), self.tokens(opening)
        at = _same(given, whole)
        while not self.text(whole[at : at + 1]).strip():  # a space alone is nothing to find
            at += 1
        return whole[:at], whole[at:]


def _same(first: list[int], second: list[int]) -> int:
    """How many tokens both start with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(first), len(second)))
