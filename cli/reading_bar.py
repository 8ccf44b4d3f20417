"""A progress bar for the reading of prompts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from .terminal import plain, progress

if TYPE_CHECKING:
    from ..runtime import Llama

MIN_TOKENS = 1024  # a shorter prompt is read before one could look at a bar


class ReadingBar:
    """A bar that appears when `llm` reads a long prompt while the block runs; `close` removes it early."""

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
        """Show that `done` of `total` tokens have been read; the callback for `Llama.on_progress`."""
        if self._advance is None:
            if total < MIN_TOKENS:
                return
            self._advance = self._stack.enter_context(progress(plain(self._label)))
        self._advance(done, total)

    def close(self) -> None:
        self._llm.on_progress = None
        self._stack.close()
        self._advance = None
