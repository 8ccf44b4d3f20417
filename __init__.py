"""Ropewalk: long context for local language models.

    import ropewalk
    llm = ropewalk.Llama("model-32k.gguf", n_ctx=0, kv="q8_0:f16")

`Llama` is `llama_cpp.Llama` with a longer context; its rescale factors are in the `Band`s of a `Schedule`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .convert import convert_checkpoint, convert_model
    from .errors import UserError
    from .factors import Band, Schedule, extend, read_schedule, write_schedule
    from .runtime import Llama
    from .runtime.chat import Conversation, Sampling, Summarizer
    from .runtime.measure import SearchPlan, Text, search_schedule

_MODULES = {
    ".convert": ("convert_checkpoint", "convert_model"),
    ".errors": ("UserError",),
    ".factors": ("Band", "Schedule", "extend", "read_schedule", "write_schedule"),
    ".runtime": ("Llama",),
    ".runtime.chat": ("Conversation", "Sampling", "Summarizer"),
    ".runtime.measure": ("SearchPlan", "Text", "search_schedule"),
}

__all__ = [
    "Band",
    "Conversation",
    "Llama",
    "Sampling",
    "Schedule",
    "SearchPlan",
    "Summarizer",
    "Text",
    "UserError",
    "convert_checkpoint",
    "convert_model",
    "extend",
    "read_schedule",
    "search_schedule",
    "write_schedule",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: llama_cpp and torch take seconds to import, which `ropewalk --help` must not.
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
