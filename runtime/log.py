"""llama.cpp's log: printed when verbose; otherwise only its errors are kept, for the one-line error message.

llama-cpp-python's own handler mistakes ggml's levels for older ones: it prints warnings as errors and drops errors.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections import deque
from typing import Any

import llama_cpp
from llama_cpp._logger import llama_log_callback

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
    """Take over llama.cpp's log from llama-cpp-python, and forget earlier errors; a user's own callback stays."""
    current, data = llama_cpp.llama_log_callback(0), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(current), ctypes.byref(data))
    if _address(current) == _address(llama_log_callback):
        llama_cpp.llama_log_set(_listen, None)
    _errors.clear()


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


def first_error(otherwise: str) -> str:
    """Return the first error since `listen`, which is the one nearest to the cause, or `otherwise`."""
    line = next(iter(_errors), otherwise)
    return line.split(": ", 1)[-1] if line.split(": ", 1)[0].isidentifier() else line
