"""Messages → prompt tokens, in the format that the model was trained on.

The model's own chat template formats them; a model without one gets plain `User:` and `Assistant:` lines. The text of
messages is never read as the template's control tokens: a document that contains `<|im_end|>` is read as those
characters. The same messages give the same tokens on any day, so that a cached prefix stays valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Literal

import llama_cpp

from ...errors import UserError
from ..prompts.control_tokens import CUT, ControlSpellings, text_of
from ..prompts.rendering import TemplateError, render

if TYPE_CHECKING:
    from ...container import Header
    from ..llama import Llama

PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role != 'system' %}{{ message.role | capitalize }}: {% endif %}{{ message.content }}\n\n"
    "{% endfor %}Assistant:"
)
PLAIN_STOPS = ("\nUser:", "\nAssistant:")

SPARE_TOKENS = 64  # for control tokens, and what else a template adds

EXACT_CHARACTERS = 1 << 20  # longer texts are counted in pieces, so that Ctrl-C takes effect between them


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str
    question_at: int = 0
    """Where the question starts in the content, after the documents that it is about."""


class ChatTemplate:
    """The format of one model's prompts.

    Args:
        llm: the model; its template, vocabulary and tokeniser are used.
        today: the date for templates that name it.

    Attributes:
        stops: texts that end an answer, besides the model's own end tokens.
    """

    def __init__(self, llm: Llama, today: date | None = None) -> None:
        self._llm = llm
        self._today = today or date.today()
        template = llm.metadata.get("tokenizer.chat_template")
        self.stops: tuple[str, ...] = () if template else PLAIN_STOPS
        self._template = template or PLAIN_TEMPLATE
        self._specials = {"eos_token": self._text(llm.token_eos()), "bos_token": self._text(llm.token_bos())}
        self._control = ControlSpellings(llm.vocab)

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt that asks the model for the message after these.

        Raises:
            UserError: the model's template does not accept such messages.
        """
        guarded = [{"role": message.role, "content": self._control.cut(message.content)} for message in messages]
        pieces = self._render(guarded).split(CUT)
        tokens = [
            token
            for piece in pieces
            for token in self._llm.tokenize(piece.encode("utf-8", "replace"), add_bos=False, special=True)
        ]
        bos = self._llm.token_bos()
        if llama_cpp.llama_vocab_get_add_bos(self._llm.vocab) and bos != -1 and tokens[:1] != [bos]:
            tokens.insert(0, bos)
        return tokens

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens that stay the same when any new paragraph is appended to the last message."""
        *before, last = messages
        first, second = (
            self.tokens([*before, Message(last.role, f"{last.content}\n\n{word}")]) for word in ("What", "In")
        )
        return first[: self._llm.longest_token_prefix(first, second)]

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            # A reasoning model's thoughts would be taken for the answer.
            variables = {"messages": messages, "enable_thinking": False, **self._specials}
            return render(self._template, variables, self._today)
        except TemplateError as error:
            if not error.hopeless and len(messages) > 1 and messages[0]["role"] == "system":  # some have no system role
                system, first, *rest = messages
                return self._render([{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest])
            raise UserError(f"{self._llm.model_path}: its chat template fails: {error}") from None

    def _text(self, token: int) -> str:
        return "" if token == -1 else text_of(self._llm.vocab, token)


def most_tokens(header: Header, *texts: str) -> int:
    """Return how many tokens a prompt of these texts takes at most, before the model is loaded.

    That is one for each byte of theirs and of the chat template, which may have a system message of its own. Some
    tokenisers can make more of a text: `Conversation.prompt_tokens` tells.
    """
    template = str(header.get("tokenizer.chat_template") or PLAIN_TEMPLATE)
    return sum(len(text.encode("utf-8", "replace")) for text in (template, *texts)) + SPARE_TOKENS


def count_tokens(llm: Llama, text: str) -> int:
    """Return the number of tokens of `text` alone; for a very long one, the sum over its pieces."""
    pieces = (text[i : i + EXACT_CHARACTERS] for i in range(0, len(text), EXACT_CHARACTERS))
    return sum(len(llm.tokenize(piece.encode("utf-8", "replace"), add_bos=False, special=False)) for piece in pieces)
