"""λ as data and mathematics: the rescale schedule and the methods that compute one. No llama.cpp here."""

from .methods import (
    METHODS,
    doubling_contexts,
    dynamic_ntk,
    extend,
    longrope_attention_factor,
    ntk,
    pi,
    yarn,
    yarn_attention_factor,
)
from .schedule import (
    FORMAT_VERSION,
    START_TOKENS,
    Band,
    Provenance,
    RopeFacts,
    Schedule,
    ScheduleError,
    check_matches,
    native_band,
    read_schedule,
    schedule_from_dict,
    write_schedule,
)
from .shipped import shipped_file, shipped_schedule

__all__ = [
    "FORMAT_VERSION",
    "METHODS",
    "START_TOKENS",
    "Band",
    "Provenance",
    "RopeFacts",
    "Schedule",
    "ScheduleError",
    "check_matches",
    "doubling_contexts",
    "dynamic_ntk",
    "extend",
    "longrope_attention_factor",
    "native_band",
    "ntk",
    "pi",
    "read_schedule",
    "schedule_from_dict",
    "shipped_file",
    "shipped_schedule",
    "write_schedule",
    "yarn",
    "yarn_attention_factor",
]
