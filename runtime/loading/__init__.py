"""What is decided and checked before a model is loaded: options, schedule, and what llama.cpp would abort at."""

from .loadable import alphabet_of, check_loadable, check_special_tokens
from .options import (
    ROPE_OPTIONS,
    WeightsKey,
    check_context,
    context_length,
    has_cells,
    import_torch,
    keys_can_shift,
    leave_out_gpu,
    resolve_schedule,
    take_overrides,
    thread_count,
    whole_number,
)

__all__ = [
    "ROPE_OPTIONS",
    "WeightsKey",
    "alphabet_of",
    "check_context",
    "check_loadable",
    "check_special_tokens",
    "context_length",
    "has_cells",
    "import_torch",
    "keys_can_shift",
    "leave_out_gpu",
    "resolve_schedule",
    "take_overrides",
    "thread_count",
    "whole_number",
]
