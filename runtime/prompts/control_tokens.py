"""Spellings of control tokens in a text: cut in two, so that the tokeniser reads the characters and not the token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import llama_cpp

CUT = "\ufdd0"  # a code point that no text may contain; `Llama.tokenize` splits there
CUT_BYTES = CUT.encode()

CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN


class ControlSpellings:
    """The spellings of one model's control tokens; `vocab` is llama.cpp's vocabulary."""

    def __init__(self, vocab: Any) -> None:
        texts = {
            text_of(vocab, token)
            for token in range(llama_cpp.llama_vocab_n_tokens(vocab))
            if llama_cpp.llama_vocab_get_attr(vocab, token) & CONTROL
        }
        longest_first: list[Any] = sorted((re.escape(text) for text in texts if len(text) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(longest_first) or r"(?!)")

    def cut(self, text: str) -> str:
        """Return the text with `CUT` inside each spelling."""
        return self._pattern.sub(lambda found: f"{found[0][0]}{CUT}{found[0][1:]}", text.replace(CUT, ""))

    def cut_messages(self, messages: Sequence[Any]) -> list[Any]:
        """Return chat messages, as dicts of OpenAI's form, with their texts cut."""
        return [self._message(message) for message in messages]

    def _message(self, message: Any) -> Any:
        if not isinstance(message, Mapping):
            return message
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self.cut(content)}
        if isinstance(content, list):
            return {**message, "content": [self._part(part) for part in content]}
        return message

    def _part(self, part: Any) -> Any:
        text = part.get("text") if isinstance(part, Mapping) else None
        return {**part, "text": self.cut(text)} if isinstance(text, str) else part


def text_of(vocab: Any, token: int) -> str:
    """Return a token's entry in the vocabulary, unmodified."""
    text: bytes = llama_cpp.llama_vocab_get_text(vocab, token)
    return text.decode("utf-8", "replace")
