"""The GGUF file: its head, read with bounds; what it says of its RoPE; the schedule it carries."""

from .facts import (
    ARCHITECTURES_WITHOUT_ROPE,
    NATIVE_FACTOR_ARCHITECTURES,
    freq_scale,
    native_schedule,
    rope_facts,
)
from .header import Entry, GGUFError, Header, Tensor, read_header
from .schedule_keys import PREFIX, embedded_schedule, schedule_entries, schedule_of

__all__ = [
    "ARCHITECTURES_WITHOUT_ROPE",
    "NATIVE_FACTOR_ARCHITECTURES",
    "PREFIX",
    "Entry",
    "GGUFError",
    "Header",
    "Tensor",
    "embedded_schedule",
    "freq_scale",
    "native_schedule",
    "read_header",
    "rope_facts",
    "schedule_entries",
    "schedule_of",
]
