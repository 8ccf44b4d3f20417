"""A progress bar for what a model reads."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from .terminal import progress

if TYPE_CHECKING:
    from ..runtime import Llama

LEAST_BAR = 1024  # tokens; what is read faster than one looks needs no bar


class ReadingBar:
    """A bar for what `llm` reads meanwhile, from the moment that it turns out to be long; `close` removes it early."""

    def __init__(self, llm: Llama, label: str) -> None:
        self._llm, self._label = llm, label
        self._stack = ExitStack()
        self._advance: Callable[[int, int], None] | None = None

    def __enter__(self) -> ReadingBar:
        self._llm.on_progress = self.show
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def show(self, done: int, total: int) -> None:
        """The callback: so many of so many tokens are read."""
        if self._advance is None:
            if total < LEAST_BAR:
                return
            self._advance = self._stack.enter_context(progress(self._label))
        self._advance(done, total)

    def close(self) -> None:
        self._llm.on_progress = None
        self._stack.close()
        self._advance = None
