"""llama.cpp's log: all of it when verbose; otherwise its errors are kept, for the one line that says what went wrong.

llama-cpp-python's own handler mistakes ggml's levels for older ones: it prints warnings as errors and drops errors.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from typing import Any

import llama_cpp

ERROR, CONTINUED = 4, 5  # GGML_LOG_LEVEL_ERROR, GGML_LOG_LEVEL_CONT in ggml.h

_logger = logging.getLogger("llama-cpp-python")  # llama_cpp sets its level by `verbose`
_errors: deque[str] = deque(maxlen=8)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _listen(level: int, text: bytes, _: Any) -> None:
    line = text.decode("utf-8", "replace")
    if _logger.level <= logging.DEBUG:
        print(line, end="", flush=True, file=sys.stderr)
    elif level == ERROR:
        _errors.append(line.strip())


def listen() -> None:
    """Take llama.cpp's log over, and forget the errors so far."""
    llama_cpp.llama_log_set(_listen, None)
    _errors.clear()


def first_error(otherwise: str) -> str:
    """The first error since `listen`, which is the one nearest to the cause."""
    line = next(iter(_errors), otherwise)
    return line.split(": ", 1)[-1] if line.split(": ", 1)[0].isidentifier() else line
