"""Ropewalk: long context for local language models.

    import ropewalk
    llm = ropewalk.Llama("model-32k.gguf", n_ctx=0, kv="q8_0:f16")

`Llama` is `llama_cpp.Llama` made long; `Schedule` and `Band` are what it runs by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import UserError
    from .factors import Band, Schedule, extend, read_schedule, write_schedule
    from .runtime import Llama

__all__ = ["Band", "Llama", "Schedule", "UserError", "extend", "read_schedule", "write_schedule"]


def __getattr__(name: str) -> Any:
    # Imported on first use: llama_cpp and torch take seconds that `ropewalk --help` must not.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    home = {"Llama": ".runtime", "UserError": ".errors"}.get(name, ".factors")
    return getattr(import_module(home, __name__), name)
