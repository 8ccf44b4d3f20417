"""The model's own chat templates for llama_cpp's chat completions, rendered within limits.

llama_cpp renders them in this process, where a hostile one may run for hours or fill the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from llama_cpp import StoppingCriteriaList
from llama_cpp.llama_chat_format import ChatFormatterResponse, chat_formatter_to_chat_completion_handler

from ...errors import UserError
from .rendering import KEY, render


def chat_handlers(metadata: Mapping[str, str], eos: tuple[int, str], bos: str) -> dict[str, Any]:
    """Return a handler for each chat template in a model's metadata, by the names that llama_cpp gives them.

    Args:
        eos: the token that ends an answer, and its text.
        bos: the text of the token that starts a prompt.
    """
    found = {}
    for key, template in metadata.items():
        if key == KEY or key.startswith(f"{KEY}."):
            name = "chat_template.default" if key == KEY else key.removeprefix("tokenizer.")
            found[name] = chat_formatter_to_chat_completion_handler(GuardedFormatter(template, eos, bos))
    return found


class GuardedFormatter:
    """llama_cpp's formatter for a template, except that the template runs within limits."""

    def __init__(self, template: str, eos: tuple[int, str], bos: str) -> None:
        self._template, self._bos = template, bos
        self._eos_id, self._eos = eos

    def __call__(self, *, messages: list[Any], **variables: Any) -> ChatFormatterResponse:
        """Return the prompt for `messages`.

        Raises:
            TemplateError: a UserError: the template does not take them, or exceeds a limit.
            UserError: a variable is of a kind that JSON does not have.
        """
        given = {"messages": messages, "eos_token": self._eos, "bos_token": self._bos, **variables}
        try:
            prompt = render(self._template, given, datetime.now())
        except TypeError as error:
            raise UserError(f"create_chat_completion: {error}: templates take what JSON can hold") from None
        return ChatFormatterResponse(
            prompt=prompt,
            stop=[self._eos],
            stopping_criteria=StoppingCriteriaList([lambda tokens, logits: tokens[-1] == self._eos_id]),
            added_special=True,
        )
